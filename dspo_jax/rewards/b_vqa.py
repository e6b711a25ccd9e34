"""B-VQA: whether an image shows what its prompt's noun phrases say, by BLIP's answers to questions.

Source: T2I-CompBench (Huang et al. 2023, arXiv:2307.06350), BLIPvqa_eval of its released code: each phrase is
the question "PHRASE?", its score P(yes) / (P(yes) + P(no)) of the answer's first word, and an image's score
the product over the phrases. The released code rounds each factor to four digits, which is not done here.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dspo_jax import json_files
from dspo_jax.errors import UserError
from dspo_jax.models.model import Params, build_model
from dspo_jax.rewards import blip_weights
from dspo_jax.rewards.device_pixels import STRETCHED
from dspo_jax.rewards.network import RewardNetwork
from dspo_jax.weights.layout import torch_shapes
from dspo_jax.weights.torch_files import open_weights

_NAME = "b_vqa"
_CLASS = "BLIP_VQA"
_TOKENS = 35  # of a question
_PHRASES = 8  # of a prompt; later ones are not asked for
_NO_THINGS = ("top", "the side", "the left", "the right")  # which the released code leaves out
_SPACY_MODEL = "en_core_web_sm"
PHRASES = "phrases.json"

Tokens = tuple[jax.Array, jax.Array, jax.Array]


def load(folder: Path) -> RewardNetwork:
    """Returns the reward of the weights that `write_weights` put into `folder`.

    Args:
      folder: holds config.json, model.safetensors, vocab.txt and reward.json; with phrases.json, an object
        of prompts with a list of phrases each, these are asked for. Otherwise spaCy finds them.

    Raises:
      FileNotFoundError: one of the files is missing.
      UserError: they are of another reward or do not fit each other; there is neither phrases.json nor spaCy.
    """
    model, params, tokenizer, source = blip_weights.read_folder(folder, _NAME, _CLASS)
    find_phrases, by = _open_phrases(folder / PHRASES)
    vocabulary = tokenizer.get_vocab()
    missing = [word for word in ("yes", "no") if word not in vocabulary]
    if missing:
        raise UserError(f"{folder / 'vocab.txt'}: has no word {missing[0]!r}; convert the weights again")
    yes, no, start, question = (vocabulary[word] for word in ("yes", "no", "[DEC]", "[ENC]"))

    def network(params: Params, pixels: jax.Array, tokens: Tokens) -> jax.Array:
        ids, mask, asked = tokens
        logits = model.apply(params, pixels, ids, mask, start)
        answers = jax.nn.sigmoid(logits[..., yes] - logits[..., no])
        return jnp.where(asked, answers, 1.0).prod(1)

    def tokenize(prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        phrases = [find_phrases(prompt)[:_PHRASES] for prompt in prompts]
        asked = np.arange(_PHRASES)[None] < np.array([[len(each)] for each in phrases])
        questions = [make_question(text) for each in phrases for text in [*each, *[""] * _PHRASES][:_PHRASES]]
        encoded = tokenizer(
            questions, padding="max_length", truncation=True, max_length=_TOKENS, return_tensors="np"
        )
        shape = (len(prompts), _PHRASES, _TOKENS)
        ids = encoded["input_ids"].astype(np.int32).reshape(shape)
        ids[..., 0] = question
        return ids, encoded["attention_mask"].astype(bool).reshape(shape), asked

    size = model.config["vision_config"]["image_size"]
    return RewardNetwork(_NAME, f"{source}, phrases by {by}", params, network, STRETCHED, size, tokenize)


def make_question(phrase: str) -> str:
    """Returns the question for a phrase, in the form that BLIP's released code gives it."""
    text = re.sub(r"([.!\"()*#:;~])", "", f"{phrase}?".lower()).rstrip(" ")
    return " ".join(text.split(" ")[:50])


def _open_phrases(file: Path) -> tuple[Callable[[str], Sequence[str]], str]:
    """Returns the function from a prompt to its phrases, and what finds them."""
    if not file.is_file():
        return _open_spacy(file)
    given = json_files.read_object(file)
    for prompt, phrases in given.items():
        if not isinstance(phrases, list) or not all(isinstance(phrase, str) for phrase in phrases):
            raise UserError(f"{file}: {prompt!r}: must be a list of phrases")

    def look_up(prompt: str) -> Sequence[str]:
        if prompt not in given:
            raise UserError(f"{file}: has no phrases of the prompt {prompt!r:.200}; add them")
        return given[prompt]

    digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()
    return look_up, f"{PHRASES} {digest[:8]}"


def _open_spacy(file: Path) -> tuple[Callable[[str], Sequence[str]], str]:
    """Returns the noun chunks of spaCy's small English model, as the released code takes them."""
    advice = (
        f"pip install spacy and python -m spacy download {_SPACY_MODEL}, or write {file}: an object of "
        "prompts with a list of phrases each"
    )
    try:
        import spacy
    except ImportError as error:
        raise UserError(
            f"reward {_NAME}: finds noun phrases with spaCy, which is absent; {advice}"
        ) from error
    try:
        parse = spacy.load(_SPACY_MODEL)
    except OSError as error:
        raise UserError(f"reward {_NAME}: spaCy has no model {_SPACY_MODEL}; {advice}") from error

    @functools.cache
    def find(prompt: str) -> Sequence[str]:
        return [chunk.text for chunk in parse(prompt).noun_chunks if chunk.text not in _NO_THINGS]

    return find, f"spaCy {_SPACY_MODEL} {parse.meta['version']}"


def write_weights(weights: Path, out: Path, tokenizer: Path | None, source: str) -> None:
    """Writes the folder that the reward is loaded from.

    Args:
      weights: the published model_base_vqa_capfilt_large.pth, or a safetensors file of the same names.
      out: must not exist; appears when it is complete.
      tokenizer: BERT's vocab.txt or tokenizer.json, or a folder with one, such as that of bert-base-uncased.
      source: what the user calls the weights, which tables print.

    Raises:
      FileNotFoundError: no such weights or vocabulary.
      UserError: a tensor is missing or has another shape; the vocabulary is another one.
      OSError: the disk is full.
    """
    vocabulary = blip_weights.find_vocabulary(_NAME, tokenizer)
    stored = open_weights(weights)
    bias = "text_decoder.cls.predictions.decoder.bias"  # which is stored under another name as well
    if bias not in stored and (other := stored.get("text_decoder.cls.predictions.bias")):
        stored[bias] = other
    model = build_model(_CLASS, blip_weights.find_config(weights, stored, _CLASS))
    blip_weights.check_tensors(weights, stored, model)
    kept = {name: stored[name] for name in torch_shapes(model)}
    blip_weights.write_folder(out, _NAME, source, weights, vocabulary, model, kept)
