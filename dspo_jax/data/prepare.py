"""Rows to pixels: images decoded, resized, cropped and mirrored, in processes of their own."""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver, resource_tracker
from typing import TypeVar

import numpy as np

from dspo_jax.data.sources.pairs import PreferencePair, decode_pair
from dspo_jax.images.image_files import BadRow
from dspo_jax.images.resize import Crop, prepare_image

FLIPS = ("none", "random", "independent", "both")

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Framing:
    """Size and mirroring of images.

    Attributes:
      sizes: (height, width) in pixels of what comes out; with several, the winner's shape decides for both
        images of a pair.
      flip: "none"; "random", half of the examples mirrored, both images or neither; "independent", half of
        the images mirrored, each by itself, as the released code does (torchvision's RandomHorizontalFlip on
        each image, anew in every epoch); "both", each row as it is and with both images mirrored.
      seed: decides, with a row's key and, for "independent", the image's place, what is mirrored.
    """

    sizes: tuple[tuple[int, int], ...]
    flip: str = "none"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An example before the VAE: `pixels` [P, H, W, 3] uint8, and what was kept of each of the P images."""

    key: str
    pixels: np.ndarray
    crops: tuple[Crop, ...]


def bucket_sizes(resolution: int, step: int, max_aspect_ratio: float) -> tuple[tuple[int, int], ...]:
    """Lists (height, width) of aspect-ratio buckets, the square first.

    Both sides are multiples of `step`, the area is as large as it can be without exceeding that of the square
    (SDXL, section 2.3 and appendix I: multiples of 64 of about 1024 x 1024), and the longer side is at most
    `max_aspect_ratio` times the shorter one.
    """
    sizes = {(resolution, resolution)}
    for height in range(step, resolution, step):
        width = resolution**2 // height // step * step
        if width <= max_aspect_ratio * height:
            sizes |= {(height, width), (width, height)}
    return tuple(sorted(sizes, key=lambda size: (abs(math.log(size[0] / size[1])), size)))


def prepare_row(row: PreferencePair, framing: Framing) -> list[Prepared]:
    """Returns the examples of a row: one, or two where each is also mirrored.

    Raises:
      BadRow: see `sources.decode_pair`.
    """
    images = decode_pair(row)
    aspect = math.log(images[0].height / images[0].width)
    size = min(framing.sizes, key=lambda size: abs(math.log(size[0] / size[1]) - aspect))
    count = len(images)
    flips = {row.key: [False] * count}
    if framing.flip == "random":
        flips[row.key] = [_draw_flip(framing.seed, row.key)] * count
    elif framing.flip == "independent":
        flips[row.key] = [_draw_flip(framing.seed, row.key, str(place)) for place in range(count)]
    elif framing.flip == "both":
        flips[f"{row.key}|mirrored"] = [True] * count
    prepared = []
    for key, flip in flips.items():
        framed = [prepare_image(image, size, each) for image, each in zip(images, flip, strict=True)]
        pixels, crops = zip(*framed, strict=True)
        prepared.append(Prepared(key, np.stack(pixels), crops))
    return prepared


def _draw_flip(seed: int, *what: str) -> bool:
    return hashlib.sha256("|".join((str(seed), *what)).encode()).digest()[0] < 128


@contextlib.contextmanager
def worker_pool(num_workers: int, preload: Sequence[str] = ()) -> Iterator[Executor | None]:
    """Processes that decode; None where `num_workers` is 0, and the work is then done in this process.

    Args:
      num_workers: how many.
      preload: modules that all of them share in memory, imported once: what the program's main module
        imports belongs there, as every process runs that module (but for what `__main__` does).
    """
    if num_workers == 0:
        yield None
        return
    # Not "fork": JAX's threads do not survive it. All fork from one server that has imported once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*preload, __name__])
    _start_forkserver()
    pool = ProcessPoolExecutor(num_workers, context, initializer=_follow_parent)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_forkserver() -> None:
    """Starts the server that workers fork from, deaf to a terminal's Ctrl-C, also while it imports."""
    resource_tracker.ensure_running()  # which unblocks the signal after it has started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def map_rows(
    rows: Iterable[PreferencePair],
    function: Callable[[PreferencePair], Result],
    pool: Executor | None,
    ahead: int,
) -> Iterator[tuple[PreferencePair, Result | BadRow]]:
    """Yields every row in order, with what a function makes of it or what is wrong with it.

    Args:
      rows: read as they are needed, `ahead` of what is yielded.
      function: of a module, as other processes call it; what it raises as `BadRow` is yielded.
      pool: from `worker_pool`.
      ahead: how many rows are being worked on at a time.

    Raises:
      OSError: a decoding process died.
    """
    if pool is None:
        for row in rows:
            yield row, _call_or_explain(function, row)
        return
    rows = iter(rows)
    pending: collections.deque[tuple[PreferencePair, Future[Result | BadRow]]] = collections.deque()
    try:
        while True:
            for row in itertools.islice(rows, ahead - len(pending)):
                pending.append((row, pool.submit(_call_or_explain, function, row)))
            if not pending:
                return
            row, future = pending.popleft()
            yield row, future.result()
    except BrokenProcessPool as error:
        raise OSError(
            "a process that decodes images was ended, perhaps for want of memory; run the same command "
            "again, with a smaller --config.num_workers"
        ) from error


def _call_or_explain(function: Callable[[PreferencePair], Result], row: PreferencePair) -> Result | BadRow:
    try:
        return function(row)
    except BadRow as problem:
        return problem


def _follow_parent() -> None:
    """Makes a worker leave Ctrl-C to its parent, and end when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
