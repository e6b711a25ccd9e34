"""Small image files for tests of the sources."""

import io

from PIL import Image


def image_bytes(color="red", size=(6, 4), mode="RGB", file_format="PNG", **arguments) -> bytes:
    """A one-coloured image file."""
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, file_format, **arguments)
    return buffer.getvalue()


def numbered_image(number: int) -> bytes:
    """An image that says which one it is: see `number_of`."""
    return image_bytes((number // 256, number % 256, 0), size=(2, 2))


def number_of(image: Image.Image) -> int:
    """The number of an image made by `numbered_image`."""
    red, green, _ = image.getpixel((0, 0))
    return red * 256 + green
