"""What becomes of an image before the VAE sees it, and the processes that do it."""

import collections
import functools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from dspo_jax.data.prepare import Framing, bucket_sizes, map_rows, prepare_row, worker_pool
from dspo_jax.data.sources import PreferencePair
from dspo_jax.images.image_files import BadRow
from dspo_jax.images.resize import prepare_image

SQUARE = Framing(((16, 16),))
prepare_square = functools.partial(prepare_row, framing=SQUARE)


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    red, green = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([red, green, 0 * red], axis=-1).astype(np.uint8))


def test_the_shortest_side_is_resized_and_the_centre_kept():
    pixels, crop = prepare_image(gradient(96, 32), (16, 16))
    assert crop == (32, 96, 0, 16, 16, 16)
    assert (crop.height, crop.width, crop.top, crop.left) == (32, 96, 0, 16)
    assert pixels.shape == (16, 16, 3)
    assert abs(int(pixels[0, 0, 0]) - 32) <= 2  # a third of the way across
    assert abs(int(pixels[0, -1, 0]) - 63) <= 2
    assert int(pixels[-1, 0, 1]) >= 29
    assert prepare_image(gradient(32, 97), (16, 16))[1] == (97, 32, 16, 0, 16, 16)
    # 15 high, not 16: the sides are rounded down, as in released code.
    assert prepare_image(gradient(30, 47), (10, 10))[1] == (47, 30, 2, 0, 10, 10)


def test_an_image_too_narrow_to_be_resized_is_a_bad_row():
    with pytest.raises(BadRow, match=r"^image too narrow: 4000x2 would be 1024000x512 before it is cropped$"):
        prepare_image(gradient(4000, 2), (512, 512))


def test_a_flip_mirrors_the_crop():
    plain, crop = prepare_image(gradient(40, 16), (16, 16))
    flipped, flipped_crop = prepare_image(gradient(40, 16), (16, 16), flip=True)
    np.testing.assert_array_equal(flipped, plain[:, ::-1])
    assert flipped_crop == crop  # the centre stays the centre


def test_what_covers_a_bucket_is_cropped_on_one_side_only():
    # 40 x 30 covers 8 x 32 (height x width) as 32 x 24, and 32 x 8 as 43 x 32.
    assert prepare_image(gradient(40, 30), (8, 32))[1] == (30, 40, 8, 0, 8, 32)
    pixels, crop = prepare_image(gradient(40, 30), (32, 8))
    assert pixels.shape == (32, 8, 3)
    assert crop == (30, 40, 0, round((42 - 8) / 2), 32, 8)


def mirrored(pixels):
    return bool(pixels[0, 0, 0] > pixels[0, -1, 0])


