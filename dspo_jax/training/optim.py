"""The optimizer and its learning-rate schedule, made from `config.optimizer`."""

import dataclasses
import math
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import optax

from dspo_jax.errors import UserError
from dspo_jax.limits import DECAY, FINITE_NOT_NEGATIVE, NOT_NEGATIVE, Limit, choice, limited
from dspo_jax.training.adafactor import scale_by_released_factored_rms
from dspo_jax.training.muon import muon
from dspo_jax.training.schedule_free import schedule_free_adamw

OPTIMIZERS = ("adafactor", "adamw", "ademamix", "lion", "muon", "prodigy", "schedule_free")
SCHEDULES = ("constant", "cosine", "inverse_sqrt", "linear")

# Schedules that do not depend on the number of steps of the run.
ENDLESS_SCHEDULES = ("constant", "inverse_sqrt")
MOMENT_DTYPES = ("bfloat16", "float32")
FACTORED_AXES = ("largest", "released")

# Keys of the decays of what `moment_dtype` is the dtype of, by optimizer.
_MOMENTS = {"adamw": ("b1",), "lion": ("b2",), "muon": ("b1", "momentum")}

# Whose updates are not proportional to the rate that is set.
_OWN_RATES = ("prodigy", "schedule_free")

LearningRate = Callable[[jax.Array | int], jax.Array]
"""Number of updates done -> learning rate of the next one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The keys of `config.optimizer`; configs/common.py says what they mean."""

    name: str = choice(*OPTIMIZERS)
    learning_rate: float = limited(FINITE_NOT_NEGATIVE)
    text_encoder_learning_rate: float | None = limited(
        Limit(FINITE_NOT_NEGATIVE.words, lambda rate: rate is None or 0 <= rate < math.inf)
    )
    scale_lr: bool
    schedule: str = choice(*SCHEDULES)
    warmup_steps: int = limited(NOT_NEGATIVE)
    b1: float = limited(DECAY)
    b2: float = limited(DECAY)
    b3: float = limited(DECAY)
    alpha: float = limited(FINITE_NOT_NEGATIVE)
    momentum: float = limited(DECAY)
    eps: float = limited(FINITE_NOT_NEGATIVE)
    weight_decay: float = limited(FINITE_NOT_NEGATIVE)
    moment_dtype: str = choice(*MOMENT_DTYPES)
    factored_axes: str = choice(*FACTORED_AXES)
    max_grad_norm: float = limited(FINITE_NOT_NEGATIVE)

    @property
    def text_encoder_quotient(self) -> float:
        """What an update of the text encoders is multiplied by."""
        rate = self.text_encoder_learning_rate
        return 1.0 if rate is None else rate / self.learning_rate

    def peak_rate(self, batch_size: int) -> float:
        """Returns the learning rate after warm-up.

        With `scale_lr` the rate is one example's and is multiplied by the batch, as the released trainers'
        --scale_lr multiplies by the batch of a process, the accumulated batches and the processes.

        Args:
          batch_size: examples in an update, over all devices and parts.
        """
        return self.learning_rate * (batch_size if self.scale_lr else 1)


