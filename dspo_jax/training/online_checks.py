"""Refusals of a run on the model's own images, before any weights are read."""

from jax.sharding import Mesh

from dspo_jax.errors import UserError
from dspo_jax.objectives.reward_gradient import ReFL
from dspo_jax.parallel.mesh import check_batch_size
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.samplers import samplers_of
from dspo_jax.samplers.spacing import check_steps
from dspo_jax.training.own_images import OwnImages
from dspo_jax.training.pair_stream import check_pairs
from dspo_jax.training.rounds import check_chunk, check_round_sizes
from dspo_jax.training.settings import Settings
from dspo_jax.training.trajectory_stream import check_rows, check_trajectories, noisy_calls


def check_own_images(settings: Settings, pipe: Pipeline, mesh: Mesh, own_images: OwnImages) -> None:
    """Refuses settings that do not fit the model, the devices, the prompts or each other.

    Raises:
      UserError: by key.
    """
    stream = settings.stream
    if settings.given.get("epochs"):
        raise UserError(
            "config.epochs: counts the examples of a dataset; set config.steps, the updates of the run"
        )
    check_drawing(settings, pipe)
    check_batch_size(stream.batch_size, mesh, "config.stream.batch_size")
    if stream.kind == "prompts":
        return
    if stream.kind == "trajectories":
        check_trajectories(settings, mesh, len(set(own_images.prompts)))
        check_rows(settings, mesh, len(noisy_calls(stream.drawing.make_sampler(pipe), stream)))
    else:
        check_pairs(settings, mesh)
    check_rounds(settings)
    check_round_sizes(settings, mesh, settings.round_images)


def check_drawing(settings: Settings, pipe: Pipeline) -> None:
    """Refuses a sampler of another process, and more steps than the model's schedule has.

    Raises:
      UserError: by key.
    """
    allowed = samplers_of(pipe.schedule)
    if settings.stream.sampler not in allowed:
        raise UserError(
            f"config.stream.sampler = {settings.stream.sampler!r}: does not reverse the process of this "
            f"model; these do: {', '.join(allowed)}"
        )
    try:
        check_steps(pipe.schedule.num_train_timesteps, settings.stream.num_inference_steps)
    except UserError as error:
        raise UserError(f"config.stream.{error}") from error


def check_self_play(settings: Settings, pipe: Pipeline, mesh: Mesh) -> None:
    """Refuses settings with which self-play compares nothing.

    Raises:
      UserError: by key.
    """
    objective = settings.objective
    if not objective.needs_reference or objective.images == "winner":
        raise UserError(
            f"config.objective.name = {objective.name!r}: does not compare images of the data with those of "
            "the reference, as config.stream.kind = 'self_play' needs it; take diffusion_dpo or the like"
        )
    if not settings.reference.every:
        raise UserError(
            "config.reference.every = 0: in self-play the reference, which draws the losers, is the policy "
            "of the iteration before; set it to the updates of one, e.g. --config.reference.every=500"
        )
    check_drawing(settings, pipe)
    check_chunk(settings, mesh, settings.batch_size)


def check_rounds(settings: Settings) -> None:
    """Refuses a run that would have to stop, be saved or be validated inside a round of images.

    Raises:
      UserError: by key.
    """
    updates = settings.stream.updates
    periods = {"steps": settings.steps, "checkpoint.every": settings.checkpoint.every}
    if settings.validation.every:
        periods["validation.every"] = settings.validation.every
    for key, period in periods.items():
        if period % updates:
            raise UserError(
                f"config.{key} = {period}: must be a multiple of config.stream.updates = {updates}, as a run "
                "goes on from between two rounds of images"
            )


def check_reward_gradient(settings: Settings) -> None:
    """Refuses a method of reward gradients that the sampler cannot do.

    Raises:
      UserError: by key.
    """
    stream, method = settings.stream, settings.reward_gradient
    threshold = settings.given["reward_gradient"]["threshold"]
    if isinstance(method, ReFL) and settings.rewards.train != "imagereward" and threshold is None:
        raise UserError(
            "config.reward_gradient.threshold is not set: refl's 2 is for ImageReward, and above it no "
            f"gradient flows; set it to more than {settings.rewards.train} reaches, in its units"
        )
    k = method.hyperparameters.get("k", 1)
    if isinstance(k, float) and k > stream.num_inference_steps:
        raise UserError(
            f"config.reward_gradient.k = {k:g}: more than config.stream.num_inference_steps = "
            f"{stream.num_inference_steps}"
        )
    if stream.sampler == "euler_ancestral" and (method.renoised or isinstance(method, ReFL)):
        raise UserError(
            f"config.stream.sampler = {stream.sampler!r}: config.reward_gradient.name = {method.name!r} "
            "needs whole timesteps; take 'ddim' or 'ddpm'"
        )
