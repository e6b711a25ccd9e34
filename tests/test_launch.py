"""The scripts of launch/: read by shellcheck, run against stubs of the schedulers, and run."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import ROOT, last_step, wait_until
from tables import each_row
from tiny_run import read_reproducible, saved_steps

from dspo_jax.cli import EXIT_STOPPED

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
# Where the tools are that came with the tests' environment.
TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
# With a space, a quote and a variable, which must come through every shell unharmed.
OVERRIDES = ["--config.model=MODEL_DIR", "--config.samples.prompts=('a fox', \"$HOME's\")"]

_END = "end of the call"


class Stubs:
    """A folder of commands that note how they were called; `calls` reads the notes."""

    def __init__(self, folder):
        self.folder, self._notes = folder, folder / "notes"
        folder.mkdir()

    def add(self, name, body="", shown=()):
        """A command; `body` is what it does after it has noted its arguments and the variables `shown`."""
        variables = " ".join(f'"{variable}=${{{variable}-}}"' for variable in shown)
        path = self.folder / name
        note = rf'printf "%s\0" {name} "$@" {variables} "{_END}" >> {self._notes}'
        path.write_text(f"#!/bin/bash\n{note}\n{body}\n")
        path.chmod(0o755)

    def calls(self):
        """Every call so far, as [command, argument, ..., VARIABLE=value, ...]."""
        notes = self._notes.read_text() if self._notes.exists() else ""
        return [call.split("\0")[:-1] for call in notes.split(f"{_END}\0")[:-1]]

    def start(self, script, *arguments, **environment):
        """Starts a script of launch/ with these commands in place of the real ones."""
        return subprocess.Popen(
            [LAUNCH / script, *arguments],
            env={
                "HOME": os.environ.get("HOME", "/"),
                "PATH": f"{self.folder}{os.pathsep}{os.environ['PATH']}",
                "CONFIG": "configs/sd15_dspo.py",
                "WORKDIR": "runs/a b",
                **environment,
            },
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script, *arguments, **environment):
        """The same, to its end: (exit status, what it said)."""
        process = self.start(script, *arguments, **environment)
        output, errors = process.communicate(timeout=60)
        return process.returncode, output + errors


@pytest.fixture
def stubs(tmp_path):
    return Stubs(tmp_path / "stubs")


@each_row("script", SCRIPTS)
def test_a_script_is_short_and_parses(script):
    assert len(script.read_text().splitlines()) < 60
    assert subprocess.run(["bash", "-n", script], capture_output=True).stderr == b""
    assert os.access(script, os.X_OK)


@each_row(("tool", "files"), [("shellcheck", SCRIPTS), ("hadolint", [LAUNCH / "Dockerfile"])])
def test_linters_find_nothing(tool, files):
    command = shutil.which(tool, path=TOOLS)
    if command is None:
        pytest.skip(f"{tool} is not installed")
    result = subprocess.run([command, *files], capture_output=True, text=True)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


@pytest.mark.parametrize(
    "script", [path.name for path in SCRIPTS if path.name not in ("gpu.sh", "slurm.sbatch")]
)
def test_what_is_not_set_is_named(stubs, script):
    status, said = stubs.run(script, CONFIG="")
    assert status == 1
    assert re.search(r": (CONFIG|TPU|CLUSTER): set ", said)


SHOWN = ("JAX_COMPILATION_CACHE_DIR", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_FLAGS", "LIBTPU_INIT_ARGS")
OFFLOAD = " ".join(
    f"--xla_tpu_enable_sparse_core_collective_offload_{kind}=true" for kind in ("all_reduce", "all_gather")
)


def test_train_gets_the_environment_and_the_arguments_unchanged(stubs):
    stubs.add("python", "exit 7", SHOWN)
    assert stubs.run("train.sh", *OVERRIDES)[0] == 7
    [call] = stubs.calls()
    command = ["python", "-m", "dspo_jax.train", "--config", "configs/sd15_dspo.py", "--workdir", "runs/a b"]
    assert call[: -len(SHOWN)] == [*command, *OVERRIDES]
    assert call[-len(SHOWN) :] == [
        "JAX_COMPILATION_CACHE_DIR=runs/.jax_cache",
        "XLA_PYTHON_CLIENT_MEM_FRACTION=",
        "XLA_FLAGS=",
        f"LIBTPU_INIT_ARGS={OFFLOAD}",
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ["runs/.jax_cache", "0.9", "--xla_gpu_enable_latency_hiding_scheduler=true", OFFLOAD]),
        (dict.fromkeys(SHOWN, "mine"), ["mine"] * 4),
        ({"XLA_FLAGS": "", "LIBTPU_INIT_ARGS": ""}, ["runs/.jax_cache", "0.9", "", ""]),
    ],
)
def test_with_a_gpu_there_is_more_and_what_was_set_stays(stubs, given, expected):
    stubs.add("nvidia-smi")
    stubs.add("python", "", SHOWN)
    assert stubs.run("train.sh", **given)[0] == 0
    assert [variable.partition("=")[2] for variable in stubs.calls()[-1][-len(SHOWN) :]] == expected


def test_jax_knows_the_flags_that_it_is_given():
    flags = re.search(r"XLA_FLAGS---(\S+)}", (LAUNCH / "train.sh").read_text())[1]
    check = [sys.executable, "-c", "import jax; print(jax.numpy.zeros(1))"]
    for value, status in ((f"--{flags}", True), ("--xla_gpu_no_such_flag=true", False)):
        result = subprocess.run(check, env={**os.environ, "XLA_FLAGS": value}, capture_output=True)
        assert (result.returncode == 0) is status, result.stderr


def test_several_processes_on_one_host_get_a_gpu_each_and_all_are_asked_to_stop(stubs):
    waiting = 'trap "exit 143" TERM; echo ready; while :; do sleep 0.05; done'
    stubs.add("python", f'[ "$1" = -c ] && {{ echo 12345; exit; }}; {waiting}', ["CUDA_VISIBLE_DEVICES"])
    process = stubs.start("gpu.sh", *OVERRIDES, PROCESSES="3", CUDA_VISIBLE_DEVICES="4,6,7")
    for _ in range(3):
        assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    calls = sorted(call for call in stubs.calls() if "-m" in call)
    for number, (call, gpu) in enumerate(zip(calls, "467", strict=True)):
        assert call[7:] == [
            *OVERRIDES,
            "--coordinator_address=localhost:12345",
            "--num_processes=3",
            f"--process_id={number}",
            f"CUDA_VISIBLE_DEVICES={gpu}",
        ]


def test_one_process_that_fails_is_the_status_of_all(stubs):
    stubs.add("python", 'case "$*" in *process_id=1*) exit 2 ;; *) exit 0 ;; esac')
    assert stubs.run("gpu.sh", PROCESSES="2", PORT="1")[0] == 2
    status, said = stubs.run("gpu.sh", PROCESSES="2", PORT="1", CUDA_VISIBLE_DEVICES="0")
    assert status == 1
    assert "CUDA_VISIBLE_DEVICES names fewer GPUs than PROCESSES=2" in said


@pytest.mark.parametrize(("status", "queued_again"), [(0, False), (2, False), (EXIT_STOPPED, True)])
def test_slurm_queues_a_run_that_was_stopped_again(stubs, status, queued_again):
    stubs.add("python", f"exit {status}", ["JAX_LOCAL_DEVICE_IDS"])
    stubs.add("srun", 'shift; exec "$@"')
    stubs.add("scontrol")
    job = {"SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_GPUS_ON_NODE": "4"}
    assert stubs.run("slurm.sbatch", *OVERRIDES, SLURM_CPUS_ON_NODE="32", **job)[0] == status
    srun, python, *rest = stubs.calls()
    assert srun == ["srun", "--cpus-per-task=32", "launch/train.sh", *OVERRIDES]
    assert python[-1] == "JAX_LOCAL_DEVICE_IDS=0,1,2,3"  # one process takes every GPU of its node
    assert rest == ([["scontrol", "requeue", "17"]] if queued_again else [])


def test_slurm_outlives_a_signal_to_its_shell_and_says_where_to_submit_from(stubs, tmp_path):
    stubs.add("srun", "echo ready; sleep 1; exit 143")
    stubs.add("scontrol")
    process = stubs.start("slurm.sbatch", SLURM_JOB_ID="17")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert stubs.calls()[-1] == ["scontrol", "requeue", "17"]
    status, said = stubs.run("slurm.sbatch", SLURM_SUBMIT_DIR=str(tmp_path))
    assert (status, said) == (
        2,
        f"error: no launch/train.sh in {tmp_path}; submit from the root of the clone\n",
    )


# A slice as `gcloud` tells of it: not there, made, preempted while the run is on, made again, the run's end.
GCLOUD = """
state=$(cat {state} 2> /dev/null)
case "$*" in
    *" describe "*) [ -n "$state" ] || exit 1; echo "$state" ;;
    *" create "*) echo READY > {state} ;;
    *" delete "*) rm {state} ;;
    *nohup*) ;;
    *pgrep*) exit 1 ;;
    *"tail -n"*) [ -e {state}.seen ] || echo PREEMPTED > {state} ;;
    *"cat train.status"*) if [ -e {state}.seen ]; then echo {status}; else touch {state}.seen; exit 255; fi ;;
