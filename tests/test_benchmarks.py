"""The benchmarks of the training step run, and say what they promise."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import tiny_model
from fake_time import FakeTime
from PIL import Image
from tables import each_row

torch = pytest.importorskip("torch")

from benchmarks import (  # noqa: E402  # noqa: E402
    compare,
    kernel_schedule,
    measuring,
    online,
    step_parts,
    torch_reference,
    tpu_plans,
    train_step,
)
from configs import common, emoji_diffusion_dpo  # noqa: E402
from dspo_jax.images.contact_sheet import contact_sheet, enlargement  # noqa: E402
from dspo_jax.models.model import build_model  # noqa: E402
from dspo_jax.monitoring.devices import peak_bytes  # noqa: E402
from dspo_jax.parallel.mesh import make_mesh  # noqa: E402
from dspo_jax.pipelines import published  # noqa: E402
from dspo_jax.pipelines.loading import load_pipeline  # noqa: E402
from dspo_jax.training.make_task import make_task  # noqa: E402
from dspo_jax.training.settings import parse  # noqa: E402
from dspo_jax.training.start import make_state  # noqa: E402

pytestmark = pytest.mark.ci


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def compared(shallow_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, list[dict]]:
    """What `compare` prints, says last and writes of the tiny model, where one way of torch fails."""
    file = tmp_path_factory.mktemp("benchmarks") / "results" / "compared.json"
    command = [sys.executable, "-m", "benchmarks.compare", "--config=configs/sd15_dspo.py"]
    command += [f"--config.model={shallow_model}", "--config.batch_size=8", "--resolution=16", "--steps=2"]
    command += ["--rounds=1", "--torch=misspelt,channels_last+online_vae", "--config.compute_dtype=float32"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, f"--json={file}"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    return done.stdout, done.stderr.splitlines()[-1], json.loads(file.read_text())


def test_both_steps_are_measured_and_compared(compared):
    _, _, (ours, theirs) = compared
    assert ours["what"] == theirs["what"]
    assert "dspo of " in ours["what"]
    assert "8 pairs" in ours["what"]
    assert ours["implementation"] == "dspo_jax"
    assert theirs["implementation"] == "torch + channels_last + online_vae"
    for result in (ours, theirs):
        assert len(result["all_seconds"]) == 2
        assert result["pairs_per_second"] == pytest.approx(8 / result["seconds"])
        assert result["peak_memory_gib"] > 0.1
        assert result["compile_seconds"] > 0
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])
        assert "jax " in result["versions"]
        assert "torch " in result["versions"]
    assert ours["command"].startswith("python -m benchmarks.train_step --config=configs/sd15_dspo.py")
    assert theirs["ratio"] == pytest.approx(ours["pairs_per_second"] / theirs["pairs_per_second"])
    per_device = ours["tflop_per_pair"] * ours["pairs_per_second"] / 8
    assert ours["tflops_per_device"] == pytest.approx(per_device)
    assert ours["mfu"] is None  # a CPU's peak is not known


def test_a_way_that_fails_leaves_what_the_others_found(compared):
    _, last, results = compared
    assert last == "error: --torch=misspelt: failed; see above"
    assert len(results) == 2


def test_torch_is_measured_where_jax_was():
    ours = {"platform": "gpu", "devices": 1}
    assert compare.options_of("plain", ours) == ["--platform=gpu"]
    assert compare.options_of("a+b", ours | {"platform": "cpu"}) == ["--options=a,b", "--platform=cpu"]
    with pytest.raises(ValueError, match=r"^JAX computes on 4 devices and torch on one; set CUDA_VISIBLE"):
        compare.options_of("plain", ours | {"devices": 4})
    with pytest.raises(ValueError, match=r"^JAX computes on a tpu and torch .* sees none; install one"):
        measuring.torch_device("tpu")


def test_what_is_printed_and_the_table_hold_the_results(compared):
    printed, _, results = compared
    assert re.search(
        r"^dspo_jax +[\d.]+ pairs/s, .* peak memory .* before the first step", printed, re.MULTILINE
    )
    assert "ours / theirs" in printed
    heading, _, *rows = measuring.markdown(results).splitlines()
    assert heading.startswith("| what | by | pairs/s |")
    assert [row.split(" | ")[1] for row in rows] == [result["implementation"] for result in results]
    assert f"`{results[0]['command']}`" in rows[0]


@pytest.fixture
def trainer(shallow_model: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes torch's trainer of the tiny model, with changes of the recipe: (trainer, batch of 4 pairs)."""
    monkeypatch.setattr(torch_reference, "flags", SimpleNamespace(FLAGS=SimpleNamespace(published=None)))

    def make(options: Sequence[str] = (), **changes: Any) -> tuple[Any, Any]:
        config = emoji_diffusion_dpo.get_config()
        config.model = str(shallow_model)
        config.update_from_flattened_dict(changes)
        torch.manual_seed(0)
        made = torch_reference.Trainer(config, options, torch.device("cpu"))
        return made, made.make_batch(4, 16)

    return make


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ((), {"accumulation": 2}),
        (("channels_last", "online_vae"), {}),
        ((), {"lora.rank": 2}),
        ((), {"optimizer.name": "adafactor", "remat": "blocks"}),
    ],
    ids=["parts", "online", "lora", "adafactor"],
)
def test_torchs_step_starts_at_the_reference_and_leaves_it(trainer, options, changes):
    made, batch = trainer(options, **changes)
    assert made.step(batch).item() == pytest.approx(math.log(2), abs=1e-6)
    assert made.step(batch).item() != pytest.approx(math.log(2), abs=1e-9)


