"""The inspect command: the numbers of datasets whose content is known, what is refused, and the sheet."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from example_shards import MANIFEST, feature_spec, make_example, write_dataset
from PIL import Image, ImageDraw
from tables import each_row

from dspo_jax.data import inspect, shards, sheet
from dspo_jax.data.inspect import check_flags
from dspo_jax.data.report import check_keys, format_report
from dspo_jax.data.sheet import choose_examples, draw_examples
from dspo_jax.data.summary import summarize_dataset
from dspo_jax.data.writer import DatasetWriter
from dspo_jax.errors import UserError
from dspo_jax.pipelines.loading import load_pipeline

REPOSITORY = Path(__file__).parents[2]
START, END = 512, 513


def tokens(length: int, pad: int = END) -> np.ndarray:
    """[1, 77]: start, words, end, `length` in all, and what pads."""
    return np.int32([[START, *[7] * (length - 2), END, *[pad] * (77 - length)]])


def write(
    out: Path,
    splits: Mapping[str, Sequence[dict[str, Any]]],
    *,
    images: int = 2,
    fingerprint: Mapping[str, Any] = MANIFEST["model"],
    shape: tuple[int, int, int] = (4, 4, 6),
    skipped: Mapping[str, Mapping[str, int]] | None = None,
    left_out: Mapping[str, Mapping[str, int]] | None = None,
    buckets: Sequence[str] = (),
) -> Path:
    """Writes splits of examples, each given by what is different from `make_example`."""
    writer = DatasetWriter(
        out,
        feature_spec(images, *(shape if not buckets else (None, None, shape[2]))),
        {**MANIFEST, "model": fingerprint},
        dict.fromkeys(splits, 1),
        buckets,
    )
    for split, changes in splits.items():
        examples = [make_example(i, images=images) | change for i, change in enumerate(changes)]
        writer.write_shard(split, 0, examples, (skipped or {}).get(split))
    writer.commit(left_out)
    return out


def test_sizes_and_making(tmp_path):
    manifest = write_dataset(tmp_path / "pairs")
    report = summarize_dataset(tmp_path / "pairs")
    assert report["model"] == manifest["model"]
    assert (report["resolution"], report["images_per_example"]) == (16, 2)
    assert report["source"] == {"name": "numbers", "arguments": {"seed": 0}}
    train, validation = report["splits"]["train"], report["splits"]["validation"]
    assert (train["num_examples"], train["examples_read"], train["num_shards"]) == (10, 10, 3)
    assert (validation["num_examples"], validation["examples_read"], validation["num_shards"]) == (5, 5, 2)
    files = (tmp_path / "pairs").glob("*train.array_record*")
    assert train["bytes"] == sum(path.stat().st_size for path in files)
    text = format_report(report)
    assert "pairs: pairs, resolution 16\n" in text
    assert "tiny, scaling_factor 0.18215" in text
    assert "numbers, seed 0" in text
    assert "10 in 3 shard(s)" in text
    assert json.loads(json.dumps(report)) == report


def test_lengths_of_captions(tmp_path):
    lengths = (2, 3, 3, 40, 77)
    captions = ("", "a", " ", "b" * 200, "c" * 999)
    rows = [{"tokens": tokens(n), "caption": c} for n, c in zip(lengths, captions, strict=True)]
    content = summarize_dataset(write(tmp_path / "out", {"train": rows}))["splits"]["train"]
    assert content["captions"]["tokens"] == {"min": 2, "median": 3, "p95": pytest.approx(69.6), "max": 77}
    assert content["captions"]["characters"]["max"] == 999
    assert content["captions"]["full"] == 1
    assert content["captions"]["empty"] == 2


@each_row("pad", [END, 0], ids=["padded with the end", "padded with another"])
def test_the_length_of_a_caption_whatever_pads_it(tmp_path, pad):
    rows = [{"tokens": tokens(76, pad)}, {"tokens": tokens(9, pad)}]
    captions = summarize_dataset(write(tmp_path / "out", {"train": rows}))["splits"]["train"]["captions"]
    assert (captions["tokens"]["min"], captions["tokens"]["max"], captions["full"]) == (9, 76, 0)


def test_the_length_of_a_caption_with_added_tokens(tmp_path):
    """Textual inversions have higher ids than the end token."""
    row = tokens(9)
    row[0, 3] = END + 5
    captions = summarize_dataset(write(tmp_path / "out", {"train": [{"tokens": row}]}))["splits"]["train"]
    assert captions["captions"]["tokens"]["max"] == 9


def test_repeated_captions_and_those_that_train_has(tmp_path):
    splits = {
        "train": [{"caption": caption} for caption in "aabcccd"],
        "validation": [{"caption": caption} for caption in "xacay"],
        "test": [{"caption": "z"}],
    }
    report = summarize_dataset(write(tmp_path / "out", splits))["splits"]
    assert report["train"]["captions"]["distinct"] == 4
    assert report["train"]["captions"]["most_repeated"] == {"c": 3, "a": 2}
    assert report["validation"]["captions_in_train"] == {"examples": 3, "train_examples_read": 7}
    assert report["test"]["captions_in_train"]["examples"] == 0
    assert "captions_in_train" not in report["train"]
    alone = summarize_dataset(tmp_path / "out", split="validation")["splits"]
    assert list(alone) == ["validation"]
    assert "captions_in_train" not in alone["validation"]  # not known, which is not none


def test_preferences_and_losers(tmp_path):
    preferences = (1.0, 1.0, 0.5, 0.55, 0.6, 0.7, 0.99)
    rows = [{"preference": np.float32(p), "loser_won": np.bool_(i < 2)} for i, p in enumerate(preferences)]
    report = summarize_dataset(write(tmp_path / "out", {"train": rows}))
    assert report["splits"]["train"]["preferences"] == {
        "hard": 2,
        "soft": {"0.5-0.6": 2, "0.6-0.7": 1, "0.7-0.8": 1, "0.8-0.9": 0, "0.9-1.0": 1},
        "loser_won": 2,
    }
    assert "2 of 7 losers (28.6 %) win another pair" in format_report(report)


def test_sizes_of_the_images(tmp_path):
    sizes = [[[8, 32], [16, 16]], [[20, 40], [15, 60]]]  # height, width
    rows = [{"micro_conditioning": np.int32([[*size, 0, 0, 16, 16] for size in pair])} for pair in sizes]
    images = summarize_dataset(write(tmp_path / "out", {"train": rows}))["splits"]["train"]["images"]
    assert images["count"] == 4
    assert (images["height"]["min"], images["height"]["median"], images["height"]["max"]) == (8, 15.5, 20)
    assert (images["width"]["min"], images["width"]["max"]) == (16, 60)
    assert (images["width_by_height"]["min"], images["width_by_height"]["max"]) == (1, 4)
    assert images["enlarged"] == 2  # 8 and 15 pixels are below 16


def test_rows_left_out_and_skipped(tmp_path):
    out = write(tmp_path / "out", {"train": [{}, {}]}, skipped={"train": {"empty caption": 3}})
    manifest = shards.read_manifest(out)
    manifest["splits"]["train"]["left_out"] = {"tie": 1234}
    (out / shards.MANIFEST).write_text(json.dumps(manifest))
    report = summarize_dataset(out)
    assert report["splits"]["train"]["skipped"] == {"empty caption": 3}
    assert report["splits"]["train"]["left_out"] == {"tie": 1234}
    text = format_report(report)
    assert "empty caption: 3" in text
    assert "tie: 1,234" in text


def test_a_large_split_is_sampled_evenly_and_says_so(tmp_path):
    write_dataset(tmp_path / "out", train=10, rows_per_shard=3)
    report = summarize_dataset(tmp_path / "out", max_examples=5)
    train = report["splits"]["train"]
    assert (train["num_examples"], train["examples_read"]) == (10, 5)
    # The originals of example i are 20 + i pixels high: every second one is read.
    assert train["images"]["height"] == {"min": 20, "median": 24, "p95": 28, "max": 28}
    assert "5 of the 10 examples" in format_report(report)
    assert "5 of the 5" not in format_report(report)


def test_keys_that_occur_twice_are_refused(tmp_path):
    splits = {
        "train": [{"key": key} for key in "abcab"],
        "validation": [{"key": key} for key in "abc"],  # keys are unique within a split only
    }
    report = summarize_dataset(write(tmp_path / "out", splits))
    assert report["splits"]["train"]["duplicate_keys"] == {"count": 2, "first": {"a": 2, "b": 2}}
    assert report["splits"]["validation"]["duplicate_keys"]["count"] == 0
    with pytest.raises(ValueError, match=r"split 'train': 2 \(a: 2, b: 2\); a key must be unique"):
        check_keys(report)
    check_keys(summarize_dataset(tmp_path / "out", split="validation"))


def test_single_images_have_no_preferences(tmp_path):
    write_dataset(tmp_path / "out", images=1)
    report = summarize_dataset(tmp_path / "out")
    train = report["splits"]["train"]
    assert train["images"]["count"] == 10
    assert "preferences" not in train
    assert "single images" in format_report(report)


def test_an_empty_split_is_no_fault(tmp_path):
    write_dataset(tmp_path / "out", validation=0)
    report = summarize_dataset(tmp_path / "out")
    assert report["splits"]["validation"]["num_examples"] == 0
    assert "0 in 1 shard(s)" in format_report(report)
    with pytest.raises(ValueError, match="no example to draw in validation"):
        choose_examples(tmp_path / "out", ["validation"], 3, 0)


def spoil_manifest(out: Path, change: Any) -> None:
    manifest = shards.read_manifest(out)
    change(manifest)
    (out / shards.MANIFEST).write_text(json.dumps(manifest))


def flip_bytes(path: Path) -> None:
    """Those of the first records, as the rest of a small shard is padding."""
    content = bytearray(path.read_bytes())
    content[300:600] = bytes(255 - byte for byte in content[300:600])
    path.write_bytes(content)


@each_row(
    ("spoil", "kind", "message"),
    [
        (lambda out: (out / "manifest.json").unlink(), FileNotFoundError, r"manifest\.json: no such file"),
        (lambda out: (out / "manifest.json").write_text("{"), ValueError, "not valid JSON"),
        (
            lambda out: spoil_manifest(out, lambda manifest: manifest.pop("source")),
            ValueError,
            r"manifest\.json: damaged manifest \(manifest: missing key\(s\) source; ",
        ),
        (
            lambda out: spoil_manifest(out, lambda manifest: manifest.update(model=None)),
            ValueError,
            "damaged manifest",
        ),
        (
            lambda out: spoil_manifest(out, lambda manifest: manifest["splits"]["train"].pop("shards")),
            ValueError,
            r"damaged manifest \(split 'train': missing key\(s\) shards; ",
        ),
        (
            lambda out: spoil_manifest(
                out, lambda manifest: manifest["splits"]["train"].update(num_examples=7)
            ),
            ValueError,
            "10 examples in its shards, but manifest.json says 7",
        ),
        (
            lambda out: next(out.glob("*train.array_record-00001*")).unlink(),
            FileNotFoundError,
            "00001-of-00003: file is missing",
        ),
        (
            lambda out: next(out.glob("*train.array_record-00001*")).write_bytes(b"short"),
            ValueError,
            "00001-of-00003: 5 bytes",
        ),
        (
            lambda out: flip_bytes(next(out.glob("*train.array_record-00000*"))),
            OSError,
            "split 'train': a shard cannot be read: .*--verify says which one",
        ),
        (lambda out: (out / "features.json").unlink(), OSError, r"features\.json"),
    ],
    ids=[
        "no manifest",
        "cut manifest",
        "missing key",
        "wrong type",
        "no shards",
        "wrong count",
        "missing shard",
        "truncated shard",
        "damaged shard",
        "no features",
    ],
)
def test_a_damaged_dataset_is_refused(tmp_path, spoil, kind, message):
    write_dataset(tmp_path / "out")
    spoil(tmp_path / "out")
    with pytest.raises(kind, match=message):
        summarize_dataset(tmp_path / "out")


def test_checksums_find_the_damaged_shard(tmp_path):
    write_dataset(tmp_path / "out")
    report = summarize_dataset(tmp_path / "out", checksums=True)
    assert "checksums       as in the manifest" in format_report(report)
    flip_bytes(next((tmp_path / "out").glob("*validation.array_record-00001*")))
    assert "as in the manifest" not in format_report(summarize_dataset(tmp_path / "out", split="train"))
    with pytest.raises(ValueError, match=r"validation\.array_record-00001-of-00002: content does not match"):
        summarize_dataset(tmp_path / "out", split="train", checksums=True)


def test_wrong_arguments_are_refused(tmp_path):
    write_dataset(tmp_path / "out")
    with pytest.raises(ValueError, match="--split = 'trian': unknown; did you mean 'train'"):
        summarize_dataset(tmp_path / "out", split="trian")
    with pytest.raises(ValueError, match="--max_examples=0: must be at least 1"):
        summarize_dataset(tmp_path / "out", max_examples=0)


def test_the_choice_is_random_and_repeatable(tmp_path):
    splits = {name: [{"key": f"{name} {i}"} for i in range(20)] for name in ("train", "validation")}
    out = write(tmp_path / "out", splits)

    def keys(seed, count=8, names=("train", "validation")):
        chosen = choose_examples(out, names, count, seed)
        assert all(example["key"].startswith(split) for split, example in chosen)
        return [example["key"] for _, example in chosen]

    assert keys(0) == keys(0) != keys(1)
    assert len(set(keys(0))) == 8
    assert len({key.split()[0] for key in keys(0)}) == 2
    assert keys(0, count=99) == [f"{name} {i}" for name in splits for i in range(20)]
    assert set(keys(0, names=["validation"])) <= {f"validation {i}" for i in range(20)}


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return load_pipeline(tiny_model)


def moments_of(pipe, seed: int, side: int | tuple[int, int] = 16, images: int = 2) -> np.ndarray:
    """Of pictures of noise, with deviations that a decoder which took them for means would show."""
    height, width = (side, side) if isinstance(side, int) else side
    draw = np.random.default_rng(seed)
    pixels = draw.uniform(-1, 1, (images, height, width, 3)).astype(np.float32)
    moments = np.array(pipe.encode_moments({"vae": pipe.read_params("vae", "float32")}, pixels))
    moments[..., pipe.latent_channels :] = draw.uniform(2, 3, moments[..., pipe.latent_channels :].shape)
    return moments.astype(np.float16)


def decoded(pipe, moments: np.ndarray) -> np.ndarray:
    """[P, H, W, 3] in 0 .. 255, an image at a time."""
    means = moments[..., : pipe.latent_channels].astype(np.float32)
    params = {"vae": pipe.read_params("vae", "float32")}
    images = np.concatenate([pipe.decode(params, mean[None]) for mean in means])
    return np.clip(images * 127.5 + 127.5, 0, 255)


def picture_at(picture: np.ndarray, row_top: int, column: int, shape: tuple[int, int]) -> np.ndarray:
    """What stands within the frame, back at the size [H, W] of the decoded image."""
    factor = sheet.PICTURE_SIDE // max(shape)
    cell = sheet.PICTURE_SIDE + 2 * sheet.FRAME + sheet.MARGIN
    x = 2 * sheet.MARGIN + sheet.TEXT_WIDTH + column * cell + sheet.FRAME
    y = row_top + sheet.FRAME
    return picture[y : y + shape[0] * factor : factor, x : x + shape[1] * factor : factor]


def frame_colours(
    picture: np.ndarray, row_top: int, column: int, shape: tuple[int, int]
) -> set[tuple[int, ...]]:
    """Colours of the outermost frame's four sides."""
    factor = sheet.PICTURE_SIDE // max(shape)
    cell = sheet.PICTURE_SIDE + 2 * sheet.FRAME + sheet.MARGIN
    x, y = 2 * sheet.MARGIN + sheet.TEXT_WIDTH + column * cell, row_top
    height, width = (side * factor + 2 * sheet.FRAME for side in shape)
    ring = picture[y : y + height, x : x + width].copy()
    ring[1:-1, 1:-1] = ring[0, 0]
    return {tuple(colour) for colour in ring.reshape(-1, 3).tolist()}


