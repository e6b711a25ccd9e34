"""What is refused before a run, in one line each."""

import math
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from tiny_model import write_model, write_pairs
from tiny_run import make_config

from dspo_jax.training.dry_run import dry_run
from dspo_jax.training.run import train
from dspo_jax.training.start import prepare
from dspo_jax.training.streams import open_stream


@pytest.fixture
def config(shallow_model, tiny_pairs):
    return make_config(shallow_model, tiny_pairs, {"steps": 12, "checkpoint.every": 4})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "config.model is not set: give --config.model=DIR, a diffusers folder"),
        (
            {"data.path": None},
            "config.data.path is not set: give --config.data.path=DIR, written by dspo_jax.encode",
        ),
        (
            {"objective.name": "dpso"},
            "config.objective.name = 'dpso': unknown; did you mean 'dspo'? "
            "(allowed: alpha_dpo, awm, crd, ddpm, dgpo, diffusion_dpo, diffusion_dpo_l2, diffusion_rpo, "
            "dmpo, dspo, dspo_e, dspo_ref, dspo_sdxl, hinge, ipo, kto, linear_dpo, lpo_list, mapo, nft, npo, "
            "orpo, rwr, sdpo, sft)",
        ),
        (
            {"objective.name": "sft", "objective.beta": 1.0},
            "argument of objective 'sft' = 'beta': unknown (allowed: min_snr_gamma, reduction, time_weight); "
            "leave config.objective.beta unset, or change config.objective.name",
        ),
        (
            {"batch_size": 12},
            "config.batch_size / config.accumulation = 12: not a multiple of 8, the ways the mesh splits a "
            "batch (data 8 x fsdp 1); nearest: 8 or 16",
        ),
        (
            {"samples.every": 1, "samples.prompts": ("absent.txt",)},
            "config.samples.prompts = 'absent.txt': absent.txt: no such file",
        ),
        (
            {"samples.every": 1, "samples.prompts": ("",)},
            "config.samples.prompts = '': prompt: empty; give a text or a file",
        ),
        (
            {"samples.every": 1, "samples.prompts": (1, 2)},
            "config.samples.prompts = (1, 2): must be a list of texts, each in quotes",
        ),
        ({"profile.start": -1}, "config.profile.start = -1: must not be negative"),
        ({"epochs": 0.0}, "config.epochs = 0.0: must be above 0 and at most a million"),
        ({"epochs": math.inf}, "config.epochs = inf: must be above 0 and at most a million"),
        ({"accumulation": 3}, "config.accumulation = 3: must divide config.batch_size = 8"),
        (
            {"objective.name": "diffusion_dpo", "objective.smpo_weight": 10.0},
            "config.objective.smpo_weight: needs a score of each image, and {data} has none; encode it with "
            "--config.score=REWARD, or leave the key out",
        ),
        (
            {"objective.name": "diffusion_dpo", "objective.smpo_weight": 1.0, "stream.kind": "self_play"},
            "config.objective.smpo_weight: needs a score of each image, and drawn losers have none; leave it "
            "out",
        ),
        (
            {"objective.name": "npo", "validation.every": 1, "validation.patience": 2},
            "config.validation.patience = 2: the held-out score of objective 'npo' falls as it learns; set "
            "it to 0",
        ),
        (
            {
                "objective.name": "diffusion_dpo",
                "validation.every": 1,
                "validation.patience": 2,
                "reference.every": 5,
            },
            "config.validation.patience = 2: with config.reference.every = 5 held-out scores are against a "
            "reference that moves, and do not compare; set it to 0",
        ),
        ({"accumulation": 0}, "config.accumulation = 0: must be at least 1"),
        ({"noise_offset": -0.1}, "config.noise_offset = -0.1: must be finite and not negative"),
        (
            {"noise_offset": 0.1, "stream.kind": "prompts"},
            "config.noise_offset = 0.1: is of noised examples, and config.stream.kind = 'prompts' trains on "
            "the steps of a sampler; leave it 0",
        ),
        ({"checkpoint.every": 0}, "config.checkpoint.every = 0: must be at least 1"),
        ({"samples.every": -1}, "config.samples.every = -1: must not be negative"),
        ({"validation.every": -1}, "config.validation.every = -1: must not be negative"),
        (
            {"validation.every": 1, "validation.draws": 0},
            "config.validation.draws = 0: must be at least 1",
        ),
        (
            {"validation.every": 1, "validation.batch_size": 12},
            "config.validation.batch_size = 12: not a multiple of 8, the ways the mesh splits a batch "
            "(data 8 x fsdp 1); nearest: 8 or 16",
        ),
        (
            {"samples.every": 1, "samples.seeds": (-1,)},
            "config.samples.seeds = (-1,): needs at least one, each from 0 to 4294967295",
        ),
        (
            {"samples.every": 1, "samples.guidance_scale": math.inf},
            "config.samples.guidance_scale = inf: must be a finite number",
        ),
        (
            {"samples.every": 1, "samples.seeds": ()},
            "config.samples.seeds = (): needs at least one, each from 0 to 4294967295",
        ),
        (
            {"samples.every": 1, "samples.num_inference_steps": 0},
            "config.samples.num_inference_steps = 0: must be between 1 and the schedule's 1000",
        ),
        (
            {"wandb_project": "aligned"},
            "config.wandb_project = 'aligned': needs the package wandb: pip install 'dspo_jax[wandb]'",
        ),
        (
            {"samples.every": 1, "samples.seeds": None},
            "config.samples.seeds = None: needs at least one, each from 0 to 4294967295",
        ),
        ({"ema_decay": 1.0}, "config.ema_decay = 1.0: must be at least 0 and below 1"),
        (
            {"remat": "block"},
            "config.remat = 'block': unknown; did you mean 'blocks'? (allowed: blocks, dots, none)",
        ),
        (
            {"timesteps.first": 500, "timesteps.last": 100},
            "config.timesteps.first = 500 and config.timesteps.last = 100: must be in order and between 0 "
            "and 999",
        ),
        (
            {"reference_dtype": "bfloat16"},
            "config.reference_dtype = 'bfloat16': policy and reference would differ from the start, with "
            "config.param_dtype = 'float32' and config.compute_dtype = 'float32'; leave reference_dtype "
            "unset, or set it to 'float32'",
        ),
        (
            {"mesh.fsdp": 3},
            "config.mesh = data -1 x fsdp 3 x tensor 1: does not fit the 8 devices of this run; set one axis "
            "to -1 and the product of the others to a divisor of that",
        ),
        ({"caption_dropout": 1.5}, "config.caption_dropout = 1.5: must be between 0 and 1"),
        ({"positive_ratio": -0.1}, "config.positive_ratio = -0.1: must be between 0 and 1"),
        (
            {"encoder_dropout": 0.464},
            "config.encoder_dropout = 0.464: is of Stable Diffusion 3, and {model} is Stable Diffusion "
            "1 and 2; leave it out: config.caption_dropout drops whole captions",
        ),
        (
            {"dropped_captions": "zeros"},
            "config.dropped_captions = 'zeros': is of Stable Diffusion 3, and {model} is Stable "
            "Diffusion 1 and 2; leave it out: config.caption_dropout drops whole captions",
        ),
        (
            {"dropped_captions": "zeros", "caption_dropout": 0.0},
            "config.dropped_captions = 'zeros': says what a dropped caption is, and none is dropped; set "
            "config.caption_dropout or config.encoder_dropout above 0, or leave it unset",
        ),
        (
            {"compute_dtype": "float16"},
            "config.compute_dtype = 'float16': unknown; did you mean 'bfloat16'? "
            "(allowed: bfloat16, float32)",
        ),
        (
            {"data.split": "trian"},
            "{data}: config.data.split = 'trian': unknown; did you mean 'train'? "
            "(allowed: train, validation)",
        ),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(config, tmp_path, changes, message):
    message = message.replace("{data}", str(config.data.path)).replace("{model}", str(config.model))
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=r"config|split|objective") as caught:
        train(config, tmp_path / "run")
    assert str(caught.value) == message
    # Had it been claimed, the corrected command would be refused as another run's.
    assert not (tmp_path / "run").exists()


