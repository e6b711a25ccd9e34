"""The emoji model's tokenizer is in CLIP's format, covers any text, and comes out the same every time."""

import string

import pytest
from tables import each_row
from transformers import CLIPTokenizer

from examples.emoji.make_tokenizer import byte_alphabet, count_words, train_merges, write_tokenizer

CAPTIONS = ["smiling cat face", "cat face", "smiling face", "animals & nature: cat", "clock face four-thirty"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Trained on a handful of captions."""
    out = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(out, train_merges(count_words(CAPTIONS), 30))
    return CLIPTokenizer.from_pretrained(out)


def test_the_bytes_are_a_permutation_in_clips_order():
    alphabet = byte_alphabet()
    assert len(set(alphabet)) == 256
    assert (alphabet[0], alphabet[93], alphabet[188]) == ("!", "~", "Ā")
    assert all(not character.isspace() for character in alphabet)


def test_the_vocabulary_is_laid_out_as_clips(tokenizer):
    assert len(tokenizer) == 256 + 256 + 30 + 2
    assert tokenizer.convert_tokens_to_ids(["!", "!</w>"]) == [0, 256]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (542, 543)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.model_max_length == 77


def test_captions_are_framed_and_padded(tokenizer):
    ids = tokenizer(["Cat face", "x " * 100], padding="max_length", truncation=True).input_ids
    assert [len(row) for row in ids] == [77, 77]
    assert ids[0][:4] == [542, *tokenizer.convert_tokens_to_ids(["cat</w>", "face</w>"]), 543]
    assert set(ids[0][4:]) == {543}
    assert (ids[1][0], ids[1][-1]) == (542, 543)


@each_row("text", [*CAPTIONS, "rescue worker's helmet", "zürich 日本 😀", string.punctuation])
def test_any_text_survives_the_round_trip(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_frequent_pairs_merge_first_and_ties_favour_the_longest():
    words = {("a", "b</w>"): 3, ("c", "d", "e</w>"): 2, ("x", "y</w>"): 2}
    assert train_merges(words, 9) == [("a", "b</w>"), ("x", "y</w>"), ("d", "e</w>"), ("c", "de</w>")]


def test_the_order_of_the_words_does_not_matter():
    words = count_words(CAPTIONS)
    assert train_merges(dict(reversed(words.items())), 30) == train_merges(words, 30)
