"""Batches of denoising steps of the model's own images, with advantages, for a policy gradient."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Float32, Int32

from dspo_jax.errors import UserError
from dspo_jax.kernels.device_kind import on_mesh
from dspo_jax.models.model import Params
from dspo_jax.objectives.advantages import (
    Advantages,
    PromptStatistics,
    batch_advantages,
    group_advantages,
    pair_preferences,
    rounds_to_fill,
)
from dspo_jax.parallel import processes
from dspo_jax.parallel.mesh import batch_sharding, batch_share, check_batch_size, replicated, shard_batch
from dspo_jax.rewards.reward import Score
from dspo_jax.samplers.registry import SAMPLERS
from dspo_jax.samplers.sampler import Sampler
from dspo_jax.training.losses.policy_gradient import PolicyGradientLoss
from dspo_jax.training.round_stream import RoundStream
from dspo_jax.training.rounds import Round, Rounds
from dspo_jax.training.settings import Settings
from dspo_jax.training.step import split_batch
from dspo_jax.training.stream_settings import StreamSettings
from dspo_jax.training.task import Batch, Task


class TrajectoryStream(RoundStream):
    """Denoising steps of rounds of images; batches are those of `PolicyGradientLoss`.

    A round is `batch_size` x `stream.updates` images. An update takes `batch_size` of them with all their
    steps that add noise, the steps of each in a random order, so that each part of an accumulated gradient
    has early and late ones.
    """

    def __init__(
        self,
        settings: Settings,
        task: Task,
        reference: Params,
        prompts: Sequence[str],
        score: Score,
        mesh: Mesh,
    ):
        """Prepares the programs.

        Args:
          settings: of the run.
          task: with a `PolicyGradientLoss`.
          reference: the frozen parameters, on the devices.
          prompts: to draw.
          score: gives the rewards, and NaN for an image that it cannot score, which is then not trained on.
          mesh: the devices.

        Raises:
          UserError: settings that do not go together, by key.
        """
        loss, stream = task.loss, settings.stream
        if not isinstance(loss, PolicyGradientLoss):
            raise ValueError(f"the loss is a {type(loss).__name__}; trajectories are for PolicyGradientLoss")
        self._loss, self._method = loss, loss.method
        check_trajectories(settings, mesh, len(prompts))
        rounds = Rounds(
            settings,
            task,
            reference,
            prompts,
            score,
            mesh,
            count=settings.round_images,
            shares_start=self._method.images == 2,
        )
        self._calls = noisy_calls(rounds.rollout.sampler, stream)
        check_rows(settings, mesh, len(self._calls))
        self._advantages, self._seed = settings.advantages, settings.seed
        self._statistics = PromptStatistics(settings.advantages.buffer_size, settings.advantages.min_count)
        self._groups = settings.batch_size // self._method.images  # of an update
        self._task, self._reference, self._mesh = task, reference, mesh
        self._order: Int32[np.ndarray, "N n"] = np.zeros((0, 0), np.int32)
        self._judged = batch_advantages(np.zeros(0))
        self._old: dict[int, Float32[np.ndarray, "R P"]] = {}
        self._has_told_noise = False
        self._take = jax.jit(self._take_steps, out_shardings=batch_sharding(mesh))
        self._evaluate = jax.jit(on_mesh(self._evaluate_steps, mesh), out_shardings=replicated(mesh))
        super().__init__(rounds, stream.updates)

    def _begin(self, params: Params, drawn: Round) -> dict[str, float]:
        """Computes old log-probabilities where they are needed, and advantages.

        Where it runs the network anyway, and in the first round of the run, it measures by how much the
        program that trains and the one that drew differ.
        """
        groups, images = self._groups * self._updates, self._method.images
        order = np.tile(self._calls, (groups, 1))
        self._order = np.random.default_rng((self._seed, drawn.position.round)).permuted(order, axis=1)
        self._judged = Advantages(np.zeros(groups, np.float32), np.ones(groups, bool))
        self._old, penalties = {}, []
        metrics: dict[str, float] = {}
        alone = self._updates == 1 and drawn.position.round == 0
        for update in range(self._updates):
            if update or self._method.penalises_reward or alone:
                batch = self._make_batch(drawn, update)
                found = jax.device_get(self._evaluate(params, self._reference, batch))
                self._old[update] = found[0]
                penalties.append(found)
        if self._old:
            metrics["ratio_noise"] = self._measure_noise(drawn, *next(iter(self._old.items())))
        rewards = drawn.rewards
        if self._method.penalises_reward:
            policy, reference = (
                jnp.concatenate(each).reshape(groups * images, -1) for each in zip(*penalties, strict=True)
            )
            penalty = np.asarray(self._method.reward_penalty(policy, reference))
            rewards = rewards - penalty
            metrics["reward_penalty"] = float(np.nanmean(penalty))
        self._judged = self._judge(drawn, rewards)
        if (self._judged.values[self._judged.mask] == 0).all():
            self._warn_of_ties(drawn)
        return metrics

    def _measure_noise(self, drawn: Round, update: int, log_probability: Float32[np.ndarray, "R P"]) -> float:
        """Returns how far the ratio is off 1 at most with unchanged parameters; says so once.

        Args:
          drawn: the round.
          update: of which the steps are.
          log_probability: of the steps, by the program that trains.
        """
        groups, images = self._groups, self._method.images
        first = drawn.position.images + update * groups * images
        index = (first + np.arange(groups * images)).astype(np.uint32)
        calls = self._order[update * groups : (update + 1) * groups]
        of_images = self._rounds.log_probability(index, np.repeat(calls, images, axis=0))
        as_drawn = np.moveaxis(of_images.reshape(groups, images, -1), 1, 2).reshape(-1, images)
        difference = np.float64(log_probability) - as_drawn
        if self._method.reduction == "mean":
            difference /= drawn.states[0][0, 0].size
        noise = np.expm1(difference[np.isfinite(difference)])
        most, usual = float(np.abs(noise).max()), float(np.sqrt(np.square(noise).mean()))
        if not self._has_told_noise and processes.is_first():
            clip = self._method.hyperparameters.get("clip")
            logging.info(
                "ratio noise: of the program that trains to the one that drew, before any update, the ratio "
                "of a step is off 1 by %.2g at most and %.2g in the root mean square%s",
                most,
                usual,
                "" if clip is None else f"; the clip is {clip:g}",
            )
            if isinstance(clip, float) and most > clip / 2:
                logging.warning(
                    "the ratio noise of %.2g is more than half of config.policy_gradient.clip = %g: images "
                    "are drawn off the policy by as much as an update may move it; raise the clip, or set "
                    "--config.compute_dtype=float32",
                    most,
                    clip,
                )
        self._has_told_noise = True
        return most

    def _judge(self, drawn: Round, rewards: Float[np.ndarray, " N"]) -> Advantages:
        """Returns the advantages of a round.

        Raises:
          UserError: of pairs none has two rewards.
        """
        if self._method.images == 2:
            judged = pair_preferences(rewards.reshape(-1, 2))
            if not judged.mask.any():
                raise UserError(
                    f"round {drawn.position.round}: config.rewards.train gives a reward to both images of no "
                    "pair; look at what it gives for the images of this model"
                )
            return judged
        if self._advantages.of == "prompt":
            return self._statistics.update(drawn.prompts, rewards, normalise=self._method.normalises)
        if self._advantages.of == "group":
            return group_advantages(
                rewards,
                self._rounds.images,
                deviation=self._advantages.deviation,
                normalise=self._method.normalises,
            )
        return batch_advantages(rewards, normalise=self._method.normalises)

    def _make_batch(self, drawn: Round, update: int) -> Batch:
        """See `RoundStream._make_batch`."""
        images, groups, calls = self._method.images, self._groups, len(self._calls)
        of_update = slice(update * groups, (update + 1) * groups)
        share, shares = batch_share(self._mesh)
        own = slice(share * groups // shares, (share + 1) * groups // shares)
        order = self._order[of_update]
        first = update * groups * images
        chunk = drawn.states[0].shape[1]
        chunks = drawn.states[first // chunk : -(-(first + groups * images) // chunk)]
        states, following = self._take(
            tuple(chunks), np.int32(first % chunk), shard_batch({"order": order[own]}, self._mesh)["order"]
        )
        mask, prompts = self._judged.mask[of_update], drawn.prompts[first : first + groups * images : images]
        weight = mask * np.float32(groups / max(1, mask.sum()))
        of_groups = {
            "tokens": self._task.pipe.tokenize(prompts[own]),
            "advantage": self._judged.values[of_update][own],
            "weight": weight.astype(np.float32)[own],
            "first": np.full(groups, update == 0)[own],
        }
        old = self._old.get(update, np.zeros((groups * calls, images), np.float32))
        of_rows = {name: np.repeat(values, calls, axis=0) for name, values in of_groups.items()} | {
            "call": order[own].reshape(-1),
            "old_log_probability": old[own.start * calls : own.stop * calls],
        }
        return shard_batch(of_rows, self._mesh) | {"state": states, "next_state": following}

    def _take_steps(
        self,
        chunks: tuple[Float32[jax.Array, "states B h w C"], ...],
        first: Int32[jax.Array, ""],
        order: Int32[jax.Array, "G n"],
    ) -> tuple[Float32[jax.Array, "R P h w C"], Float32[jax.Array, "R P h w C"]]:
        """Returns the states before and after the calls in `order`, of G x P images from `first` on."""
        images = self._method.images
        states = jnp.moveaxis(jnp.concatenate(chunks, axis=1), 1, 0)
        states = jax.lax.dynamic_slice_in_dim(states, first, len(order) * images)
        states = jnp.moveaxis(states.reshape(-1, images, *states.shape[1:]), 2, 1)  # [G, n+1, P, h, w, C]

        def take(calls: jax.Array) -> jax.Array:
            return jax.vmap(lambda states, calls: states[calls])(states, calls).reshape(-1, *states.shape[2:])

        return take(order), take(order + 1)

    def _evaluate_steps(
        self, params: Params, reference: Params, batch: Batch
    ) -> tuple[Float32[jax.Array, "R P"], Float32[jax.Array, "R P"]]:
        """Returns log-probabilities of a batch's steps under the policy and, for a penalty, the reference.

        The parts are those of the training step, so that the numbers are, too.
        """

        def evaluate(part: Batch) -> tuple[jax.Array, jax.Array]:
            steps = self._loss.make_steps(
                params, self._task, reference, part, with_reference=self._method.penalises_reward
            )
            log_reference = steps.reference_log_probability
            return steps.log_probability, steps.log_probability if log_reference is None else log_reference

        found = jax.lax.map(evaluate, split_batch(batch, self._task.update.accumulation))
        policy, log_reference = (jnp.moveaxis(leaf, 0, 1).reshape(-1, self._method.images) for leaf in found)
        return policy, log_reference

    def _get_statistics(self) -> dict[str, Any]:
        """See `RoundStream._get_statistics`."""
        return self._statistics.get_state()

    def _set_statistics(self, statistics: dict[str, Any]) -> None:
        """See `RoundStream._set_statistics`."""
        self._statistics.set_state(statistics)


def noisy_calls(sampler: Sampler, stream: StreamSettings) -> Int32[np.ndarray, " n"]:
    """Returns the numbers of the sampler's calls that add noise, which alone have a density.

    Raises:
      UserError: there are none.
    """
    if sampler.step_noise is None:
        why = "the sampler's steps add no noise, so that they have no density, which a policy gradient needs"
        if stream.sampler and not SAMPLERS[stream.sampler].eta:
            raise UserError(f"config.stream.sampler = {stream.sampler!r}: {why}; take 'flow_ancestral'")
        raise UserError(
            f"config.stream.eta = {stream.eta:g}: {why}; it must be above 0, and is 1 in every released code"
        )
    calls: Bool[np.ndarray, " n"] = np.asarray(sampler.step_noise) > 0
    if not calls.any():
        raise UserError(
            f"config.stream.num_inference_steps = {stream.num_inference_steps}: the last step of "
            f"{stream.sampler} adds no noise, so that it has no density, which a policy gradient needs; "
            "there must be at least 2"
        )
    return np.flatnonzero(calls).astype(np.int32)


def check_trajectories(settings: Settings, mesh: Mesh, prompts: int) -> None:
    """Refuses settings with which a policy gradient is wrong, before any weights are read.

    Args:
      settings: of the run.
      mesh: the devices.
      prompts: number of different prompts.

    Raises:
      UserError: by key.
    """
    method, stream, advantages = settings.policy_gradient, settings.stream, settings.advantages
    check_batch_size(settings.batch_size, mesh)
    if method.single_update and stream.updates > 1:
        raise UserError(
            f"config.stream.updates = {stream.updates}: policy gradient {method.name!r} holds for the first "
            "update of a round alone; set it to 1, or take config.policy_gradient.name = 'ddpo'"
        )
    if method.images == 2:
        if stream.images % 2:
            raise UserError(
                f"config.stream.images = {stream.images}: policy gradient {method.name!r} compares the "
                "images of a prompt two by two; it must be even"
            )
        if settings.batch_size % 2:
            raise UserError(
                f"config.batch_size = {settings.batch_size}: policy gradient {method.name!r} takes images "
                "two by two; it must be even"
            )
        return
    if method.name == "grpo" and advantages.of != "group":
        raise UserError(
            f"config.advantages.of = {advantages.of!r}: policy gradient 'grpo' compares the images of a "
            "prompt in a round; set it to 'group', or take config.policy_gradient.name = 'ddpo'"
        )
    if advantages.of == "group" and stream.images < 2:
        raise UserError(
            f"config.stream.images = {stream.images}: config.advantages.of = 'group' compares the images of "
            "a prompt in a round; there must be at least 2, or take 'prompt' or 'round'"
        )
    if advantages.of == "prompt":
        rounds_to_fill(
            advantages.buffer_size,
            advantages.min_count,
            prompts=prompts,
            images_per_round=settings.batch_size * stream.updates,
            rounds=-(-settings.steps // stream.updates),
        )


def check_rows(settings: Settings, mesh: Mesh, calls: int) -> None:
    """Refuses an update that the mesh, or the accumulation, does not split evenly.

    Args:
      settings: of the run.
      mesh: the devices.
      calls: steps of an image that are trained on.

    Raises:
      UserError: by key, with the values that fit.
    """
    ways, images = mesh.shape["data"] * mesh.shape["fsdp"], settings.policy_gradient.images
    if settings.batch_size % (images * ways):
        raise UserError(
            f"config.batch_size = {settings.batch_size}: not a multiple of {images * ways}, as the mesh "
            f"splits the images of an update, taken {images} at a time, {ways} ways"
        )
    steps = settings.batch_size // (images * ways) * calls
    if steps % settings.accumulation:
        fitting = [count for count in range(1, steps + 1) if steps % count == 0]
        raise UserError(
            f"config.accumulation = {settings.accumulation}: must divide the {steps} denoising steps of an "
            f"update on a device; one of {fitting}"
        )