esac
"""
POD = {"TPU": "slice", "ZONE": "zone-a", "TYPE": "v5litepod-16", "RUNTIME": "v2", "PAUSE": "0", "SPOT": "1"}


@pytest.mark.parametrize("status", [0, 2])
def test_a_pod_is_made_followed_made_again_when_preempted_and_ends_as_train_does(stubs, tmp_path, status):
    stubs.add("gcloud", GCLOUD.format(state=tmp_path / "state", status=status))
    assert stubs.run("tpu_pod.sh", *OVERRIDES, **POD, SETUP="mount it")[0] == status
    calls = [call[4:] for call in stubs.calls()]  # without: gcloud compute tpus tpu-vm
    verbs = [call[0] for call in calls]
    a_run = ["describe", "ssh", "scp", "ssh", "ssh", "ssh", "ssh"]
    assert verbs == ["describe", "create", *a_run, "describe", "delete", "describe", "create", *a_run]
    assert calls[1] == [
        *("create", "slice", "--zone=zone-a", "--accelerator-type=v5litepod-16", "--version=v2", "--spot")
    ]
    _, probe, copy, install, start, follow, ended = calls[2:9]
    assert copy[2:] == ["slice:", "--zone=zone-a", "--worker=all"]
    assert "mount it" in install[-1]
    assert "'.[tpu]'" in install[-1]
    assert [call[-2] for call in (install, start)] == ["--worker=all"] * 2
    assert [call[-2] for call in (probe, follow, ended)] == ["--worker=0"] * 3
    # What the hosts run, through two shells and one more for the background.
    inner = re.search(r"setsid bash -c (.*) > train.log", start[-1])[1]
    command = shlex.split(subprocess.check_output(["bash", "-c", f"printf %s {inner}"], text=True))
    assert command[5:] == [
        *("env", "CONFIG=configs/sd15_dspo.py", "WORKDIR=runs/a b", "launch/train.sh"),
        *OVERRIDES,
        *(";", "echo", "$?", ">", "~/train.status"),
    ]


def test_a_pod_whose_run_is_on_is_only_followed(stubs):
    answers = 'case "$*" in *describe*) echo READY ;; *"cat train.status"*) echo 0 ;; esac'
    stubs.add("gcloud", answers)
    assert stubs.run("tpu_pod.sh", **POD)[0] == 0
    assert [call[4] for call in stubs.calls()] == ["describe", "ssh", "ssh", "ssh"]


def test_a_pod_on_which_nothing_starts_does_not_end_as_an_earlier_run_did(stubs):
    stubs.add(
        "gcloud", 'case "$*" in *describe*) echo READY ;; *"cat train.status"*) echo 0 ;; *) exit 1 ;; esac'
    )
    status, said = stubs.run("tpu_pod.sh", **POD, ATTEMPTS="2")
    assert (status, said.splitlines()[0]) == (1, "slice: not started in attempt 1")
    assert [call[4] for call in stubs.calls()] == ["describe", "ssh", "scp"] * 2


def test_a_pod_that_cannot_be_had_is_given_up(stubs):
    stubs.add("gcloud", "exit 1")
    status, said = stubs.run("tpu_pod.sh", **POD, ATTEMPTS="3")
    assert (status, said.splitlines()[-1]) == (1, "error: slice: given up after 3 attempts")
    assert [call[4] for call in stubs.calls()] == ["describe", "create"] * 3


def test_xpk_gets_the_run_as_one_command_and_its_log_is_followed(stubs):
    for name in ("xpk", "kubectl"):
        stubs.add(name)
    job = {"CLUSTER": "c", "WORKLOAD": "w", "IMAGE": "r/dspo_jax:tpu", "TYPE": "v5litepod-16", "SLICES": "2"}
    assert stubs.run("gke_xpk.sh", *OVERRIDES, **job)[0] == 0
    xpk, wait, logs = stubs.calls()
    assert xpk[:3] == ["xpk", "workload", "create"]
    options = dict(option.split("=", 1) for option in xpk[3:])
    assert shlex.split(options.pop("--command")) == [
        *("env", "CONFIG=configs/sd15_dspo.py", "WORKDIR=runs/a b", "launch/train.sh", *OVERRIDES)
    ]
    assert options == {
        "--cluster": "c",
        "--workload": "w",
        "--docker-image": "r/dspo_jax:tpu",
        "--tpu-type": "v5litepod-16",
        "--num-slices": "2",
        "--max-restarts": "50",
        "--termination-grace-period-seconds": "300",
    }
    assert (wait[1], logs[1]) == ("wait", "logs")
    assert "jobset.sigs.k8s.io/jobset-name=w" in logs[-1]


# Commands that leave what the real ones leave, and a training that first is stopped.
STAGES = """
for option; do case $option in --out=*) mkdir -p "${{option#--out=}}" ;; esac; done
case "$*" in *dspo_jax.train*) [ -e {seen} ] || {{ touch {seen}; exit 143; }} ;; esac
"""


def test_the_pipeline_goes_on_where_it_was(stubs, tmp_path):
    stubs.add("python", STAGES.format(seen=tmp_path / "seen"))
    settings = {
        "WORKDIR": str(tmp_path / "run"),
        "MODEL": "org/model",
        "ENCODE": "configs/encode/folder.py --config.source.path=DIR",
        "EVALUATE": "--prompts=p.txt --rewards=compressibility",
    }

    def stages():
        before = len(stubs.calls())
        status, _ = stubs.run("pipeline.sh", *OVERRIDES, **settings)
        modules = [call[2].removeprefix("dspo_jax.") for call in stubs.calls()[before:]]
        return status, modules

    assert stages() == (EXIT_STOPPED, ["convert", "encode", "train"])
    assert stages() == (0, ["encode", "train", "convert", "evaluate"])
    assert stages() == (0, ["encode", "evaluate"])
    encode, train = stubs.calls()[1:3]
    model, pairs = f"{tmp_path}/run/model", f"{tmp_path}/run/pairs"
    assert encode[3:] == [
        *("--config", *settings["ENCODE"].split(), f"--config.model={model}", f"--out={pairs}")
    ]
    assert train[7:] == [f"--config.model={model}", f"--config.data.path={pairs}", *OVERRIDES]


def test_the_image_has_the_uv_of_the_makefile_and_installs_what_there_is():
    text = (LAUNCH / "Dockerfile").read_text()
    pinned = re.search(r"^UV_VERSION := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert f"uv=={pinned}\n" in text
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    assert all(re.search(rf"^{target} = ", extras, re.MULTILINE) for target in ("gpu", "tpu"))
    copied = re.search(r"^COPY (pyproject.*) \./$", text, re.MULTILINE)[1].split()
    assert all((ROOT / name).is_file() for name in copied)


# For what is really run; each process has one fake device.
REAL = {
    **os.environ,
    "PATH": TOOLS,
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
}
SETTINGS = {
    "objective.reward_scale": 10.0,
    "objective.score_weight": 1.0,
    "optimizer.learning_rate": 1e-2,
    "optimizer.warmup_steps": 0,
    "batch_size": 8,
    "log_every": 1,
    "steps": 60,
    "checkpoint.every": 7,
    "validation.every": 0,
    "samples.every": 0,
    "mesh.data": 2,
}


@pytest.fixture
def sessions():
    """Scripts with their own processes, none of which outlives the test."""
    started = []
    yield started
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_two_processes_killed_stopped_and_started_again_make_the_run_of_two_undisturbed(
    shallow_model, tiny_pairs, tmp_path, sessions
):
    settings = SETTINGS | {"model": shallow_model, "data.path": tiny_pairs}
    arguments = [f"--config.{key}={value}" for key, value in settings.items()]

    def start(workdir):
        environment = REAL | {"PROCESSES": "2", "CONFIG": "configs/common.py", "WORKDIR": str(workdir)}
        command = [LAUNCH / "gpu.sh", *arguments, "--heartbeat_timeout=10"]
        with (tmp_path / "log").open("a") as log:
            sessions.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            )
        return sessions[-1]

    def children(process):
        return [
            int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ]

    undisturbed, workdir = tmp_path / "undisturbed", tmp_path / "run"
    assert start(undisturbed).wait(900) == 0, (tmp_path / "log").read_text()

    process = start(workdir)
    wait_until(
        [process], lambda: bool(saved_steps(workdir)) and last_step(workdir) > saved_steps(workdir)[-1]
    )
    os.kill(children(process)[1], signal.SIGKILL)
    assert process.wait(120) not in (0, EXIT_STOPPED)  # the other ends by itself
    killed_at = last_step(workdir)
    assert killed_at < 60

    process = start(workdir)
    wait_until([process], lambda: last_step(workdir) >= killed_at + 4)
    assert "Restored step" in (tmp_path / "log").read_text()
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == EXIT_STOPPED
    assert last_step(workdir) < 60

    assert start(workdir).wait(900) == 0, (tmp_path / "log").read_text()
    assert read_reproducible(workdir) == read_reproducible(undisturbed)


@pytest.mark.slow
def test_the_pipeline_makes_win_rates_of_a_model_and_pairs_and_does_nothing_twice(shallow_model, tmp_path):
    draw, pairs = np.random.default_rng(0), tmp_path / "images"
    pairs.mkdir()
    rows = []
    for number in range(12):
        files = [f"{number}{side}.png" for side in "ab"]
        for file in files:
            Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8)).save(pairs / file)
        rows.append(json.dumps({"caption": f"picture {number}", "winner": files[0], "loser": files[1]}))
    (pairs / "pairs.jsonl").write_text("\n".join(rows))
    (tmp_path / "prompts.txt").write_text("a picture\nanother\n")
    workdir = tmp_path / "run"
    environment = REAL | {
        "CONFIG": "configs/emoji_dspo.py",
        "WORKDIR": str(workdir),
        "MODEL": str(shallow_model),
        "ENCODE": f"configs/encode/folder.py --config.source.path={pairs} --config.resolution=16 "
        "--config.num_workers=0 --config.source.validation_share=0.3",
        "EVALUATE": f"--prompts={tmp_path / 'prompts.txt'} --rewards=compressibility --steps=2 --num_seeds=1",
    }
    changes = ["--config.steps=2", "--config.batch_size=2", "--config.samples.every=0"]

    def run():
        command = [LAUNCH / "pipeline.sh", *changes]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return re.findall(r"^pipeline: (\w+):", result.stderr, re.MULTILINE)

    def written():
        return {path: path.stat().st_mtime_ns for path in workdir.rglob("*.safetensors")}

    assert run() == ["convert", "encode", "train", "export", "evaluate"]
    assert (workdir / "evaluation" / "index.html").is_file()
    before = written()
    assert len(before) == 6
    assert run() == ["encode", "evaluate"]
    assert written() == before
