"""Saving and restoring the state of a run. The only file that knows Orbax.

A checkpoint directory holds one folder per saved step, named by the step. A folder gets that name only when
everything in it has been written, so a save that was cut short (SIGKILL, full disk) never looks like a
checkpoint.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from logging import WARNING, LogRecord
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import traverse_util

_STATE = "state"
_EXTRA = "extra"
_UNFINISHED = ".orbax-checkpoint-tmp"
# Every call of Orbax costs, however small the array: `SavedParams.read` reads this much at once.
_READ_AHEAD_BYTES = 64 * 2**20
# Of an array that several devices hold, each writes its part if that is at least this much.
_SPLIT_BYTES = 2**20


class Checkpoints:
    """The checkpoints of one run: at most `max_to_keep` of them, written in the background.

    With several processes, all of them make the same calls in the same order.
    """

    def __init__(self, directory: str | Path, max_to_keep: int | None = None):
        """Opens or creates a checkpoint directory and clears what an interrupted save left there.

        Args:
          directory: a local folder.
          max_to_keep: how many checkpoints to keep, the newest ones; None keeps all. An old one is deleted
            only after the new one is complete.

        Raises:
          ValueError: `directory` holds other files than checkpoints.
          NotADirectoryError: `directory` is a file.
        """
        _hush_orbax()
        self._directory = Path(directory).absolute()
        _refuse_foreign_folder(self._directory)
        self._saving: int | None = None
        self._manager = ocp.CheckpointManager(
            self._directory,
            item_handlers={_STATE: _state_handler(), _EXTRA: ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, cleanup_tmp_directories=True),
        )

    def save(self, step: int, state: Any, extra: dict[str, Any], wait: bool = False) -> None:
        """Saves `state` and `extra` as step `step`; does nothing when that step is saved already.

        The arrays are read before this returns or held until they are written, so the caller may donate them
        at once.

        Args:
          step: number of optimizer updates done.
          state: pytree of JAX arrays.
          extra: whatever else a resumed run needs, such as the position in the data; JSON types only.
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
                **{_STATE: ocp.args.PyTreeSave(state), _EXTRA: ocp.args.JsonSave(extra)}
            )
            self._manager.save(step, args=items, force=True)
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
        """The newest complete checkpoint, or None; waits for a save under way."""
        self.wait()
        return self._manager.latest_step()

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any], int]:
        """Reads a checkpoint back into the structure, dtypes and shardings of `abstract_state`.

        The mesh may differ from the one that saved it.

        Args:
          abstract_state: the saved pytree with `jax.ShapeDtypeStruct` leaves that carry their sharding.
          step: which checkpoint; None means the newest.

        Returns:
          (state, extra, step).

        Raises:
          FileNotFoundError: there is no such checkpoint.
          ValueError: it is damaged, or its arrays differ from `abstract_state` in name, shape or dtype.
        """
        self.wait()
        step = _choose_step(self._directory, self._manager.all_steps(), step)
        with _name_restore_errors(self._directory / str(step)):
            saved = self._manager.item_metadata(step)[_STATE].tree
        _refuse_different_state(self._directory / str(step), saved, abstract_state)
        with _name_restore_errors(self._directory / str(step)):
            shardings = ocp.checkpoint_utils.construct_restore_args(abstract_state)
            state = ocp.args.PyTreeRestore(abstract_state, restore_args=shardings)
            items = ocp.args.Composite(**{_STATE: state, _EXTRA: ocp.args.JsonRestore()})
            restored = self._manager.restore(step, args=items)
        logging.info("Restored step %d from %s", step, self._directory)
        return restored[_STATE], restored[_EXTRA], step

    def close(self) -> None:
        """Waits for the save under way and releases the background threads.

        Raises:
          OSError: that save failed; the message says which step still loads.
        """
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
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
            self._manager.reload()  # after a failure the manager's own list no longer agrees with the disk
            newest = self._manager.latest_step()
            kept = (
                "there is no earlier checkpoint"
                if newest is None
                else f"step {newest} is complete and still loads"
            )
            raise OSError(
                f"{self._directory / str(step)}: checkpoint not saved: {_reason(error)}; {kept}"
            ) from error


