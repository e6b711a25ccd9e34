"""The file of votes, and what is shown to whom."""

import collections
import dataclasses
import itertools
import secrets
import sqlite3

import pytest
from tables import each_row

from dspo_jax.errors import UserError
from dspo_jax.people.groups import Group, ImageFile
from dspo_jax.people.questions import QUESTIONS, read_questions
from dspo_jax.people.showing import REPEAT_AFTER, Showings
from dspo_jax.people.votes import SKIP, TIE, Plan, create, open_votes


def make_groups(count, checks=0, images=2):
    return [
        Group(
            f"prompt {i}",
            tuple(ImageFile("/images", f"{i}_{j}.png", f"model {j}", f"{i}-{j}") for j in range(images)),
            0 if i >= count else None,
        )
        for i in range(count + checks)
    ]


def plan(**changes):
    return Plan(**{"questions": {"general": "?"}, "repeat_share": 0.0, "check_share": 0.0} | changes)


@pytest.fixture
def collect(tmp_path):
    """Makes a collection with one person, who judges by a function of the showing's number."""

    def begin(groups, **changes):
        store = create(tmp_path / "votes.sqlite", plan(**changes), groups)
        stores.append(store)
        return store, Showings(store)

    stores = []
    yield begin
    for store in stores:
        store.close()


def judge(store, showings, name, choose=lambda showing: 0, most=10**6):
    """Judges until all is done or `most` votes are given; returns what was shown, in order."""
    person = store.join(name, secrets.token_hex())
    seen = []
    while len(seen) < most and (current := showings.current(person, name)):
        showing, question = current
        assert showings.vote(showing, question, choose(showing))
        seen.append(showing)
    return seen


def test_a_name_is_one_person_whatever_its_case_unless_it_was_two_before(collect):
    store, _ = collect(make_groups(1))
    anna = store.join("Anna", "a")
    assert store.join("ANNA", "b") == anna
    with sqlite3.connect(store.path) as earlier:
        other = earlier.execute("INSERT INTO people (name) VALUES ('anna')").lastrowid
    earlier.close()
    assert store.join("anna", "c") == other
    assert store.join("Anna", "d") == store.join("ANNA", "e") == anna
    assert store.join("Zo\u00eb", "f") == store.join("ZO\u00cb", "g")


def test_everybody_judges_every_pair_once_in_an_order_and_on_sides_of_their_own(collect):
    store, showings = collect(make_groups(40))
    seen = {name: judge(store, showings, name) for name in ("anna", "ben")}
    for of_person in seen.values():
        assert sorted(showing.group for showing in of_person) == list(range(40))
    orders = [[showing.group for showing in of_person] for of_person in seen.values()]
    assert orders[0] != orders[1] != list(range(40))
    sides = [{showing.group: showing.places for showing in of_person} for of_person in seen.values()]
    assert sides[0] != sides[1]
    # A fair coin shows fewer than 8 or more than 32 of 40 heads once in 20,000 times.
    for of_person in sides:
        assert 8 <= sum(places == (0, 1) for places in of_person.values()) <= 32


def test_what_is_shown_follows_from_the_seed_and_goes_on_after_a_restart(tmp_path):
    shown = []
    for folder, restart in (("a", False), ("b", True), ("c", False)):
        seed = 1 if folder == "c" else 0
        path, groups = tmp_path / folder / "votes.sqlite", make_groups(30, checks=5)
        changes = {"repeat_share": 0.2, "check_share": 0.2, "seed": seed}
        store = create(path, plan(**changes), groups)
        showings = Showings(store)
        seen = judge(store, showings, "anna", most=13 if restart else 10**6)
        if restart:
            waiting = showings.current(1, "anna")
            store.close()
            store = create(path, plan(**changes), groups)
            showings = Showings(store)
            assert showings.current(1, "anna") == waiting
            assert showings.progress(1).done == 13
            seen += judge(store, showings, "anna")
        store.close()
        shown.append([(showing.group, showing.places, showing.repeats) for showing in seen])
    assert shown[0] == shown[1]
    assert shown[0] != shown[2]