@pytest.mark.ci
def test_the_sheet_shows_winner_and_loser_of_each_pair(pipe, tiny_model, tmp_path):
    rows = [{"caption": f"pair {i}", "moments": moments_of(pipe, i)} for i in range(3)]  # six images: 4 and 2
    shape = rows[0]["moments"].shape[1:]
    out = write(tmp_path / "out", {"train": rows}, fingerprint=pipe.fingerprint(), shape=shape)
    chosen = choose_examples(out, ["train"], 12, 0)
    picture = np.asarray(draw_examples(str(tiny_model), out, chosen)).astype(int)
    height = sheet.PICTURE_SIDE + 2 * sheet.FRAME
    assert picture.shape[0] == sheet.HEADING_HEIGHT + 3 * (height + sheet.MARGIN)
    for i, row in enumerate(rows):
        top = sheet.HEADING_HEIGHT + i * (height + sheet.MARGIN)
        winner, loser = decoded(pipe, row["moments"])
        assert np.abs(winner - loser).mean() > 3  # so that they cannot be mistaken for each other
        assert np.abs(picture_at(picture, top, 0, (16, 16)) - winner).max() <= 1
        assert np.abs(picture_at(picture, top, 1, (16, 16)) - loser).max() <= 1
        assert frame_colours(picture, top, 0, (16, 16)) == {sheet.WINNER_COLOUR}
        assert frame_colours(picture, top, 1, (16, 16)) == {(255, 255, 255)}


