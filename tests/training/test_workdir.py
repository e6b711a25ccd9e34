"""What a workdir allows to differ when its run is resumed, and what it takes of runs of earlier versions."""

import json

import pytest
from tiny_run import begin, make_config

from dspo_jax.training.settings import parse
from dspo_jax.training.workdir import claim_workdir


@pytest.fixture
def config(shallow_model, tiny_pairs):
    return make_config(shallow_model, tiny_pairs, {"steps": 12, "checkpoint.every": 4})


def test_a_damaged_config_of_a_run_is_named(config, tmp_path):
    begin(tmp_path, config)
    path = tmp_path / "config.json"
    path.write_text('{"steps": 5')
    with pytest.raises(
        ValueError, match=rf"^{path}: not valid JSON [^\n]+; it says how the run was started; "
    ):
        claim_workdir(tmp_path, parse(config).given)


def test_what_does_not_change_the_result_may_differ_on_resuming(config, tmp_path):
    begin(tmp_path, config)
    changes = {"steps": 99, "log_every": 7, "checkpoint.every": 3, "validation.draws": 2, "mesh.fsdp": 2}
    config.update_from_flattened_dict(changes)
    claim_workdir(tmp_path, parse(config).given)
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 99


def test_keys_that_an_earlier_version_did_not_read_do_not_keep_its_runs_from_going_on(config, tmp_path):
    begin(tmp_path, config)
    path = tmp_path / "config.json"
    earlier = json.loads(path.read_text())
    earlier["reference"]["decay"] = 0.9
    earlier["lora"]["targets"] = [r"to_[qkv]", r"to_out\.0", r"(q|k|v|out)_proj"]
    path.write_text(json.dumps(earlier))
    claim_workdir(tmp_path, parse(config).given)
    earlier["stream"]["kind"] = config.stream.kind = "prompts"
    path.write_text(json.dumps(earlier | {"timesteps": {"first": 3, "last": 9}}))
    claim_workdir(tmp_path, parse(config).given)
    path.write_text(json.dumps(earlier | {"lora": {**earlier["lora"], "targets": ["to_q"]}}))
    with pytest.raises(ValueError, match=r"started with config\.lora\.targets = \['to_q'\]"):
        claim_workdir(tmp_path, parse(config).given)


def test_a_run_from_before_weights_has_none(config, tmp_path):
    begin(tmp_path, config)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    assert saved["data"].pop("weights") == []
    path.write_text(json.dumps(saved))
    claim_workdir(tmp_path, parse(config).given)
    config.data.weights = (1.0,)
    with pytest.raises(ValueError, match=r"config\.data\.weights = \[\], now it is \[1\.0\]"):
        claim_workdir(tmp_path, parse(config).given)


@pytest.mark.parametrize(
    ("key", "then", "now"),
    [
        ("share_timesteps", False, True),  # what share_noise=False alone meant, and means
        ("optimizer.factored_axes", "largest", "released"),
        ("noise_offset", 0.0, 0.1),
    ],
)
def test_a_run_from_before_a_key_is_resumed_with_what_it_did(config, tmp_path, key, then, now):
    config.share_noise, config.optimizer.name = False, "adafactor"
    config.update_from_flattened_dict({key: then})
    path = tmp_path / "config.json"
    begin(tmp_path, config)
    saved = json.loads(path.read_text())
    *groups, last = key.split(".")
    assert (saved[groups[0]] if groups else saved).pop(last) == then
    path.write_text(json.dumps(saved))
    config.update_from_flattened_dict({key: now})
    with pytest.raises(ValueError, match=rf"config\.{key} = {then!r}, now it is {now!r}"):
        claim_workdir(tmp_path, parse(config).given)
    config.update_from_flattened_dict({key: then})
    claim_workdir(tmp_path, parse(config).given)


@pytest.mark.parametrize("length", [None, 256])
def test_a_run_from_before_reads_captions_and_its_reference_as_it_did(length, config, tmp_path):
    """It knew no draws of the reference, dropped encoders, length of captions or sampler by the model."""
    settings = parse(config).with_sequence_length(length)  # None but of Stable Diffusion 3
    begin(tmp_path, config)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    for group, key in (("text", "max_sequence_length"), ("reference", "draws"), ("objective", "temperature")):
        del saved[group][key]
    del saved["encoder_dropout"], saved["dropped_captions"]
    saved["stream"]["sampler"] = "ddim"
    path.write_text(json.dumps(saved))
    for key, value in (("encoder_dropout", 0.5), ("dropped_captions", "zeros")):
        with pytest.raises(ValueError, match=rf"config\.{key} = [^\n]*, now it is {value!r}; resume"):
            claim_workdir(tmp_path, {**settings.given, key: value})
    with pytest.raises(ValueError, match=r"config\.reference\.draws = 0, now it is 2"):
        claim_workdir(tmp_path, {**settings.given, "reference": settings.given["reference"] | {"draws": 2}})
    if length is not None:
        with pytest.raises(ValueError, match=r"config\.text\.max_sequence_length = 256, now it is 77"):
            claim_workdir(tmp_path, settings.with_sequence_length(77).given)
    claim_workdir(tmp_path, settings.given)


def test_a_run_from_before_with_another_optimizer_factored_nothing(config, tmp_path):
    config.optimizer.factored_axes = "released"  # as in the recipes for SDXL, that with AdamW too
    begin(tmp_path, config)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    assert (saved["optimizer"].pop("factored_axes"), saved["optimizer"]["name"]) == ("released", "adamw")
    for key in ("b3", "alpha", "momentum"):  # of optimizers that were not there
        del saved["optimizer"][key]
    path.write_text(json.dumps(saved))
    claim_workdir(tmp_path, parse(config).given)


def test_a_decaying_learning_rate_fixes_the_number_of_steps(config, tmp_path):
    config.optimizer.schedule = "cosine"
    begin(tmp_path, config)
    config.steps = 99
    with pytest.raises(ValueError, match=r"config\.steps = 12, now it is 99"):
        claim_workdir(tmp_path, parse(config).given)


@pytest.mark.parametrize(
    ("left", "fresh"),
    [
        ({}, True),
        (
            {"checkpoints/4.orbax-checkpoint-tmp/state": "", "metrics.jsonl": '{"step": 0, "loss": 0.7}\n'},
            True,
        ),
        ({"metrics.jsonl": '{"step": 0}\n{"step": 1}\n'}, False),
        ({"checkpoints/4/state": ""}, False),
    ],
    ids=["nothing", "unfinished", "a step", "a checkpoint"],
)
def test_a_run_that_never_began_gives_its_workdir_to_a_corrected_config(config, tmp_path, left, fresh):
    claim_workdir(tmp_path, parse(config).given)
    for name, text in left.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    config.lora.rank = 4
    if fresh:
        claim_workdir(tmp_path, parse(config).given)
        assert json.loads((tmp_path / "config.json").read_text())["lora"]["rank"] == 4
    else:
        with pytest.raises(ValueError, match=r"config\.lora\.rank = 0, now it is 4"):
            claim_workdir(tmp_path, parse(config).given)


def test_what_a_run_left_without_its_config_is_refused(config, tmp_path):
    begin(tmp_path, config)
    (tmp_path / "config.json").unlink()
    with pytest.raises(
        ValueError, match=r"config\.json: no such file, .*put the file back, or choose another"
    ):
        claim_workdir(tmp_path, parse(config).given)
    assert not (tmp_path / "config.json").exists()