def test_both_images_of_a_pair_are_mirrored_together_or_not_at_all():
    framing = Framing(((16, 16),), "random", seed=0)
    winner, loser = gradient(16, 16), Image.eval(gradient(16, 16), lambda value: value // 2)
    rows = [PreferencePair("a caption", winner, loser, key=str(i)) for i in range(40)]
    flips = []
    for row in rows:
        (prepared,) = prepare_row(row, framing)
        assert mirrored(prepared.pixels[0]) == mirrored(prepared.pixels[1])
        flips.append(mirrored(prepared.pixels[0]))
    assert 8 < sum(flips) < 32
    again = [mirrored(prepare_row(row, framing)[0].pixels[0]) for row in rows]
    assert again == flips
    other_seed = Framing(((16, 16),), "random", seed=1)
    assert [mirrored(prepare_row(row, other_seed)[0].pixels[0]) for row in rows] != flips


def test_each_image_is_mirrored_by_itself():
    framing = Framing(((16, 16),), "independent", seed=0)
    winner, loser = gradient(16, 16), Image.eval(gradient(16, 16), lambda value: value // 2)
    rows = [PreferencePair("a caption", winner, loser, key=str(i)) for i in range(400)]

    def flips(framing):
        prepared = [prepare_row(row, framing) for row in rows]
        assert all(len(examples) == 1 for examples in prepared)
        return [tuple(map(mirrored, examples[0].pixels)) for examples in prepared]

    ways = flips(framing)
    counts = collections.Counter(ways)
    assert len(counts) == 4
    assert all(70 < count < 130 for count in counts.values())  # a quarter each; 3.5 deviations
    assert flips(framing) == ways
    assert flips(Framing(((16, 16),), "independent", seed=1)) != ways
    # Of single images there is one, and it is mirrored as a winner is.
    single = PreferencePair("a caption", winner, key="0")
    assert mirrored(prepare_row(single, framing)[0].pixels[0]) == ways[0][0]


def test_both_makes_two_examples_of_a_row():
    row = PreferencePair("a caption", gradient(40, 16), gradient(16, 40), key="k")
    plain, other = prepare_row(row, Framing(((16, 16),), "both"))
    assert (plain.key, other.key) == ("k", "k|mirrored")
    np.testing.assert_array_equal(other.pixels, plain.pixels[:, :, ::-1])
    assert [crop[:4] for crop in plain.crops] == [(16, 40, 0, 12), (40, 16, 12, 0)]


def test_the_winner_decides_the_bucket_of_both():
    framing = Framing(bucket_sizes(64, 8, 2.0))
    for size, bucket in (
        ((60, 60), (64, 64)),
        ((100, 60), (48, 80)),
        ((60, 100), (80, 48)),
        ((300, 10), (48, 80)),
    ):
        row = PreferencePair("a caption", gradient(*size), gradient(40, 40))
        (prepared,) = prepare_row(row, framing)
        assert prepared.pixels.shape == (2, *bucket, 3)
        assert [(crop.target_height, crop.target_width) for crop in prepared.crops] == [bucket] * 2


def test_buckets_are_about_the_squares_area():
    sizes = bucket_sizes(1024, 64, 2.0)
    assert sizes[0] == (1024, 1024)
    # Of SDXL's list (appendix I).
    assert {(832, 1216), (1216, 832), (896, 1152), (768, 1344)} <= set(sizes)
    for height, width in sizes:
        assert height % 64 == width % 64 == 0
        assert 0.9 * 1024**2 < height * width <= 1024**2
        assert max(height, width) <= 2 * min(height, width)
    assert bucket_sizes(512, 64, 1.0) == ((512, 512),)


def rows(count):
    for i in range(count):
        loser = b"corrupt" if i % 5 == 3 else gradient(20, 21 + i)
        yield PreferencePair("a caption", gradient(20 + i, 20), loser, key=str(i))


def blocked_signals():
    return signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_ctrl_c_in_a_terminal_is_left_to_this_process():
    before = blocked_signals()
    with worker_pool(1) as pool:
        # Inherited from the server it forks from, which so is deaf while it imports.
        assert signal.SIGINT in pool.submit(blocked_signals).result()
    assert blocked_signals() == before


def test_workers_give_what_this_process_gives_in_order():
    with worker_pool(0) as none:
        expected = list(map_rows(rows(23), prepare_square, none, 4))
    with worker_pool(2) as pool:
        found = list(map_rows(rows(23), prepare_square, pool, 4))
    assert [row.key for row, _ in found] == [str(i) for i in range(23)]
    for (_, ours), (row, theirs) in zip(found, expected, strict=True):
        if int(row.key) % 5 == 3:
            assert isinstance(ours, BadRow)
            assert (str(ours), ours.reason) == (str(theirs), theirs.reason)
        else:
            np.testing.assert_array_equal(ours[0].pixels, theirs[0].pixels)
            assert ours[0].crops == theirs[0].crops


def test_rows_are_read_only_a_little_ahead():
    read = []

    def watched():
        for row in rows(50):
            read.append(row.key)
            yield row

    with worker_pool(1) as pool:
        prepared = map_rows(watched(), prepare_square, pool, 4)
        for _ in range(3):
            next(prepared)
        assert 3 <= len(read) <= 7
        prepared.close()


def test_a_worker_that_is_killed_is_an_os_error():
    with worker_pool(1) as pool:
        victim = pool.submit(os.getpid).result()
        prepared = map_rows(rows(500), prepare_square, pool, 8)
        next(prepared)
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(OSError, match=r"was ended.*smaller --config\.num_workers"):
            list(prepared)


def test_workers_end_with_the_process_that_started_them():
    program = """
import os, sys, time
from dspo_jax.data.prepare import worker_pool
if __name__ == "__main__":
    with worker_pool(2) as pool:
        print(*{pool.submit(os.getpid).result() for _ in range(4)}, flush=True)
        time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.communicate()
    assert workers

    def alive(pid):
        try:
            with open(f"/proc/{pid}/stat") as stat:
                return stat.read().split(") ")[1][0] != "Z"
        except FileNotFoundError:
            return False

    end = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(alive, workers))