class SavedParams:
    """One named subtree of a saved state, read a part at a time. A context manager.

    Attributes:
      step: of the checkpoint.
      path: its folder.
      arrays: dotted name -> shape and dtype of every array, e.g. "unet.conv_in.kernel"; nothing is read yet.
    """

    def __init__(self, directory: str | Path, step: int | None = None, subtree: str = "params"):
        """Opens a checkpoint; arguments and errors as `restore_params`."""
        _hush_orbax()
        directory = Path(directory).absolute()
        if not directory.exists():
            raise FileNotFoundError(f"{directory}: no such checkpoint directory")
        _refuse_foreign_folder(directory)
        self.step = _choose_step(directory, _complete_steps(directory), step)
        self.path = directory / str(self.step)
        self._subtree = subtree
        handler = ocp.PyTreeCheckpointHandler()
        with _name_restore_errors(self.path):
            saved = handler.metadata(self.path / _STATE).tree
        if not isinstance(saved.get(subtree), dict):
            raise ValueError(
                f"{self.path}: the saved state has no {subtree!r} (it has: {', '.join(sorted(saved))})"
            )
        self._reader = ocp.Checkpointer(handler)
        # Sorted, as a file of safetensors is: neighbours are wanted together.
        self._saved = dict(sorted(traverse_util.flatten_dict(saved[subtree]).items()))
        self.arrays = {
            ".".join(key): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for key, leaf in self._saved.items()
        }
        self._keys = dict(zip(self.arrays, self._saved, strict=True))
        self._ahead: dict[str, np.ndarray] = {}

    def read(self, name: str) -> np.ndarray:
        """One array. Cheap in the order of `arrays`: a few of those that follow are read with it and kept.

        Raises:
          ValueError: the checkpoint is damaged.
        """
        if name not in self._ahead:
            names = list(self.arrays)
            group: list[str] = []
            size = 0
            for following in names[names.index(name) :]:
                array = self.arrays[following]
                size += array.size * array.dtype.itemsize
                if group and size > _READ_AHEAD_BYTES:
                    break
                group.append(following)
            restored = traverse_util.flatten_dict(self._restore([self._keys[member] for member in group]))
            self._ahead = {member: restored[self._keys[member]] for member in group}
        return self._ahead.pop(name)

    def read_all(self) -> dict[str, Any]:
        """The whole subtree as nested dicts with the keys it was saved with."""
        return self._restore(list(self._saved))

    def _restore(self, keys: list[tuple[str, ...]]) -> dict[str, Any]:
        wanted = {self._subtree: traverse_util.unflatten_dict({key: self._saved[key] for key in keys})}
        as_numpy = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted, is_leaf=_is_array_metadata
        )
        with _name_restore_errors(self.path):
            restored = self._reader.restore(
                self.path / _STATE,
                args=ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True),
            )
        return restored[self._subtree]

    def close(self) -> None:
        """Releases Orbax's threads."""
        self._reader.close()

    def __enter__(self) -> "SavedParams":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def restore_params(
    directory: str | Path, step: int | None = None, subtree: str = "params"
) -> tuple[dict[str, Any], int]:
    """Reads one named subtree of a saved state as nested dicts of NumPy arrays, and nothing else of it.

    Args:
      directory: what `Checkpoints` was given.
      step: which checkpoint; None means the newest.
      subtree: top-level name in the saved state.

    Returns:
      (nested dict with the keys and dtypes it was saved with, step).

    Raises:
      FileNotFoundError: there is no such directory or no such checkpoint.
      ValueError: `directory` holds something else, the checkpoint is damaged, or the state has no such
        subtree.
    """
    with SavedParams(directory, step, subtree) as saved:
        return saved.read_all(), saved.step


def _state_handler() -> ocp.PyTreeCheckpointHandler:
    """Orbax's own, but for arrays with copies on several devices.

    Every device writes a part of its copy, and cutting the part out is a dispatch for each array and device:
    worth it for large arrays only.
    """
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SPLIT_BYTES)
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    )


def _is_array_metadata(node: Any) -> bool:
    return hasattr(node, "shape") and hasattr(node, "dtype")


def _refuse_foreign_folder(directory: Path) -> None:
    """Refuses a path that is neither absent, nor empty, nor a checkpoint directory; leaves it alone."""
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory}: is a file, not a checkpoint directory")
    entries = sorted(entry.name for entry in directory.iterdir()) if directory.exists() else []
    if entries and not any(name.isdecimal() or name.endswith(_UNFINISHED) for name in entries):
        raise ValueError(
            f"{directory}: not a checkpoint directory: it holds {entries[0]!r} and no step folders; "
            "name the `checkpoints` folder of a run, or an empty one"
        )


def _complete_steps(directory: Path) -> list[int]:
    return [int(entry.name) for entry in directory.iterdir() if entry.name.isdecimal() and entry.is_dir()]


def _choose_step(directory: Path, steps: list[int], step: int | None) -> int:
    if not steps:
        raise FileNotFoundError(f"{directory}: holds no complete checkpoint")
    if step is None:
        return max(steps)
    if step not in steps:
        raise FileNotFoundError(
            f"{directory}: holds no step {step} (it has: {', '.join(map(str, sorted(steps)))})"
        )
    return step


def _refuse_different_state(path: Path, saved: Any, wanted: Any) -> None:
    """Compares names, shapes and dtypes, without reading arrays; Orbax would cast a dtype silently."""

    def by_name(tree: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_array_metadata)
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
            raise ValueError(
                f"{path}: {where.format(name=min(missing))} ({len(missing)} such arrays){advice}"
            )
    for name, (shape, dtype) in wanted_arrays.items():
        if saved_arrays[name] != (shape, dtype):
            saved_shape, saved_dtype = saved_arrays[name]
            raise ValueError(
                f"{path}: {name!r} is {saved_dtype}{list(saved_shape)} there "
                f"and {dtype}{list(shape)} in this run{advice}"
            )


@contextmanager
def _name_restore_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax raises anything up to a bare Exception for damaged files
        raise ValueError(
            f"{path}: damaged checkpoint: {_reason(error)}; move this folder away to use the one before it"
        ) from error


def _reason(error: BaseException) -> str:
    """The first line of an error, or plain words for a disk that is full."""
    text = str(error)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        return "no space left on the disk"
    lines = text.strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


class _OrbaxFilter:
    """Drops Orbax's log lines except warnings: its errors arrive as exceptions, the rest is internal."""

    def filter(self, record: LogRecord) -> bool:
        return (
            logging.level_debug() or record.levelno == WARNING or "/orbax/checkpoint/" not in record.pathname
        )


_ORBAX_FILTER = _OrbaxFilter()


def _hush_orbax() -> None:
    logging.get_absl_logger().addFilter(_ORBAX_FILTER)
