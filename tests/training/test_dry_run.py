"""What a run would take, said without reading a weight."""

import jax
import pytest
from tiny_run import make_config

from dspo_jax.monitoring.devices import count_flops
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.training.costs import flops_per_example
from dspo_jax.training.dry_run import describe_run, dry_run
from dspo_jax.training.settings import parse
from dspo_jax.training.start import make_state, make_task, prepare


@pytest.mark.ci
def test_a_dry_run_says_what_a_run_would_take_and_reads_no_weights(
    shallow_model, tiny_pairs, monkeypatch, tmp_path
):
    monkeypatch.setattr(Pipeline, "read_params", lambda *given: pytest.fail("weights were read"))
    monkeypatch.chdir(tmp_path)
    changes = {"mesh.data": 2, "mesh.fsdp": 4, "accumulation": 2, "batch_size": 16, "ema_decay": 0.9}
    changes["param_dtype"] = "bfloat16"
    said = dry_run(make_config(shallow_model, tiny_pairs, changes))
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
    assert "warning: parameters kept in bfloat16" in said
    assert "more than once" not in said
    assert not list(tmp_path.iterdir())


def test_a_batch_larger_than_the_data_is_said(shallow_model, tiny_pairs):
    config = make_config(shallow_model, tiny_pairs, {"batch_size": 32})
    experiment = prepare(config)
    state, reference = make_state(experiment.task, experiment.mesh, abstract=True)
    said = "\n".join(describe_run(experiment, state, reference))
    assert "warning: config.batch_size = 32: every step holds each of the 24 examples more than once" in said


@pytest.mark.parametrize(
    ("changes", "unet_passes", "text_passes"),
    [
        ({"objective.name": "dspo"}, 2 * (1 + 2 + 1), 2),
        ({"objective.name": "dspo", "objective.detach": True}, 3 + 1 + 2, 2),
        ({"objective.name": "sft"}, 3, 1),
        ({"objective.name": "ddpm", "train_text_encoder": True}, 6, 3),
        ({"objective.name": "dspo", "lora.rank": 2}, 2 * (1 + 1 + 1), 2),
        ({"objective.name": "kto"}, 3 + 1, 2),
    ],
)
def test_flops_of_a_pair_are_those_of_its_passes(
    shallow_model, tiny_pairs, changes, unet_passes, text_passes
):
    task = make_task(parse(make_config(shallow_model, tiny_pairs, changes)), load_pipeline(shallow_model))
    pipe = task.pipe
    params = {name: pipe.networks[name].abstract_params() for name in ("unet", "text_encoder")}
    batch = {"tokens": jax.ShapeDtypeStruct((1, 1, 77), "int32")}
    inputs = (
        jax.ShapeDtypeStruct((1, 4, 4, 4), "float32"),
        jax.ShapeDtypeStruct((1,), "int32"),
        jax.eval_shape(pipe.encode_conditioning, params, batch),
    )
    unet = count_flops(pipe.predict, params, *inputs)
    encoder = count_flops(pipe.encode_conditioning, params, batch)
    counted = flops_per_example(task, 2, (16, 16))
    assert counted == pytest.approx(unet_passes * unet + text_passes * encoder)


def test_what_would_stop_the_run_stops_the_dry_run(shallow_model, tiny_pairs):
    with pytest.raises(
        ValueError, match=r"config\.batch_size / config\.accumulation = 12: not a multiple of 8"
    ):
        dry_run(make_config(shallow_model, tiny_pairs, {"batch_size": 12}))
