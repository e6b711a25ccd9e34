"""From files to a trained model: labelled images and lists encoded, watched and trained on."""

import json
from contextlib import closing

import numpy as np
import pytest
from image_files import image_bytes
from tiny_run import make_config

from configs.encode import common
from dspo_jax.data import loader
from dspo_jax.data.datasets import read_datasets
from dspo_jax.data.encoding import encode
from dspo_jax.data.report import format_report
from dspo_jax.data.shards import read_manifest
from dspo_jax.data.summary import summarize_dataset
from dspo_jax.errors import UserError
from dspo_jax.monitoring.metrics import read_metrics, read_validations
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.training.dry_run import dry_run
from dspo_jax.training.run import train
from dspo_jax.training.start import prepare
from dspo_jax.training.validation import judge

LABELS = [1.0, 0.0, 1.0, 0.25, 0.0, 1.0, 0.75, 0.0]


def write_images(folder, count):
    for i in range(count):
        draw = np.random.default_rng(i)
        (folder / f"{i}.png").write_bytes(image_bytes(tuple(int(c) for c in draw.integers(0, 256, 3))))


def encode_source(name, model, out, **arguments):
    config = common.get_config()
    common.set_source(config, name)
    config.source.update(arguments)
    config.update(model=str(model), batch_size=4, num_workers=0, rows_per_shard=5)
    assert encode(config, out)
    return out


@pytest.fixture(scope="module")
def labelled(shallow_model, tmp_path_factory):
    """8 labelled images of `train` and the same ones of `validation`."""
    folder = tmp_path_factory.mktemp("labelled")
    write_images(folder, 8)
    rows = [
        {"caption": f"picture {i}", "image": f"{i}.png", "label": label, "split": split}
        for split in ("train", "validation")
        for i, label in enumerate(LABELS)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return encode_source("folder", shallow_model, folder / "out", path=str(folder))


def test_labels_are_stored_and_counted(labelled):
    manifest = read_manifest(labelled)
    assert manifest["images_per_example"] == 1
    assert [manifest["splits"][split]["disliked"] for split in ("train", "validation")] == [4, 4]
    report = summarize_dataset(labelled)
    assert report["splits"]["train"]["labels"] == {"liked": 4, "disliked": 4, "soft": 2}
    assert "liked: 4, disliked: 4, soft: 2" in format_report(report)


@pytest.mark.ci
def test_nft_trains_on_labelled_images_and_tells_the_liked_from_the_others(shallow_model, labelled, tmp_path):
    changes = {
        "objective.name": "nft",
        "steps": 2,
        "validation.every": 2,
        "validation.batch_size": 8,
        "validation.draws": 2,
        "checkpoint.every": 2,
    }
    assert train(make_config(shallow_model, labelled, changes), tmp_path).finished
    steps = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "loss" in record]
    assert [record["liked"] for record in steps] == pytest.approx([np.mean(LABELS)] * 2)
    assert all(record["grad_norm"] > 0 for record in steps)
    found = read_validations(tmp_path / "metrics.jsonl")
    assert (found[0]["implicit_accuracy"], found[0]["margin"]) == (0.5, 0)
    assert found[2]["margin"] != 0
    assert found[2]["num_images"] == 8
    scores = judge(tmp_path, None, labelled, split="train", draws=2, batch_size=8, compute_dtype="float32")
    assert scores["margin"] == pytest.approx(found[2]["margin"], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.name": "sft"}, "holds images that people dislike, which 'sft' would imitate"),
        ({"objective.name": "diffusion_dpo"}, "holds single images"),
        (
            {"objective.name": "diffusion_dpo", "stream.kind": "self_play", "reference.every": 2},
            "people dislike, which self-play would imitate",
        ),
    ],
)
def test_objectives_that_read_no_labels_are_refused(shallow_model, labelled, changes, message):
    with pytest.raises(UserError, match=message):
        prepare(make_config(shallow_model, labelled, changes))


def test_held_out_images_must_be_of_both_kinds(shallow_model, labelled, tmp_path):
    path = labelled / "manifest.json"
    text = path.read_text()
    manifest = json.loads(text)
    del manifest["splits"]["validation"]["disliked"]
    changes = {"objective.name": "kto", "validation.every": 1, "validation.batch_size": 8}
    try:
        path.write_text(json.dumps(manifest))
        with pytest.raises(
            UserError, match=r"config\.validation\.split = 'validation': .*liked and disliked"
        ):
            prepare(make_config(shallow_model, labelled, changes))
    finally:
        path.write_text(text)
    assert prepare(make_config(shallow_model, labelled, changes)).settings.objective.name == "kto"


