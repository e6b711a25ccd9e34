"""Fuzzers with fixed seeds: whatever bytes come, an image is decoded or a bad row, and texts are read or
refused by file."""

import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from tables import each_row

from dspo_jax.data.sources import PreferencePair, decode_pair, get_source
from dspo_jax.images.decode import MAX_PIXELS, decode_image
from dspo_jax.images.image_files import BadRow
from dspo_jax.monitoring.metrics import read_metrics
from dspo_jax.sampling.prompts import Prompt, read_prompts

pytestmark = [
    pytest.mark.slow,
    # Pillow's, of files that are damaged: it goes on, or raises as well.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:Corrupt EXIF data"),
]

REASONS = {"undecodable image", "zero-size image", "image over the pixel limit"}


def attempt(function: Callable[[], Any], *refusals: type[Exception]) -> tuple[Any, Any]:
    """The result of a function, or its refusal."""
    try:
        return function(), None
    except refusals as error:
        return None, error


# --- Images
# ---------------------------------------------------------------------------------------------------------


def files() -> dict[str, bytes]:
    """Small images of every format and of the modes that are decoded in ways of their own."""
    draw = np.random.default_rng(0)
    rgba = Image.fromarray(draw.integers(0, 256, (9, 7, 4), np.uint8))
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "turned"
    texts = PngImagePlugin.PngInfo()
    texts.add_text("prompt", "a fox " * 20, zip=True)
    texts.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="3"/>', zip=True)
    deep = Image.fromarray(draw.integers(0, 2**16, (9, 7), np.uint16))
    kept = {
        "png": (rgb, "PNG", {"pnginfo": texts, "icc_profile": bytes(range(256)), "exif": exif}),
        "png, transparent": (rgba, "PNG", {}),
        "png, palette": (rgb.convert("P"), "PNG", {"transparency": 0}),
        "png, 16 bits": (deep, "PNG", {}),
        "png, animated": (rgb, "PNG", {"save_all": True, "append_images": [rgb.rotate(90)]}),
        "jpeg": (rgb, "JPEG", {"exif": exif, "comment": "a fox"}),
        "jpeg, progressive": (grey, "JPEG", {"progressive": True}),
        "jpeg, cmyk": (rgb.convert("CMYK"), "JPEG", {}),
        "webp": (rgba, "WEBP", {"exif": exif, "lossless": True}),
        "webp, animated": (rgb, "WEBP", {"save_all": True, "append_images": [rgb.rotate(90)]}),
        "gif": (rgb.convert("P"), "GIF", {"save_all": True, "append_images": [grey.convert("P")]}),
        "bmp": (rgb, "BMP", {}),
        "tiff": (rgb, "TIFF", {"compression": "tiff_lzw", "exif": exif}),
        "tiff, jpeg": (rgb, "TIFF", {"compression": "jpeg"}),
        "tiff, 16 bits": (deep, "TIFF", {}),
    }
    found = {}
    for name, (image, file_format, options) in kept.items():
        buffer = io.BytesIO()
        image.save(buffer, file_format, **options)
        found[name] = buffer.getvalue()
    return found


FILES = files()


