"""Distributions of the noise level sigma that a model of rectified flow is trained at.

Each is that of f(u), u uniform between 0 and 1, and then shifted: sigma' = a sigma / (1 + (a - 1) sigma),
which adds ln a to logit(sigma) (Esser et al. 2024, arXiv 2403.03206, section 5.3.2). All are defined on sigma
itself, 0 for the image and 1 for the noise: diffusers' trainers draw an index of timesteps that fall, so that
their logit_mean has the opposite sign, and take levels that the scheduler has shifted already.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Key

from dspo_jax import spelling
from dspo_jax.errors import UserError

_HALF_STEP = 2.0**-24
"""Half of what two uniform float32 numbers differ by at least: what is drawn lies inside 0 and 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigmaDraw(abc.ABC):
    """A distribution of sigma.

    Attributes:
      shift: a; above 1 it draws more noise.
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        """Refuses what is no distribution.

        Raises:
          UserError: by the key of the config.
        """
        if not 0 < self.shift < math.inf:
            raise UserError(f"config.levels.shift = {self.shift!r}: must be a finite number above 0")

    @abc.abstractmethod
    def unshifted(self, u: Float[jax.Array, "..."]) -> Float[jax.Array, "..."]:
        """Returns f(u)."""

    @abc.abstractmethod
    def describe(self) -> str:
        """Names the distribution without its shift."""

    def __call__(self, key: Key[jax.Array, ""], shape: tuple[int, ...]) -> Float[jax.Array, "..."]:
        """Draws float32 levels of a shape, above 0 and at most 1."""
        return self.of_uniform(jax.random.uniform(key, shape) + _HALF_STEP)

    def of_uniform(self, u: Float[jax.Array, "..."]) -> Float[jax.Array, "..."]:
        """Returns sigma of u, above 0 and at most 1."""
        sigma = jnp.clip(self.unshifted(u), _HALF_STEP, 1.0)
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def notes(self) -> list[str]:
        """Says what is drawn, and what the scale of an objective of eps becomes under it."""
        middles = jnp.asarray((np.arange(4096) + 0.5) / 4096, jnp.float32)
        sigma = np.asarray(self.of_uniform(middles), np.float64)
        factor = np.mean((1 - sigma) ** 2)
        return [
            f"noise levels: {self.describe()}, shift {self.shift:g}: median sigma {np.median(sigma):.3g}, "
            f"mean of (1 - sigma)^2 {factor:.3g}, by which a beta of errors of the noise is multiplied for "
            "the same strength on average"
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitNormal(SigmaDraw):
    """Sigma whose logit is normal (Esser et al. 2024, Eq. 19).

    Attributes:
      mean, std: of the logit; 0 and 1 are the paper's best.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.mean):
            raise UserError(f"config.levels.mean = {self.mean!r}: must be a finite number")
        if not 0 < self.std < math.inf:
            raise UserError(f"config.levels.std = {self.std!r}: must be a finite number above 0")

    def unshifted(self, u: Float[jax.Array, "..."]) -> Float[jax.Array, "..."]:
        return jax.nn.sigmoid(self.mean + self.std * jax.scipy.special.ndtri(u))

    def describe(self) -> str:
        return f"sigmoid of N({self.mean:g}, {self.std:g}^2)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode(SigmaDraw):
    """1 - u - scale (cos(pi u / 2)^2 - 1 + u) (Esser et al. 2024, Eq. 20).

    Attributes:
      scale: from -1 to 2 / (pi - 2), where it is monotone; above 0 it favours the middle, below 0 the
        ends; 1.29 in the paper.
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        super().__post_init__()
        largest = 2 / (math.pi - 2)
        if not -1 <= self.scale <= largest:
            raise UserError(f"config.levels.scale = {self.scale!r}: must be from -1 to {largest:.4g}")

    def unshifted(self, u: Float[jax.Array, "..."]) -> Float[jax.Array, "..."]:
        return 1 - u - self.scale * (jnp.square(jnp.cos(jnp.pi * u / 2)) - 1 + u)

    def describe(self) -> str:
        return f"mode, scale {self.scale:g}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform(SigmaDraw):
    """Every sigma as likely as the others."""

    def unshifted(self, u: Float[jax.Array, "..."]) -> Float[jax.Array, "..."]:
        return u

    def describe(self) -> str:
        return "uniform"


DRAWS: dict[str, type[SigmaDraw]] = {"logit_normal": LogitNormal, "mode": Mode, "uniform": Uniform}


def make_sigma_draw(keys: Mapping[str, Any]) -> SigmaDraw:
    """Makes the distribution of `config.levels`, by default `logit_normal`.

    Args:
      keys: `draw`, a name, and arguments; None is a default.

    Raises:
      UserError: an unknown name, an argument that the distribution does not have, or a value.
    """
    given = {key: value for key, value in keys.items() if value is not None}
    name = given.pop("draw", "logit_normal")
    if name not in DRAWS:
        raise UserError(spelling.unknown("config.levels.draw", str(name), DRAWS))
    own = [field.name for field in dataclasses.fields(DRAWS[name])]
    for key, value in given.items():
        if key not in own:
            raise UserError(
                f"config.levels.{key} = {value!r}: {name!r} has no such argument, but: {', '.join(own)}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"config.levels.{key} = {value!r}: must be a number")
    return DRAWS[name](**given)
