"""The rewards by name."""

import functools
import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

from dspo_jax import spelling
from dspo_jax.errors import UserError
from dspo_jax.rewards import aesthetic, b_vqa, clip_score, hps, image_reward, pickscore, pixels
from dspo_jax.rewards.network import RewardNetwork
from dspo_jax.rewards.reward import Reward, describe_error

# A reward that needs no weights, or a function that loads one from the folder of its weights.
REWARDS: dict[str, Reward | Callable[[Path], RewardNetwork]] = {
    "compressibility": Reward("compressibility", "JPEG quality 95", pixels.compressibility),
    "colourfulness": Reward("colourfulness", "Hasler & Süsstrunk 2003", pixels.colourfulness),
    "aesthetic": aesthetic.load,
    "b_vqa": b_vqa.load,
    "clip-b": functools.partial(clip_score.load, name="clip-b"),
    "clip-h": functools.partial(clip_score.load, name="clip-h"),
    "clip-l": functools.partial(clip_score.load, name="clip-l"),
    "hpsv2.0": functools.partial(hps.load, name="hpsv2.0"),
    "hpsv2.1": functools.partial(hps.load, name="hpsv2.1"),
    "imagereward": image_reward.load,
    "pickscore": pickscore.load,
}


def load_reward(name: str, folder: str | Path | None = None, *, batch_size: int = 32) -> Reward:
    """Returns the reward `name`, or a function of the user's.

    Args:
      name: one of `REWARDS`, or `FILE.py:FUNCTION`, a function (images, prompts) -> scores as `Score`
        describes it, whose name the tables then use.
      folder: holds the weights of each reward under its name, as `dspo_jax.rewards.convert` writes them.
      batch_size: images in one call of a network, over the devices of this process.

    Raises:
      UserError: an unknown name, a file that does not define the function, weights that do not fit.
      FileNotFoundError: the file, or the weights.
    """
    if ":" in name:
        function, version = read_function(name)
        return Reward(name.rpartition(":")[2], version, function)
    loaded = read_reward(name, folder)
    return loaded if isinstance(loaded, Reward) else loaded.make_reward(batch_size)


def read_reward(name: str, folder: str | Path | None = None) -> Reward | RewardNetwork:
    """Returns one of `REWARDS`; one with weights as a network. Arguments and errors are `load_reward`'s."""
    if name not in REWARDS:
        hint = "; a function of your own is FILE.py:FUNCTION"
        raise UserError(spelling.unknown("reward", name, REWARDS) + hint)
    reward = REWARDS[name]
    if isinstance(reward, Reward):
        return reward
    weights = Path(folder or "rewards") / name
    if not weights.is_dir():
        raise FileNotFoundError(
            f"reward {name}: no weights in {weights}; make them with python -m dspo_jax.rewards.convert "
            f"--reward={name} --weights=FILE_OR_HUB_ID --out={weights}"
        )
    return reward(weights)


def read_function(name: str) -> tuple[Callable, str]:
    """Returns the user's function `FILE.py:FUNCTION`, and its version: the file and the start of its sha256.

    Raises:
      UserError: the file cannot be run, or does not define the function.
      FileNotFoundError: no such file.
    """
    path, _, function_name = name.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"reward {name}: {file}: no such file")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise UserError(f"reward {name}: must be a .py file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code may raise anything
        raise UserError(f"reward {name}: {file}: cannot be run: {describe_error(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{file}: defines no function {function_name!r}")
    return function, f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()[:8]}"