def test_an_objective_without_a_torch_step_is_refused(trainer):
    made, batch = trainer(**{"objective.name": "mapo"})
    with pytest.raises(ValueError, match=r"^config.objective.name = 'mapo': unknown"):
        made.step(batch)


@each_row(
    ("name", "parameters", "paddings"),
    [
        ("sd15", 859_520_964, [49407]),
        ("sd21", 865_910_724, [0]),
        ("sdxl", 2_567_463_684, [49407, 0]),
        ("sd3-medium", 2_028_328_000, [49407, 0]),
    ],
)
def test_a_published_architecture_has_no_weights(name, parameters, paddings):
    pipe = published.architecture(name)
    shapes = jax.tree.leaves(pipe.networks[pipe.denoiser].abstract_params())
    assert sum(leaf.size for leaf in shapes) == parameters
    tokens = [[49406, 49407, *[padding] * 75] for padding in paddings]
    if name == "sd3-medium":  # T5's, and nothing behind those of CLIP
        tokens = [[*row, *[-1] * 179] for row in tokens] + [[1, *[0] * 255]]
    np.testing.assert_array_equal(pipe.empty_tokens, np.array(tokens, np.int32))
    types = {"sd21": "v_prediction", "sd3-medium": "flow_prediction"}
    assert pipe.schedule.prediction_type == types.get(name, "epsilon")
    with pytest.raises(FileNotFoundError, match=f"^{name}/{pipe.denoiser}/.*: no such file"):
        pipe.read_params(pipe.denoiser, "float32")
    with pytest.raises(ValueError, match=r"'sd1\.5': unknown; did you mean 'sd15'"):
        published.architecture("sd1.5")


def test_random_weights_are_born_where_they_belong():
    pipe = published.architecture("sd15")
    networks = {
        "unet": build_model("UNet2DConditionModel", tiny_model.UNET | {"layers_per_block": 1}),
        "text_encoder": build_model("CLIPTextModel", tiny_model.TEXT_ENCODER),
    }
    pipe = dataclasses.replace(pipe, networks={**pipe.networks, **networks})
    config = common.get_config()
    task, mesh = make_task(parse(config), pipe), make_mesh({"data": 2, "fsdp": 4})
    state, reference = train_step.random_state(task, mesh, {})
    expected = make_state(task, mesh, abstract=True)
    for made, shape in zip(jax.tree.leaves((state, reference)), jax.tree.leaves(expected), strict=True):
        assert (made.shape, made.dtype) == (shape.shape, shape.dtype)
        assert made.sharding.is_equivalent_to(shape.sharding, made.ndim)
    deviation = np.std(np.asarray(state.params["unet"]["mid_block"]["resnets"]["0"]["conv1"]["kernel"]))
    assert deviation == pytest.approx((9 * 16) ** -0.5, rel=0.1)