def test_repeats_are_turned_round_and_checks_come_among_them(collect):
    store, showings = collect(make_groups(100, checks=20), repeat_share=0.2, check_share=0.1)
    seen = judge(store, showings, "anna")
    place = {showing.number: i for i, showing in enumerate(seen)}
    repeats = [showing for showing in seen if showing.repeats is not None]
    checks = [showing for showing in seen if store.groups[showing.group].answer is not None]
    for showing in repeats:
        first = seen[place[showing.repeats]]
        assert first.group == showing.group
        assert first.places == showing.places[::-1]
        assert place[showing.number] - place[first.number] >= REPEAT_AFTER
        assert first.repeats is None
        assert store.groups[first.group].answer is None
    assert len({showing.repeats for showing in repeats}) == len(repeats)
    assert len({showing.group for showing in checks}) == len(checks)
    # Of about 143 showings 20 % and 10 %, within four standard deviations.
    assert len(seen) == 100 + len(repeats) + len(checks)
    assert abs(len(repeats) - 0.2 * len(seen)) < 20
    assert abs(len(checks) - 0.1 * len(seen)) < 15


def test_votes_are_spread_and_a_group_needs_no_more_than_its_number(collect):
    store, showings = collect(make_groups(12), votes_per_group=2)
    names = ["anna", "ben", "carl"]
    people = {name: store.join(name, name) for name in names}
    judged = collections.Counter()
    for name in itertools.islice(itertools.cycle(names), 3 * 12):
        current = showings.current(people[name], name)
        if current is None:
            continue
        judged[current[0].group] += 1
        showings.vote(*current, TIE)
        assert max(judged.values()) == 1 or len(judged) == 12
    assert set(judged.values()) == {2}
    assert sum(showings.progress(person).done for person in people.values()) == 24
    assert all(showings.progress(person).left == 0 for person in people.values())


def test_a_skipped_group_needs_another_judge(collect):
    store, showings = collect(make_groups(1), votes_per_group=1)
    judge(store, showings, "anna", lambda showing: SKIP)
    assert len(judge(store, showings, "ben")) == 1
    assert judge(store, showings, "carl") == []


def test_undo_takes_back_the_last_vote_through_questions_and_groups(collect):
    store, showings = collect(make_groups(3), questions={"general": "?", "appeal": "?"}, votes_per_group=1)
    judge(store, showings, "anna", most=3)
    waiting = showings.current(1, "anna")
    first = [(vote.showing.number, vote.question) for vote in store.votes()]
    for expected in reversed(first):
        last = showings.last_vote(1)
        assert not showings.undo(1, last.number + 1)
        assert showings.undo(1, last.number)
        assert not showings.undo(1, last.number)  # sent twice
        showing, question = showings.current(1, "anna")
        assert (showing.number, question) == expected
    assert store.votes() == []
    assert showings.last_vote(1) is None
    assert showings.progress(1).left == 3
    # What is counted is what is counted after a restart.
    assert showings.current(1, "anna") == Showings(store).current(1, "anna")
    judge(store, showings, "anna", most=3)
    assert showings.current(1, "anna") == waiting


def test_a_vote_that_comes_twice_is_one_and_another_choice_is_refused(collect):
    store, showings = collect(make_groups(2))
    store.join("anna", "session")
    showing, question = showings.current(1, "anna")
    assert showings.vote(showing, question, 1)
    assert showings.vote(showing, question, 1)
    assert not showings.vote(showing, question, 0)
    assert [vote.choice for vote in store.votes()] == [1]


def test_choices_come_back_as_they_were(collect):
    store, showings = collect(make_groups(4, images=3))
    choices = [TIE, SKIP, 2, (2, 0, 1)]
    judge(store, showings, "anna", lambda showing: choices[showing.number - 1])
    assert [vote.choice for vote in open_votes(store.path).votes()] == choices


def test_a_file_of_votes_is_opened_only_with_what_it_was_begun_with(tmp_path):
    path, groups = tmp_path / "votes.sqlite", make_groups(3)
    create(path, plan(), groups).close()
    with pytest.raises(
        UserError, match=r"holds votes on other images, or .* another order; name another file"
    ):
        create(path, plan(), make_groups(4))
    with pytest.raises(UserError, match="--seed: these votes were begun with 0; give that again"):
        create(path, plan(seed=1), groups)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE t (x)")
    (tmp_path / "text").write_text("no database, but a text that is longer than its header" * 9)
    for file in (other, tmp_path / "text"):
        with pytest.raises(UserError, match=r"votes.*name what collect wrote"):
            open_votes(file)
    with pytest.raises(UserError, match="is a folder or a device; name a file of votes"):
        create(tmp_path, plan(), groups)
    with pytest.raises(FileNotFoundError, match="no such file of votes"):
        open_votes(tmp_path / "absent")


