"""Rewards: images and prompts to scores, one way of loading all of them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspo_jax.rewards.registry import REWARDS as REWARDS
    from dspo_jax.rewards.registry import load_reward as load_reward
    from dspo_jax.rewards.reward import Reward as Reward

_OFFERED = ("REWARDS", "Reward", "load_reward")  # as __all__, pdoc would look for modules of these names


def __getattr__(name: str) -> Any:
    """Imports the registry when it is first asked for: it takes seconds, which a command's help need not."""
    if name in _OFFERED:
        from dspo_jax.rewards import registry

        return getattr(registry, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
