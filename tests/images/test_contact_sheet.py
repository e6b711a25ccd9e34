"""Contact sheets: where images lie, and that captions are written out."""

import numpy as np

from dspo_jax.images.contact_sheet import contact_sheet, enlargement

RED, BLUE = (np.full((8, 8, 3), colour, np.uint8) for colour in ([255, 0, 0], [0, 0, 255]))


def test_images_lie_under_headings_labels_and_a_whole_caption():
    words = "a caption much wider than two small images"
    plain = contact_sheet([("a", [RED, BLUE])], [("base", 1), ("now", 1)], scale=4)
    named = contact_sheet([("a", [RED, BLUE])], [("base", 1), ("now", 1)], 4, ["seed 0", "seed 0"])
    wrapped = np.asarray(contact_sheet([(words, [RED, BLUE]), ("b", [BLUE, RED])], [("base", 2)], scale=4))
    assert named.height == plain.height + 14
    pixels = np.asarray(plain)
    np.testing.assert_array_equal(pixels[28:60, 4:36], np.broadcast_to([255, 0, 0], (32, 32, 3)))
    np.testing.assert_array_equal(pixels[28:60, 44:76], np.broadcast_to([0, 0, 255], (32, 32, 3)))
    first = int(np.flatnonzero((wrapped[:, 4] == [255, 0, 0]).all(axis=-1))[0])
    lines = (first - 14) // 14
    assert lines >= 3
    text = wrapped[14:first]
    assert (text[:, -1] == 255).all()  # nothing is cut off at the edge
    assert all((text[14 * line : 14 * (line + 1)] < 255).any() for line in range(lines))


def test_captions_stand_below_their_images():
    rows = [("a", [RED, BLUE]), ("b", [BLUE, RED])]
    captions = [[["one", "two"], ["one", "two"]], [["one", "two"], ["", ""]]]
    plain = np.asarray(contact_sheet(rows, [("base", 2)], 4))
    pixels = np.asarray(contact_sheet(rows, [("base", 2)], 4, captions=captions))
    assert len(pixels) == len(plain) + 2 * 28
    np.testing.assert_array_equal(pixels[:60], plain[:60])
    second = 28 + 32 + 28 + 4 + 14  # row of pixels where the images of the second prompt begin
    np.testing.assert_array_equal(pixels[second : second + 32], plain[78:110])
    for top, left, written in ((60, 4, True), (60, 40, True), (138, 4, True), (138, 40, False)):
        for line in (top, top + 14):
            assert (pixels[line : line + 14, left : left + 32] < 128).any() == written


def test_small_images_are_enlarged_to_a_visible_size():
    assert [enlargement(side, side) for side in (16, 64, 100, 256, 1024)] == [16, 4, 3, 1, 1]