def test_the_sheet_of_single_images_has_one_column_and_no_frame(pipe, tiny_model, tmp_path):
    moments = moments_of(pipe, 0, images=1)
    out = write(
        tmp_path / "out",
        {"train": [{"moments": moments}]},
        images=1,
        fingerprint=pipe.fingerprint(),
        shape=moments.shape[1:],
    )
    chosen = choose_examples(out, ["train"], 12, 0)
    picture = np.asarray(draw_examples(str(tiny_model), out, chosen)).astype(int)
    cell = sheet.PICTURE_SIDE + 2 * sheet.FRAME + sheet.MARGIN
    assert picture.shape[1] == 2 * sheet.MARGIN + sheet.TEXT_WIDTH + cell
    (image,) = decoded(pipe, moments)
    assert np.abs(picture_at(picture, sheet.HEADING_HEIGHT, 0, (16, 16)) - image).max() <= 1
    assert frame_colours(picture, sheet.HEADING_HEIGHT, 0, (16, 16)) == {(255, 255, 255)}


@pytest.fixture
def bucketed(pipe, tmp_path) -> Path:
    """Two buckets: 16x24 with examples 0 and 2, 24x16 with example 1."""

    def example(i, size):
        micro_conditioning = np.tile(np.int32([60, 60, 0, 0, *size]), (2, 1))
        return {"key": str(i), "moments": moments_of(pipe, i, size), "micro_conditioning": micro_conditioning}

    return write(
        tmp_path / "out",
        {"train": [example(0, (16, 24)), example(1, (24, 16)), example(2, (16, 24))]},
        fingerprint=pipe.fingerprint(),
        shape=(4, 4, 2 * pipe.latent_channels),
        buckets=("16x16", "16x24", "24x16"),
    )


