"""CLIP's tokenizers: their files, captions to token ids, and the digest by which shards are matched."""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dspo_jax.errors import UserError
from dspo_jax.models.config import NetworkConfig

if TYPE_CHECKING:  # it takes a second, and not every command reads a model
    from transformers import CLIPTokenizer

FILES = (
    *("tokenizer.json", "vocab.json", "merges.txt"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
"""The files that transformers reads a tokenizer from, of which a folder has some."""
_VOCABULARY = ("vocab.json", "merges.txt")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
# Errors of transformers at damaged files; tokenizers, written in Rust, raises Exception itself.
_OF_DAMAGED_FILES = (AttributeError, LookupError, RecursionError, TypeError, ValueError)
_SHORTEST = 3  # start, one token, end


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionTokenizer:
    """The tokenizer of one text encoder, which tokenises captions as diffusers' pipelines do.

    Attributes:
      folder: where it was read.
      tokenizer: transformers'.
      length: tokens of a chunk with its start, end and padding.
      max_chunks: chunks of a caption; those that it does not fill are padding between their start and end.
    """

    folder: Path
    tokenizer: "CLIPTokenizer"
    length: int
    max_chunks: int = 1

    @property
    def places(self) -> int:
        """Tokens of the longest caption that is not cut, without starts and ends."""
        return self.max_chunks * (self.length - 2)

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest caption that is not cut, with one start and one end."""
        return self.places + 2

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Returns token ids [N, max_chunks * length] int32 of N captions; longer ones are cut.

        Source: AUTOMATIC1111's web UI (sd_hijack_clip.py), but for its search of a comma to part at: chunks
        of 75 tokens, each between a start and an end of its own and padded after it, side by side.
        """
        first, end, padding = (getattr(self.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad"))
        ids = np.full((len(captions), self.max_chunks, self.length), padding, np.int32)
        ids[:, :, 0] = first
        for of_caption, found in zip(ids, self._tokenize(captions), strict=True):
            for number, chunk in enumerate(of_caption):
                tokens = found[number * (self.length - 2) :][: self.length - 2]
                chunk[1 : 1 + len(tokens)] = tokens
                chunk[1 + len(tokens)] = end
        return ids.reshape(len(captions), -1)

    def find_long(self, captions: Sequence[str]) -> list[str]:
        """Returns the captions that are cut."""
        found = zip(captions, self._tokenize(captions), strict=True)
        return [caption for caption, tokens in found if len(tokens) > self.places]

    def _tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each caption, of any number, without start and end."""
        if not captions:
            return []
        texts = [self._write_out(caption) for caption in captions]
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    @functools.cached_property
    def _inversions(self) -> dict[str, str]:
        """Token of a textual inversion with several vectors -> the tokens of all of them."""
        added = self.tokenizer.added_tokens_encoder
        vectors = {}
        for token in added:
            numbered = (f"{token}_{number}" for number in itertools.count(1))
            if more := list(itertools.takewhile(added.__contains__, numbered)):
                vectors[token] = " ".join([token, *more])
        return vectors

    def _write_out(self, caption: str) -> str:
        """Returns a caption in which textual inversions stand with all their vectors.

        Source: diffusers' TextualInversionLoaderMixin.maybe_convert_prompt.
        """
        if not self._inversions:
            return caption
        present = set(self.tokenizer.tokenize(caption))
        for token, vectors in self._inversions.items():
            if token in present:
                caption = caption.replace(token, vectors)
        return caption

    def digest(self) -> str:
        """Hashes tokens and merges (SHA-256): the same in whichever files they are saved."""
        return _digest(self.tokenizer)

    def digest_files(self) -> str | None:
        """Hashes vocab.json and merges.txt (SHA-256); None where the tokenizer has more tokens than these.

        Shards that were encoded before dspo_jax wrote `digest` have it in their manifest.
        """
        from transformers import CLIPTokenizer

        files = [self.folder / name for name in _VOCABULARY]
        if not all(file.is_file() for file in files):
            return None
        special = {key: getattr(self.tokenizer, key) for key in _SPECIAL}
        if _digest(CLIPTokenizer(*map(str, files), **special)) != self.digest():
            return None
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def is_tokenizer(folder: Path) -> bool:
    """Returns whether the files of a CLIP tokenizer are there, in either form."""
    return (folder / "tokenizer.json").is_file() or all((folder / name).is_file() for name in _VOCABULARY)


def open_tokenizer(folder: Path, vocab_size: int) -> "CLIPTokenizer":
    """Reads a tokenizer from tokenizer.json, or from vocab.json and merges.txt where that is not there.

    Args:
      folder: of the tokenizer.
      vocab_size: tokens that the text encoder has embeddings of.

    Raises:
      FileNotFoundError: the folder has neither.
      UserError: they are damaged, of another kind of tokenizer, or have tokens beyond `vocab_size`.
    """
    from transformers import CLIPTokenizer

    if not is_tokenizer(folder):
        missing = next(name for name in _VOCABULARY if not (folder / name).is_file())
        raise FileNotFoundError(
            f"{folder / missing}: no such file; fetch the model again: a CLIP tokenizer is vocab.json and "
            "merges.txt, or tokenizer.json"
        )
    names = "tokenizer.json is" if (folder / "tokenizer.json").is_file() else "vocab.json and merges.txt are"
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, _OF_DAMAGED_FILES):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder}: {names} no CLIP tokenizer ({reason}); fetch it again") from error
    own = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    for key in ("bos_token", "eos_token"):
        if getattr(tokenizer, key) not in own:
            reason = f"its {key} {getattr(tokenizer, key)!r} is not in the vocabulary"
            raise UserError(f"{folder}: {names} no CLIP tokenizer ({reason}); fetch it again")
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: pad_token = None: captions are padded to one length; "
            f"allowed: a token of the vocabulary, {tokenizer.eos_token!r} in most models"
        )
    highest, token = max((number, token) for token, number in tokenizer.get_vocab().items())
    if highest >= vocab_size:
        raise UserError(
            f"{folder}: token {token!r} has the id {highest}, but the text encoder has embeddings of "
            f"{vocab_size} tokens (vocab_size); save it with resized embeddings, or take the tokenizer of "
            "the same model"
        )
    return tokenizer


def read_tokenizer(folder: Path, text_config: NetworkConfig) -> CaptionTokenizer:
    """Returns the tokenizer of the text encoder with `text_config`.

    Raises:
      FileNotFoundError, UserError: as `open_tokenizer`; a `model_max_length` that the encoder cannot take.
    """
    from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

    tokenizer = open_tokenizer(folder, text_config["vocab_size"])
    length, positions = tokenizer.model_max_length, text_config["max_position_embeddings"]
    if isinstance(length, int | float) and length >= VERY_LARGE_INTEGER:  # transformers' word for none
        length = positions
    if type(length) is not int or not _SHORTEST <= length <= positions:
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: model_max_length = {length!r}; allowed: integers from "
            f"{_SHORTEST} to {positions}, the positions of the text encoder (max_position_embeddings)"
        )
    return CaptionTokenizer(folder, tokenizer, length)


def _digest(tokenizer: "CLIPTokenizer") -> str:
    special = {getattr(tokenizer, key) for key in _SPECIAL}
    # Whether a special token is normalised differs between versions of the same published tokenizer.
    added = [
        (number, token.content, token.single_word, token.lstrip, token.rstrip, token.normalized)
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.content not in special
    ]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    content = [sorted(tokenizer.get_vocab().items()), merges, added, ends]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