def test_pairs_are_weighed_by_the_scores_of_one_reward(shallow_model, tmp_path):
    for name, score in (("one", "pickscore"), ("two", "hpsv2.1"), ("plain", "")):
        write_pairs(tmp_path / name, shallow_model, train=8, validation=None, score=score)

    def start(*names):
        data = ",".join(str(tmp_path / name) for name in names)
        changes = {"objective.name": "diffusion_dpo", "objective.smpo_weight": 10.0}
        return prepare(make_config(shallow_model, data, changes))

    with closing(open_stream(start("one", "one"), {})) as stream:
        scores = np.concatenate([np.asarray(stream.next({})["scores"]) for _ in range(2)])
    assert sorted(scores.tolist()) == sorted([[i, i - 1] for i in range(8)] * 2)
    with pytest.raises(
        ValueError, match=r"one and .*two hold scores of different rewards \(pickscore 1, hpsv2"
    ):
        start("one", "two")
    for names in (("plain",), ("one", "plain"), ("plain", "one")):
        with pytest.raises(ValueError, match=r"^config\.objective\.smpo_weight: .*plain has none; encode it"):
            start(*names)


@pytest.mark.parametrize("images", [1, 2, 4])
def test_an_example_in_memory_has_as_many_images_as_its_moments(images, shallow_model):
    examples = {"moments": np.zeros((8, images, 4, 4, 8), np.float16), "preference": np.zeros(8, np.float32)}
    config = make_config(shallow_model, "", {"objective.name": "nft" if images == 4 else "sft"})
    assert prepare(config, examples).images_per_example == images


