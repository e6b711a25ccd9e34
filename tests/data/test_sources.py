"""Rows are decoded or refused for a stated reason; the emoji sources give what they document, in an order
that is fixed."""

import io
import struct
import zlib

import numpy as np
import pytest
from image_files import image_bytes
from PIL import Image
from tables import each_row

from dspo_jax.data.sources import PreferencePair, decode_pair, get_source
from dspo_jax.images.decode import decode_image
from dspo_jax.images.image_files import BadRow

# --- Decoding
# -------------------------------------------------------------------------------------------------------


@each_row("file_format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_images_decode_to_rgb(file_format):
    image = decode_image(image_bytes("white", file_format=file_format))
    assert (image.mode, image.size) == ("RGB", (6, 4))
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_a_pil_image_is_taken_as_it_is():
    assert decode_image(Image.new("L", (3, 2), 7)).getpixel((2, 1)) == (7, 7, 7)


@each_row(
    ("mode", "color", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 51), (255, 204, 204)),
        ("LA", (0, 0), (255, 255, 255)),
    ],
)
def test_transparency_is_composited_over_white(mode, color, expected):
    assert decode_image(image_bytes(color, mode=mode)).getpixel((0, 0)) == expected


def test_a_transparent_palette_is_composited_over_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=0)
    image = decode_image(buffer.getvalue())
    assert [image.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (0, 0, 255)]


def test_a_rotated_photograph_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: turn by 90 degrees
    assert decode_image(image_bytes(size=(6, 4), file_format="JPEG", exif=exif)).size == (4, 6)


@each_row("tag", [0x0100, 0x011A])
def test_letters_for_numbers_in_exif_are_a_bad_row(tag):
    entries = sorted([(tag, 2, 4, b"abc\0"), (0x0112, 3, 1, b"\6\0\0\0")])  # the other turns it by 90 degrees
    packed = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + packed + struct.pack("<I", 0)
    with pytest.raises(BadRow, match=r"^undecodable image: damaged EXIF"):
        decode_image(image_bytes(size=(6, 4), file_format="JPEG", exif=exif))


def test_sixteen_bits_of_grey_are_scaled_to_eight():
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 257 * 100 - 100, 65535]], np.uint16)).save(buffer, "PNG")
    decoded = decode_image(buffer.getvalue())
    assert [decoded.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (100, 100, 100), (255, 255, 255)]
    with pytest.raises(BadRow, match="of mode F, whose range is not known"):
        decode_image(Image.new("F", (2, 2)))


@each_row(
    "data",
    [
        b"",
        b"not an image",
        image_bytes()[:40],
        image_bytes(size=(64, 64), file_format="JPEG")[:300],
        b"%!PS-Adobe-3.0 EPSF-3.0",
    ],
)
def test_undecodable_bytes_are_a_bad_row(data):
    with pytest.raises(BadRow) as caught:
        decode_image(data)
    assert caught.value.reason == "undecodable image"


@each_row("side", [8200, 12000, 20000])  # over our limit; over PIL's warning; over PIL's error
def test_a_decompression_bomb_is_a_bad_row(side):
    data = image_bytes()
    header = b"IHDR" + struct.pack(">II", side, side) + data[24:29]
    bomb = data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    with pytest.raises(BadRow) as caught:
        decode_image(bomb)
    assert caught.value.reason == "image over the pixel limit"


def test_a_pair_gives_the_winner_then_the_loser():
    images = decode_pair(PreferencePair("a caption", image_bytes("red"), image_bytes("blue")))
    assert [image.getpixel((0, 0)) for image in images] == [(255, 0, 0), (0, 0, 255)]


def test_a_single_image_gives_one():
    assert len(decode_pair(PreferencePair("a caption", image_bytes()))) == 1


@each_row(
    ("change", "reason"),
    [
        ({"caption": " \n"}, "empty caption"),
        ({"caption": "a fox \ud83e"}, "caption is no text"),
        ({"caption": "a fox\0"}, "caption is no text"),
        ({"preference": 0.4}, "preference outside [0.5, 1]"),
        ({"preference": float("nan")}, "preference outside [0.5, 1]"),
        ({"winner": b""}, "undecodable image"),
        ({"loser": b"\x89PNG"}, "undecodable image"),
        ({"loser": image_bytes("red", file_format="BMP")}, "identical images"),
        ({"winner": Image.new("RGB", (0, 4))}, "zero-size image"),
    ],
)
def test_bad_rows_are_refused_for_a_stated_reason(change, reason):
    row = {"caption": "a caption", "winner": image_bytes("red"), "loser": image_bytes("blue"), **change}
    with pytest.raises(BadRow) as caught:
        decode_pair(PreferencePair(**row))
    assert caught.value.reason == reason


# --- The registry
# ---------------------------------------------------------------------------------------------------


def test_an_unknown_source_is_refused_with_the_nearest_name():
    with pytest.raises(
        ValueError, match=r"config.source.name = 'emoji_pair': unknown; did you mean 'emoji_pairs'\?"
    ):
        get_source("emoji_pair")


def test_an_unknown_argument_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"'min_zz': unknown; did you mean 'min_z'\?"):
        get_source("emoji_pairs", min_zz=2)
