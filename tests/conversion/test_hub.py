"""What is uploaded to the model hub and how it is refused, without the hub; what a file's header says."""

import json
from types import SimpleNamespace

import huggingface_hub
import jax.numpy as jnp
import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError
from model_folders import make_run, refused
from PIL import Image
from safetensors import safe_open
from tables import each_row

from dspo_jax.conversion.export_model import export
from dspo_jax.conversion.hub import check_upload, push_to_hub
from dspo_jax.weights.checkpoints import Checkpoints

TOKEN = "hf_secret"


def answer(status):
    """The error of a hub that answers so."""
    response = SimpleNamespace(headers={}, status_code=status, request=None)
    return HfHubHTTPError(f"{status} for {TOKEN}\nRequest ID: 1", response=response)


class Hub:
    """An `HfApi` of one repository: None where it is absent, or whether it is private."""

    endpoint = "https://hub"

    def __init__(self, private=None, fails=None):
        self.private, self.fails = private, fails or {}
        self.calls, self.files = [], {}

    def __call__(self):
        return self

    def _call(self, name):
        self.calls.append(name)
        if name in self.fails:
            raise self.fails[name]

    def repo_exists(self, repo_id):
        self._call("repo_exists")
        return self.private is not None

    def model_info(self, repo_id):
        self._call("model_info")
        return SimpleNamespace(private=self.private)

    def create_repo(self, repo_id, *, private):
        self._call("create_repo")
        self.private = private

    def create_commit(self, repo_id, operations, *, commit_message):
        self._call("create_commit")
        assert (repo_id, commit_message) == ("me/mine", "Upload a model exported by dspo_jax")
        self.files = {each.path_in_repo: each.path_or_fileobj for each in operations}


@pytest.fixture
def exported(tmp_path):
    """A folder as an export leaves it."""
    folder = tmp_path / "my model"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text("{}")
    (folder / "README.md").write_text("# mine\n")
    return folder


@pytest.fixture
def use(monkeypatch):
    """Puts a hub in the place of the real one."""

    def use(hub):
        monkeypatch.setattr(huggingface_hub, "HfApi", hub)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
        return hub

    return use


@each_row(("private", "public"), [(None, False), (None, True), (True, False), (False, True)])
def test_a_folder_is_uploaded_in_one_commit(private, public, exported, use):
    hub = use(Hub(private))
    assert push_to_hub(exported, "me/mine", public=public) == "https://hub/me/mine"
    assert hub.private is not public
    assert ("create_repo" in hub.calls) == (private is None)
    assert hub.calls.count("create_commit") == 1
    assert hub.files == {
        "README.md": str(exported / "README.md"),
        "unet/config.json": str(exported / "unet" / "config.json"),
    }


def test_a_file_is_uploaded_with_its_card(tmp_path, use):
    hub, file = use(Hub()), tmp_path / "mine.safetensors"
    file.write_text("weights")
    file.with_suffix(".md").write_text("# mine\n")
    push_to_hub(file, "me/mine", public=False)
    assert hub.files == {"mine.safetensors": str(file), "README.md": str(file.with_suffix(".md"))}
    use(Hub(fails={"create_commit": answer(500)}))
    card = file.with_suffix(".md")
    with pytest.raises(OSError, match="500") as caught:
        push_to_hub(file, "me/mine", public=True)
    command = f"hf upload me/mine {file} mine.safetensors && hf upload me/mine {card} README.md"
    assert str(caught.value).endswith(f"to upload it later: {command}")


