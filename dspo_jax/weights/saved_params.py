"""The trained parameters of a run without the rest of its state, as NumPy arrays: for sampling and export."""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from dspo_jax import json_files
from dspo_jax.errors import UserError
from dspo_jax.json_files import JsonObject
from dspo_jax.models.lora import Params, Scale
from dspo_jax.weights import checkpoints, orbax_log

# Every call of Orbax costs, however small the array: `SavedParams.read` reads this much at once.
_READ_AHEAD_BYTES = 64 * 2**20


class SavedParams:
    """One named subtree of a saved state, read a part at a time. A context manager.

    Attributes:
      step: of the checkpoint.
      path: folder of the checkpoint.
      arrays: dotted name -> shape and dtype of every array, e.g. "unet.conv_in.kernel"; nothing is read yet.
    """

    def __init__(self, directory: str | Path, step: int | None = None, subtree: str | None = None):
        """Opens a checkpoint; arguments and errors as `restore_params`."""
        orbax_log.hush()
        directory = Path(directory).absolute()
        if not directory.exists():
            raise FileNotFoundError(f"{directory}: no such checkpoint directory")
        checkpoints.refuse_foreign_folder(directory)
        self.step = checkpoints.choose_step(directory, checkpoints.complete_steps(directory), step)
        self.path = directory / str(self.step)
        handler = ocp.PyTreeCheckpointHandler()
        with checkpoints.name_restore_errors(self.path):
            saved = handler.metadata(self.path / checkpoints.STATE).tree
        if subtree is None:
            subtree = "ema" if "ema" in saved else "params"
        self._subtree = subtree
        if not isinstance(saved.get(subtree), dict):
            raise UserError(
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
        """Reads one array. Cheap in the order of `arrays`: a few of the next ones are read along and kept.

        Raises:
          UserError: the checkpoint is damaged.
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

    def read_all(self) -> Params:
        """Returns the whole subtree as nested dicts with the keys it was saved with."""
        return self._restore(list(self._saved))

    def _restore(self, keys: list[tuple[str, ...]]) -> Params:
        wanted = {self._subtree: traverse_util.unflatten_dict({key: self._saved[key] for key in keys})}
        as_numpy = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted, is_leaf=checkpoints.is_array_metadata
        )
        with checkpoints.name_restore_errors(self.path):
            restored = self._reader.restore(
                self.path / checkpoints.STATE,
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
    directory: str | Path, step: int | None = None, subtree: str | None = None
) -> tuple[Params, int]:
    """Reads one named subtree of a saved state as nested dicts of NumPy arrays, and nothing else of it.

    Args:
      directory: what `Checkpoints` was given.
      step: which checkpoint; None means the newest.
      subtree: top-level name in the saved state; None means what the run is for: the moving average of the
        parameters where it kept one ("ema"), or else "params".

    Returns:
      (nested dict with the keys and dtypes it was saved with, step).

    Raises:
      FileNotFoundError: there is no such directory or no such checkpoint.
      UserError: `directory` holds something else, the checkpoint is damaged, or the state has no such
        subtree.
    """
    with SavedParams(directory, step, subtree) as saved:
        return saved.read_all(), saved.step


def read_run_config(run: Path, *texts: str) -> JsonObject:
    """Reads the config.json of a training run.

    Args:
      run: the workdir.
      texts: dotted keys that must be there and hold a string.

    Raises:
      FileNotFoundError, UserError: the file is missing or damaged, or lacks such a key.
    """
    path, fix = run / "config.json", "put back the config that the run was started with"
    config = json_files.read_object(path, fix)
    for key in texts:
        json_files.member(config, key, str, path, fix)
    return config


def read_base(run: Path) -> str:
    """Reads which model a training run started from; raises as `read_run_config`."""
    return read_run_config(run, "model")["model"]


def read_scale(config: JsonObject) -> Scale:
    """Returns the factor of a run's adapters by its config; runs of early versions have no keys: it was 1."""
    keys = config.get("lora", {})
    return Scale(keys.get("alpha"), keys.get("rank_stabilised", False))


def parse_step(text: str, run: Path) -> int:
    """Returns the checkpoint of a run that a text asks for: a number, or "best" by the held-out pairs.

    Raises:
      UserError: another text, or no checkpoint has a held-out score.
    """
    if text.isascii() and text.isdecimal():
        return int(text)
    if text != "best":
        raise UserError(f"{run}: step {text!r}: must be a whole number, or best")
    best = checkpoints.find_best(run / "checkpoints")
    if best is None:
        raise UserError(f"{run}: no checkpoint has a held-out score to be the best; name one by its number")
    return best[0]


def split_run(name: str | Path) -> tuple[Path, int | None] | None:
    """Parses the workdir of a run, or `WORKDIR@STEP` or `WORKDIR@best`, to (workdir, step).

    The step is None for the newest. Returns None where there is no such run.

    Raises:
      UserError: as `parse_step`.
    """
    if (Path(name) / "checkpoints").is_dir():
        return Path(name), None
    folder, at, step = str(name).rpartition("@")
    if not (at and folder and (Path(folder) / "checkpoints").is_dir()) or Path(name).exists():
        return None
    return Path(folder), parse_step(step, Path(folder))


def name_step(name: str) -> str:
    """Returns the name of a model; of a run's workdir always with a step, `WORKDIR@STEP`.

    Raises:
      FileNotFoundError: the run has no checkpoint.
      UserError: as `split_run`.
    """
    run = split_run(name)
    if run is None:
        return name
    folder = run[0] / "checkpoints"
    return f"{run[0]}@{checkpoints.choose_step(folder, checkpoints.complete_steps(folder), run[1])}"
