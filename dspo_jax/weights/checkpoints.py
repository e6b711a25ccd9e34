"""Saving and restoring the state of a run. With saved_params.py the only file that knows Orbax.

A checkpoint directory holds one folder per saved step, named by the step. A folder gets that name only when
everything in it has been written, so a save that was cut short (SIGKILL, full disk) never looks like a
checkpoint.
"""

from __future__ import annotations

import errno
import itertools
import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jaxtyping import PyTree
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from dspo_jax import json_files
from dspo_jax.errors import UserError
from dspo_jax.json_files import JsonObject
from dspo_jax.parallel import processes
from dspo_jax.weights import orbax_log

STATE = "state"
_EXTRA = "extra"
_SCORE = "score"
_UNKNOWN = float("-inf")  # Orbax warns about a checkpoint without metrics
_UNFINISHED = ".orbax-checkpoint-tmp"
# Devices that hold copies of an array each write a part, if the part has at least so many bytes.
_SPLIT_BYTES = 2**20
# Errors of reading that do not tell of damaged content.
_NOT_DAMAGE = (errno.EACCES, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)


class DamagedCheckpoint(UserError):
    """A checkpoint that cannot be read."""


class Checkpoints:
    """The checkpoints of one run: the newest `max_to_keep` and the best, written in the background.

    With several processes, all of them make the same calls in the same order.
    """

    def __init__(self, directory: str | Path, max_to_keep: int | None = None):
        """Opens or creates a checkpoint directory and clears what an interrupted save left there.

        Args:
          directory: a local folder.
          max_to_keep: how many checkpoints to keep, the newest ones; None keeps all. The one with the best
            score is kept besides. An old one is deleted only after the new one is complete.

        Raises:
          UserError: `directory` holds other files than checkpoints.
          NotADirectoryError: `directory` is a file.
        """
        orbax_log.hush()
        self.directory = Path(directory).absolute()
        refuse_foreign_folder(self.directory)
        self._saving: int | None = None
        self._manager = ocp.CheckpointManager(
            self.directory,
            handler_registry=ocp.handlers.create_default_handler_registry(
                **{STATE: _state_handler(), _EXTRA: ocp.JsonCheckpointHandler()}
            ),
            options=ocp.CheckpointManagerOptions(
                best_fn=_score,  # also makes Orbax write the scores
                preservation_policy=keep.AnyPreservationPolicy(
                    [
                        keep.LatestN(max_to_keep),
                        keep.BestN(get_metric_fn=_score, n=1),
                    ]
                ),
                cleanup_tmp_directories=True,
            ),
        )

    def save(
        self,
        step: int,
        state: PyTree,
        extra: JsonObject,
        score: float | None = None,
        wait: bool = False,
    ) -> None:
        """Saves `state` and `extra` as step `step`; does nothing when that step is saved already.

        The arrays are read before this returns or held until they are written, so the caller may donate them
        at once.

        Args:
          step: number of optimizer updates done.
          state: pytree of JAX arrays.
          extra: whatever else a resumed run needs, such as the position in the data; JSON types only.
          score: how good the model is, higher is better; None or not finite: not known, and never the best.
          wait: return only when the checkpoint is complete on disk.

        Raises:
          OSError: this save, or an earlier one that was still being written, failed; the message says which
            step still loads.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        with self._name_save_errors(step):
            self._saving = step
            items = ocp.args.Composite(
                **{STATE: ocp.args.PyTreeSave(state), _EXTRA: ocp.args.JsonSave(extra)}
            )
            metrics = {_SCORE: score if score is not None and math.isfinite(score) else _UNKNOWN}
            self._manager.save(step, args=items, metrics=metrics, force=True)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Blocks until the save under way, if any, is complete on disk.

        Raises:
          OSError: that save failed; the message says which step still loads.
        """
        with self._name_save_errors(self._saving):
            self._manager.wait_until_finished()
        self._saving = None

    def latest_step(self) -> int | None:
        """Returns the newest complete checkpoint, or None; waits for a save under way."""
        self.wait()
        return self._manager.latest_step()

    def best(self) -> tuple[int, float] | None:
        """Returns step and score of the best checkpoint that is kept, or None where none has a score."""
        self.wait()
        return find_best(self.directory)

    def restore_newest(
        self, abstract_state: PyTree, fallback: bool, agree: Callable[[bool], bool] = bool
    ) -> tuple[PyTree, JsonObject, int]:
        """Restores the newest checkpoint, or with `fallback` the newest that is not damaged.

        A damaged one is reported and renamed, so that the run can save that step again.

        Args:
          abstract_state: as `restore`.
          fallback: whether to go on with an older one.
          agree: with several processes, tells them all whether one of them says yes.
        """
        while True:
            newest = self.latest_step()
            try:
                restored, damage = self.restore(abstract_state), None
            except DamagedCheckpoint as error:
                restored, damage = None, error
            if not agree(damage is not None) and restored is not None:
                return restored
            if damage is None:
                damage = DamagedCheckpoint(f"{self.directory / str(newest)}: damaged for another process")
            if not fallback or len(self._manager.all_steps()) < 2:
                raise damage
            logging.error("%s: config.checkpoint.fallback: using the one before it", damage)
            if processes.is_first():
                names = (f"{newest}.damaged{number or ''}" for number in itertools.count())
                aside = next(path for path in map(self.directory.joinpath, names) if not path.exists())
                (self.directory / str(newest)).rename(aside)
            processes.wait_for_all("damaged checkpoint set aside")
            self._manager.reload()

    def restore(self, abstract_state: PyTree, step: int | None = None) -> tuple[PyTree, JsonObject, int]:
        """Reads a checkpoint back into the structure, dtypes and shardings of `abstract_state`.

        The mesh may differ from the one that saved it.

        Args:
          abstract_state: the saved pytree with `jax.ShapeDtypeStruct` leaves that carry their sharding.
          step: which checkpoint; None means the newest.

        Returns:
          (state, extra, step).

        Raises:
          FileNotFoundError: there is no such checkpoint.
          DamagedCheckpoint: it cannot be read.
          UserError: its arrays differ from `abstract_state` in name, shape or dtype.
        """
        self.wait()
        step = choose_step(self.directory, self._manager.all_steps(), step)
        with name_restore_errors(self.directory / str(step)):
            saved = self._manager.metadata(step).item_metadata[STATE].tree
        _refuse_different_state(self.directory / str(step), saved, abstract_state)
        with name_restore_errors(self.directory / str(step)):
            shardings = ocp.checkpoint_utils.construct_restore_args(abstract_state)
            state = ocp.args.PyTreeRestore(abstract_state, restore_args=shardings)
            items = ocp.args.Composite(**{STATE: state, _EXTRA: ocp.args.JsonRestore()})
            restored = self._manager.restore(step, args=items)
        logging.info("Restored step %d from %s", step, self.directory)
        return restored[STATE], restored[_EXTRA], step

    def close(self) -> None:
        """Waits for the save under way and releases the background threads.

        Raises:
          OSError: that save failed; the message says which step still loads.
        """
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def _name_save_errors(self, step: int | None) -> Iterator[None]:
        """Turns a failed save into one OSError: the folder, the reason, the newest step that loads."""
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:  # tensorstore reports a full disk as ValueError
            self._saving = None
            traceback.clear_frames(error.__traceback__)  # they hold pending writes
            self._manager.reload()  # after a failure the manager's own list no longer agrees with the disk
            newest = self._manager.latest_step()
            kept = (
                "there is no earlier checkpoint"
                if newest is None
                else f"step {newest} is complete and still loads"
            )
            raise OSError(
                f"{self.directory / str(step)}: checkpoint not saved: {_reason(error)}; {kept}"
            ) from error


