"""The task that a config asks for: loss, optimizer and precision, before any weights are read."""

import dataclasses

from dspo_jax.errors import UserError
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.rewards.differentiable import DifferentiableReward, load_differentiable
from dspo_jax.schedules.process import LevelDraw
from dspo_jax.training import schedule_free
from dspo_jax.training.auto_beta import make_auto_beta
from dspo_jax.training.losses.policy_gradient import PolicyGradientLoss
from dspo_jax.training.losses.preference import Draws, PreferenceLoss
from dspo_jax.training.losses.reward_gradient import RewardGradientLoss
from dspo_jax.training.offload import check_offload
from dspo_jax.training.online_checks import check_reward_gradient
from dspo_jax.training.optim import make_optimizer
from dspo_jax.training.reference import Reference
from dspo_jax.training.settings import Settings
from dspo_jax.training.task import LossFn, Precision, Task, UpdateRule


def make_task(
    settings: Settings,
    pipe: Pipeline,
    reward: DifferentiableReward | None = None,
    reference: Reference | None = None,
) -> Task:
    """Returns the static configuration of the step that a config asks for.

    Args:
      settings: of the run.
      pipe: the model, whose weights are not read.
      reward: whose gradient is trained by; read from `config.rewards` where it is not given.
      reference: from `open_reference`, where `config.reference.model` names one; without it `make_state` has
        shapes alone, as if all of its weights were other ones.

    Raises:
      UserError: settings that do not fit the model or each other, by key.
    """
    optimizer, learning_rate = make_optimizer(
        settings.optimizer, settings.steps, settings.batch_size, tuple(pipe.text_encoders)
    )
    averages = settings.optimizer.name == "schedule_free"
    if averages:
        _check_average(settings)
    if settings.reference.model and reference is None:
        reference = Reference(None, pipe.components)
    loss = _make_loss(settings, pipe, reward)
    check_offload(
        settings.offload,
        adapters=settings.lora.on,
        needs_reference=loss.needs_reference,
        method=settings.method,
    )
    return Task(
        pipe=pipe,
        loss=loss,
        update=UpdateRule(
            optimizer,
            learning_rate,
            accumulation=settings.accumulation,
            ema_decay=settings.ema_decay,
            loss_spike=settings.stability.loss_spike,
            average=schedule_free.average if averages else None,
            auto_beta=make_auto_beta(settings.objective) if settings.method_key == "objective" else None,
        ),
        precision=Precision(
            param_dtype=settings.param_dtype,
            compute_dtype=settings.compute_dtype,
            reference_dtype=settings.reference_dtype,
            remat=settings.remat,
            frozen_kernels=settings.frozen_kernels,
        ),
        train_text_encoder=settings.train_text_encoder,
        adapters=settings.lora.scale if settings.lora.on else None,
        reference=reference,
        dora=settings.lora.dora,
        offload=tuple(settings.offload),
    )


def _check_average(settings: Settings) -> None:
    """Refuses what does not go with an optimizer that keeps an average of its own."""
    if settings.ema_decay:
        raise UserError(
            f"config.ema_decay = {settings.ema_decay:g}: schedule_free keeps an average of its own; set it "
            "to 0"
        )
    if settings.param_dtype == "bfloat16":
        raise UserError(
            "config.param_dtype = 'bfloat16': rounds away the small steps of schedule_free's average; set "
            "it to 'float32'"
        )


def _make_loss(settings: Settings, pipe: Pipeline, reward: DifferentiableReward | None) -> LossFn:
    """Returns the loss of `config.stream.kind`."""
    stream = settings.stream
    if stream.kind == "prompts":
        check_reward_gradient(settings)
        reward = reward or load_differentiable(settings.rewards.train, settings.rewards.folder)
        return RewardGradientLoss(settings.reward_gradient, reward, stream.drawing, pipe.latent_size)
    if stream.kind == "trajectories":
        return PolicyGradientLoss(settings.policy_gradient, stream.drawing, pipe.latent_size)
    draws = Draws(
        levels=_draw_levels(settings, pipe),
        caption_dropout=settings.caption_dropout,
        share_timesteps=settings.share_timesteps,
        share_noise=settings.share_noise,
        noise_offset=settings.noise_offset,
        positive_ratio=settings.positive_ratio,
        adapter_dropout=settings.lora.dropout,
        encoder_dropout=settings.encoder_dropout,
        drops_to_zeros=settings.dropped_captions == "zeros",
    )
    _check_dropout(settings, pipe)
    settings.objective.check_process(pipe.schedule)
    return PreferenceLoss(settings.objective, draws, stored_reference=settings.reference.draws > 0)


def _check_dropout(settings: Settings, pipe: Pipeline) -> None:
    """Refuses to drop the caption of a single text encoder in a model that reads all of them as one."""
    keys = {"encoder_dropout": settings.encoder_dropout, "dropped_captions": settings.dropped_captions}
    for key, value in keys.items():
        if value and not pipe.family.conditioner.drops_by_encoder:
            raise UserError(
                f"config.{key} = {value!r}: is of Stable Diffusion 3, and {pipe.path} is "
                f"{pipe.family.conditioner.name}; leave it out: config.caption_dropout drops whole captions"
            )


def _draw_levels(settings: Settings, pipe: Pipeline) -> LevelDraw:
    timesteps = settings.timesteps
    return pipe.schedule.make_draw(timesteps.first, timesteps.last, dataclasses.asdict(settings.levels))
