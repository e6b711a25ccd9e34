"""Reward models: images and their prompts to scores."""

from dspo_jax.rewards.registry import REWARDS, load_reward
from dspo_jax.rewards.reward import Reward

__all__ = ["REWARDS", "Reward", "load_reward"]