RANKS = [[1, 2, 3, 4], [4, 3, 2, 1], [2, 2, 1, 3], [1, 3, 3, 4], [3, 1, 2, 4], [1, 2, 3, 4]]


@pytest.fixture(scope="module")
def lists(shallow_model, tmp_path_factory):
    """Six lists of three of four images, some of them held out."""
    folder = tmp_path_factory.mktemp("lists")
    write_images(folder, 24)
    rows = [
        {"prompt": f"prompt {n}", "generations": [f"{4 * n + i}.png" for i in range(4)], "ranking": ranks}
        for n, ranks in enumerate(RANKS)
    ]
    (folder / "ranks.json").write_text(json.dumps(rows))
    arguments = {"comparisons": "list", "length": 3, "validation_share": 0.3}
    path = str(folder / "ranks.json")
    return encode_source("image_reward", shallow_model, folder / "out", path=path, **arguments)


def test_a_list_is_stored_with_its_ranks_as_scores(shallow_model, lists):
    assert read_manifest(lists)["images_per_example"] == 3
    datasets, found = read_datasets(lists), {}
    for split in ("train", "validation"):
        with closing(loader.eval_batches(datasets, batch_size=6, split=split)) as batches:
            for batch in batches:
                assert batch["moments"].shape[1:] == (3, 4, 4, 8)
                found |= dict(
                    zip(batch["key"], zip(batch["scores"], batch["moments"], strict=True), strict=True)
                )
    assert sorted(found) == [str(n) for n in range(6)]
    pipe = load_pipeline(shallow_model)
    params = {"vae": pipe.read_params("vae")}
    for n, ranks in enumerate(RANKS):
        scores, moments = found[str(n)]
        order = sorted(range(4), key=lambda i: ranks[i])
        places = [order[0], order[2], order[3]]
        assert scores.tolist() == [-ranks[i] for i in places]
        for i, moment in zip(places, moments, strict=True):
            color = np.random.default_rng(4 * n + i).integers(0, 256, 3)
            pixels = np.broadcast_to(color / np.float32(127.5) - 1, (1, 16, 16, 3)).astype(np.float32)
            expected = np.asarray(pipe.encode_moments(params, pixels))[0]
            np.testing.assert_allclose(moment, expected, rtol=2e-3, atol=2e-3)
    assert "lists of 3 images" in format_report(summarize_dataset(lists))


@pytest.mark.ci
def test_lpo_list_trains_on_lists_and_is_watched_on_them(shallow_model, lists, tmp_path):
    changes = {
        "objective.name": "lpo_list",
        "steps": 2,
        "validation.every": 2,
        "validation.batch_size": 8,
        "validation.draws": 2,
        "checkpoint.every": 2,
    }
    assert train(make_config(shallow_model, lists, changes), tmp_path).finished
    steps = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "loss" in record]
    # log K!, while policy and reference agree, but for rounding times beta = 5000.
    assert steps[0]["loss"] == pytest.approx(np.log(6), abs=1e-3)
    assert all(record["grad_norm"] > 0 for record in steps)
    found = read_validations(tmp_path / "metrics.jsonl")
    assert (found[0]["implicit_accuracy"], found[0]["margin"]) == (0.5, 0)
    assert found[2]["margin"] != 0
    assert found[2]["num_lists"] == len(RANKS) - sum(
        content["num_examples"]
        for split, content in read_manifest(lists)["splits"].items()
        if split == "train"
    )
    said = "\n".join(dry_run(make_config(shallow_model, lists, {"objective.name": "dgpo"})))
    assert "batch: moments float16[8, 3, 4, 4, 8]" in said
    assert "batch: scores float32[8, 3]" in said


def test_an_objective_of_pairs_is_refused_on_lists(shallow_model, lists):
    with pytest.raises(UserError, match=r"'dspo': takes pairs, but .* holds lists of 3 images; use lpo_list"):
        prepare(make_config(shallow_model, lists, {"objective.name": "dspo"}))
