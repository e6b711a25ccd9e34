"""How processes are told of one another; what they do together is in distributed/."""

import pytest
from absl import flags
from tables import each_row

from dspo_jax.parallel import processes
from dspo_jax.parallel.process_flags import define_process_flags


@each_row(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_NTASKS": "16"}, False),  # a script of a job of many tasks, outside srun
        ({"SLURM_STEP_NUM_TASKS": "16"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2", "JAX_PLATFORMS": "cpu"}, False),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
        ({"MEGASCALE_NUM_SLICES": "2", "JAX_PLATFORMS": "tpu,cpu"}, True),
    ],
)
def test_launchers_are_recognised_by_their_environment(environment, expected):
    assert processes.in_cluster(environment) is expected


@pytest.fixture
def parsed(monkeypatch):
    """Parses a command line with the flags of several processes alone; notes how JAX is initialized."""
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    for define in ("DEFINE_string", "DEFINE_integer"):
        original = getattr(flags, define)
        monkeypatch.setattr(
            flags, define, lambda *args, original=original: original(*args, flag_values=values)
        )
    define_process_flags()
    calls = []
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda **given: calls.append(given))
    monkeypatch.setattr(processes, "in_cluster", lambda environment: False)

    def parse(*line):
        values(["train", *line])
        processes.initialize_from_flags()
        return calls

    return parse


def test_one_process_joins_nobody(parsed):
    assert parsed() == []


def test_flags_say_who_joins_whom(parsed):
    line = ("--coordinator_address=host:1", "--num_processes=4", "--process_id=3", "--heartbeat_timeout=7")
    assert parsed(*line) == [
        {"coordinator_address": "host:1", "num_processes": 4, "process_id": 3, "heartbeat_timeout_seconds": 7}
    ]


def test_in_a_cluster_jax_asks_the_launcher(parsed, monkeypatch):
    monkeypatch.setattr(processes, "in_cluster", lambda environment: True)
    [given] = parsed()
    assert {given[name] for name in ("coordinator_address", "num_processes", "process_id")} == {None}


@each_row(
    ("line", "message"),
    [
        (
            ("--num_processes=2",),
            "--coordinator_address is not set: several processes need --coordinator_address, "
            "--num_processes, --process_id",
        ),
        (
            ("--coordinator_address=host:1", "--num_processes=2", "--process_id=2"),
            "--process_id=2: must be between 0 and --num_processes - 1 = 1",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(parsed, line, message):
    with pytest.raises(ValueError, match="process") as caught:
        parsed(*line)
    assert str(caught.value) == message


def test_a_launcher_that_counts_in_words_is_named():
    with pytest.raises(ValueError, match=r"^SLURM_STEP_NUM_TASKS=two: a launcher sets"):
        processes.in_cluster({"SLURM_STEP_NUM_TASKS": "two"})
