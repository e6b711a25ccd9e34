"""Images as the page shows them: scaled for the screen, without the metadata and the name of their file."""

import functools
import hashlib
import hmac
import io
from pathlib import Path

from PIL import Image

from dspo_jax.images.decode import decode_image
from dspo_jax.images.image_files import ImagePaths
from dspo_jax.people.groups import ImageFile
from dspo_jax.people.votes import VoteStore

SIDES = (256, 512, 1024, 2048)
"""Longest sides, in pixels, that images are scaled down to."""

_LOSSLESS = 512 * 512  # pixels
_KEPT = 300  # scaled images in memory, of about 0.1 MB each


class Pictures:
    """The images of a collection under opaque names. Nothing else can be asked for."""

    def __init__(self, store: VoteStore, *, allow_outside: bool = False):
        """Names every image by a keyed digest of its content, as its path would tell its model."""
        images = {image for group in store.groups for image in (*group.images, group.init_image) if image}
        self._secret, self._allow_outside = store.secret.encode(), allow_outside
        self._images = {self._name(image): image for image in images}
        self.scaled = functools.lru_cache(maxsize=_KEPT)(self._scale)

    def _name(self, image: ImageFile) -> str:
        return hmac.digest(self._secret, image.sha256.encode(), hashlib.sha256).hex()[:32]

    def address(self, image: ImageFile) -> str:
        """Returns where the page finds an image."""
        return f"/image/{self._name(image)}"

    def __contains__(self, name: str) -> bool:
        return name in self._images

    def _scale(self, name: str, side: int) -> bytes:
        """Returns an image as WebP, at most `side` pixels on its longer side; it is never enlarged.

        Raises:
          BadRow: it cannot be decoded.
          UserError: it leads out of its folder by now.
        """
        image = self._images[name]
        path = ImagePaths(Path(image.folder), "--allow_outside", self._allow_outside).find(image.file)
        picture = decode_image(path)
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        # Compression must not be what is judged: none where that is cheap, and little elsewhere.
        lossless = picture.width * picture.height <= _LOSSLESS
        picture.save(out, "WEBP", lossless=lossless, quality=95, method=2)
        return out.getvalue()
