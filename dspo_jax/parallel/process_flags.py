"""Flags of a command that several processes may run together; `processes` reads them."""

from absl import flags


def define_process_flags() -> None:
    """Defines the flags; a command calls this once."""
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "HOST:PORT of the first of several processes. SLURM, Open MPI and TPU pods say it themselves.",
    )
    flags.DEFINE_integer("num_processes", None, "How many processes share the run.")
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
    flags.DEFINE_integer(
        "heartbeat_timeout", 100, "Seconds after which the others stop when a process is no longer heard of."
    )
