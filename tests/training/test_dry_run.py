"""What a run would take, said without reading a weight."""

import re
from contextlib import closing

import pytest
from tiny_run import make_config

from dspo_jax.data import loader
from dspo_jax.data.datasets import read_datasets
from dspo_jax.errors import UserError
from dspo_jax.monitoring import devices
from dspo_jax.pipelines import published
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.training.describe import describe_run
from dspo_jax.training.dry_run import dry_run, estimate
from dspo_jax.training.settings import parse
from dspo_jax.training.start import make_state, prepare


@pytest.mark.ci
def test_a_dry_run_says_what_a_run_would_take_and_reads_no_weights(
    shallow_model, tiny_pairs, monkeypatch, tmp_path
):
    monkeypatch.setattr(Pipeline, "read_params", lambda *given: pytest.fail("weights were read"))
    monkeypatch.chdir(tmp_path)
    changes = {"mesh.data": 2, "mesh.fsdp": 4, "accumulation": 2, "batch_size": 16, "ema_decay": 0.9}
    changes["param_dtype"] = "bfloat16"
    said = "\n".join(dry_run(make_config(shallow_model, tiny_pairs, changes)))
    for line in (
        "8 cpu device(s) of 1 process(es), mesh data 2 x fsdp 4 x tensor 1",
        "24 examples, 16 a step: 2 part(s) of 1 on each of 8 device(s) or groups of them; 5 steps are 3.33 "
        "epochs",
        "batch: moments float16[16, 2, 4, 4, 8]",
        "batch: tokens int32[16, 1, 77]",
        "no step was made, nothing was written",
    ):
        assert line in said.splitlines(), said
    for words in ("12,364 trainable parameters", "moving average ", "TFLOP a pair", "the step compiles in"):
        assert words in said
    assert "temporaries" in said
    assert "fits into the " in said
    assert "warning: parameters kept in bfloat16" in said
    assert "several times" not in said
    assert not list(tmp_path.iterdir())


def test_a_batch_larger_than_the_data_is_said(shallow_model, tiny_pairs):
    config = make_config(shallow_model, tiny_pairs, {"batch_size": 32})
    experiment = prepare(config)
    state, reference = make_state(experiment.task, experiment.mesh, abstract=True)
    said = "\n".join(describe_run(experiment, state, reference))
    assert (
        "warning: config.batch_size = 32: more than the 24 examples, of which every step holds some" in said
    )


def test_few_held_out_examples_are_warned_of(shallow_model, tiny_pairs):
    said = list(dry_run_lines(shallow_model, tiny_pairs, {"validation.every": 5}))
    count = sum(read_datasets(tiny_pairs)[0].buckets("validation").values())
    assert f"{count} held-out examples, split 'validation'" in said
    assert any(line.startswith(f"warning: {count} held-out examples: the interval ") for line in said)
    assert not any("held-out examples" in line for line in dry_run_lines(shallow_model, tiny_pairs, {}))


def test_very_many_epochs_are_warned_of(shallow_model, tiny_pairs):
    settings = prepare(make_config(shallow_model, tiny_pairs, {"epochs": 201.0})).settings
    assert (settings.steps, settings.epochs) == (603, None)  # so that its time can be said
    said = dry_run_lines(shallow_model, tiny_pairs, {"epochs": 201.0})
    assert any("201 epochs of 24 examples: a model forgets more than it learns" in line for line in said)
    said = dry_run_lines(shallow_model, tiny_pairs, {"epochs": 200.0})
    assert not any("forgets" in line for line in said)


def test_a_run_of_few_updates_is_warned_of_where_its_length_follows_from_the_data(shallow_model, tiny_pairs):
    said = dry_run_lines(shallow_model, tiny_pairs, {"epochs": 16.0})
    assert (
        "warning: config.epochs = 16: of 24 examples that is 48 updates, which hardly move a model; "
        "raise it, or lower config.batch_size"
    ) in said
    for changes in ({"epochs": 17.0}, {"steps": 48}):
        assert not any("hardly" in line for line in dry_run_lines(shallow_model, tiny_pairs, changes))


def test_a_loss_that_parts_of_a_batch_change_is_warned_of(shallow_model, tiny_pairs):
    switched = {"objective.name": "dspo_sdxl", "objective.released_switch": True}
    named = [{"objective.name": name} for name in ("kto", "alpha_dpo", "diffusion_rpo")]
    for changes in (*named, switched):
        name, changes = changes["objective.name"], {"batch_size": 16} | changes
        said = "\n".join(dry_run_lines(shallow_model, tiny_pairs, changes | {"accumulation": 2}))
        assert f"warning: config.accumulation = 2: the loss of {name} " in said
        assert "now over the 8 of a part" in said
        assert "of a part" not in "\n".join(dry_run_lines(shallow_model, tiny_pairs, changes))
    plain = {"batch_size": 16, "accumulation": 2, "objective.name": "dspo_sdxl"}
    assert "of a part" not in "\n".join(dry_run_lines(shallow_model, tiny_pairs, plain))


def dry_run_lines(model, pairs, changes):
    experiment = prepare(make_config(model, pairs, changes))
    state, reference = make_state(experiment.task, experiment.mesh, abstract=True)
    return list(describe_run(experiment, state, reference))


