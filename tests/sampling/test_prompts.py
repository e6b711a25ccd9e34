"""Prompts from texts and files of every kind."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tables import each_row

from dspo_jax.sampling.prompts import Prompt, read_prompts


def texts(path):
    return [prompt.text for prompt in read_prompts(str(path))]


@each_row("text", [" a cat ", "a cat, from cats.json", "a .txt"])
def test_a_text_is_one_prompt(text):
    assert read_prompts(text) == [Prompt(text.strip())]


def test_lines(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\n two \n", encoding="utf-8")
    assert texts(tmp_path / "prompts.txt") == ["one", "two"]


@each_row(
    ("name", "content"),
    [
        ("p.jsonl", '{"prompt": "one"}\n{"prompt": "", "id": 3}\n"three"\n'),
        ("p.json", '["one", {"caption": ""}, {"text": "three"}]'),
        ("p.tsv", "Prompt\tCategory\none\tA\n\tB\nthree\tC\n"),
        ("p.csv", 'id,Prompt\n1,one\n2,\n3,"three"\n'),
    ],
)
def test_files(tmp_path, name, content):
    """An empty prompt is one, where it is not an empty line."""
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert texts(tmp_path / name) == ["one", "", "three"]


@each_row(
    ("name", "content", "message"),
    [
        ("p.csv", "prompt\na cat, sitting\n", "line 2: more fields than the first line has names; quote"),
        ("p.tsv", "Prompt\na cat\tsitting\n", "line 2: more fields than the first line has names; take tabs"),
        ("p.csv", 'prompt\none\n"two\nthree\n', "after line 2: not CSV"),
    ],
)
def test_a_table_that_would_lose_text_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        read_prompts(str(tmp_path / name))


def test_unicodes_line_separators_are_no_ends_of_lines(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "one\u2028line"}\n"two\u0085"\n', encoding="utf-8")
    (tmp_path / "p.txt").write_text("one\u2029line\ntwo\n", encoding="utf-8")
    assert texts(tmp_path / "p.jsonl") == ["one\u2028line", "two"]
    assert texts(tmp_path / "p.txt") == ["one\u2029line", "two"]


def test_quotes_in_a_tsv_are_part_of_the_prompt(tmp_path):
    (tmp_path / "p.tsv").write_text('Prompt\tNote\n"GO" on a sign\tx\nthe word "STOP\ty\n', encoding="utf-8")
    assert texts(tmp_path / "p.tsv") == ['"GO" on a sign', 'the word "STOP']


@each_row(
    ("name", "content"),
    [
        ("p.jsonl", '{"prompt": "one", "category": "A"}\n"two"'),
        ("p.tsv", "Prompt\tCategory\tNote\none\tA\tx\ntwo\t\tx\n"),
    ],
)
def test_categories(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_prompts(str(tmp_path / name)) == [Prompt("one", category="A"), Prompt("two")]


def test_parquet(tmp_path):
    table = pa.table({"caption": ["one", "two"], "jpg_0": [b"1", b"2"]})
    pq.write_table(table, tmp_path / "p.parquet")
    assert texts(tmp_path / "p.parquet") == ["one", "two"]
    table = pa.table({"jpg_0": [b"1", b"2"]})
    pq.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=r"row 0: no text under .* \(found: jpg_0, a NoneType\)"):
        texts(tmp_path / "p.parquet")


def test_parquet_of_every_kind_of_text(tmp_path):
    category = pa.array(["one", "two"]).dictionary_encode()
    for column in (category, category.cast(pa.string()).cast(pa.large_string())):
        pq.write_table(pa.table({"Prompt": column, "category": [1, 2]}), tmp_path / "p.parquet")
        assert read_prompts(str(tmp_path / "p.parquet")) == [
            Prompt("one", None, "1"),
            Prompt("two", None, "2"),
        ]
    for column, found in (([b"one"], "bytes"), ([1], "int"), ([["one"]], "list")):
        pq.write_table(pa.table({"prompt": column}), tmp_path / "p.parquet")
        with pytest.raises(ValueError, match=rf"row 0: no text under .*found: prompt, a {found}\)"):
            texts(tmp_path / "p.parquet")
    pq.write_table(pa.table({"prompt": pa.array([b"caf\xe9"]).view(pa.string())}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=r"p.parquet: not UTF-8"):
        texts(tmp_path / "p.parquet")


def test_images_to_start_from_are_relative_to_the_file(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").touch()
    path = tmp_path / "edits.jsonl"
    path.write_text(json.dumps({"prompt": "red", "image": "images/a.png"}), encoding="utf-8")
    assert read_prompts(str(path)) == [Prompt("red", tmp_path / "images" / "a.png")]
    path.write_text(json.dumps({"prompt": "red", "image": "images/b.png"}), encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"edits.jsonl: line 1: image = 'images/b.png': no such file"):
        read_prompts(str(path))


@each_row(
    ("name", "content", "message"),
    [
        ("p.txt", "\n", "no prompt in it"),
        ("p.json", "[]", "no prompt in it"),
        ("p.json", "{}", "holds a dict, but must be a list of prompts"),
        ("p.json", "[", r"the file: not JSON"),
        ("p.jsonl", '"a"\n{', r"line 2: not JSON"),
        ("p.jsonl", "7", r"line 1: 7: must be a prompt"),
        ("p.jsonl", '{"promt": "a"}', r"line 1: no text under prompt, caption, text \(found: promt, a str\)"),
        ("p.jsonl", '{"prompt": null}', r"line 1: no text under .* \(found: prompt, a NoneType\)"),
        (
            "p.jsonl",
            '{"prompt": "a", "image": {"bytes": 1}}',
            "line 1: image is a dict, but must be the path",
        ),
        ("p.csv", "promt\na\n", r"line 2: no text under prompt, caption, text \(found: promt, a str\)"),
        ("p.parquet", "a", "not parquet"),
    ],
)
def test_a_file_that_cannot_be_understood_is_refused_by_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / name))


HALF = "a fox \\ud83e"  # as JSON writes it


@each_row(
    ("name", "content", "message"),
    [
        ("p.jsonl", f'"one"\n{{"prompt": "{HALF}"}}', "p.jsonl: line 2: .* has half a character in it"),
        ("p.jsonl", f'"one"\n"{HALF}"', "p.jsonl: line 2: .* has half a character in it"),
        ("p.jsonl", f'{{"prompt": "a", "category": "{HALF}"}}', "p.jsonl: line 1: .* has half a character"),
        ("p.json", f'["one", "{HALF}"]', "p.json: entry 1: .* has half a character in it"),
        ("p.json", '["one", "two\\u0000"]', "p.json: entry 1: .* has a null character in it"),
        ("p.txt", "one\ntwo\0", "p.txt: line 2: .* has a null character in it"),
        ("p.txt", "a cat".encode("utf-16"), "p.txt: not UTF-8"),
        ("p.txt", "café".encode("latin-1"), "p.txt: not UTF-8"),
        ("p.csv", "prompt\ncafé".encode("latin-1"), "p.csv: not UTF-8"),
        ("p.jsonl", "[" * 100_000, "p.jsonl: line 1: not JSON"),
        ("p.jsonl", "7" * 5000, "p.jsonl: line 1: not JSON"),
    ],
)
def test_what_is_no_text_is_refused_by_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(str(tmp_path / name))
    str(caught.value).encode()  # so that it can be printed


def test_bytes_on_the_command_line_that_are_no_utf_8_are_refused():
    with pytest.raises(ValueError, match=r"--prompts: 'caf\\udce9' has half a character in it"):
        read_prompts(os.fsdecode(b"caf\xe9"))


def test_a_missing_file_and_an_empty_text_are_refused():
    with pytest.raises(FileNotFoundError, match=r"--prompts=missing\.txt: no such file"):
        read_prompts("missing.txt")
    with pytest.raises(ValueError, match="--prompts: empty"):
        read_prompts(" ")


def test_the_published_sets():
    folder = os.environ.get("DSPO_TEST_DATA")
    if not folder:
        pytest.skip("DSPO_TEST_DATA is not set")
    parti = read_prompts(str(Path(folder) / "PartiPrompts.tsv"))
    assert (len(parti), parti[1]) == (1632, Prompt("element", category="Abstract"))
    assert len(texts(Path(folder) / "imagereward_benchmark_prompts.json")) == 100
