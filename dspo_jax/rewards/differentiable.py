"""Rewards that can be differentiated by the pixels, for training by reward gradients."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, PyTree

from dspo_jax.errors import UserError
from dspo_jax.models.model import Params
from dspo_jax.rewards.network import RewardNetwork, ignore_prompts
from dspo_jax.rewards.pixels import differentiable_colourfulness
from dspo_jax.rewards.registry import read_function, read_reward
from dspo_jax.rewards.reward import Reward, describe_error

Images = Float32[Array, "B H W 3"]
Scores = Float32[Array, " B"]

DIVISORS = {
    "pickscore": 1.0,
    "hpsv2.0": 0.01,
    "hpsv2.1": 0.01,
    "clip-b": 1.0,
    "clip-h": 1.0,
    "clip-l": 1.0,
    "imagereward": 1.0,
    "b_vqa": 0.1,
    "aesthetic": 0.5,
    "colourfulness": 18.0,
}
"""A unit of each reward. All are choices: the spread over the images of a base model has not been measured.

pickscore, hpsv2.*, clip-*: one logit of the softmax that the network was trained with, which is 0.01 of the
cosine, as CLIP's scale is 100. imagereward: one deviation, by which the released code divides what the head
gives. aesthetic: half a point of its ten, an estimate. b_vqa: a tenth of its range. colourfulness: 109 / 6,
the mean step between the seven degrees of colourfulness to which Hasler and Süsstrunk 2003 give values.
"""

_FILES = 32  # images in one call of a network, as by default in `load_reward`
# Two images of noise, on which a user's function is tried.
_TRIAL_SHAPE = (2, 512, 512, 3)


@dataclasses.dataclass(frozen=True, eq=False)
class DifferentiableReward:
    """A reward as a pure function of pixels.

    Attributes:
      name: what tables call it.
      version: which weights or code these are, as tables print it.
      params: float32 weights, {} if there are none: an argument of `function`, never a part of its program.
      tokenize: N prompts -> arrays with a leading axis N, on the host.
      function: pure: (params, images [B, H, W, 3] float32 in [0, 1], tokens of their prompts) -> scores [B]
        float32. It can be jitted and differentiated by the images, and multiplies in float32 on every device.
        The caller clamps images to [0, 1].
      divisor: a unit of the reward (`DIVISORS`). Training climbs function / divisor, so that learning rates
        of different rewards compare.
      of_files: makes the rewards of image files, one of each part of a sum, from weights like `params`, which
        may be on the devices already; none by default.
    """

    name: str
    version: str
    params: Params
    tokenize: Callable[[Sequence[str]], PyTree]
    function: Callable[[Params, Images, PyTree], Scores]
    divisor: float
    of_files: Callable[[Params], Sequence[Reward]] = lambda params: ()


def load_differentiable(reward: str, folder: str | Path | None = None) -> DifferentiableReward:
    """Returns a reward, or a weighted sum of several, that can be differentiated by the pixels.

    Args:
      reward: one of `DIVISORS`; `FILE.py:FUNCTION`, a JAX function (images [B, H, W, 3] float32 in [0, 1]) ->
        scores [B] float32 for every B, H and W; or a sum of these as `combine` makes it, whose parts are
        separated by commas and may have a weight in front: `pickscore,0.5*aesthetic`.
      folder: holds the weights of each reward under its name, as for `load_reward`.

    Raises:
      UserError: an unknown name, a reward without a gradient, weights that do not fit, a sum that `combine`
        refuses.
      FileNotFoundError: the file, or the weights.
    """
    if "," not in reward and "*" not in reward:
        return _load(reward, folder)
    return combine([(_load(name, folder), weight) for name, weight in read_sum(reward)])


def read_sum(reward: str) -> list[tuple[str, float]]:
    """Reads names and weights of a sum of rewards such as `pickscore,0.5*aesthetic`.

    Raises:
      UserError: a weight that is no number, not finite or 0, or a reward that stands twice.
    """
    parts: list[tuple[str, float]] = []
    for part in reward.split(","):
        weight, star, name = part.strip().rpartition("*")
        try:
            parts.append((name, float(weight) if star else 1.0))
        except ValueError:
            raise UserError(f"reward {part!r}: {weight!r} is no weight; write, e.g., 0.5*{name}") from None
    check_weights(parts)
    return parts


def check_weights(parts: Sequence[tuple[str, float]]) -> None:
    """Refuses names and weights that make no sum.

    Raises:
      UserError: a weight that is 0 or not finite, or a name that stands twice.
    """
    names = [name for name, _ in parts]
    for name, weight in parts:
        if not math.isfinite(weight) or not weight:
            raise UserError(f"reward {name}: its weight is {weight:g}; it must be finite and not 0")
        if names.count(name) > 1:
            raise UserError(f"reward {name}: stands twice in the sum; give it once")


def combine(parts: Sequence[tuple[DifferentiableReward, float]]) -> DifferentiableReward:
    """Returns the sum of weight * reward / divisor over (reward, weight), which has the divisor 1.

    Raises:
      UserError: a weight that is 0 or not finite, or two rewards of one name.
    """
    names = [reward.name for reward, _ in parts]
    check_weights([(reward.name, weight) for reward, weight in parts])
    # Neither function may keep the weights of the networks.
    tokenizers = {reward.name: reward.tokenize for reward, _ in parts}
    terms = {reward.name: (reward.function, weight / reward.divisor) for reward, weight in parts}
    files = {reward.name: reward.of_files for reward, _ in parts}

    def tokenize(prompts: Sequence[str]) -> dict[str, PyTree]:
        return {name: tokenizer(prompts) for name, tokenizer in tokenizers.items()}

    def function(params: Params, images: Images, tokens: dict[str, PyTree]) -> Scores:
        scores = [
            factor * score(params[name], images, tokens[name]) for name, (score, factor) in terms.items()
        ]
        return jnp.stack(scores).sum(0)

    def of_files(params: Params) -> list[Reward]:
        return [reward for name, make in files.items() for reward in make(params[name])]

    return DifferentiableReward(
        name=",".join(
            name if weight == 1 else f"{weight:g}*{name}"
            for name, (_, weight) in zip(names, parts, strict=True)
        ),
        version="; ".join(f"{reward.name}: {reward.version}" for reward, _ in parts),
        params={reward.name: reward.params for reward, _ in parts},
        tokenize=tokenize,
        function=function,
        divisor=1.0,
        of_files=of_files,
    )


def differentiate(network: RewardNetwork) -> DifferentiableReward:
    """Returns the differentiable form of one of the registry's networks, with the same weights."""
    apply, transform, size = network.apply, network.preprocess.on_device, network.size
    bare = dataclasses.replace(network, params={})

    def function(params: Params, images: Images, tokens: PyTree) -> Scores:
        return apply(params, transform(images, size), tokens)

    return DifferentiableReward(
        network.name,
        network.version,
        network.params,
        network.tokenize,
        _in_float32(function),
        DIVISORS[network.name],
        lambda params: [dataclasses.replace(bare, params=params).make_reward(_FILES)],
    )


