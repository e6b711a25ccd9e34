"""Uploads what was exported to the model hub."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspo_jax.errors import UserError
from dspo_jax.hub_cache import is_hub_id, split_hub_id

_LOGIN = "set HF_TOKEN, or log in with: hf auth login"


def check_upload(repository: str) -> None:
    """Refuses an upload that cannot succeed, before anything is exported; asks nobody.

    Args:
      repository: id of the repository, `owner/name`.

    Raises:
      UserError: it is no such id, or there is no token of the model hub.
    """
    import huggingface_hub  # slow to import, and needed here only

    if not is_hub_id(repository) or split_hub_id(repository)[1]:
        raise UserError(
            f"--push_to_hub={repository}: is not the id of a repository; write owner/name, of which no file "
            "or folder may be here"
        )
    if huggingface_hub.get_token() is None:
        raise UserError(f"--push_to_hub={repository}: there is no token of the model hub; {_LOGIN}")


def push_to_hub(out: Path, repository: str, *, public: bool) -> str:
    """Uploads an exported model in one commit; the repository is made if need be.

    The token is what huggingface_hub finds: the environment variable HF_TOKEN, or that of a login.

    Args:
      out: a folder, or a file with its card beside it as NAME.md, which becomes README.md.
      repository: id of the repository, `owner/name`.
      public: whether everybody may see it. One that exists must be so already.

    Returns:
      The address of the repository.

    Raises:
      UserError: the token is not valid or gives no right to write there, or the repository is public where
        it should be private, or the other way round.
      OSError: the hub cannot be reached or refuses the files.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    api = huggingface_hub.HfApi()
    files = {str(file.relative_to(out)): file for file in sorted(out.rglob("*")) if file.is_file()}
    if out.is_file():
        files = {out.name: out, "README.md": out.with_suffix(".md")}
    key = f"--push_to_hub={repository}"
    later = f"{out} stays; to upload it later: {_command(files, out, repository, public=public)}"
    # What the HTTP library raises where there is no answer: another one in each major version of the hub's.
    unanswered: Any = HfHubHTTPError.__bases__
    try:
        if not api.repo_exists(repository):
            api.create_repo(repository, private=not public)
        elif bool(api.model_info(repository).private) == public:
            now, asked = ("private", "public") if public else ("public", "private")
            fix = "leave out --public" if public else "give --public"
            raise UserError(
                f"{key}: is there already and is {now}, not {asked}; {fix}, change it in its settings, or "
                f"name another. {later}"
            )
        api.create_commit(
            repository,
            [huggingface_hub.CommitOperationAdd(name, str(file)) for name, file in files.items()],
            commit_message="Upload a model exported by dspo_jax",
        )
    except (OSError, RuntimeError, *unanswered) as error:  # RuntimeError: of the upload of large files
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            raise UserError(f"{key}: the hub does not know the token; {_LOGIN}. {later}") from None
        if status in (403, 409):
            raise UserError(
                f"{key}: the token gives no right to write there; take one with the role write, and a "
                f"repository of yours or of an organisation of yours. {later}"
            ) from None
        reason = _reason(error, huggingface_hub.get_token())
        raise OSError(f"{key}: not uploaded ({reason}). {later}") from None
    return f"{api.endpoint}/{repository}"


def _reason(error: Exception, token: str | None) -> str:
    """Returns the first line of an error, without the token should it be there."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    text = f"{type(error).__name__}: {line}"
    return text.replace(token, "...") if token else text


def _command(files: Mapping[str, Path], out: Path, repository: str, *, public: bool) -> str:
    """Returns what uploads the files in a shell."""
    private = "" if public else " --private"
    if out.is_dir():
        return f"hf upload {repository} {shlex.quote(str(out))} .{private}"
    return " && ".join(
        f"hf upload {repository} {shlex.quote(str(file))} {shlex.quote(name)}{private}"
        for name, file in files.items()
    )