def make_optimizer(
    settings: OptimizerSettings, total_steps: int, batch_size: int, text_encoders: Collection[str] = ()
) -> tuple[optax.GradientTransformation, LearningRate]:
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

    "ademamix" (Pagliardini et al. 2024, arXiv 2409.03137) is AdamW whose first moment has `alpha` times a
    second one of the slow decay b3 added to it; neither is warmed up, as by default in the released code.
    "muon" is `muon.muon`, "schedule_free" `schedule_free.schedule_free_adamw`.

    "prodigy" (Mishchenko and Defazio 2023, arXiv 2306.06101) is AdamW that finds its rate d from 1e-6 on, and
    never lowers it; the learning rate is a factor of d. Bias is corrected, and a warm-up is kept out of the
    estimate (the released `use_bias_correction` and `safeguard_warmup`), as its authors recommend for
    diffusion models.

    Args:
      settings: parsed by `limits.parse`. `max_grad_norm` 0 turns clipping off; `moment_dtype` is the dtype of
        the first moment of adamw, lion and muon; `factored_axes` is adafactor's.
      total_steps: optimizer updates of the whole run, where a schedule that ends with it reaches 0.
      batch_size: examples in an update, over all devices and parts.
      text_encoders: components that `text_encoder_learning_rate` is of. An update of each of these optimizers
        is proportional to the rate, weight decay too, so theirs is multiplied by the quotient of the rates.

    Returns:
      (the transformation, the schedule it uses: number of updates done -> learning rate of the next one).

    Raises:
      UserError: settings that do not fit each other or the length of the run.
    """
    _check(settings)
    schedule = make_schedule(
        settings.schedule, settings.peak_rate(batch_size), settings.warmup_steps, total_steps
    )
    weight_decay, moment_dtype = settings.weight_decay, settings.moment_dtype
    adam: dict[str, float] = {"b1": settings.b1, "b2": settings.b2, "eps": settings.eps}
    optimizer: optax.GradientTransformation
    if settings.name == "adamw":
        optimizer = optax.adamw(schedule, **adam, weight_decay=weight_decay, mu_dtype=moment_dtype)
    elif settings.name == "lion":
        optimizer = optax.lion(
            schedule, b1=settings.b1, b2=settings.b2, weight_decay=weight_decay, mu_dtype=moment_dtype
        )
    elif settings.name == "ademamix":
        optimizer = optax.contrib.ademamix(
            schedule, **adam, b3=settings.b3, alpha=settings.alpha, weight_decay=weight_decay
        )
    elif settings.name == "muon":
        optimizer = muon(
            schedule,
            **adam,
            momentum=settings.momentum,
            weight_decay=weight_decay,
            moment_dtype=moment_dtype,
        )
    elif settings.name == "prodigy":
        optimizer = optax.contrib.prodigy(
            schedule,
            betas=(settings.b1, settings.b2),
            eps=settings.eps,
            weight_decay=weight_decay,
            safeguard_warmup=True,
        )
    elif settings.name == "schedule_free":
        optimizer = schedule_free_adamw(schedule, **adam, weight_decay=weight_decay)
    else:
        # Not optax.adafactor, whose weight decay does not follow the learning rate.
        optimizer = optax.chain(
            scale_by_released_factored_rms()
            if settings.factored_axes == "released"
            else optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(schedule),
        )
    if settings.text_encoder_learning_rate is not None:
        optimizer = optax.chain(optimizer, _multiply(text_encoders, settings.text_encoder_quotient))
    if settings.max_grad_norm == 0:
        return optimizer, schedule
    return optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), optimizer), schedule


def _multiply(components: Collection[str], factor: float) -> optax.GradientTransformation:
    """Multiplies the updates of some components."""

    def multiply(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        return {
            name: optax.tree.scale(factor, part) if name in components else part
            for name, part in updates.items()
        }

    return optax.stateless(multiply)


def _check(settings: OptimizerSettings) -> None:
    """Refuses settings that do not fit each other."""
    name = settings.name
    if name not in ("adafactor", "lion") and not settings.eps:
        raise UserError("config.optimizer.eps = 0: must be above 0, or a gradient of 0 gives 0 / 0")
    if settings.moment_dtype == "bfloat16":
        _check_bfloat16(settings)
    if settings.text_encoder_learning_rate is not None and name in _OWN_RATES:
        raise UserError(
            f"config.optimizer.text_encoder_learning_rate = {settings.text_encoder_learning_rate:g}: {name} "
            "has one rate for all parameters; leave this key out, or take 'adamw'"
        )
    if settings.text_encoder_learning_rate is not None and not settings.learning_rate:
        raise UserError(
            "config.optimizer.learning_rate = 0: must be above 0 where text_encoder_learning_rate is set"
        )
    if name == "prodigy" and (settings.scale_lr or settings.learning_rate < 0.01):
        raise UserError(
            f"config.optimizer.learning_rate = {settings.learning_rate:g}: prodigy finds the rate, and this "
            "is a factor of it; set it to 1, and scale_lr to False"
        )
    if name == "schedule_free" and settings.schedule != "constant":
        raise UserError(
            f"config.optimizer.schedule = {settings.schedule!r}: schedule_free averages in place of a rate "
            "that falls; set it to 'constant'"
        )
    if name == "schedule_free" and not settings.b1:
        raise UserError(
            "config.optimizer.b1 = 0: must be above 0 for schedule_free, which finds its average by it"
        )


def _check_bfloat16(settings: OptimizerSettings) -> None:
    name = settings.name
    if name not in _MOMENTS:
        why = "keeps no first moment" if name == "adafactor" else "keeps what it keeps in float32"
        raise UserError(f"config.optimizer.moment_dtype = 'bfloat16': {name} {why}; set it to 'float32'")
    for decay in _MOMENTS[name]:
        # Just below 1 the numbers of bfloat16 are 2^-8 apart.
        if getattr(settings, decay) >= 1 - 2**-9:
            raise UserError(
                f"config.optimizer.{decay} = {getattr(settings, decay)}: is 1 in bfloat16, so that the "
                "moment would never decay; use 0.99 or less, or moment_dtype 'float32'"
            )


def make_schedule(name: str, peak: float, warmup_steps: int, total_steps: int) -> LearningRate:
    """Returns the learning rate as a function of the number of updates done.

    It rises linearly over `warmup_steps` updates, the first of which already has 1/warmup_steps of the full
    rate (diffusers' schedulers, and so the released trainers, are one update behind, with a first one at rate
    0), then stays (`constant`), falls to 0 at `total_steps` (`cosine`, `linear`) or falls without an end
    (`inverse_sqrt`). The last is Vaswani et al.'s (2017, arXiv 1706.03762, Eq. 3), scaled to the given peak:
    with w = max(warmup_steps, 1) and n the number of the update, counted from 1, the rate is
    peak * min(n / w, sqrt(w / n)).

    Args:
      name: one of `SCHEDULES`.
      peak: the learning rate after warm-up.
      warmup_steps: updates of the warm-up.
      total_steps: updates of the whole run, which only `cosine` and `linear` read.

    Raises:
      UserError: a schedule that ends with the run and whose warm-up takes all of it.
    """
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