def _load(name: str, folder: str | Path | None) -> DifferentiableReward:
    if name == "compressibility":
        raise UserError(
            "reward compressibility: has no gradient: rounding and entropy coding make the size of a JPEG; "
            f"train by a policy gradient, such as ddpo, or by another reward: {', '.join(DIVISORS)}"
        )
    if ":" in name:
        return _load_function(name)
    loaded = read_reward(name, folder)
    if isinstance(loaded, RewardNetwork):
        return differentiate(loaded)
    return _without_weights(loaded, differentiable_colourfulness, DIVISORS[name])


def _load_function(name: str) -> DifferentiableReward:
    function, version = read_function(name)
    _check_function(name, function)

    def score(images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        del prompts
        with jax.default_matmul_precision("highest"):
            return np.asarray(function(jnp.asarray(np.stack(images), jnp.float32) / 255))

    return _without_weights(Reward(name.rpartition(":")[2], version, score), function, 1.0)


def _without_weights(
    of_files: Reward, score: Callable[[Images], Scores], divisor: float
) -> DifferentiableReward:
    def function(params: Params, images: Images, tokens: PyTree) -> Scores:
        del params, tokens
        return score(images)

    return DifferentiableReward(
        of_files.name,
        of_files.version,
        {},
        ignore_prompts,
        _in_float32(function),
        divisor,
        lambda params: [of_files],
    )


def _in_float32(
    function: Callable[[Params, Images, PyTree], Scores],
) -> Callable[[Params, Images, PyTree], Scores]:
    """Multiplies in float32 on accelerators too, as `Scorer` does; backwards as well."""

    def precise(params: Params, images: Images, tokens: PyTree) -> Scores:
        with jax.default_matmul_precision("highest"):
            return function(params, images, tokens)

    return precise


def _check_function(name: str, function: Callable) -> None:
    """Refuses a user's function that fails, or that JAX cannot trace or differentiate."""
    fix = "it must be a JAX function (images [B, H, W, 3] float32 in [0, 1]) -> scores [B] float32"
    images = jax.ShapeDtypeStruct(_TRIAL_SHAPE, jnp.float32)
    try:
        scores = jax.eval_shape(function, images)
    except Exception as error:  # the user's own code may raise anything
        raise UserError(f"reward {name}: cannot be traced: {describe_error(error)}; {fix}") from error
    if not isinstance(scores, jax.ShapeDtypeStruct):
        raise UserError(f"reward {name}: gave a {type(scores).__name__}; {fix}")
    if (scores.shape, scores.dtype) != (_TRIAL_SHAPE[:1], jnp.float32):
        raise UserError(f"reward {name}: gave {scores.dtype}{list(scores.shape)} for 2 images; {fix}")
    noise = np.random.default_rng(0).random(_TRIAL_SHAPE, np.float32)
    slope = jax.grad(lambda images: function(images).sum())
    try:
        jax.eval_shape(slope, images)
        gradient = jax.jit(slope)(noise)
    except Exception as error:
        raise UserError(f"reward {name}: cannot be differentiated: {describe_error(error)}; {fix}") from error
    size = np.abs(np.asarray(gradient)).max()
    if not size or not math.isfinite(size):
        raise UserError(
            f"reward {name}: its gradient for images of noise is {size:g}; it must be finite and not 0"
        )
