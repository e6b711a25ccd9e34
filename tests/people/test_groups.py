"""Images that are shown together, from the folders that people have."""

import json
import shutil

import pytest
from people_images import make_edits, write_model, write_pairs, write_picture
from tables import each_row

from dspo_jax.errors import UserError
from dspo_jax.people.groups import read_checks, read_groups

PROMPTS = ["a fox", "a hare", "a fox in snow"]


def describe(groups):
    return [(group.prompt, [(image.model, image.file) for image in group.images]) for group in groups]


def test_two_models_give_a_pair_for_each_prompt_and_seed(tmp_path):
    for number, name in enumerate(("base", "mine")):
        write_model(tmp_path / name, PROMPTS, seeds=2, first=100 * number)
    groups = read_groups([str(tmp_path / "base"), f"tuned={tmp_path / 'mine'}"], rank=False)
    assert describe(groups) == [
        (prompt, [("base", f"0-base/{i:05d}_{seed}.png"), ("tuned", f"0-mine/{i:05d}_{seed}.png")])
        for i, prompt in enumerate(PROMPTS)
        for seed in range(2)
    ]


def test_three_models_give_three_pairs_or_one_list(tmp_path):
    folders = [str(write_model(tmp_path / name, PROMPTS, first=100 * ord(name))) for name in "abc"]
    pairs = read_groups(folders, rank=False)
    assert [[image.model for image in group.images] for group in pairs[:3]] == [
        ["a", "b"],
        ["a", "c"],
        ["b", "c"],
    ]
    assert len(pairs) == 9
    lists = read_groups(folders, rank=True)
    assert [[image.model for image in group.images] for group in lists] == [["a", "b", "c"]] * 3


def test_one_models_seeds_are_compared_and_a_folder_of_several_models_is_told_apart(tmp_path):
    folder = write_model(tmp_path / "mine", PROMPTS, seeds=3)
    assert len(read_groups([str(folder)], rank=False)) == 3 * 3
    assert [len(group.images) for group in read_groups([str(folder)], rank=True)] == [3, 3, 3]
    # `sample` with two models of the same name: numbers keep them apart.
    lines = (folder / "manifest.jsonl").read_text().splitlines()
    for line in list(lines):
        row = json.loads(line)
        row["file"] = row["file"].replace("0-mine", "1-mine")
        write_picture(folder / row["file"], 500 + len(lines))
        lines.append(json.dumps(row))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    groups = read_groups([str(folder)], rank=False)
    assert [[image.model for image in group.images] for group in groups] == [["0-mine", "1-mine"]] * 9
    assert len(read_groups([str(folder / "1-mine")], rank=False)) == 9