def _score(metrics: dict[str, float]) -> float:
    return metrics[_SCORE]


def _state_handler() -> ocp.PyTreeCheckpointHandler:
    """Makes Orbax's handler, with another rule for arrays that several devices hold.

    Every device writes a part of its copy, and cutting the part out is a dispatch for each array and device:
    worth it for large arrays only.
    """
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SPLIT_BYTES)
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    )


def is_array_metadata(node: object) -> bool:
    return hasattr(node, "shape") and hasattr(node, "dtype")


def refuse_foreign_folder(directory: Path) -> None:
    """Refuses a path that is neither absent, nor empty, nor a checkpoint directory; leaves it alone."""
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory}: is a file, not a checkpoint directory")
    entries = sorted(entry.name for entry in directory.iterdir()) if directory.exists() else []
    if entries and not any(name.isdecimal() or name.endswith(_UNFINISHED) for name in entries):
        raise UserError(
            f"{directory}: not a checkpoint directory: it holds {entries[0]!r} and no step folders; "
            "name the `checkpoints` folder of a run, or an empty one"
        )


def complete_steps(directory: Path) -> list[int]:
    """Returns the steps of the complete checkpoints in a folder, in any order."""
    return [int(entry.name) for entry in directory.iterdir() if entry.name.isdecimal() and entry.is_dir()]


