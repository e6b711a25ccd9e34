"""Image files that data name: what is read of them, what is refused before that, where they may lie."""

import io
import json
import os
import re
from pathlib import Path

import pytest
from image_files import image_bytes
from PIL import Image, PngImagePlugin
from tables import each_row

from dspo_jax.data.sources import decode_pair, get_source
from dspo_jax.evaluation.image_folders import ImageFolder, find_images
from dspo_jax.evaluation.prompt_sets import PromptSet
from dspo_jax.images import image_files
from dspo_jax.images.decode import decode_image
from dspo_jax.images.image_files import BadRow, ImagePaths, read_image_file
from dspo_jax.rewards.scores import read_image
from dspo_jax.sampling.prompts import Prompt, read_prompts

# --- Kind and size
# --------------------------------------------------------------------------------------------------


def special(tmp_path, kind):
    path = tmp_path / f"{kind}.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(200 * 1024**3)
    return path


@each_row(
    ("kind", "reason", "detail"),
    [
        ("pipe", "not a regular file", "is a named pipe"),
        ("device", "not a regular file", "is a device"),
        ("sparse", "image file over the size limit", "is larger than 268,435,456 bytes"),
    ],
)
def test_what_is_no_small_regular_file_is_not_read(tmp_path, kind, reason, detail):
    path = special(tmp_path, kind)
    with pytest.raises(BadRow) as caught:
        decode_image(path)
    assert caught.value.reason == reason
    assert detail in caught.value.detail
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {reason}"):
        read_image(path)  # as evaluate and label read
    with pytest.raises(ValueError, match=reason):
        PromptSet("edits", (Prompt("a", path),)).sha256  # noqa: B018


def test_a_file_that_holds_more_than_it_says_is_refused(tmp_path, monkeypatch):
    path = Path("/proc/self/maps")
    if not path.is_file():
        pytest.skip("no /proc")
    assert path.stat().st_size == 0
    assert len(read_image_file(path)) > 100
    monkeypatch.setattr(image_files, "MAX_FILE_BYTES", 99)
    with pytest.raises(BadRow, match="over the size limit"):
        read_image_file(path)


# --- PNG files with long texts
# --------------------------------------------------------------------------------------


def png_with(**chunks):
    buffer = io.BytesIO()
    texts = PngImagePlugin.PngInfo()
    for add in chunks.pop("texts", ()):
        add(texts)
    Image.new("RGB", (6, 4), (1, 2, 3)).save(buffer, "PNG", pnginfo=texts, **chunks)
    return buffer.getvalue()


@each_row(
    "data",
    [
        png_with(texts=[lambda info: info.add_text("workflow", "x" * 3_000_000, zip=True)]),
        png_with(texts=[lambda info: info.add_itxt("XML:com.adobe.xmp", "x" * 3_000_000, zip=True)]),
        png_with(texts=[lambda info: info.add_text("parameters", "x" * 3_000_000)]),
        png_with(icc_profile=bytes(3_000_000)),
    ],
    ids=["zTXt", "iTXt", "tEXt", "iCCP"],
)
def test_long_texts_and_profiles_do_not_cost_a_png_its_pixels(data, tmp_path):
    assert decode_image(data).getpixel((5, 3)) == (1, 2, 3)
    (tmp_path / "a.png").write_bytes(data)
    assert read_image(tmp_path / "a.png")[3, 5].tolist() == [1, 2, 3]


def test_a_text_that_inflates_without_end_is_a_bad_row():
    data = png_with(texts=[lambda info: info.add_text("bomb", "x" * (70 * 2**20), zip=True)])
    assert len(data) < 100_000
    with pytest.raises(BadRow, match="undecodable image"):
        decode_image(data)


# --- Where images may lie
# -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A folder `data` with an image, and `outside.png` beside it."""
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "images" / "a.png").write_bytes(image_bytes("red"))
    (tmp_path / "outside.png").write_bytes(image_bytes("blue"))
    (tmp_path / "data" / "images" / "link.png").symlink_to(tmp_path / "outside.png")
    (tmp_path / "data" / "images" / "inner.png").symlink_to("a.png")
    (tmp_path / "data" / "up").symlink_to("..")
    return tmp_path / "data"


def leaving(folder):
    return ["../outside.png", str(folder.parent / "outside.png"), "images/link.png", "up/outside.png"]


