"""The optimizer and its learning-rate schedule, made from `config.optimizer`."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dspo_jax import spelling
from dspo_jax.errors import UserError
from dspo_jax.training.adafactor import scale_by_released_factored_rms

OPTIMIZERS = ("adafactor", "adamw", "lion")
SCHEDULES = ("constant", "cosine", "inverse_sqrt", "linear")

# Of these, what does not depend on where the run ends.
ENDLESS_SCHEDULES = ("constant", "inverse_sqrt")
MOMENT_DTYPES = ("bfloat16", "float32")
FACTORED_AXES = ("largest", "released")
KEYS = (
    "b1",
    "b2",
    "eps",
    "factored_axes",
    "learning_rate",
    "max_grad_norm",
    "moment_dtype",
    "name",
    "scale_lr",
    "schedule",
    "warmup_steps",
    "weight_decay",
)

Schedule = Callable[[jax.Array | int], jax.Array]


def make_optimizer(
    config: Any, total_steps: int, batch_size: int
) -> tuple[optax.GradientTransformation, Schedule]:
    """Builds clipping by global norm, then the optimizer with decoupled weight decay on every parameter.

    "adamw" is torch's. "adafactor" is what the released trainers use for SDXL: second moments factored into
    rows and columns, updates clipped to root mean square 1, no momentum, the learning rate as given rather
    than relative to the parameters; b1, b2 and eps are not used. `factored_axes` "released" factors the axes
    that transformers' Adafactor does (`scale_by_released_factored_rms`), "largest" the two largest of at
    least 128, as optax does, which of a convolution keeps next to nothing.

    "lion" (Chen et al. 2023, arXiv 2302.06675) steps by the sign of b1 m + (1 - b1) g and then keeps one
    momentum m = b2 m + (1 - b2) g, where adamw keeps two moments; eps is not used. Every parameter moves by
    the whole rate, so the paper takes a rate 3 to 10 times smaller than AdamW's and a weight decay as much
    larger; its b2 is 0.99.

    Args:
      config: mapping with exactly the keys `KEYS`. `max_grad_norm` 0 turns clipping off; `moment_dtype` is
        what the first moment of adamw and lion is stored in, "float32" or "bfloat16"; `factored_axes` is
        adafactor's; the rest is `peak_rate`'s and `make_schedule`'s.
      total_steps: optimizer updates of the whole run, where a schedule that ends with it reaches 0.
      batch_size: examples in an update, over all devices and parts.

    Returns:
      (the transformation, the schedule it uses: number of updates done -> learning rate of the next one).

    Raises:
      ValueError: an unknown name, an unknown or missing key, or a value outside its range.
    """
    for key in config:
        if key not in KEYS:
            raise UserError(spelling.unknown("a key of config.optimizer", key, KEYS))
    for key in KEYS:
        if key not in config:
            raise UserError(f"config.optimizer.{key}: missing")
    for key, allowed in (
        ("name", OPTIMIZERS),
        ("moment_dtype", MOMENT_DTYPES),
        ("factored_axes", FACTORED_AXES),
    ):
        if config[key] not in allowed:
            raise UserError(spelling.unknown(f"config.optimizer.{key}", config[key], allowed))
    for key in ("b1", "b2"):
        if not 0 <= config[key] < 1:
            raise UserError(f"config.optimizer.{key} = {config[key]}: must be at least 0 and below 1")
    for key in ("eps", "learning_rate", "max_grad_norm", "weight_decay"):
        if not 0 <= config[key] < math.inf:
            raise UserError(f"config.optimizer.{key} = {config[key]}: must be finite and not negative")
    if config["name"] == "adamw" and not config["eps"]:
        raise UserError("config.optimizer.eps = 0: must be above 0, or a gradient of 0 gives 0 / 0")
    if config["moment_dtype"] == "bfloat16":
        _check_bfloat16(config)
    schedule = make_schedule({**config, "learning_rate": peak_rate(config, batch_size)}, total_steps)
    weight_decay, moment_dtype = config["weight_decay"], config["moment_dtype"]
    optimizer: optax.GradientTransformation
    if config["name"] == "adamw":
        optimizer = optax.adamw(
            schedule,
            b1=config["b1"],
            b2=config["b2"],
            eps=config["eps"],
            weight_decay=weight_decay,
            mu_dtype=moment_dtype,
        )
    elif config["name"] == "lion":
        optimizer = optax.lion(
            schedule, b1=config["b1"], b2=config["b2"], weight_decay=weight_decay, mu_dtype=moment_dtype
        )
    else:
        # Not optax.adafactor, whose weight decay does not follow the learning rate.
        optimizer = optax.chain(
            scale_by_released_factored_rms()
            if config["factored_axes"] == "released"
            else optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(schedule),
        )
    if config["max_grad_norm"] == 0:
        return optimizer, schedule
    return optax.chain(optax.clip_by_global_norm(config["max_grad_norm"]), optimizer), schedule


def peak_rate(config: Any, batch_size: int) -> float:
    """The learning rate after warm-up.

    Args:
      config: mapping with `learning_rate` and `scale_lr`. With the latter the rate is one example's and is
        multiplied by the batch, as the released trainers' --scale_lr multiplies by the batch of a process,
        the accumulated batches and the processes.
      batch_size: examples in an update, over all devices and parts.
    """
    return config["learning_rate"] * (batch_size if config["scale_lr"] else 1)


def _check_bfloat16(config: Any) -> None:
    if config["name"] == "adafactor":
        raise UserError(
            "config.optimizer.moment_dtype = 'bfloat16': adafactor keeps no first moment; set it to 'float32'"
        )
    decay = "b1" if config["name"] == "adamw" else "b2"
    # Just below 1 the numbers of bfloat16 are 2^-8 apart.
    if config[decay] >= 1 - 2**-9:
        raise UserError(
            f"config.optimizer.{decay} = {config[decay]}: is 1 in bfloat16, so that the moment would never "
            "decay; use 0.99 or less, or moment_dtype 'float32'"
        )


def make_schedule(config: Any, total_steps: int) -> Schedule:
    """The learning rate as a function of the number of updates done.

    It rises linearly over `warmup_steps` updates, the first of which already has 1/warmup_steps of the full
    rate (diffusers' schedulers, and so the released trainers, are one update behind, with a first one at rate
    0), then stays (`constant`), falls to 0 at `total_steps` (`cosine`, `linear`) or falls without an end
    (`inverse_sqrt`). The last is Vaswani et al.'s (2017, arXiv 1706.03762, Eq. 3), scaled to the given peak:
    with w = max(warmup_steps, 1) and n the number of the update, counted from 1, the rate is
    peak * min(n / w, sqrt(w / n)).

    Args:
      config: mapping with `schedule`, `learning_rate` and `warmup_steps`.
      total_steps: updates of the whole run, which only `cosine` and `linear` read.

    Raises:
      ValueError: an unknown schedule, a negative value, or a schedule that ends with the run and whose
        warm-up takes all of it.
    """
    name, peak, warmup_steps = config["schedule"], config["learning_rate"], config["warmup_steps"]
    if name not in SCHEDULES:
        raise UserError(spelling.unknown("config.optimizer.schedule", name, SCHEDULES))
    for key in ("learning_rate", "warmup_steps"):
        if config[key] < 0:
            raise UserError(f"config.optimizer.{key} = {config[key]}: must not be negative")
    if name in ("cosine", "linear") and warmup_steps >= total_steps:
        raise UserError(
            f"config.optimizer.warmup_steps = {warmup_steps}: must be below the run's {total_steps} steps "
            f"for schedule {name!r}"
        )

    def schedule(count: jax.Array | int) -> jax.Array:
        done = jnp.asarray(count, jnp.float32)
        warmup = jnp.minimum(1.0, (done + 1) / max(warmup_steps, 1))
        progress = jnp.clip((done - warmup_steps) / max(total_steps - warmup_steps, 1), 0.0, 1.0)
        if name == "cosine":
            decay = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        elif name == "linear":
            decay = 1 - progress
        elif name == "inverse_sqrt":
            decay = jnp.minimum(1.0, jnp.sqrt(max(warmup_steps, 1) / (done + 1)))
        else:
            decay = jnp.ones_like(progress)
        return peak * warmup * decay

    return schedule
