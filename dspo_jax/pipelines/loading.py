"""Reads a diffusers folder or a training workdir as a `Pipeline`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import logging

from dspo_jax import schema
from dspo_jax.errors import UserError
from dspo_jax.json_files import JsonObject, shown
from dspo_jax.models import lora
from dspo_jax.models.model import Params
from dspo_jax.pipelines.conditioning import NO_TOKEN, stack_tokens
from dspo_jax.pipelines.families import FAMILIES
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.pipelines.stable_diffusion_3 import T5, T5_LENGTH
from dspo_jax.pipelines.t5_tokenizer import T5Tokenizer, read_t5_tokenizer
from dspo_jax.pipelines.tokenizers import CaptionTokenizer, read_tokenizer
from dspo_jax.samplers.spacing import check_sampler_config
from dspo_jax.schema import flag
from dspo_jax.weights import file_kinds, saved_params
from dspo_jax.weights.components import read_models
from dspo_jax.weights.lora_files import open_lora
from dspo_jax.weights.model_dir import find_model, read_json
from dspo_jax.weights.saved_params import read_run_config

LONGEST_SEQUENCE = 512
"""Tokens of a caption that diffusers' `StableDiffusion3Pipeline` takes at most."""
_INDEX_KEYS = {"force_zeros_for_empty_prompt": flag(True, null=True)}


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A model with LoRA files added to its weights.

    Attributes:
      model: a folder, workdir or hub id.
      loras: each `FILE` or `FILE:WEIGHT`, as `weights.lora_files.open_lora` takes it.
    """

    model: str | Path
    loras: tuple[str, ...]

    def __str__(self) -> str:
        """Names the model and then the files, as a manifest does."""
        return ", ".join([str(self.model), *self.loras])


def load_pipeline(
    path: str | Path | Adapted,
    *,
    max_chunks: int | None = None,
    clip_skip: int | None = None,
    max_sequence_length: int | None = None,
) -> Pipeline:
    """Reads a model directory: a diffusers folder, or a training workdir (its base with trained weights).

    Args:
      path: the folder, or the hub id of one. Of a workdir the newest checkpoint is read, of `WORKDIR@STEP`
        and `WORKDIR@best` the one that is named (`weights.saved_params.split_run`). `Adapted` is such a model
        with LoRA files.
      max_chunks: see `Pipeline`; None is what the run was trained with, or 1 of a plain folder.
      clip_skip: in the same way.
      max_sequence_length: in the same way; of a plain folder of Stable Diffusion 3 256, as in diffusers.

    Raises:
      FileNotFoundError: no such folder, or a file of it is missing.
      UserError: a pipeline, component or config value that is not supported; a run that was trained with
        another `max_chunks`, `clip_skip` or `max_sequence_length`; a LoRA of another model.
    """
    text: Mapping[str, int | None] = {
        "max_chunks": max_chunks,
        "clip_skip": clip_skip,
        "max_sequence_length": max_sequence_length,
    }
    if isinstance(path, Adapted):
        pipe = load_pipeline(path.model, **text)
        networks = {name: pipe.networks[name] for name in pipe.components}
        return dataclasses.replace(pipe, loras=tuple(open_lora(text, networks) for text in path.loras))
    trained: Mapping[str, Params] = {}
    step, run = None, saved_params.split_run(path)
    if run is None:
        path = find_model(path)
    else:
        of_run = read_run_config(run[0], "model")
        text = _text_of_run(run[0], of_run, text)
        path = find_model(of_run["model"])
        trained, step = saved_params.restore_params(run[0] / "checkpoints", run[1])
        trained = lora.scaled(trained, saved_params.read_scale(of_run))
        logging.info("%s: %s from step %d over %s", run[0], " and ".join(trained), step, path)
    index_file = path / "model_index.json"
    if not index_file.is_file():
        raise FileNotFoundError(
            f"{path}: neither a diffusers folder (no model_index.json) nor a training workdir "
            f"(no checkpoints){file_kinds.explain(path)}"
        )
    index = read_json(index_file)
    schema.check(str(index_file), index, _INDEX_KEYS)
    class_name = index.get("_class_name")
    if not isinstance(class_name, str) or class_name not in FAMILIES:
        raise UserError(
            f"{index_file}: _class_name = {shown(class_name)} is not supported; allowed: "
            f"{', '.join(FAMILIES)}"
        )
    family = FAMILIES[class_name]
    models = read_models(path, family.classes)
    for name, classes in family.classes.items():
        if name not in models and name in family.optional:
            continue
        if name not in models or models[name].class_name not in classes:
            found = models[name].class_name if name in models else "absent"
            raise UserError(
                f"{index_file}: {name} is {found}, but a {class_name} needs {' or '.join(classes)}"
            )
    scheduler_file = path / "scheduler" / "scheduler_config.json"
    scheduler_config = read_json(scheduler_file)
    try:
        schedule = family.process.from_config(scheduler_config)
        check_sampler_config(scheduler_config)
    except UserError as error:
        raise UserError(f"{scheduler_file}: {error}") from error
    tokenizers = tuple(
        read_tokenizer(_tokenizer_folder(path, name), models[name].settings)
        for name in family.text_encoders
        if name != T5
    )
    _check_lengths(*tokenizers)
    all_tokenizers: list[CaptionTokenizer | T5Tokenizer] = [*tokenizers]
    t5_tokenizer = None
    if T5 in models:
        vocab_size = models[T5].settings["vocab_size"]
        t5_tokenizer = read_t5_tokenizer(_tokenizer_folder(path, T5), vocab_size, T5_LENGTH)
        all_tokenizers.append(t5_tokenizer)
    pipe = Pipeline(
        path=path,
        family=family,
        networks=models,
        tokenizers=tokenizers,
        empty_tokens=stack_tokens([tokenizer([""]) for tokenizer in all_tokenizers])[0],
        schedule=schedule,
        scheduler_config=scheduler_config,
        zero_empty_captions=family.zero_empty_captions(index),
        trained=trained,
        step=step if trained else None,
        t5_tokenizer=t5_tokenizer,
    )
    _check_sizes(pipe)
    return with_text(pipe, **text)


def with_text(
    pipe: Pipeline,
    max_chunks: int | None = None,
    clip_skip: int | None = None,
    max_sequence_length: int | None = None,
) -> Pipeline:
    """Returns a pipeline that reads captions in another way; see `Pipeline`. None is the default.

    Raises:
      UserError: it has no such layer, or reads a fixed one; it reads captions in one chunk alone, or a fixed
        number of tokens, or not so many.
    """
    max_chunks, clip_skip = (1 if value is None else value for value in (max_chunks, clip_skip))
    if max_chunks < 1:
        raise UserError(f"{pipe.path}: max_chunks = {max_chunks}: must be at least 1")
    conditioner = pipe.family.conditioner
    if max_chunks > 1 and conditioner.longer:
        raise UserError(f"{pipe.path}: max_chunks = {max_chunks}: must be 1: {conditioner.longer}")
    if clip_skip != 1 and conditioner.fixed_layer:
        allowed = f"must be 1, as {conditioner.name} always reads {conditioner.fixed_layer}"
        raise UserError(f"{pipe.path}: clip_skip = {clip_skip}: {allowed}")
    if not conditioner.fixed_layer:
        layers = min(network.settings["num_hidden_layers"] for network in pipe.text_encoders.values())
        if not 1 <= clip_skip <= layers:
            allowed = f"must be from 1, the last layer, to {layers}, the first of this text encoder"
            raise UserError(f"{pipe.path}: clip_skip = {clip_skip}: {allowed}")
    pipe = dataclasses.replace(
        pipe,
        max_chunks=max_chunks,
        clip_skip=clip_skip,
        tokenizers=tuple(dataclasses.replace(each, max_chunks=max_chunks) for each in pipe.tokenizers),
        empty_tokens=np.tile(np.split(pipe.empty_tokens, pipe.max_chunks, axis=1)[0], max_chunks),
    )
    return _with_length(pipe, max_sequence_length)


def _with_length(pipe: Pipeline, length: int | None) -> Pipeline:
    """Returns a pipeline whose T5 reads so many tokens of a caption."""
    conditioner = pipe.family.conditioner
    if conditioner.default_length is None:
        if length is not None:
            allowed = f"must be left out, as {conditioner.name} has no T5"
            raise UserError(f"{pipe.path}: max_sequence_length = {length}: {allowed}")
        return pipe
    length = conditioner.default_length if length is None else length
    lowest = 1 if T5 in pipe.networks else 0
    if not lowest <= length <= LONGEST_SEQUENCE:
        allowed = f"must be from {lowest} to {LONGEST_SEQUENCE}, the most that diffusers' pipeline takes"
        raise UserError(f"{pipe.path}: max_sequence_length = {length}: {allowed}")
    pipe = dataclasses.replace(pipe, max_sequence_length=length)
    if T5 not in pipe.networks:
        return pipe
    *clips, of_t5 = (row[row != NO_TOKEN] for row in pipe.empty_tokens)
    of_t5 = np.trim_zeros(of_t5, "b")[:length]  # 0 is T5's padding
    of_t5 = np.pad(of_t5, (0, length - len(of_t5)))
    return dataclasses.replace(
        pipe,
        t5_tokenizer=pipe.t5_tokenizer and dataclasses.replace(pipe.t5_tokenizer, length=length),
        empty_tokens=stack_tokens([row[None] for row in (*clips, of_t5)])[0],
    )


def _text_of_run(run: Path, config: JsonObject, asked: Mapping[str, int | None]) -> dict[str, int | None]:
    """Returns how a run reads captions, which earlier versions could not change; refuses another wish."""
    trained = {"max_chunks": 1, "clip_skip": 1, "max_sequence_length": None}
    trained |= {key: value for key, value in config.get("text", {}).items() if key in asked}
    for key, value in asked.items():
        if trained[key] is None:  # `with_text` knows whether the model reads it
            trained[key] = value
        if value not in (None, trained[key]):
            raise UserError(
                f"{run}: was trained with {key} = {trained[key]}, but {key} = {value} is asked for; leave it "
                f"out, or take {trained[key]}"
            )
    return trained


def _tokenizer_folder(path: Path, text_encoder: str) -> Path:
    return path / text_encoder.replace("text_encoder", "tokenizer")


def _check_sizes(pipe: Pipeline) -> None:
    """Refuses a folder whose denoiser takes something else than its VAE and text encoders give."""
    if pipe.shift_factor and not pipe.family.shifts_latents:
        raise UserError(
            f"{pipe.path / 'vae' / 'config.json'}: shift_factor = {pipe.shift_factor}, which this class of "
            "pipelines does not read; use the VAE that the denoiser was made for"
        )
    settings = pipe.networks[pipe.denoiser].settings
    encoders = {name: model.settings for name, model in pipe.text_encoders.items()}
    needed = pipe.family.conditioner.needed_settings(settings, encoders, pipe.latent_channels)
    kind = "UNet" if pipe.denoiser == "unet" else pipe.denoiser
    for key, value in needed.items():
        if settings[key] != value:
            file = pipe.path / pipe.denoiser / "config.json"
            raise UserError(
                f"{file}: {key} = {settings[key]!r}, but text to image with the VAE and text encoders of "
                f"this folder needs {value!r}; use a {kind} that was made for them"
            )


def _check_lengths(first: CaptionTokenizer, *others: CaptionTokenizer) -> None:
    """Refuses text encoders whose states cannot lie side by side."""
    for other in others:
        if other.length != first.length:
            raise UserError(
                f"{other.folder}: captions of {other.length} tokens, but of {first.length} in "
                f"{first.folder}; give both tokenizer_config.json the same model_max_length"
            )