@each_row(
    ("private", "public", "fails", "message"),
    [
        (None, False, {"create_repo": answer(401)}, "the hub does not know the token; set HF_TOKEN, or"),
        (None, False, {"create_repo": answer(403)}, "the token gives no right to write there; take one"),
        (None, False, {"create_repo": answer(409)}, "the token gives no right to write there; take one"),
        (True, False, {"create_commit": answer(403)}, "the token gives no right to write there; take one"),
        (False, False, {}, "is there already and is public, not private; give --public, change"),
        (True, True, {}, "is there already and is private, not public; leave out --public, change"),
        (True, False, {"create_commit": answer(503)}, r"not uploaded \(HfHubHTTPError: 503 for \.\.\.\)\. "),
        (
            None,
            False,
            {"repo_exists": ConnectionError("no route")},
            "not uploaded .ConnectionError: no",
        ),
        (None, False, {"repo_exists": HfHubHTTPError.__bases__[0]("timed out")}, "not uploaded .*timed out"),
        (True, False, {"create_commit": RuntimeError("Xet")}, r"not uploaded \(RuntimeError: Xet\)"),
    ],
)
def test_an_upload_that_fails_names_the_command_for_later(private, public, fails, message, exported, use):
    hub = use(Hub(private, fails))
    later = "" if public else " --private"
    with pytest.raises((ValueError, OSError), match=rf"^--push_to_hub=me/mine: {message}[^\n]*$") as caught:
        push_to_hub(exported, "me/mine", public=public)
    assert str(caught.value).endswith(
        f"{exported} stays; to upload it later: hf upload me/mine '{exported}' .{later}"
    )
    assert TOKEN not in str(caught.value)
    # A traceback would show the hub's own message.
    assert caught.value.__suppress_context__ or not fails
    assert hub.files == {}
    assert (exported / "README.md").is_file()


def test_what_cannot_be_uploaded_is_refused_before_the_export(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    check_upload("me/mine")
    for name in ("mine", "me/mine/too", "me/mine@main", "https://hub/me/mine"):
        with refused(f"--push_to_hub={name}: is not the id of a repository; write owner/name"):
            check_upload(name)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with refused("--push_to_hub=me/mine: there is no token of the model hub; set HF_TOKEN, or log in with: "):
        check_upload("me/mine")


def header(file):
    with safe_open(file, "np") as opened:
        return opened.metadata()


NAMES = {
    "sd15": ("stable-diffusion-v1", "epsilon", "sd_v1", "False"),
    "sd21": ("stable-diffusion-v2-768-v", "v", "sd_v2", "True"),
    "sdxl": ("stable-diffusion-xl-v1-base", "epsilon", "sdxl_base_v1-0", "False"),
}


@pytest.mark.ci
def test_the_header_of_a_file_says_what_it_is(family, tmp_path, request):
    architecture, prediction, base, is_2 = NAMES[request.node.callspec.params["family"]]
    run = make_run(tmp_path / "mine", family, trained=("unet",))
    export(run, tmp_path / "whole.safetensors")
    expected = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "sgm",
        "modelspec.title": "mine step 3",
        "modelspec.description": "Trained with dspo_jax from tiny",
        "modelspec.prediction_type": prediction,
        "modelspec.predict_key": prediction,
        "modelspec.resolution": "16x16",
    }
    assert header(tmp_path / "whole.safetensors") == expected
    layer = {"lora_A": {"kernel": jnp.ones((8, 2))}, "lora_B": {"kernel": jnp.ones((2, 4))}}
    with Checkpoints(run / "checkpoints") as checkpoints:
        checkpoints.save(5, {"params": {"unet": {"fc1": layer}}}, {}, wait=True)
    export(run, tmp_path / "lora.safetensors", adapters="kohya")
    assert header(tmp_path / "lora.safetensors") == expected | {
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "mine step 5",
        "ss_base_model_version": base,
        "ss_v2": is_2,
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "2",
        "ss_output_name": "mine step 5",
    }
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"model": "/nowhere/tiny"}))
    export(run, tmp_path / "alone.safetensors", adapters="diffusers")
    metadata = header(tmp_path / "alone.safetensors")
    configs = json.loads(metadata.pop("lora_adapter_metadata"))
    assert metadata == {"format": "pt"}
    assert (configs["unet.r"], configs["unet.lora_alpha"], configs["unet.target_modules"]) == (2, 2, ["fc1"])


def test_the_picture_of_a_card_is_shown_by_the_hub_with_its_prompts(full_run, out):
    (full_run / "samples").mkdir()
    Image.new("RGB", (8, 8)).save(full_run / "samples" / "step_000002.png")
    config = json.loads((full_run / "config.json").read_text())
    config["samples"]["prompts"] = ["/home/me/prompts.txt", 'a "red": bird', "a dog"]
    (full_run / "config.json").write_text(json.dumps(config))
    export(full_run, out)
    _, text, _ = (out / "README.md").read_text().split("---\n", 2)
    (shown,) = yaml.safe_load(text)["widget"]
    assert shown == {
        "text": 'a "red": bird; a dog (the base, and step 2, from the same noise)',
        "output": {"url": "samples.png"},
    }
    assert (out / shown["output"]["url"]).is_file()
