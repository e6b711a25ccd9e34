"""Datasets of a run, and the refusals of examples that its objective cannot be trained on."""

import dataclasses
from collections.abc import Sequence

from dspo_jax.data.datasets import Dataset, check_scores, check_weights, count_examples, read_datasets
from dspo_jax.data.shards import check_manifest
from dspo_jax.errors import UserError
from dspo_jax.objectives import Objective
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.pipelines.same_kind import component_digest
from dspo_jax.pipelines.stored import T5_KEY
from dspo_jax.training.settings import Settings


def open_data(settings: Settings, pipe: Pipeline) -> Sequence[Dataset]:
    """Reads and verifies the datasets of `config.data`.

    Raises:
      UserError, FileNotFoundError: data that are damaged, empty or encoded with another model; single images
        where two are compared; labels where none are read; several datasets that do not fit one another, or
        weights or a curriculum that do not fit them.
    """
    data, validation = settings.data, settings.validation
    if not data.path:
        raise UserError(
            "config.data.path is not set: give --config.data.path=DIR, written by dspo_jax.encode"
        )
    datasets = read_datasets(data.path)
    check_weights(data.weights, datasets)
    for dataset in datasets:
        check_manifest(dataset.manifest, pipe.fingerprint(), path=dataset.folder)
    images = datasets[0].manifest["images_per_example"]
    if data.curriculum_groups > 1:
        key = f"config.data.curriculum_groups = {data.curriculum_groups}"
        check_scores(datasets, key)
        if images == 1:
            raise UserError(f"{key}: orders pairs, but {data.path} holds single images; leave it at 1")
        if data.weights:
            raise UserError(f"{key}: does not go together with config.data.weights; leave one of them out")
    disliked = sum(dataset.disliked(data.split) for dataset in datasets)
    if settings.stream.kind != "self_play":  # which draws the other image
        check_images(settings.objective, images, data.path, labelled=disliked > 0)
    if disliked and (settings.stream.kind == "self_play" or not settings.objective.needs_labels):
        method = "self-play" if settings.stream.kind == "self_play" else repr(settings.objective.name)
        raise UserError(
            f"config.data.path = {data.path!r}: holds images that people dislike, which {method} would "
            "imitate; use kto, nft or awm, or encode the liked images alone"
        )
    # These raise where a split has no examples. Not every dataset needs held-out ones.
    for dataset in datasets:
        count_examples([dataset], data.split, "config.data.split")
    if validation.every:
        count_examples(
            datasets,
            validation.split,
            "config.validation.split",
            "choose another with --config.validation.split=NAME, train without held-out examples with "
            "--config.validation.every=0, or encode the data so that some are held out",
        )
        held_out = sum(sum(dataset.buckets(validation.split).values()) for dataset in datasets)
        if disliked and not 0 < sum(dataset.disliked(validation.split) for dataset in datasets) < held_out:
            raise UserError(
                f"config.validation.split = {validation.split!r}: does not hold both liked and disliked "
                "images, which are compared; choose another, set --config.validation.every=0, or encode the "
                "data so that more are held out"
            )
    return datasets


def use_stored_states(
    settings: Settings, pipe: Pipeline, datasets: Sequence[Dataset]
) -> tuple[Pipeline, Sequence[Dataset]]:
    """Returns a model without its T5, where the datasets store T5's states of their captions.

    In self-play T5 runs all the same, as captions are drawn.

    Raises:
      UserError: the states are of another T5, or T5 is to be trained.
    """
    made_of, table = datasets[0].manifest.get(T5_KEY), datasets[0].caption_table
    encoder = pipe.stored_encoder
    if not made_of or table is None or encoder is None:
        return pipe, datasets
    if settings.stream.kind == "self_play":
        return pipe, [dataset.without_states() for dataset in datasets]
    where = datasets[0].folder
    if settings.train_text_encoder:
        raise UserError(
            f"config.train_text_encoder = True: {where} stores what T5 says of its captions, so that T5 is "
            "not run; encode the data with --config.text.store_t5=False, or leave it False"
        )
    if made_of["sha256"] != component_digest(pipe, encoder):
        raise UserError(
            f"{where}: {T5_KEY}.sha256 = {made_of['sha256']!r}: T5's stored states are of other weights than "
            f"those in {pipe.path / encoder}; encode the data again with this model"
        )
    return dataclasses.replace(pipe, stored_states={"": table.read([""])[0]}), datasets


def check_images(objective: Objective, images: int, data: str, *, labelled: bool = False) -> None:
    """Refuses single images where an objective needs pairs, unlabelled ones where it needs labels, and lists.

    Args:
      objective: of the run.
      images: of an example.
      data: what the error calls the examples.
      labelled: whether some single images are not (surely) liked.

    Raises:
      UserError: by the name of the objective.
    """
    if images > 2 and not objective.takes_lists:
        raise UserError(
            f"config.objective.name = {objective.name!r}: takes pairs, but {data} holds lists of {images} "
            "images; use lpo_list, dgpo, crd, nft or awm, or encode pairs"
        )
    if objective.needs_loser and images == 1:
        raise UserError(
            f"config.objective.name = {objective.name!r}: compares winner and loser, but {data} "
            "holds single images; use sft or ddpm, or encode pairs"
        )
    if objective.needs_labels and images == 1 and not labelled:
        raise UserError(
            f"config.objective.name = {objective.name!r}: needs liked and disliked images, but "
            f"{data} holds single images without such labels; use sft or ddpm, or encode pairs"
        )