def test_a_step_is_timed_from_the_end_of_the_last_one():
    clock = FakeTime()
    waited = []

    def step() -> int:
        clock.seconds += 1
        return len(waited)

    def wait(number: int) -> None:
        waited.append(number)
        clock.seconds += 2

    assert measuring.time_steps(step, wait, 3, now=clock) == [3, 3, 3]
    assert len(waited) == 5


def test_compare_passes_on_what_the_benchmarks_understand():
    given = ["--config", "a.py", "--torch=plain", "--rounds", "2", "--steps=3", "--json=x", "--config.a=1"]
    assert list(compare.arguments_for_both(given)) == ["--config", "a.py", "--steps=3", "--config.a=1"]


@each_row(
    ("model", "name", "message"),
    [
        (None, None, "config.model is not set: give"),
        ("m", "sd15", "--published=sd15: the recipe names a model"),
    ],
)
def test_a_benchmark_of_no_model_or_of_two_is_refused(model, name, message, monkeypatch):
    monkeypatch.setattr(measuring, "flags", SimpleNamespace(FLAGS=SimpleNamespace(published=name)))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        measuring.check_model(SimpleNamespace(model=model))


def test_the_input_pipeline_says_how_far_ahead_it_keeps(tmp_path):
    file = tmp_path / "read.json"
    command = [sys.executable, "-m", "benchmarks.input_pipeline", f"--folder={tmp_path / 'pairs'}"]
    command += ["--pairs=128", "--threads=1", "--target=0.5", f"--json={file}"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    results = {(result["what"], result["implementation"]): result for result in json.loads(file.read_text())}
    speed = results["read, 1 thread(s)", "dspo_jax"]["pairs_per_second"]
    assert f"keeps ahead of a step of 0.5 pairs/s by {speed / 0.5:.0f} x" in done.stdout
    assert not (tmp_path / "pairs").exists()


@pytest.fixture
def online_runs(tmp_path: Path) -> Path:
    """Folder of finished runs of the online methods, with made-up metrics and samples."""
    rng = np.random.default_rng(0)
    for number, (method, reward) in enumerate(online.RUNS):
        workdir = tmp_path / f"{method}_{reward}"
        (workdir / "samples").mkdir(parents=True)
        config = online.make_config(method, reward)
        lines = []
        for step in range(0, config.steps + 1, config.validation.every):
            scores = {"diversity": 0.07 - step / 1e4}
            for each in online.REWARDS:
                scores |= {f"reward_{each}": 80 + number + step, f"win_rate_{each}": 0.9}
                scores |= {f"win_rate_{each}_low": 0.84, f"win_rate_{each}_high": 0.95}
            scalars = {f"validation/{name}": value for name, value in scores.items()}
            lines.append(json.dumps({"step": step, "wall_seconds": 60.0 * step, **scalars}))
        (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        for step in range(config.samples.every, config.steps + 1, config.samples.every):
            pictures = rng.integers(0, 256, (3, 2, 64, 64, 3), np.uint8)
            rows = list(zip(config.samples.prompts, pictures, strict=True))
            headings, captions = [("base", 1), ("now", 1)], [[["a reward", "another"]] * 2] * 3
            sheet = contact_sheet(rows, headings, enlargement(64, 64), ["seed 0"] * 2, captions)
            sheet.save(workdir / "samples" / f"step_{step:06d}.png")
            np.save(workdir / "last.npy", pictures)
    return tmp_path


def test_finished_online_runs_are_read_counted_and_drawn(online_runs):
    results = {}
    for method, reward in online.RUNS:
        workdir, config = online_runs / f"{method}_{reward}", online.make_config(method, reward)
        results[method, reward] = found = online.read(workdir, config)
        assert list(found.scores) == [0, 128, 256, 384, 512, 640, 768]
        # Images that the recipe's stream draws for these updates, which are rounds but for `prompts`.
        drawn = config.steps * config.batch_size * (4 if method == "online_dpo" else 1)
        assert drawn == 768
        assert not config.validation.every % (1 if method == "draft_k" else config.stream.updates)
        assert list(found.pictures) == [0, 256, 512, 768]
        # The sheet enlarges 64 pixels fourfold.
        shown = np.stack([found.pictures[0], found.pictures[768]], axis=1)[:, :, ::4, ::4]
        np.testing.assert_array_equal(shown, np.load(workdir / "last.npy"))
        (workdir / "metrics.jsonl").write_text(
            '{"step": 0, "wall_seconds": 1.0, "validation/diversity": 1}\n'
        )
        assert online.read(workdir, config) is None  # goes on
    table = online.markdown(results).splitlines()
    assert table[3] == (
        "| DRaFT-1 on colourfulness | 768 | 176 | 90 % [84, 95] | 176 | 90 % [84, 95] | 0.060 | 96 |"
    )
    assert len(table) == 2 + 2 * 4
    figure = online.draw(results)
    figure.savefig(online_runs / "online.png")
    with Image.open(online_runs / "online.png") as image:
        assert image.width == 900
    assert [len(axes.lines) for axes in figure.axes[:6]] == [4, 4, 4] * 2
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xydata()[-1], (768, 176))
    titles = [axes.get_title() for axes in figure.axes[6:] if axes.get_title()]
    assert titles[0] == "the base"
    assert len(titles) == 7


@pytest.mark.slow
@each_row(
    ("benchmark", "case", "forms"),
    [
        ("layers", "double 128 to", ("3 x 3 of what is doubled", "four of 2 x 2")),
        ("attention", "SD1.5 16x16", ("plain",)),
    ],
)
def test_single_layers_are_timed_in_each_form(benchmark, case, forms):
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", f"--only={case}", "--images=1", "--runs=1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert re.fullmatch(rf"one cpu, 1 images, jax {jax.__version__}", lines[0])
    measured = [line for line in lines[1:] if line.startswith(case)]
    assert len(measured) == len(forms)
    for line, form in zip(measured, forms, strict=True):
        found = re.fullmatch(rf"{case}.* {form} +temporaries +(\d+) MB, +([\d.]+) ms", line)
        assert found
        assert float(found[2]) > 0


# Does what a benchmark does for the script: a result where --json says, or failure.
STUB = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
[[ $* == *benchmarks.measuring* ]] && { echo "| table |"; exit; }
[[ $* == *benchmarks.sample* ]] && { echo "no pictures today"; exit 3; }
for argument; do [[ $argument == --json=* ]] && echo "[]" > "${argument#--json=}"; done
exit 0
"""


def test_the_script_runs_every_part_once_and_says_what_failed(tmp_path):
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)
    environment = {"CALLS": str(tmp_path / "calls"), "PYTHON": str(tmp_path / "python"), "TINY": "1"}

    def run(**more: str) -> tuple[str, list[str]]:
        (tmp_path / "calls").write_text("")
        command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out")]
        done = subprocess.run(
            command, env=os.environ | environment | more, check=True, capture_output=True, text=True
        )
        return done.stdout, (tmp_path / "calls").read_text().splitlines()

    printed, calls = run(SECONDS_IN_ALL="0")
    assert "sd15: left out, 0 seconds are over" in printed
    assert len(calls) == 1  # the table alone
    printed, calls = run()
    assert re.search("sample: failed with status 3 after .* s: no pictures today", printed)
    for name in ("sd15", "sdxl", "sd15_lora", "sdxl_lora", "input_pipeline", "encode"):
        assert re.search(rf"^{name}: \d+ s$", printed, re.MULTILINE), name
    assert (tmp_path / "out" / "table.md").read_text() == "| table |\n"
    assert sum("benchmarks.compare" in call for call in calls) == 4
    printed, calls = run()  # goes on with what is missing
    assert [call.split()[1] for call in calls] == ["benchmarks.sample", "benchmarks.measuring"]


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="an NVIDIA GPU is here")
def test_the_script_refuses_a_machine_without_a_gpu(tmp_path):
    environment = os.environ | {"PYTHON": "false", "TINY": ""}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "gpu.sh: no GPU here (no nvidia-smi); TINY=1 runs its parts on a CPU\n"


@pytest.mark.slow
def test_a_step_without_one_of_its_parts_computes_the_same_with_no_less_arithmetic(shallow_model):
    config = common.get_config()
    config.update(model=str(shallow_model), batch_size=8)
    config.objective.name = "diffusion_dpo"
    task, mesh = make_task(parse(config), load_pipeline(shallow_model)), make_mesh({"data": 8})
    batch, key = train_step.make_batch(task, 16, 8, mesh), jax.random.key(0)
    norms, flops, held = {}, {}, {}
    for part in (step_parts.AS_IT_IS, *step_parts.UNDOING):
        state, reference = make_state(task, mesh, {})
        step, flops[part] = step_parts.trace(part, state, reference, batch, key)
        held[part] = peak_bytes(step.memory_analysis())
        _, metrics = step(state, reference, batch, key)
        norms[part] = float(metrics["grad_norm"])
    assert len(norms) == 5
    assert norms == pytest.approx(dict.fromkeys(norms, norms[step_parts.AS_IT_IS]), rel=1e-4)
    assert flops["text encoded once for a pair"] > flops["text's keys and values once for a pair"]
    assert flops["text's keys and values once for a pair"] > flops[step_parts.AS_IT_IS]
    assert flops["state donated"] == flops[step_parts.AS_IT_IS]
    assert held["state donated"] > held[step_parts.AS_IT_IS]


def test_a_kernels_instructions_are_counted(tmp_path):
    """Files as libtpu 0.0.42 writes them: units, how many of each, and what each instruction takes."""
    start = "12-splash_mha_fwd_residuals.1"
    lines = ["== CAPACTIY:", "MXU, XLU", "  4 3", "== UTILIZATION:", "0 1", "4 0", "2 3", "0 0"]
    (tmp_path / f"{start}-02-final_hlo-static-per-bundle-utilization.txt").write_text("\n".join(lines))
    bundles = "p = scmp.ge.s32.totalorder %s46_s20, 34 /* loop exit test */\nsbr.rel (!%p43) target"
    (tmp_path / f"{start}-04-final_bundles.txt").write_text(bundles)
    (tmp_path / "12-copy.1-02-final_hlo-static-per-bundle-utilization.txt").write_text("another")
    (schedule,) = kernel_schedule.read_schedules(tmp_path)
    assert schedule == kernel_schedule.Schedule("splash_mha_fwd_residuals.1", 4, 32, 6 / 16)


def test_rows_that_are_kept_are_not_compiled_again(tmp_path, monkeypatch):
    compiled: list[str] = []
    fails = {"v6e:4x4"}

    def run(command, *, check):
        row = dict(flag.removeprefix("--").split("=", 1) for flag in command if flag.startswith("--"))
        compiled.append(row["topology"])
        if row["topology"] in fails:
            return SimpleNamespace(returncode=2)
        plan = {"unit": "pairs", "peak_bytes": 2**34, "hbm_bytes": 2**35, "compiler_seconds": 0.25}
        plan |= {"loop_seconds": 0.25, "estimated_seconds": 0.75, "mfu": 0.5}
        Path(row["json"]).write_text(json.dumps(plan | {"pairs_per_second_per_device": 20.0}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(tpu_plans.subprocess, "run", run)
    monkeypatch.setattr(tpu_plans, "versions", lambda: {"libtpu": "1"})
    rows = [tpu_plans.Row("M, DSPO", "c", "p", topology, 4) for topology in ("v6e:4x4", "v5p:2x2x1")]
    (failure,) = tpu_plans.compile_rows(rows, tmp_path)
    assert "v6e:4x4" in failure
    assert "status 2" in failure
    plan = tpu_plans.kept(rows[1], tmp_path)[1]
    assert tpu_plans.describe(rows[1], plan) == (
        "| M, DSPO | `v5p:2x2x1` |  | 4 pairs | 16.0 of 32.0 GiB | 0.500 s | 0.750 s | 20/s | 50.0% |"
    )
    fails.clear()
    assert not list(tpu_plans.compile_rows(rows, tmp_path))
    assert compiled == ["v6e:4x4", "v5p:2x2x1", "v6e:4x4"]
    monkeypatch.setattr(tpu_plans, "versions", lambda: {"libtpu": "2"})
    assert not list(tpu_plans.compile_rows(rows, tmp_path))
    assert compiled[3:] == ["v6e:4x4", "v5p:2x2x1"]
