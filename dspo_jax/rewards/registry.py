"""What a reward is, and the rewards by name."""

import dataclasses
import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dspo_jax import spelling
from dspo_jax.errors import UserError

Score = Callable[[Sequence[np.ndarray], Sequence[str]], np.ndarray]
"""(images [H, W, 3] uint8, which may differ in size, the prompt of each) -> scores [N]; higher is better."""


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward model that is ready to score.

    Attributes:
      name: what tables call it.
      version: which weights or code these are, as tables print it.
      function: scores images.
      reads_alpha: whether `function` takes a picture with transparency as [H, W, 4] and treats it as the
        reward's released code does; otherwise it gets all of them over white.
    """

    name: str
    version: str
    function: Score
    reads_alpha: bool = False

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        """Scores [N] float32 of N images [H, W, 3] uint8 under their prompts; or [H, W, 4] if `reads_alpha`.

        Raises:
          ValueError: the function gave another number of scores, or one that is not finite.
        """
        scores = np.asarray(self.function(images, prompts))
        if scores.shape != (len(images),):
            raise UserError(
                f"reward {self.name}: gave scores of shape {list(scores.shape)} for {len(images)} images; "
                f"it must give [{len(images)}]"
            )
        scores = scores.astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(scores))
        if len(bad):
            raise UserError(
                f"reward {self.name}: gave {scores[bad[0]]} for an image of {prompts[bad[0]]!r}; "
                "every score must be finite"
            )
        return scores


# Needs no weights; or makes a reward of the folder that rewards/convert.py wrote.
_FUNCTIONS: dict[str, tuple[str, Score]] = {}
_LOADERS: dict[str, Callable[[Path, int], Reward]] = {}


def register_function(name: str, version: str) -> Callable[[Score], Score]:
    """Function decorator: makes a reward that needs no weights available under `name`."""

    def decorate(function: Score) -> Score:
        _FUNCTIONS[name] = version, function
        return function

    return decorate


def register_loader(
    name: str,
) -> Callable[[Callable[[Path, int], Reward]], Callable[[Path, int], Reward]]:
    """Function decorator: `(folder, batch_size) -> Reward` makes the reward of its weights."""

    def decorate(load: Callable[[Path, int], Reward]) -> Callable[[Path, int], Reward]:
        _LOADERS[name] = load
        return load

    return decorate


def reward_names() -> list[str]:
    """The rewards there are."""
    return [*_FUNCTIONS, *_LOADERS]


def load_reward(name: str, folder: str | Path | None = None, *, batch_size: int = 32) -> Reward:
    """The reward `name`, or a function of the user's.

    Args:
      name: one of `reward_names()`, or `FILE.py:FUNCTION`, a function (images, prompts) -> scores as `Score`
        describes it, whose name the tables then use.
      folder: holds the weights of each reward under its name, as `dspo_jax.rewards.convert` writes them.
      batch_size: images in one call of a network, over the devices of this process.

    Raises:
      ValueError: an unknown name, a file that does not define the function, weights that do not fit.
      FileNotFoundError: the file, or the weights.
    """
    path, colon, function = name.rpartition(":")
    if colon:
        return _load_function(Path(path), function)
    if name in _FUNCTIONS:
        return Reward(name, *_FUNCTIONS[name])
    if name not in _LOADERS:
        hint = "; a function of your own is FILE.py:FUNCTION"
        raise UserError(spelling.unknown("reward", name, reward_names()) + hint)
    weights = Path(folder or "rewards") / name
    if not weights.is_dir():
        raise FileNotFoundError(
            f"reward {name}: no weights in {weights}; make them with python -m dspo_jax.rewards.convert "
            f"--reward={name} --weights=FILE_OR_HUB_ID --out={weights}"
        )
    return _LOADERS[name](weights, batch_size)


def _load_function(file: Path, name: str) -> Reward:
    if not file.is_file():
        raise FileNotFoundError(f"reward {file}:{name}: {file}: no such file")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise UserError(f"reward {file}:{name}: must be a .py file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{file}: defines no function {name!r}")
    return Reward(name, f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()[:8]}", function)