def staying(folder):
    return ["images/a.png", "images/../images/a.png", str(folder / "images" / "a.png"), "images/inner.png"]


def test_what_counts_is_where_a_path_leads(folder):
    paths = ImagePaths(folder, "--allow", False)
    for name in staying(folder):
        assert paths.find(name) == folder / name
    for name in leaving(folder):
        with pytest.raises(ValueError, match=r"leads out of .*, to .*outside.png; .* set --allow if you"):
            paths.find(name)
        assert ImagePaths(folder, "--allow", True).find(name) == folder / name
    # The folder itself may be a link, and a folder beside it may begin like it.
    (folder.parent / "link").symlink_to("data")
    assert ImagePaths(folder.parent / "link", "--allow", False).find("images/a.png").is_file()
    (folder.parent / "data2").mkdir()
    with pytest.raises(ValueError, match="leads out"):
        paths.find("../data2/a.png")


def test_a_snapshot_of_the_hubs_cache_is_whole(tmp_path):
    repository = tmp_path / "datasets--a--b"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "0123").write_bytes(image_bytes())
    snapshot = repository / "snapshots" / "main" / "data"
    snapshot.mkdir(parents=True)
    (snapshot / "a.png").symlink_to("../../../blobs/0123")
    assert ImagePaths(snapshot, "--allow", False).find("a.png").is_file()
    with pytest.raises(ValueError, match="leads out"):
        ImagePaths(snapshot, "--allow", False).find("../../../other")


@pytest.mark.parametrize("number", range(4))
def test_pairs_keep_to_their_folder_unless_told(folder, number):
    name = leaving(folder)[number]
    row = {"caption": "a", "winner": "images/a.png", "loser": name}
    (folder / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    kept = {"path": str(folder), "validation_share": 0.0}
    with pytest.raises(ValueError, match=r"leads out of .* set --config.source.allow_outside=True"):
        list(get_source("folder", **kept).pairs("train"))
    if number < 2:  # what is written in the file is seen before anything is encoded
        with pytest.raises(ValueError, match="leads out"):
            get_source("folder", **kept).num_examples("train")
    (pair,) = get_source("folder", **kept, allow_outside=True).pairs("train")
    assert [image.getpixel((0, 0)) for image in decode_pair(pair)] == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize("number", range(4))
def test_ranked_lists_keep_to_their_folder_unless_told(folder, number):
    name = leaving(folder)[number]
    rows = [{"prompt": "a", "generations": ["images/a.png", name], "ranking": [1, 2]}]
    (folder / "ranks.json").write_text(json.dumps(rows))
    kept = {"path": str(folder / "ranks.json"), "validation_share": 0.0}
    with pytest.raises(ValueError, match=r"leads out of .* set --config.source.allow_outside=True"):
        list(get_source("image_reward", **kept).pairs("train"))
    (pair,) = get_source("image_reward", **kept, allow_outside=True).pairs("train")
    assert len(decode_pair(pair)) == 2
    # A folder that the user names is where they may lie.
    source = get_source("image_reward", **kept, images=str(folder.parent), comparisons="all")
    rows[0]["generations"] = ["data/images/a.png", "outside.png"]
    (folder / "ranks.json").write_text(json.dumps(rows))
    assert len(decode_pair(next(source.pairs("train")))) == 2


@pytest.mark.parametrize("number", range(4))
def test_prompts_keep_to_their_folder_unless_told(folder, number):
    name = leaving(folder)[number]
    path = folder / "edits.jsonl"
    path.write_text(json.dumps({"prompt": "a", "image": name}))
    with pytest.raises(ValueError, match=r"edits.jsonl: line 1: image = .* leads out of .* --allow_outside"):
        read_prompts(str(path))
    assert read_prompts(str(path), allow_outside=True) == [Prompt("a", folder / name)]


def test_folders_of_images_have_no_links_out_of_them_unless_told(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "elsewhere.png").write_bytes(image_bytes())
    (tmp_path / "made" / "00000_0.png").symlink_to("../elsewhere.png")
    with pytest.raises(ValueError, match=r"00000_0.png: leads out of .* --allow_outside"):
        find_images(ImageFolder(tmp_path / "made"), [Prompt("a")], 1)
    found = find_images(ImageFolder(tmp_path / "made", allow_outside=True), [Prompt("a")], 1)
    assert found.files == [[tmp_path / "made" / "00000_0.png"]]