def test_prompts_of_edits_are_drawn_without_their_images(config, tmp_path):
    (tmp_path / "edits.jsonl").write_text('{"prompt": "a hat", "image": "/absent/of another folder.png"}\n')
    config.samples.every, config.samples.prompts = 1, (str(tmp_path / "edits.jsonl"), "a dog")
    assert prepare(config).prompts == ["a hat", "a dog"]


@pytest.mark.ci
@pytest.mark.parametrize(
    "start_run", [train, lambda config, _: list(dry_run(config))], ids=["train", "dry run"]
)
def test_data_without_held_out_examples_say_which_keys_to_set(shallow_model, tmp_path, start_run):
    data = write_pairs(tmp_path / "pairs", shallow_model, train=8, validation=None)
    changes = {"steps": 1, "validation.every": 1, "samples.every": 1, "samples.num_inference_steps": 1}
    config = make_config(shallow_model, data, changes)
    with pytest.raises(ValueError, match="unknown") as caught:
        start_run(config, tmp_path / "run")
    assert str(caught.value) == (
        f"{data}: config.validation.split = 'validation': unknown (allowed: train); choose another with "
        "--config.validation.split=NAME, train without held-out examples with --config.validation.every=0, "
        "or encode the data so that some are held out"
    )
    for fix in ({"validation.every": 0}, {"validation.split": "train"}):
        config = make_config(shallow_model, data, {**changes, **fix})
        start_run(config, tmp_path / f"run {next(iter(fix))}")


def test_shards_of_another_model_are_refused(config, tmp_path):
    other = write_pairs(tmp_path / "pairs", write_model(tmp_path / "other", seed=7), train=2, validation=2)
    config.data.path = str(other)
    with pytest.raises(ValueError, match="the shards were encoded with another model") as caught:
        train(config, tmp_path / "run")
    message = str(caught.value)
    assert message.startswith(f"{other}: model.vae_sha256 = ")
    assert message.endswith("('other'); encode the data again with this one")


def test_single_images_are_refused_for_an_objective_that_compares(config, tiny_model, tmp_path):
    singles = write_pairs(tmp_path / "singles", tiny_model, train=2, validation=2, images=1)
    config.data.path = str(singles)
    with pytest.raises(ValueError, match="single images") as caught:
        train(config, tmp_path / "run")
    assert str(caught.value) == (
        f"config.objective.name = 'dspo': compares winner and loser, but {singles} holds single images; "
        "use sft or ddpm, or encode pairs"
    )
    config.objective.name = "kto"
    with pytest.raises(ValueError, match="single images") as caught:
        train(config, tmp_path / "run")
    assert str(caught.value) == (
        f"config.objective.name = 'kto': needs liked and disliked images, but {singles} holds single images "
        "without such labels; use sft or ddpm, or encode pairs"
    )


def test_single_images_in_memory_may_be_labelled_and_scored(config):
    examples = {
        "moments": np.zeros((8, 1, 8, 8, 8), np.float16),
        "preference": np.ones(8, np.float32),
    }
    config.objective.name = "nft"
    with pytest.raises(ValueError, match="'nft': needs liked and disliked images, but the batch in memory"):
        prepare(config, examples)
    examples["preference"][3] = 0.2
    assert prepare(config, examples).settings.objective.name == "nft"
    pairs = {"moments": np.zeros((8, 2, 8, 8, 8), np.float16), "preference": np.ones(8, np.float32)}
    config.objective.name, config.objective.smpo_weight = "diffusion_dpo", 10.0
    with pytest.raises(ValueError, match=r"config\.objective\.smpo_weight: needs the scores"):
        prepare(config, pairs)
    assert prepare(config, pairs | {"scores": np.zeros((8, 2))}).settings.objective.needs_scores


def test_a_run_cannot_start_from_a_checkpoint_over_another_model(config, tmp_path):
    config.model = str(tmp_path / "earlier")
    (tmp_path / "earlier" / "checkpoints").mkdir(parents=True)
    command = f"dspo_jax.convert export --run={config.model}"
    for name, step in ((config.model, ""), (f"{config.model}@3", " --step=3")):
        config.model = name
        with pytest.raises(ValueError, match="a training workdir") as caught:
            train(config, tmp_path / "run")
        assert str(caught.value).endswith(f"{command}{step} --out=DIR")


def test_an_empty_split_is_refused(config, tiny_model, tmp_path):
    empty = write_pairs(tmp_path / "empty", tiny_model, train=0, validation=2)
    config.data.path = str(empty)
    with pytest.raises(ValueError, match="split 'train' is empty") as caught:
        train(config, tmp_path / "run")
    assert str(caught.value).startswith(f"{empty}: ")


def test_a_truncated_shard_is_refused(config, tiny_pairs, tmp_path):
    data = Path(shutil.copytree(tiny_pairs, tmp_path / "pairs"))
    shard = next(data.glob("*-train.array_record-*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    config.data.path = str(data)
    with pytest.raises(ValueError, match="truncated") as caught:
        train(config, tmp_path / "run")
    assert str(caught.value).startswith(f"{shard}: ")
