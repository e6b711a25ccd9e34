"""Objectives with hyperparameters at which each of these matters, and arrays to evaluate them on."""

import jax.numpy as jnp
import numpy as np

from dspo_jax.objectives import Predictions

SHAPE = (4, 2, 3, 2, 2)  # B, P, h, w, C
WITH_REWARD = (
    *("diffusion_dpo", "diffusion_dpo_l2", "sdpo", "ipo", "dmpo", "mapo", "kto"),
    *("alpha_dpo", "hinge", "linear_dpo", "diffusion_rpo", "npo", "orpo"),
    *("dspo", "dspo_ref", "dspo_sdxl"),
)
OBJECTIVES = ("ddpm", "sft", "rwr", "dspo_e", *WITH_REWARD)

# Every hyperparameter with a value at which it matters: the scales put the sigmoids where they bend.
CASES = {
    "ddpm": ("ddpm", {}),
    "ddpm-min_snr": ("ddpm", {"min_snr_gamma": 5.0}),
    "sft": ("sft", {}),
    "sft-min_snr": ("sft", {"min_snr_gamma": 5.0}),
    "rwr": ("rwr", {}),
    "rwr-min_snr": ("rwr", {"min_snr_gamma": 5.0}),
    "diffusion_dpo": ("diffusion_dpo", {"beta": 3.0}),
    "diffusion_dpo_l2": ("diffusion_dpo_l2", {"beta": 3.0}),
    "diffusion_dpo-min_snr": ("diffusion_dpo", {"beta": 3.0, "min_snr_gamma": 5.0, "sft_weight": 0.3}),
    "diffusion_dpo-mixture": ("diffusion_dpo", {"beta": 3.0, "sft_weight": 0.3, "anchor_weight": 0.7}),
    "dspo-mixture": (
        "dspo",
        {"lam": 0.7, "gamma": 1.5, "detach": True, "sft_weight": 0.3, "anchor_weight": 0.7},
    ),
    "sdpo-min_snr": ("sdpo", {"beta": 3.0, "mu": 0.7, "min_snr_gamma": 5.0}),
    "diffusion_dpo_l2-min_snr": ("diffusion_dpo_l2", {"beta": 3.0, "min_snr_gamma": 5.0}),
    "sdpo": ("sdpo", {"beta": 3.0, "mu": 0.7}),
    "ipo": ("ipo", {"beta": 0.8}),
    "dmpo": ("dmpo", {"beta": 3.0, "alpha": 0.1}),
    "alpha_dpo": ("alpha_dpo", {"beta": 3.0}),
    "alpha_dpo-low": ("alpha_dpo", {"beta": 3.0, "alpha": 0.3}),
    "hinge": ("hinge", {"beta": 1.2}),
    "linear_dpo": ("linear_dpo", {"beta": 3.0}),
    "diffusion_rpo": ("diffusion_rpo", {"beta": 9.0, "temperature": 0.4}),
    "diffusion_rpo-mixture": ("diffusion_rpo", {"beta": 9.0, "sft_weight": 0.3, "anchor_weight": 0.7}),
    "diffusion_rpo-min_snr": ("diffusion_rpo", {"beta": 9.0, "min_snr_gamma": 5.0}),
    "npo": ("npo", {"beta": 3.0}),
    "orpo": ("orpo", {"beta": 0.7}),
    "kto": ("kto", {"beta": 1.5}),
    "mapo": ("mapo", {"margin_weight": 0.7, "kappa": 0.4, "scale": 5.0}),
    "dspo": ("dspo", {"lam": 0.7, "gamma": 1.5}),
    "dspo-detached": ("dspo", {"lam": 0.7, "gamma": 1.5, "detach": True}),
    "dspo-scales": ("dspo", {"reward_scale": 4.0, "score_weight": 0.6}),
    "dspo_ref": ("dspo_ref", {"lam": 0.7, "gamma": 1.5}),
    "dspo_ref-detached": ("dspo_ref", {"reward_scale": 4.0, "score_weight": 0.6, "detach": True}),
    "dspo_e": ("dspo_e", {"lam": 0.7, "gamma": 1.5}),
    "dspo_e-weight": ("dspo_e", {"score_weight": 0.6}),
    "dspo_sdxl": ("dspo_sdxl", {"beta": 1.0}),
    "dspo_sdxl-switched": ("dspo_sdxl", {"beta": 1.0, "released_switch": True}),
}
STRONG = {name: CASES[name][1] for name in OBJECTIVES}


def make_arrays():
    """Float64 arrays whose margins take both signs, and soft labels."""
    rng = np.random.default_rng(0)
    reference, target = rng.normal(size=(2, *SHAPE))
    return {
        "policy": reference + 0.5 * rng.normal(size=SHAPE),
        "reference": reference,
        "target": target,
        "timesteps": np.array([[1, 900], [40, 60], [500, 500], [999, 0]]),
        "preference": np.array([1.0, 0.9, 0.5, 0.7]),
        "weight": np.array([[3.0, 0.0], [1.5, 0.4], [0.2, 2.0], [0.7, 0.2]]),
        "captions": rng.normal(size=(4, 5)),
    }


def as_predictions(arrays, dtype=jnp.float32):
    floats = {key: jnp.asarray(arrays[key], dtype) for key in ("policy", "reference", "target")}
    preference, weight = (jnp.asarray(arrays[key], jnp.float32) for key in ("preference", "weight"))
    timesteps, captions = jnp.asarray(arrays["timesteps"]), jnp.asarray(arrays["captions"], jnp.float32)
    return Predictions(**floats, levels=timesteps, preference=preference, weight=weight, captions=captions)