def test_pairs_metadata_and_checks_are_read_and_equal_images_are_no_pair(tmp_path):
    pairs = write_pairs(tmp_path / "pairs", PROMPTS)
    assert [[image.file for image in group.images] for group in read_groups([str(pairs)], rank=False)] == [
        [f"{i}a.png", f"{i}b.png"] for i in range(3)
    ]
    assert [group.answer for group in read_checks(str(pairs))] == [0, 0, 0]
    (pairs / "0b.png").write_bytes((pairs / "0a.png").read_bytes())
    assert len(read_groups([str(pairs)], rank=False)) == 2
    rows = [{"file_name": f"{i}{part}.png", "prompt": "a fox"} for i in (1, 2) for part in "ab"]
    (pairs / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (pairs / "pairs.jsonl").unlink()
    assert len(read_groups([str(pairs)], rank=False)) == 6


def test_lines_of_a_manifest_end_at_line_feeds_alone(tmp_path):
    # `sample` writes Unicode's other line separators as they are, and an editor may put a mark before all.
    prompts = ["a fox\u2028in snow", "a\u0085hare", "größer 笑"]
    folder = write_model(tmp_path / "mine", prompts, seeds=2)
    manifest = folder / "manifest.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().split("\n")]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    manifest.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    assert [group.prompt for group in read_groups([str(folder)], rank=False)] == prompts


def test_edits_are_compared_with_edits_of_the_same_picture_and_show_it(tmp_path):
    folders = [write_model(tmp_path / name, ["old"] * 2, first=100 * ord(name)) for name in "ab"]
    texts = [str(make_edits(folder, [1, 2])) for folder in folders]
    groups = read_groups(texts, rank=False)
    assert [group.init_image.file for group in groups] == ["init_images/1.png", "init_images/2.png"]
    # The same prompt for two pictures: nothing of one model to compare.
    with pytest.raises(UserError, match="nothing to compare; give"):
        read_groups(texts[:1], rank=False)
    make_edits(folders[1], [1, 3])
    with pytest.raises(UserError, match=r"pictures to edit \(.*0-a/00001_0.png has no counterpart\)"):
        read_groups(texts, rank=False)
    (folders[1] / "init_images/3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"3\.png: no such image"):
        read_groups(texts, rank=False)


@each_row(
    ("change", "error", "says"),
    [
        ("absent", FileNotFoundError, "no such folder"),
        ("empty", FileNotFoundError, "write a metadata.jsonl"),
        ("lost", FileNotFoundError, "no such image"),
        ("outside", UserError, "leads out of .*set --allow_outside"),
        ("broken", UserError, r"manifest.jsonl:2: not valid JSON"),
        ("number", UserError, "manifest.jsonl:2: must be an object"),
        ("prompt", UserError, r"manifest.jsonl:2: prompt = 3: must be a text"),
        ("fewer", UserError, "not of the same prompts, seeds .*00001_0.png has no counterpart"),
        ("equal", UserError, "nothing to compare: the images of each of 3 groups are equal"),
        ("twice", UserError, "two are called 'base'; name it: --images=NAME=DIR"),
        ("one", UserError, "nothing to compare; give the images of two models"),
    ],
)
def test_folders_that_cannot_be_compared_are_refused(change, error, says, tmp_path):
    folders = [
        write_model(tmp_path / name, PROMPTS, first=100 * number)
        for number, name in enumerate(("base", "mine"))
    ]
    manifest = folders[1] / "manifest.jsonl"
    lines = manifest.read_text().splitlines()
    if change == "absent":
        folders[1] = tmp_path / "absent"
    elif change == "empty":
        manifest.unlink()
    elif change == "lost":
        (folders[1] / "0-mine/00001_0.png").unlink()
    elif change == "outside":
        lines[1] = lines[1].replace("0-mine/", "../base/0-base/")
    elif change in ("broken", "number"):
        lines[1] = {"broken": "{", "number": "7"}[change]
    elif change == "prompt":
        lines[1] = lines[1].replace('"a hare"', "3")
    elif change == "fewer":
        del lines[1]
    elif change == "equal":
        for i in range(3):
            shutil.copy(folders[0] / f"0-base/0000{i}_0.png", folders[1] / f"0-mine/0000{i}_0.png")
    elif change == "twice":
        folders[1] = folders[0]
    else:
        folders.pop()
    if manifest.is_file():
        manifest.write_text("\n".join(lines))
    with pytest.raises(error, match=says):
        read_groups(list(map(str, folders)), rank=False)


def test_too_many_images_to_rank_and_pairs_to_rank_are_refused(tmp_path):
    with pytest.raises(UserError, match="10 images of 'a fox', and at most 9 can be ranked"):
        read_groups([str(write_model(tmp_path / "mine", ["a fox"], seeds=10))], rank=True)
    with pytest.raises(UserError, match="holds pairs, which cannot be ranked"):
        read_groups([str(write_pairs(tmp_path / "pairs", ["a fox"]))], rank=True)
    with pytest.raises(FileNotFoundError, match=r"--checks=.*no pairs\.jsonl"):
        read_checks(str(tmp_path))
