"""T5's tokenizer, Stable Diffusion 3's third: captions to token ids of one length."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dspo_jax.errors import UserError

if TYPE_CHECKING:  # it takes a second, and not every command reads a model
    from tokenizers import Tokenizer

_FILE = "tokenizer.json"
_PADDING, _END = 0, 1  # of every T5


@dataclasses.dataclass(frozen=True, eq=False)
class T5Tokenizer:
    """A T5's tokenizer, which ends and pads captions as diffusers' pipelines do.

    Attributes:
      folder: where it was read.
      tokenizer: of the library tokenizers.
      length: tokens of a caption with its end and padding, which the encoder attends to like all others: it
        must be the same in training and drawing.
    """

    folder: Path
    tokenizer: "Tokenizer"
    length: int

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest caption that is not cut, with its end."""
        return self.length

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Returns token ids [N, length] int32 of N captions; longer ones are cut before their end token."""
        ids = np.full((len(captions), self.length), _PADDING, np.int32)
        for of_caption, found in zip(ids, self._tokenize(captions), strict=True):
            tokens = [*found[: self.length - 1], _END]
            of_caption[: len(tokens)] = tokens
        return ids

    def find_long(self, captions: Sequence[str]) -> list[str]:
        """Returns the captions that are cut."""
        found = zip(captions, self._tokenize(captions), strict=True)
        return [caption for caption, tokens in found if len(tokens) >= self.length]

    def _tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each caption, of any number, without the end."""
        return [each.ids for each in self.tokenizer.encode_batch(list(captions), add_special_tokens=False)]

    def digest(self) -> str:
        """Hashes what turns captions into ids (SHA-256), without the settings of length."""
        content = json.loads(self.tokenizer.to_str())
        parts = {key: content[key] for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_t5_tokenizer(folder: Path, vocab_size: int, length: int) -> T5Tokenizer:
    """Reads a T5's tokenizer from its tokenizer.json, which needs no other file.

    Args:
      folder: of the tokenizer.
      vocab_size: tokens that the text encoder has embeddings of.
      length: of the captions, in tokens.

    Raises:
      FileNotFoundError: the folder has no tokenizer.json.
      UserError: it is damaged, of another kind of tokenizer, or has tokens beyond `vocab_size`.
    """
    from tokenizers import Tokenizer

    file = folder / _FILE
    if not file.is_file():
        fix = "fetch the model again"
        if (folder / "spiece.model").is_file():
            fix = (
                "spiece.model alone is not read; write this file beside it: "
                "python -c 'from transformers import T5TokenizerFast as T; "
                f'T.from_pretrained("{folder}").save_pretrained("{folder}")\''
            )
        raise FileNotFoundError(f"{file}: no such file; {fix}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # written in Rust, it raises no other class
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: no tokenizer ({reason}); fetch it again") from error
    found = [tokenizer.id_to_token(number) for number in (_PADDING, _END)]
    if found != ["<pad>", "</s>"]:
        raise UserError(f"{file}: no tokenizer of T5: its first tokens are {found}, not padding and end")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab_size:
        raise UserError(
            f"{file}: has a token with the id {highest}, but the text encoder has embeddings of {vocab_size} "
            "tokens (vocab_size); take the tokenizer of the same model"
        )
    return T5Tokenizer(folder, tokenizer, length)
