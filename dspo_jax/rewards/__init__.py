"""Reward models: images and their prompts to scores."""

from dspo_jax.rewards import aesthetic as aesthetic
from dspo_jax.rewards import clip_score as clip_score
from dspo_jax.rewards import hps as hps
from dspo_jax.rewards import image_reward as image_reward
from dspo_jax.rewards import pickscore as pickscore
from dspo_jax.rewards import pixels as pixels
from dspo_jax.rewards.registry import Reward as Reward
from dspo_jax.rewards.registry import load_reward as load_reward
from dspo_jax.rewards.registry import reward_names as reward_names