@pytest.mark.ci
def test_buckets_are_counted_and_drawn_in_their_shape(pipe, tiny_model, bucketed):
    report = summarize_dataset(bucketed)
    assert report["splits"]["train"]["buckets"] == {"16x24": 2, "24x16": 1}
    assert report["splits"]["train"]["examples_read"] == 3
    assert "16x24: 2, 24x16: 1" in format_report(report)
    chosen = choose_examples(bucketed, ["train"], 12, 0)
    assert [example["key"] for _, example in chosen] == ["0", "2", "1"]
    picture = np.asarray(draw_examples(str(tiny_model), bucketed, chosen)).astype(int)
    top = sheet.HEADING_HEIGHT
    for (_, example), shape in zip(chosen, ((16, 24), (16, 24), (24, 16)), strict=True):
        for column, image in enumerate(decoded(pipe, example["moments"])):
            assert np.abs(picture_at(picture, top, column, shape) - image).max() <= 1
        assert frame_colours(picture, top, 0, shape) == {sheet.WINNER_COLOUR}
        top += shape[0] * (sheet.PICTURE_SIDE // 24) + 2 * sheet.FRAME + sheet.MARGIN
    assert picture.shape[0] == top


def test_a_bucket_that_the_manifest_does_not_list_is_damage(bucketed):
    spoil_manifest(bucketed, lambda manifest: manifest["buckets"].remove("16x24"))
    with pytest.raises(ValueError, match=r"damaged manifest \(KeyError: '16x24'\)"):
        summarize_dataset(bucketed)


def test_another_model_is_refused(tiny_model, tmp_path):
    out = write(tmp_path / "out", {"train": [{}]})
    chosen = choose_examples(out, ["train"], 1, 0)
    with pytest.raises(ValueError, match=r"out/manifest\.json: model\.latent_channels = 3.*this model has 4"):
        draw_examples(str(tiny_model), out, chosen)


def test_large_images_are_fitted_and_long_captions_stay_in_their_column():
    image = np.full((1, 100, 600, 3), 200, np.uint8)
    caption = "a word " * 200 + "x" * 500
    picture = np.asarray(sheet.draw_sheet([(caption, ["a note"], image), ("日本語" * 99, [], image)]))
    row = round(100 * sheet.PICTURE_SIDE / 600) + 2 * sheet.FRAME + sheet.MARGIN
    assert picture.shape[0] == sheet.HEADING_HEIGHT + 2 * row
    gutter = picture[:, sheet.MARGIN + sheet.TEXT_WIDTH + 1 : 2 * sheet.MARGIN + sheet.TEXT_WIDTH]
    assert (gutter == 255).all()
    gap = picture[sheet.HEADING_HEIGHT + row - 6 : sheet.HEADING_HEIGHT + row, : sheet.TEXT_WIDTH]
    assert (gap == 255).all()  # the first caption does not run into the second


@pytest.mark.ci
def test_the_shipped_model_gives_the_encoded_picture_back(tmp_path):
    pipe = load_pipeline(REPOSITORY / "examples" / "emoji" / "model")
    disc = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(disc).ellipse((8, 8, 56, 56), "orange")
    pixels = np.asarray(disc)
    vae = {"vae": pipe.read_params("vae", "float32")}
    moments = np.asarray(pipe.encode_moments(vae, pixels[None] / np.float32(127.5) - 1)).astype(np.float16)
    ((image,),) = sheet.decode_examples(pipe, [{"moments": moments, "caption": "disc"}])
    assert np.abs(image.astype(int) - pixels).mean() < 8


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dspo_jax.data.inspect", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.mark.ci
def test_the_command_writes_report_numbers_and_sheet(tiny_model, tiny_pairs, tmp_path):
    numbers = tmp_path / "numbers.json"
    done = run(f"--model={tiny_model}", f"--json={numbers}", "--pairs=3", str(tiny_pairs))
    try:
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{tiny_pairs}: pairs, resolution 16\n")
        path = tiny_pairs.with_name(tiny_pairs.name + "-contact_sheet.png")
        assert done.stdout.splitlines()[-1] == f"{path}: contact sheet"
        assert "read train 24/24 (100%)" in done.stderr
        assert json.loads(numbers.read_text()) == summarize_dataset(tiny_pairs)
        with Image.open(path) as picture:
            row = sheet.PICTURE_SIDE + 2 * sheet.FRAME + sheet.MARGIN
            assert picture.height == sheet.HEADING_HEIGHT + 3 * row
    finally:
        for left in tiny_pairs.parent.glob("*.png*"):
            left.unlink()


def test_without_a_model_faults_are_refused_after_the_report(tmp_path, monkeypatch, capsys):
    settings = {"split": None, "max_examples": 20_000, "verify": False, "json": None, "model": None}
    flags = SimpleNamespace(**settings, sheet=None, pairs=12, seed=0)
    monkeypatch.setattr(inspect, "flags", SimpleNamespace(FLAGS=flags))
    out = write(tmp_path / "out", {"train": [{"key": "a"}, {"key": "a"}]})
    with pytest.raises(UserError, match=f"^{out}: keys that more than one example has"):
        inspect.main(["inspect", str(out)])
    said = capsys.readouterr().out
    assert "2 in 1 shard(s)" in said
    assert "--model=MODEL_DIR, the model this was encoded with, draws one" in said
    with pytest.raises(FileNotFoundError, match=r"absent/manifest\.json: no such file; .* is not a dataset"):
        inspect.main(["inspect", str(tmp_path / "absent")])


@each_row(
    ("changed", "message"),
    [
        ({"sheet": "b.png"}, r"--sheet=b\.png: needs --model"),
        ({"model": "m", "sheet": "b.jpg"}, r"--sheet=b\.jpg: must end in \.png"),
        ({"pairs": 0}, "--pairs=0: must be at least 1"),
    ],
)
def test_wrong_flags_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        check_flags(SimpleNamespace(**({"model": None, "sheet": None, "pairs": 12} | changed)))


@pytest.mark.ci
@each_row(
    ("arguments", "message"),
    [
        ([], "DIR is missing"),
        (["a", "b"], "unexpected argument 'b'"),
    ],
)
def test_a_wrong_folder_is_refused_in_one_line(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.ci
def test_help_names_the_folder_and_the_options():
    done = run("--help")
    for word in ("inspect DIR", "--model", "--sheet", "--pairs", "--max_examples", "--verify", "--json"):
        assert word in done.stdout


def test_a_report_alone_does_not_start_jax():
    program = "import sys, dspo_jax.data.inspect; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False).returncode == 0