def test_a_folder_beside_the_votes_can_be_moved_with_them(tmp_path):
    inside, outside = tmp_path / "here" / "images", tmp_path / "elsewhere"
    images = tuple(ImageFile(str(folder), "1.png", "m", folder.name) for folder in (inside, outside))
    path = tmp_path / "here" / "votes.sqlite"
    create(path, plan(), [Group("a fox", images, init_image=images[0])]).close()
    moved = (tmp_path / "here").rename(tmp_path / "there")
    store = open_votes(moved / path.name)
    [group] = store.groups
    store.close()
    assert [image.folder for image in group.images] == [str(moved / "images"), str(outside)]
    assert group.init_image == group.images[0]


def test_votes_go_on_with_images_that_were_moved_or_renamed(tmp_path):
    path, groups = tmp_path / "votes.sqlite", make_groups(3)
    store = create(path, plan(), groups)
    judge(store, Showings(store), "anna", most=2)
    store.close()
    moved = [
        dataclasses.replace(
            group,
            images=tuple(
                dataclasses.replace(image, folder="/moved", file=f"new_{image.file}")
                for image in group.images
            ),
        )
        for group in groups
    ]
    create(path, plan(), moved).close()
    store = open_votes(path)
    assert (store.groups, len(store.votes())) == (moved, 2)
    store.close()


def test_a_file_of_the_first_format_is_read_and_goes_on(tmp_path):
    path, groups = tmp_path / "votes.sqlite", make_groups(3)
    store = create(path, plan(), groups)
    judge(store, Showings(store), "anna", most=2)
    store.close()
    with sqlite3.connect(path) as connection:
        for column in ("init_image", "disagreement"):
            connection.execute(f"ALTER TABLE groups DROP COLUMN {column}")
        connection.execute("PRAGMA user_version = 1")
    store = open_votes(path)
    assert (store.groups, len(store.votes())) == (groups, 2)
    store.close()
    image = groups[0].images[0]
    groups[0] = dataclasses.replace(
        groups[0], images=(dataclasses.replace(image, folder="/moved"), groups[0].images[1])
    )
    create(path, plan(), groups).close()
    store = open_votes(path)
    assert (store.groups, len(store.votes())) == (groups, 2)
    store.close()


def test_a_name_in_capitals_is_the_same_person(collect):
    store, _ = collect(make_groups(1))
    assert [store.join(name, name) for name in ("Anna Weiß", "ben", "ANNA WEISS", "anna weiß")] == [
        1,
        2,
        1,
        1,
    ]
    assert store.people() == {1: "Anna Weiß", 2: "ben"}


@each_row(
    ("name", "value", "says"),
    [
        ("repeat_share", 0.6, "--repeat_share=0.6: must be from 0 to 0.5"),
        ("check_share", -0.1, "--check_share=-0.1: must be from 0 to 0.5"),
        ("votes_per_group", -1, "--votes_per_group=-1: must be at least 0"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(name, value, says):
    with pytest.raises(UserError, match=says):
        plan(**{name: value})


def test_questions_by_name_and_of_ones_own():
    assert read_questions(["appeal", "colour=Which has the better colours?"]) == {
        "appeal": QUESTIONS["appeal"],
        "colour": "Which has the better colours?",
    }
    for texts, says in [
        (["generl"], "did you mean 'general'.*your own is NAME=TEXT"),
        (["a b=What?"], "NAME of letters and digits"),
        (["hands=Which", " of both?"], "in double quotes where TEXT has a comma"),
        (["x= "], "a question of your own is NAME=TEXT"),
        (["general", "general=Which?"], "general is there twice"),
        ([], "--questions: none given"),
    ]:
        with pytest.raises(UserError, match=says):
            read_questions(texts)