def find_best(directory: Path) -> tuple[int, float] | None:
    """Returns step and score of the best complete checkpoint, of equal ones the newest; None without scores.

    Nothing is changed in the folder, to which another process may be writing.

    Raises:
      UserError: a score is damaged.
    """
    scores = []
    for step in complete_steps(directory) if directory.is_dir() else ():
        path = directory / str(step) / "metrics" / "metrics"  # as Orbax lays it out
        if path.is_file():
            fix = f"delete {path}, and that checkpoint counts as one without a score"
            score = json_files.member(json_files.read_object(path, fix), _SCORE, float, path, fix)
            scores.append((score, step))
    score, step = max(scores, default=(_UNKNOWN, 0))
    return None if score == _UNKNOWN else (step, score)


def choose_step(directory: Path, steps: list[int], step: int | None) -> int:
    if not steps:
        raise FileNotFoundError(f"{directory}: holds no complete checkpoint")
    if step is None:
        return max(steps)
    if step not in steps:
        raise FileNotFoundError(
            f"{directory}: holds no step {step} (it has: {', '.join(map(str, sorted(steps)))})"
        )
    return step


def _refuse_different_state(path: Path, saved: PyTree, wanted: PyTree) -> None:
    """Compares names, shapes and dtypes, without reading arrays; Orbax would cast a dtype silently."""

    def by_name(tree: PyTree) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_array_metadata)
        return {
            jax.tree_util.keystr(key, simple=True, separator="."): (tuple(leaf.shape), np.dtype(leaf.dtype))
            for key, leaf in leaves
        }

    saved_arrays, wanted_arrays = by_name(saved), by_name(wanted)
    advice = "; resume with the config the run was started with, or start in a new --workdir"
    for missing, where in (
        (
            wanted_arrays.keys() - saved_arrays.keys(),
            "this run needs {name!r}, which the checkpoint does not have",
        ),
        (saved_arrays.keys() - wanted_arrays.keys(), "the checkpoint has {name!r}, which this run does not"),
    ):
        if missing:
            raise UserError(f"{path}: {where.format(name=min(missing))} ({len(missing)} such arrays){advice}")
    for name, (shape, dtype) in wanted_arrays.items():
        if saved_arrays[name] != (shape, dtype):
            saved_shape, saved_dtype = saved_arrays[name]
            raise UserError(
                f"{path}: {name!r} is {saved_dtype}{list(saved_shape)} there "
                f"and {dtype}{list(shape)} in this run{advice}"
            )


@contextmanager
def name_restore_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax raises anything up to a bare Exception for damaged files
        if (
            isinstance(error, MemoryError)
            or "RESOURCE_EXHAUSTED" in str(error)
            or getattr(error, "errno", None) in _NOT_DAMAGE
        ):
            raise
        raise DamagedCheckpoint(
            f"{path}: damaged checkpoint: {_reason(error)}; move this folder away to use the one before it"
        ) from error


def _reason(error: BaseException) -> str:
    """Returns the first line of an error, or plain words for a disk that is full."""
    text = str(error)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        return "no space left on the disk"
    lines = text.strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