def mutate(data: bytes, draw: np.random.Generator) -> bytes:
    """Changes, deletes, repeats or cuts off a few bytes, mostly near the beginning."""
    changed = bytearray(data)
    for _ in range(draw.integers(1, 5)):
        place = int(len(changed) * draw.random() ** 2)
        length = int(draw.integers(1, 9))
        match draw.integers(5):
            case 0:
                changed[place : place + 1] = draw.bytes(1)
            case 1:
                changed[place : place + 4] = draw.choice(
                    [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"]
                )
            case 2:
                del changed[place : place + length]
            case 3:
                changed[place:place] = changed[place : place + length] * 3
            case 4 if draw.random() < 0.3:
                del changed[place:]
    return bytes(changed)


@each_row("name", FILES)
def test_an_image_of_any_bytes_is_decoded_or_a_bad_row(name):
    draw = np.random.default_rng(sorted(FILES).index(name))
    decoded = 0
    for _ in range(400):
        image, problem = attempt(functools.partial(decode_image, mutate(FILES[name], draw)), BadRow)
        if problem is not None:
            assert problem.reason in REASONS, problem
            assert "\n" not in str(problem)
            continue
        decoded += 1
        assert image.mode == "RGB"
        assert 0 < image.width * image.height <= MAX_PIXELS
    assert 0 < decoded < 400  # else it is no test of both


# --- Texts
# ----------------------------------------------------------------------------------------------------------

# As JSON can hold them, half characters among them.
TEXTS = st.text(st.characters(codec=None), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
ROWS = st.fixed_dictionaries(
    {}, optional={name: TEXTS | VALUES for name in ("prompt", "caption", "image", "category")}
)
SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")


def read_or_refuse(path: Path) -> None:
    prompts, error = attempt(lambda: read_prompts(str(path)), ValueError, FileNotFoundError)
    if error is not None:
        assert str(path) in str(error)
        str(error).encode()  # it can be printed
        return
    assert prompts
    for prompt in prompts:
        assert isinstance(prompt, Prompt)
        (prompt.text + prompt.category).encode()
        assert "\0" not in prompt.text


@pytest.mark.parametrize("suffix", SUFFIXES)
@seed(0)
@settings(max_examples=300, deadline=None, database=None)
@given(data=st.binary(max_size=200) | TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_a_file_of_any_bytes_is_read_or_refused(tmp_path_factory, suffix, data):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(data)
    read_or_refuse(path)


@seed(0)
@settings(max_examples=500, deadline=None, database=None)
@given(rows=st.lists(ROWS | VALUES, max_size=3))
def test_json_of_anything_is_read_or_refused(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp()
    (folder / "any.json").write_text(json.dumps(rows))
    (folder / "any.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read_or_refuse(folder / "any.json")
    read_or_refuse(folder / "any.jsonl")


@each_row("suffix", SUFFIXES)
def test_damaged_files_of_prompts_are_read_or_refused(tmp_path, suffix):
    rows = [{"prompt": f"a fox, {i} \u00e9\U0001f98a", "category": "x", "image": ""} for i in range(4)]
    path = tmp_path / f"prompts{suffix}"
    separator = "\t" if suffix == ".tsv" else ","
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    elif suffix == ".txt":
        path.write_text("\n".join(row["prompt"] for row in rows))
    else:
        quote = "" if suffix == ".tsv" else '"'
        lines = [list(rows[0]), *([f"{quote}{value}{quote}" for value in row.values()] for row in rows)]
        path.write_text("\n".join(separator.join(line) for line in lines))
    whole, draw = path.read_bytes(), np.random.default_rng(1)
    assert len(read_prompts(str(path))) == 4
    for _ in range(300):
        path.write_bytes(mutate(whole, draw))
        read_or_refuse(path)


@seed(0)
@settings(max_examples=300, deadline=None, database=None)
@given(
    rows=st.lists(st.fixed_dictionaries({"caption": TEXTS, "winner": TEXTS | VALUES}) | VALUES, max_size=3)
)
def test_pairs_of_anything_are_read_or_refused(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = get_source("folder", path=str(folder))
    found, error = attempt(lambda: list(source.pairs("train")), ValueError)
    if error is not None:
        assert str(folder) in str(error)
        str(error).encode()
        return
    for pair in found:
        with pytest.raises(BadRow):  # there is no image
            decode_pair(pair)


@seed(0)
@settings(max_examples=300, deadline=None, database=None)
@given(
    rows=st.lists(st.dictionaries(TEXTS, VALUES, max_size=3) | VALUES, max_size=3), end=st.binary(max_size=9)
)
def test_metrics_of_anything_are_read_or_refused(tmp_path_factory, rows, end):
    path = tmp_path_factory.getbasetemp() / "metrics.jsonl"
    path.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode() + end)
    records, error = attempt(lambda: read_metrics(path), ValueError)
    if error is not None:
        assert str(path) in str(error)
        return
    assert all(isinstance(record["step"], int) for record in records)


@seed(0)
@settings(max_examples=300, deadline=None, database=None)
@given(caption=TEXTS)
def test_a_caption_of_anything_is_encoded_or_a_bad_row(caption):
    red, blue = Image.new("RGB", (2, 2), "red"), Image.new("RGB", (2, 2), "blue")
    _, problem = attempt(lambda: decode_pair(PreferencePair(caption, red, blue)), BadRow)
    if problem is None:
        caption.encode()
        return
    assert problem.reason in ("empty caption", "caption is no text")
    str(problem).encode()
