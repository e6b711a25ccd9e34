"""Trains the emoji model's tokenizer: byte-pair encoding in CLIP's file format, from the emoji's captions.

    python examples/emoji/make_tokenizer.py --out build/emoji/tokenizer

Writes `vocab.json`, `merges.txt`, `tokenizer_config.json` and `special_tokens_map.json`, which
`transformers.CLIPTokenizer.from_pretrained` loads. The vocabulary is laid out as CLIP's: the 256 bytes, the
256 bytes that end a word, one token per merge, <|startoftext|>, <|endoftext|>. All bytes are there, so any
text encodes.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from absl import flags
from tokenizers import Regex, normalizers, pre_tokenizers

from dspo_jax import cli
from dspo_jax.data.sources import get_source
from dspo_jax.files import appear, refuse_existing, write_json, write_text

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 77
END_OF_WORD = "</w>"
# How transformers.CLIPTokenizer splits text before it applies the merges.
_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def byte_alphabet() -> list[str]:
    """The 256 bytes as characters, in the order of CLIP's vocabulary: first those that print themselves."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(others)]


def count_words(captions: Iterable[str]) -> Counter[tuple[str, ...]]:
    """Counts the words; a word is the tuple of its bytes, the last one with `END_OF_WORD`."""
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words: Counter[tuple[str, ...]] = Counter()
    for caption in captions:
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption)):
            words[(*word[:-1], word[-1] + END_OF_WORD)] += 1
    return words


def train_merges(words: Mapping[tuple[str, ...], int], num_merges: int) -> list[tuple[str, str]]:
    """Learns up to `num_merges` merges, each of the pair of neighbours that is most frequent by then.

    Among equally frequent pairs the longest wins, because most names' words occur once, and a token should
    rather complete one of them than start several; then the alphabet decides. (The trainer of the
    `tokenizers` library leaves ties to the order of a hash map: two runs give two vocabularies.)
    """
    words = dict(words)
    merges: list[tuple[str, str]] = []
    while len(merges) < num_merges:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], len("".join(pair)), pair))
        merges.append(best)
        words = {merge_pair(word, best): count for word, count in words.items()}
    return merges


def merge_pair(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Replaces every occurrence of `pair` in `word` by one token, from the left."""
    if pair[0] not in word:
        return word
    merged: list[str] = []
    i = 0
    while i < len(word):
        step = 2 if word[i : i + 2] == pair else 1
        merged.append("".join(word[i : i + step]))
        i += step
    return tuple(merged)


def write_tokenizer(out: Path, merges: list[tuple[str, str]]) -> None:
    """Writes CLIP's four files. Two merges that make the same token share its id."""
    alphabet = byte_alphabet()
    tokens = [
        *alphabet,
        *(c + END_OF_WORD for c in alphabet),
        *("".join(merge) for merge in merges),
        BOS,
        EOS,
    ]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": EOS,
        "pad_token": EOS,
    }
    special = {name: config[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    write_text(out / "vocab.json", json.dumps(vocab, ensure_ascii=False))
    write_text(out / "merges.txt", "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    write_json(out / "tokenizer_config.json", config)
    write_json(out / "special_tokens_map.json", special)


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    out = Path(flags.FLAGS.out)
    refuse_existing(out)
    captions = [pair.caption for pair in get_source("emoji_images").pairs("train")]
    merges = train_merges(count_words(captions), flags.FLAGS.vocab_size - 2 * 256 - 2)
    with appear(out) as partial:
        write_tokenizer(partial, merges)
    print(f"{out}: {len(merges)} merges from {len(captions)} captions")


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "Folder to write the tokenizer to.", required=True)
    flags.DEFINE_integer("vocab_size", 2048, "Number of tokens, with 512 bytes and 2 special ones.")
    cli.run(main)
