"""Published prompt sets by name, and what is refused as not being them."""

import io
import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tables import each_row

from dspo_jax.data.sources.emoji import EmojiImages
from dspo_jax.evaluation.prompt_sets import SETS, read_prompt_set
from dspo_jax.sampling.prompts import Prompt, read_prompts

ROOT = Path(__file__).parents[2]


def write_hpsv2(folder, *, photos=800):
    folder.mkdir(parents=True)
    for style in ("anime", "concept-art", "paintings", "photo"):
        count = photos if style == "photo" else 800
        texts = [f"{style} {i}" for i in range(count)]
        (folder / f"{style}.json").write_text(json.dumps(texts), encoding="utf-8")
    return folder


def write_edits(path, count=1000):
    pictures = []
    for i in range(count):
        buffer = io.BytesIO()
        Image.fromarray(np.full((2, 3, 3), i % 256, np.uint8)).save(buffer, "JPEG" if i % 2 else "PNG")
        pictures.append({"bytes": buffer.getvalue(), "path": None})
    prompts = [f"edit {i}" for i in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table({"input_image": pictures, "edit_prompt": prompts, "edited_image": pictures}), path
    )


def test_parti(test_data):
    found = read_prompt_set(f"parti={test_data / 'PartiPrompts.tsv'}", Path("unused"))
    assert (found.name, len(found.prompts), found.sha256) == ("parti", 1632, SETS["parti"].sha256)
    assert found.prompts[-1].category == "Artifacts"
    assert read_prompt_set(f"parti={test_data}", Path("unused")) == found


def test_other_prompts_than_parti_are_refused(tmp_path):
    path = tmp_path / "PartiPrompts.tsv"
    path.write_text("Prompt\tCategory\n" + "a\tb\n" * 1632)
    with pytest.raises(ValueError, match=r"not the prompts of parti, their sha256 is \w{64} and must be db0"):
        read_prompt_set(f"parti={path}", tmp_path)


def test_hpsv2_is_four_files_and_each_a_category(tmp_path):
    folder = write_hpsv2(tmp_path / "hpd" / "benchmark")
    found = read_prompt_set(f"hpsv2={tmp_path / 'hpd'}", tmp_path)
    assert len(found.prompts) == 3200
    assert found.prompts[0] == Prompt("anime 0", category="anime")
    assert found.prompts[-1] == Prompt("photo 799", category="photo")
    with pytest.raises(ValueError, match="hpsv2 has 4 files; give their folder"):
        read_prompt_set(f"hpsv2={folder / 'photo.json'}", tmp_path)
    (folder / "photo.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no photo\.json in it; fetch it \(from zhwang/HPDv2"):
        read_prompt_set(f"hpsv2={folder}", tmp_path)


def test_another_number_of_prompts_is_refused_by_file(tmp_path):
    folder = write_hpsv2(tmp_path / "benchmark", photos=799)
    message = r"photo\.json: 799 prompts, but hpsv2 has 800 there; fetch it again \(from zhwang/HPDv2"
    with pytest.raises(ValueError, match=message):
        read_prompt_set(f"hpsv2={folder}", tmp_path)


def test_pick_a_pic_is_one_split_of_many(tmp_path):
    for split, count in (("train", 7), ("test", 9), ("test_unique", 500), ("validation_unique", 500)):
        captions = [f"{split} {i}" for i in range(count)]
        pq.write_table(pa.table({"caption": captions}), tmp_path / f"{split}-00000-of-00001-ab.parquet")
    assert read_prompt_set(f"pickapic={tmp_path}", tmp_path).prompts[3].text == "test_unique 3"
    assert (
        read_prompt_set(f"pickapic-validation={tmp_path}", tmp_path).prompts[3].text == "validation_unique 3"
    )


