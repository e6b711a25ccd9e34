"""Reads a diffusers folder or a training workdir as a `Pipeline`."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import logging

from dspo_jax import schema
from dspo_jax.errors import UserError
from dspo_jax.json_files import shown
from dspo_jax.models.model import Params
from dspo_jax.pipelines.families import FAMILIES
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.pipelines.tokenizers import CaptionTokenizer, read_tokenizer
from dspo_jax.samplers.spacing import check_sampler_config
from dspo_jax.schema import flag
from dspo_jax.weights import file_kinds, saved_params
from dspo_jax.weights.components import read_models
from dspo_jax.weights.model_dir import find_model, read_json
from dspo_jax.weights.saved_params import read_base

_INDEX_KEYS = {"force_zeros_for_empty_prompt": flag(True, null=True)}


def load_pipeline(path: str | Path) -> Pipeline:
    """Reads a model directory: a diffusers folder, or a training workdir (its base with trained weights).

    Args:
      path: the folder, or the hub id of one. Of a workdir the newest checkpoint is read, of `WORKDIR@STEP`
        and `WORKDIR@best` the one that is named (`weights.saved_params.split_run`).

    Raises:
      FileNotFoundError: no such folder, or a file of it is missing.
      UserError: a pipeline, component or config value that is not supported.
    """
    trained: Mapping[str, Params] = {}
    step, run = None, saved_params.split_run(path)
    if run is None:
        path = find_model(path)
    else:
        path = find_model(read_base(run[0]))
        trained, step = saved_params.restore_params(run[0] / "checkpoints", run[1])
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
        read_tokenizer(path / name.replace("text_encoder", "tokenizer"), models[name].settings)
        for name in family.text_encoders
    )
    _check_lengths(*tokenizers)
    pipe = Pipeline(
        path=path,
        family=family,
        networks=models,
        tokenizers=tokenizers,
        empty_tokens=np.concatenate([tokenizer([""]) for tokenizer in tokenizers]),
        schedule=schedule,
        scheduler_config=scheduler_config,
        zero_empty_captions=family.zero_empty_captions(index),
        trained=trained,
        step=step if trained else None,
    )
    _check_sizes(pipe)
    return pipe


def _check_sizes(pipe: Pipeline) -> None:
    """Refuses a folder whose denoiser takes something else than its VAE and text encoders give."""
    settings = pipe.networks[pipe.denoiser].settings
    encoders = [model.settings for model in pipe.text_encoders.values()]
    given = {
        "in_channels": pipe.latent_channels,
        "out_channels": pipe.latent_channels,
        "cross_attention_dim": sum(encoder["hidden_size"] for encoder in encoders),
        "addition_embed_type": "text_time" if pipe.family.micro_conditioning else None,
    }
    if settings["addition_embed_type"] and pipe.family.micro_conditioning:
        pooled, numbers = encoders[-1]["projection_dim"], 6 * settings["addition_time_embed_dim"]
        given["projection_class_embeddings_input_dim"] = pooled + numbers
    for key, value in given.items():
        if settings[key] != value:
            file = pipe.path / pipe.denoiser / "config.json"
            raise UserError(
                f"{file}: {key} = {settings[key]!r}, but text to image with the VAE and text encoders of "
                f"this folder needs {value!r}; use a UNet that was made for them"
            )


def _check_lengths(first: CaptionTokenizer, *others: CaptionTokenizer) -> None:
    """Refuses text encoders whose states cannot lie side by side."""
    for other in others:
        if other.length != first.length:
            raise UserError(
                f"{other.folder}: captions of {other.length} tokens, but of {first.length} in "
                f"{first.folder}; give both tokenizer_config.json the same model_max_length"
            )
