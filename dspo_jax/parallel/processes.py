"""Several processes as one run: joining, locking, voting.

Every process runs the same program over the same global arrays. Only the first writes what is not a
checkpoint.
"""

import hashlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dspo_jax import locks
from dspo_jax.errors import UserError
from dspo_jax.parallel.mesh import MESH_AXES, batch_share, replicated


def initialize_from_flags() -> None:
    """Joins the other processes of the run, if it has several; call it before anything asks for a device.

    Raises:
      UserError: some of the flags are given and others not, or do not fit together.
      OSError: the other processes were not reached.
    """
    values = flags.FLAGS
    explicit: dict[str, Any] = {
        name: values[name].value for name in ("coordinator_address", "num_processes", "process_id")
    }
    missing = [name for name, value in explicit.items() if value is None]
    if missing and len(missing) < len(explicit):
        raise UserError(f"--{missing[0]} is not set: several processes need {_listed(explicit)}")
    if not missing and not 0 <= explicit["process_id"] < explicit["num_processes"]:
        raise UserError(
            f"--process_id={explicit['process_id']}: must be between 0 and --num_processes - 1 = "
            f"{explicit['num_processes'] - 1}"
        )
    if missing and not in_cluster(os.environ):
        return
    try:
        jax.distributed.initialize(**explicit, heartbeat_timeout_seconds=values.heartbeat_timeout)
    except (RuntimeError, ValueError) as error:  # not reached; or a launcher that does not say enough
        reason = str(error).splitlines()[0]
        raise OSError(
            f"the processes of this run did not find one another: {reason}; give {_listed(explicit)}"
        ) from error
    logging.info("process %d of %d", jax.process_index(), jax.process_count())


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Returns whether a launcher that JAX can ask has started this process as one of several.

    SLURM by srun, Open MPI's mpirun, or a TPU virtual machine, which may be one of a pod.
    """
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        count = environment.get(name, "1")
        if not count.isdecimal():
            raise UserError(f"{name}={count}: a launcher sets this variable to a number; unset it")
        if int(count) > 1:
            return True
    platforms = environment.get("JAX_PLATFORMS", "")  # XPK, for one, says "tpu,cpu"
    if platforms and "tpu" not in platforms.split(","):
        return False
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_NUM_SLICES" in environment:
        return True
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def is_first() -> bool:
    """Returns whether this is the first process, which alone writes what is not a checkpoint."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Waits until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather_shares(values: np.ndarray, mesh: Mesh) -> np.ndarray:
    """Returns the values of a whole batch, given those of this process's part (`mesh.batch_share`).

    Args:
      values: an array of 32 bits a number with a leading axis of examples, of one shape in every process.
      mesh: the devices.
    """
    if jax.process_count() == 1:
        return values
    share, shares = batch_share(mesh)
    numbers = multihost_utils.process_allgather(np.int32(share))
    parts = dict(zip(numbers.tolist(), multihost_utils.process_allgather(values), strict=True))
    return np.concatenate([parts[number] for number in range(shares)])


def refuse_failure_elsewhere(error: Exception | None, what: str) -> None:
    """Ends the run in every process where something failed in one, which the others would wait for.

    Every process must call it alike.

    Args:
      error: of this process, which is raised here; None where it did not fail.
      what: names what failed, for the other processes.

    Raises:
      UserError: it failed in another process.
    """
    failed = jax.process_count() > 1 and multihost_utils.process_allgather(np.int32(error is not None)).any()
    if error is not None:
        raise error
    if failed:
        raise UserError(f"{what}: failed in another process, which says why")


def differing(texts: Mapping[str, str]) -> list[str]:
    """Returns the names under which some process has another text; the same list in every process.

    Args:
      texts: by name; of the same names in every process.
    """
    if jax.process_count() == 1 or not texts:
        return []
    sums = [hashlib.sha256(text.encode()).digest() for text in texts.values()]
    of_all = multihost_utils.process_allgather(np.stack([np.frombuffer(each, np.uint8) for each in sums]))
    same = (of_all == of_all[:1]).all(axis=(0, 2))
    return [name for name, is_same in zip(texts, same, strict=True) if not is_same]


@contextmanager
def claim(out: Path, share: tuple[int, int] | None = None) -> Iterator[None]:
    """Keeps other runs off a folder that this one writes to; see `locks.claim`.

    The first process holds the lock for all. Where it is refused, all processes end.

    Raises:
      UserError, OSError: as `locks.claim`, in every process.
    """
    if not jax.distributed.is_initialized():  # and no device is asked for
        with locks.claim(out, share):
            yield
        return
    with ExitStack() as stack:
        refusal = None
        if is_first():
            try:
                stack.enter_context(locks.claim(out, share))
            except (UserError, OSError) as error:
                refusal = error
        refused = multihost_utils.broadcast_one_to_all(np.array(refusal is not None))
        if refusal is not None:
            raise refusal
        if refused:
            raise UserError(f"{out}: refused to this run; its first process says why")
        yield


class Vote:
    """Tells all processes at the same step that one of them has asked for something.

    With several processes the answer is that of the call before, so that none ever waits for the others.
    """

    def __init__(self, mesh: Mesh):
        """Prepares a vote among the processes of a mesh."""
        self._one_a_device = NamedSharding(mesh, PartitionSpec(MESH_AXES))
        self._size = mesh.size
        self._any = jax.jit(jnp.any, out_shardings=replicated(mesh))
        self._asked: jax.Array | None = None

    def __call__(self, mine: bool) -> bool:
        """Hands in this process's vote; whether there was any in the call before (with one process: now)."""
        if jax.process_count() == 1:
            return mine
        before, self._asked = self._asked, self._ask(mine)
        return before is not None and bool(before)

    def now(self, mine: bool) -> bool:
        """Returns the same, but waits for the answer."""
        return bool(self._ask(mine)) if jax.process_count() > 1 else mine

    def _ask(self, mine: bool) -> jax.Array:
        votes = np.full(self._size, mine)
        return self._any(
            jax.make_array_from_callback(votes.shape, self._one_a_device, lambda index: votes[index])
        )


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(f"--{name}" for name in names)