def test_examples_in_memory_are_described_and_what_they_leave_unused_is_said(
    shallow_model, tiny_pairs, caplog
):
    with closing(loader.eval_batches(read_datasets(tiny_pairs), batch_size=6)) as batches:
        examples = next(batches)
    changes = {"data.path": None, "validation.every": 5, "samples.every": 7, "batch_size": 8, "steps": 3}
    with caplog.at_level("INFO", "absl"):
        experiment = prepare(make_config(shallow_model, "", changes), examples)
    assert (
        "config.validation.every = 5 and config.samples.every = 7: not used with examples in memory"
        in caplog.text
    )
    assert (experiment.settings.validation.every, experiment.settings.samples.every) == (0, 0)
    state, reference = make_state(experiment.task, experiment.mesh, abstract=True)
    said = list(describe_run(experiment, state, reference))
    assert said[0] == f"{shallow_model} over examples in memory"
    assert any(line.startswith("6 examples, 8 a step: ") and line.endswith("are 4 epochs") for line in said)
    assert "over 64 values an image" in said[-2]
    caplog.clear()
    prepare(make_config(shallow_model, tiny_pairs, {"validation.every": 5, "batch_size": 8}))
    assert "not used" not in caplog.text


def test_what_would_stop_the_run_stops_the_dry_run(shallow_model, tiny_pairs):
    with pytest.raises(
        ValueError, match=r"config\.batch_size / config\.accumulation = 12: not a multiple of 8"
    ):
        list(dry_run(make_config(shallow_model, tiny_pairs, {"batch_size": 12})))


def test_before_data_and_gpu_are_at_hand_an_estimate_says_steps_memory_disk_and_time(shallow_model):
    changes = {"epochs": 10.0, "batch_size": 16, "accumulation": 4, "compute_dtype": "bfloat16"}
    changes |= {"validation.every": 5, "data.path": None}
    settings, pipe = parse(make_config(shallow_model, "", changes)), load_pipeline(shallow_model)
    said = list(estimate(settings, pipe, 500, "rtx4090"))
    assert f"dspo of {shallow_model}, 16x16 pixels: 16 pairs a step, 4 at a time" in said
    assert "312 steps, 9.98 epochs of 500 pairs" in said
    (room,) = (line for line in said if line.startswith("NVIDIA GeForce RTX 4090: "))
    assert "16.8 GiB, which leaves 16.8 GiB" in room  # 3/4 of 24e9, for a tiny model
    assert "for the activations of 4 pair(s), which take " in room
    assert "warning: config.optimizer.warmup_steps = 313: the run has 312 steps, and never" in "".join(
        estimate(parse(make_config(shallow_model, "", {**changes, "optimizer.warmup_steps": 313})), pipe, 500)
    )
    kept, step = settings.checkpoint.max_to_keep + 1, 12_364 * 3 * 4  # parameters and two moments in float32
    (disk,) = (line for line in said if line.startswith("checkpoints: "))
    assert disk.startswith(f"checkpoints: {kept} of {devices.in_units(step)[:3]}")
    # The time follows from what is said to be computed, at a third of the card's peak.
    (tera,) = (float(line.split()[4]) for line in said if "TFLOP a pair" in line)
    assert said[-1].startswith(
        f"{3 * tera / 165.2:.3g} s a step, the run {312 * 3 * tera / 165.2:.3g} s, at a third, "
    )


def test_what_no_card_of_a_name_can_hold_is_said_with_what_to_change():
    changes = {"epochs": 1.0, "compute_dtype": "bfloat16"}
    lines = estimate(parse(make_config(None, "", changes)), published.architecture("sdxl"), None, "rtx4090")
    said = [next(lines) for _ in range(4)]  # before the networks are traced
    assert said[-1].startswith("does not fit into the 16.8 GiB of NVIDIA GeForce RTX 4090: ")
    assert "--config.lora.rank=8" in said[-1]
    with pytest.raises(UserError, match="--gpu = 'rtx490': unknown; did you mean 'rtx4090'"):
        next(estimate(parse(make_config(None, "", changes)), published.architecture("sd15"), None, "rtx490"))


def test_what_the_activations_of_a_batch_can_never_fit_into_is_said():
    pipe = published.architecture("sd15")
    changes = {"epochs": 1.0, "compute_dtype": "bfloat16", "batch_size": 1024, "lora.rank": 8}

    def of_room(**more):
        settings = parse(make_config(None, "", {**changes, **more}))
        (line,) = (line for line in estimate(settings, pipe, 5000, "rtx4090") if "activations" in line)
        return line

    # Each of a pair's two images enters 25 blocks with at most 64 x 64 x 320 numbers of two bytes.
    assert re.match(
        r"does not fit: .* 1024 pair\(s\), which take 3\d\d GiB at the very least; raise ", of_room()
    )
    one = of_room(accumulation=1024)
    assert re.search(r" 1 pair\(s\), which take 3\d\d MiB at the very least", one)
    assert "does not fit" not in one


def test_a_cpu_s_time_is_by_a_product_that_is_timed(shallow_model, monkeypatch):
    monkeypatch.setattr("dspo_jax.training.dry_run.time_product", lambda: 1e9)
    changes = {"batch_size": 16, "data.path": None, "steps": 4}
    said = list(estimate(parse(make_config(shallow_model, "", changes)), load_pipeline(shallow_model)))
    (tera,) = (float(line.split()[4]) for line in said if "TFLOP a pair" in line)
    assert float(said[-1].split()[0]) == pytest.approx(tera * 1e3, rel=0.01)
    assert "at the 1 GFLOP/s that a product of matrices reaches on this CPU now" in said[-1]
