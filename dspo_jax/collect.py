"""Collects people's preferences on a local web page, blind: which of two images is better, or in what order.

    python -m dspo_jax.collect --images eval/images/base --images eval/images/mine --out votes.sqlite

The page shows a prompt with the images of two models, of one model's seeds, or of a pairs.jsonl, and takes
left, right, tie, skip and undo by mouse, touch and keys. Ctrl-C ends the server; the same command goes on.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dspo_jax import cli

_LOCAL = ("127.0.0.1", "localhost", "::1")


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    from dspo_jax.errors import UserError
    from dspo_jax.locks import reserve
    from dspo_jax.people.groups import read_checks, read_groups
    from dspo_jax.people.questions import read_questions
    from dspo_jax.people.votes import Plan, create

    try:
        from dspo_jax.people.server import make_app
        from dspo_jax.people.serving import listen, serve
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("dspo_jax"):
            raise
        raise UserError(f"{error.name} is not installed: pip install 'dspo_jax[people]'") from error

    del argv
    values = flags.FLAGS
    plan = Plan(
        questions=read_questions(values.questions),
        seed=values.seed,
        repeat_share=values.repeat_share,
        check_share=values.check_share,
        votes_per_group=values.votes_per_group,
    )
    out = Path(values.out)
    with reserve(out):
        groups = read_groups(values.images, rank=values.rank, allow_outside=values.allow_outside)
        checks = read_checks(values.checks, allow_outside=values.allow_outside)
        store = create(out, plan, [*groups, *checks])
        token = None if values.host in _LOCAL else store.link_token
        listener = listen(values.host, values.port)
        address = f"[{values.host}]" if ":" in values.host else values.host
        query = "" if token is None else f"?token={token}"
        print(
            f"{len(groups):,} groups of images, {len(checks):,} attention checks, "
            f"{len(store.votes()):,} votes so far"
        )
        print(f"http://{address}:{listener.getsockname()[1]}/{query} (Ctrl-C ends it)", flush=True)
        try:
            serve(make_app(store, token=token, allow_outside=values.allow_outside), listener)
        finally:
            listener.close()
            print(f"{out}: {len(store.votes()):,} votes by {len(store.people()):,} people")
            store.close()


def run() -> None:
    """Defines the flags and runs the command."""
    flags.DEFINE_multi_string(
        "images",
        None,
        "DIR or NAME=DIR: what sample wrote, or a folder with metadata.jsonl or pairs.jsonl; may be "
        "repeated.",
    )
    flags.DEFINE_string("out", None, "File of votes (SQLite); the same command goes on with it.")
    flags.DEFINE_list(
        "questions",
        ["general"],
        "general, appeal, alignment, or NAME=TEXT of your own, separated by commas; all are asked each time.",
    )
    flags.DEFINE_bool("rank", False, "All images of a prompt are put in order, in place of two compared.")
    flags.DEFINE_string("checks", None, "Folder whose pairs.jsonl has known answers: attention checks.")
    flags.DEFINE_float("check_share", 0.05, "Of what a person sees, the share of attention checks.")
    flags.DEFINE_float("repeat_share", 0.05, "Of what a person sees, the share that is shown a second time.")
    flags.DEFINE_integer("votes_per_group", 0, "People who judge each group of images; 0: everybody all.")
    flags.DEFINE_integer("seed", 0, "Of order, sides, repetitions and checks.")
    flags.DEFINE_string(
        "host", "127.0.0.1", "Address to listen to; others than this machine need the link's token."
    )
    flags.DEFINE_integer("port", 8765, "Port to listen to; 0 is any.")
    flags.DEFINE_bool(
        "allow_outside", False, "Whether images may lie outside their folder, by a link or '..'."
    )
    cli.run(main, required=("images", "out"))


if __name__ == "__main__":
    run()