def test_edits_are_unpacked_with_their_pictures(tmp_path):
    source, images = tmp_path / "data" / "train-00000-of-00001.parquet", tmp_path / "images"
    write_edits(source)
    found = read_prompt_set(f"instructpix2pix={tmp_path / 'data'}", images)
    assert len(found.prompts) == 1000
    pictures = images / source.stem
    assert found.prompts[9] == Prompt("edit 9", pictures / "00009.jpeg")
    with Image.open(pictures / "00008.png") as picture:
        assert picture.getpixel((0, 0)) == (8, 8, 8)
    kept = (pictures / "00008.png").stat().st_mtime_ns
    (pictures / "00009.jpeg").write_bytes(b"cut short")
    assert read_prompt_set(f"instructpix2pix={source}", images) == found
    assert (pictures / "00008.png").stat().st_mtime_ns == kept
    for text, picture in ((None, {"bytes": b"x"}), ("a", None), ("a", {"bytes": None, "path": "x.png"})):
        pq.write_table(pa.table({"edit_prompt": [text], "input_image": [picture]}), source)
        with pytest.raises(ValueError, match="row 0: needs a text as edit_prompt and bytes as input_image"):
            read_prompt_set(f"instructpix2pix={source}", images)
    pq.write_table(pa.table({"edit_prompt": ["a"]}), source)
    with pytest.raises(ValueError, match=r"no column 'input_image' \(found: edit_prompt\)"):
        read_prompt_set(f"instructpix2pix={source}", images)


def test_compositions(tmp_path):
    names = ("color", "shape", "texture", "spatial", "non_spatial", "complex")
    for name in names:
        (tmp_path / f"{name}_val.txt").write_text("".join(f"{name} {i}\n" for i in range(300)))
        (tmp_path / f"{name}_train.txt").write_text("other\n")
    found = read_prompt_set(f"t2i-compbench={tmp_path}", tmp_path)
    assert len(found.prompts) == 1800
    assert list(dict.fromkeys(prompt.category for prompt in found.prompts)) == list(names)


def test_a_set_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def download(repository, *, repo_type, revision, allow_patterns):
        asked.append((repository, repo_type, revision, allow_patterns[:2]))
        return str(tmp_path)

    write_hpsv2(tmp_path / "benchmark")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert len(read_prompt_set("hpsv2=zhwang/HPDv2", tmp_path).prompts) == 3200
    assert len(read_prompt_set("hpsv2=zhwang/HPDv2@abc123", tmp_path).prompts) == 3200
    patterns = ["anime.json", "*/anime.json"]
    assert asked == [("zhwang/HPDv2", "dataset", revision, patterns) for revision in (None, "abc123")]


def test_what_the_hub_does_not_have():
    with pytest.raises(
        OSError, match="--prompts=parti=nobody/none: no such file or folder, and the hub gave"
    ):
        read_prompt_set("parti=nobody/none", Path("unused"))


@each_row(
    ("text", "message"),
    [
        ("prati=PartiPrompts.tsv", "--prompts = 'prati': unknown; did you mean 'parti'"),
        (
            "parti",
            r"--prompts=parti: say where it is, parti=FILE, FOLDER or HUB_ID \(from nateraw",
        ),
        ("parti=none.tsv", "--prompts=parti=none.tsv: no such file or folder"),
        ("none.txt", "--prompts=none.txt: no such file"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_prompt_set(text, Path("unused"))


def test_texts_and_files_without_a_name(tmp_path):
    assert read_prompt_set("a sign: 1 + 1 = 2", tmp_path).prompts == (Prompt("a sign: 1 + 1 = 2"),)
    path = tmp_path / "of=mine.txt"
    path.write_text("one\n two\n")
    found = read_prompt_set(str(path), tmp_path)
    assert (found.name, [prompt.text for prompt in found.prompts]) == ("of=mine.txt", ["one", "two"])
    (tmp_path / "a.png").write_bytes(b"1")
    edits = tmp_path / "edits.jsonl"
    edits.write_text('{"prompt": "a", "image": "a.png"}')
    before = read_prompt_set(str(edits), tmp_path).sha256
    (tmp_path / "a.png").write_bytes(b"2")
    assert read_prompt_set(str(edits), tmp_path).sha256 != before


def test_the_shipped_prompts_are_captions_that_the_shipped_model_has_seen():
    prompts = read_prompts(str(ROOT / "examples" / "emoji" / "prompts.txt"))
    texts = [prompt.text for prompt in prompts]
    seen = {pair.caption for pair in EmojiImages(min_occurrences=20).pairs("train")}
    assert [text for text in texts if text not in seen] == []
    assert len(set(texts)) == len(texts) == 60
