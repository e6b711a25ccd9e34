"""What rewards disagree on comes first."""

import secrets
import statistics

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from people_images import write_model
from tables import each_row

from dspo_jax.errors import UserError
from dspo_jax.people.disagreement import add_disagreement, measure_disagreement
from dspo_jax.people.groups import read_groups
from dspo_jax.people.showing import Showings
from dspo_jax.people.votes import Plan, create, open_votes

PROMPTS = [f"prompt {i}" for i in range(6)]
# By how much each pair's first image is better by two rewards, the second of a hundred times the scale.
LEADS = [(1, 100), (1, -100), (0, 50), (-2, -190), (2, -200), (0.5, 40)]

ROWS = [
    {
        "model": model,
        "file": f"../images/{model}/0-{model}/0000{i}_0.png",
        "prompt": PROMPTS[i],
        "small": 5.0 + (model == "a") * lead[0],
        "large": -7.0 + (model == "a") * lead[1],
    }
    for model in "ab"
    for i, lead in enumerate(LEADS)
]


@pytest.fixture
def scored(tmp_path):
    """Two models' folders, and the scores of an evaluation that are relative to its own folder."""
    folders = [write_model(tmp_path / "images" / name, PROMPTS, first=100 * ord(name)) for name in "ab"]
    (tmp_path / "eval").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "eval" / "scores.parquet")
    return read_groups(list(map(str, folders)), rank=False), tmp_path / "eval" / "scores.parquet"


def expected_disagreement():
    """The definition with the statistics module: an oracle."""
    scales = [statistics.mean(lead[r] ** 2 for lead in LEADS) ** 0.5 for r in (0, 1)]
    return [statistics.pstdev([lead[r] / scales[r] for r in (0, 1)]) for lead in LEADS]


def test_pairs_on_which_rewards_disagree_come_first_for_everybody_and_stay_so(scored, tmp_path):
    groups, scores = scored
    groups = add_disagreement(groups, scores)
    found = [group.disagreement for group in groups]
    assert found == pytest.approx(expected_disagreement(), abs=1e-12)
    plan = Plan(questions={"general": "?"}, repeat_share=0.0)
    create(tmp_path / "votes.sqlite", plan, groups).close()
    store = open_votes(tmp_path / "votes.sqlite")
    assert store.groups == groups
    order = sorted(range(6), key=lambda i: -found[i])
    showings = Showings(store)
    for name in ("anna", "ben"):
        person, seen = store.join(name, secrets.token_hex()), []
        while current := showings.current(person, name):
            seen.append(current[0].group)
            assert showings.vote(*current, 0)
        assert seen == order
    store.close()
    with pytest.raises(
        UserError, match=r"--scores: the votes of .* were begun with other scores, or with none"
    ):
        create(tmp_path / "votes.sqlite", plan, scored[0])


def test_of_several_images_the_pair_of_most_disagreement_counts():
    draw = np.random.default_rng(0)
    three = draw.normal(size=(4, 3, 2))
    leads = [[(s[i] - s[j]) for i, j in ((0, 1), (0, 2), (1, 2))] for s in three]
    scale = np.sqrt(np.mean(np.array(leads).reshape(-1, 2) ** 2, axis=0))
    expected = [max(abs(a / scale[0] - b / scale[1]) / 2 for a, b in of_group) for of_group in leads]
    assert measure_disagreement(list(three)) == pytest.approx(expected)
    # A reward that finds all images equal disagrees by what the other says.
    assert measure_disagreement([np.array([[0.0, 3.0], [1.0, 3.0]])]) == [0.5]


@each_row(
    ("change", "error", "says"),
    [
        ("absent", FileNotFoundError, "no such file; name the scores.parquet"),
        ("text", UserError, "not parquet; name the scores.parquet"),
        ("one", UserError, "has scores by small; .* two --rewards or more"),
        ("fewer", UserError, r"has no scores of .*0-b/00005_0\.png"),
    ],
)
def test_scores_that_do_not_tell_are_refused(change, error, says, scored):
    groups, scores = scored
    table = pa.Table.from_pylist(ROWS)
    if change == "absent":
        scores.unlink()
    elif change == "text":
        scores.write_text("no parquet")
    elif change == "one":
        pq.write_table(table.drop_columns(["large"]), scores)
    else:
        pq.write_table(table.slice(0, table.num_rows - 1), scores)
    with pytest.raises(error, match=says):
        add_disagreement(groups, scores)
