"""The training step: exact at the start, the reference frozen, the same however it is split."""

import dataclasses
import functools
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from promoting_optimizer import promote_dtypes
from tiny_run import make_config, read_batches

from dspo_jax.objectives import get_objective
from dspo_jax.parallel.mesh import make_mesh, replicated, shard_batch
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.training.losses.preference import PreferenceLoss, draw_noise
from dspo_jax.training.make_task import make_task
from dspo_jax.training.settings import parse
from dspo_jax.training.start import make_state
from dspo_jax.training.step import COMPILER_OPTIONS, TrainState, compile_step
from dspo_jax.training.task import Metrics, policy_params, predict

GOLDEN = Path(__file__).parents[1] / "golden" / "one_step.json"

# What is compiled; every test picks one. All run without weight decay: only a gradient moves a parameter.
VARIANTS = {
    "ddpm": {"objective.name": "ddpm", "train_text_encoder": True},
    "sft": {"objective.name": "sft"},
    "diffusion_dpo": {
        "objective.name": "diffusion_dpo",
        "objective.beta": 10.0,
        "train_text_encoder": True,
    },
    "dspo": {"objective.name": "dspo", "objective.reward_scale": 10.0, "objective.score_weight": 1.0},
    "diffusion_dpo in bfloat16": {
        "objective.name": "diffusion_dpo",
        "objective.beta": 5000.0,
        "compute_dtype": "bfloat16",
    },
    "dspo in bfloat16": {
        "objective.name": "dspo",
        "objective.score_weight": 1.0,
        "compute_dtype": "bfloat16",
    },
}


class Run:
    """A compiled step at its start; `steps` always begins there."""

    def __init__(self, config, pipe, mesh_sizes):
        count = int(np.prod(list(mesh_sizes.values())))
        self.mesh = make_mesh(mesh_sizes, jax.devices()[:count])
        task = make_task(parse(config), pipe)
        rule = dataclasses.replace(task.update, optimizer=promote_dtypes(task.update.optimizer))
        self.task = dataclasses.replace(task, update=rule)
        self.state, self.reference = make_state(self.task, self.mesh)
        self.step = compile_step(self.state)
        self.key = jax.device_put(jax.random.key(config.seed), replicated(self.mesh))

    def steps(self, batches, reference=None) -> tuple[TrainState, list[Metrics]]:
        """The state after a step on each of the batches, and the metrics of each."""
        # A copy, as the step donates its state.
        state = jax.tree.map(lambda leaf: jax.device_put(jnp.copy(leaf), leaf.sharding), self.state)
        metrics = []
        reference = self.reference if reference is None else reference
        for batch in batches:
            state, values = self.step(state, reference, shard_batch(batch, self.mesh), self.key)
            metrics.append(jax.device_get(values))
        return state, metrics


@pytest.fixture(scope="module")
def pipe(shallow_model):
    return load_pipeline(shallow_model)


@pytest.fixture(scope="module")
def batches(tiny_pairs):
    return read_batches(tiny_pairs, batch_size=16, count=5)


@pytest.fixture(scope="module")
def make_run(shallow_model, tiny_pairs, pipe):
    """Makes the `Run` of a variant; compiled once."""
    runs: dict[tuple, Run] = {}

    def make(variant, data=1, fsdp=1, accumulation=1) -> Run:
        choice = (variant, data, fsdp, accumulation)
        if choice not in runs:
            changes = {
                **VARIANTS[variant],
                "optimizer.weight_decay": 0.0,
                "batch_size": 16,
                "accumulation": accumulation,
            }
            config = make_config(shallow_model, tiny_pairs, changes)
            runs[choice] = Run(config, pipe, {"data": data, "fsdp": fsdp})
        return runs[choice]

    return make


def other_reference(run):
    """Not the start: no metric is zero, and no pair is tied."""
    return jax.tree.map(lambda leaf: jax.device_put(0.9 * leaf, leaf.sharding), run.reference)


def leaves_by_name(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize(
    "variant", ["diffusion_dpo", "dspo", "diffusion_dpo in bfloat16", "dspo in bfloat16"]
)
def test_policy_and_reference_predict_the_same_bits_at_the_start(make_run, batches, variant):
    """Through one program: what a compiler fuses differently in two may differ in the last bit."""
    run = make_run(variant)
    draw, (count, images, *size, channels) = np.random.default_rng(0), batches[0]["moments"].shape
    noisy = draw.standard_normal((count, images, *size, channels // 2)).astype(np.float32)
    timesteps = draw.integers(0, 1000, (count, images))
    compiled = jax.jit(partial(predict, run.task))
    conditioning = {name: batches[0][name] for name in run.task.pipe.conditioning_inputs}
    policy, reference = (
        compiled(params, noisy, timesteps, conditioning)
        for params in (policy_params(run.task, run.state.params, run.reference), run.reference)
    )
    np.testing.assert_array_equal(policy, reference)
    assert np.std(np.asarray(policy, np.float32)) > 0.1


@pytest.mark.parametrize(
    ("variant", "rounding"),
    [("diffusion_dpo", 1e-6), pytest.param("diffusion_dpo in bfloat16", 1e-3, marks=pytest.mark.ci)],
)
def test_diffusion_dpo_starts_at_ln_2(make_run, batches, variant, rounding):
    _, [metrics] = make_run(variant).steps(batches[:1])
    assert metrics["loss"] == pytest.approx(np.log(2), rel=rounding)
    for name in ("deviation", "winner_drift", "loser_drift"):
        assert abs(metrics[name]) < rounding, name
    assert metrics["grad_norm"] > 0


@pytest.mark.parametrize(
    ("variant", "rounding"),
    [("dspo", 1e-6), pytest.param("dspo in bfloat16", 1e-3, marks=pytest.mark.ci)],
)
def test_dspo_starts_at_the_winners_error(make_run, batches, variant, rounding):
    _, [metrics] = make_run(variant).steps(batches[:1])
    assert metrics["loss"] == pytest.approx(metrics["winner_error"], rel=rounding)
    assert metrics["deviation"] < rounding
    assert metrics["grad_norm"] > 0


def test_metrics_and_parameters_are_float32_whatever_the_compute_dtype(make_run, batches):
    run = make_run("dspo in bfloat16")
    state, [metrics] = run.steps(batches[:1])
    assert {leaf.dtype for leaf in jax.tree.leaves(run.reference)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert {value.dtype for value in metrics.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("variant", "trained", "frozen"),
    [
        ("ddpm", {"unet", "text_encoder"}, set()),
        ("sft", {"unet"}, {"text_encoder"}),
        ("diffusion_dpo", {"unet", "text_encoder"}, {"unet", "text_encoder"}),
        ("dspo", {"unet"}, {"unet", "text_encoder"}),
    ],
)
def test_every_parameter_moves_and_the_reference_does_not(make_run, batches, variant, trained, frozen):
    run = make_run(variant)
    assert (set(run.state.params), set(run.reference)) == (trained, frozen)
    before, reference = leaves_by_name(run.state.params), leaves_by_name(run.reference)
    state, _ = run.steps(batches[:3])
    after = leaves_by_name(state.params)
    assert state.step == 3
    assert [name for name in before if np.array_equal(before[name], after[name])] == []
    for name, leaf in leaves_by_name(run.reference).items():
        np.testing.assert_array_equal(leaf, reference[name], err_msg=name)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("data", "fsdp", "accumulation"),
    [(2, 4, 2), (1, 1, 4)],
)
def test_the_trajectory_depends_neither_on_the_mesh_nor_on_the_parts(
    make_run, batches, data, fsdp, accumulation
):
    whole, split = make_run("dspo"), make_run("dspo", data, fsdp, accumulation)
    _, expected = whole.steps(batches, other_reference(whole))
    _, actual = split.steps(batches, other_reference(split))
    for name in expected[0]:
        np.testing.assert_allclose(
            [values[name] for values in actual],
            [values[name] for values in expected],
            rtol=1e-5,
            atol=1e-5,
            err_msg=name,
        )


def test_fsdp_splits_parameters_reference_and_moments_over_the_devices(make_run, batches):
    run = make_run("dspo", 2, 4, 2)
    state, _ = run.steps(batches[:1])
    for tree in (run.state.params, run.reference, run.state.opt_state, state.params, state.opt_state):
        leaves = jax.tree.leaves(tree)
        here = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
        assert here < 0.3 * sum(leaf.nbytes for leaf in leaves)


def test_the_step_is_compiled_once(make_run, batches):
    for run in (make_run("dspo"), make_run("dspo", 2, 4, 2)):
        run.steps(batches)
        # After thousands of programs in one process JAX may have dropped the entry from its cache.
        assert run.step._cache_size() <= 1


@pytest.mark.parametrize("variant", ["ddpm", "sft", "diffusion_dpo", "dspo"])
def test_one_step_gives_the_golden_metrics(make_run, batches, variant, request):
    run = make_run(variant)
    _, [metrics] = run.steps(batches[:1], other_reference(run))
    actual = {name: float(value) for name, value in sorted(metrics.items())}
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(json.dumps({**golden, variant: actual}, indent=2, sort_keys=True) + "\n")
        return
    assert actual == pytest.approx(golden.get(variant, {}), rel=2e-5), (
        f"one {variant} step does not give the metrics in {GOLDEN.name}. If your change was meant to alter "
        "them: pytest tests/training/test_step.py -k golden --regenerate-golden; and say why in the commit"
    )


@pytest.fixture
def task(shallow_model, tiny_pairs, pipe):
    return make_task(parse(make_config(shallow_model, tiny_pairs)), pipe)


@pytest.fixture
def draws(task):
    return task.loss.draws


def make_moments(count, *, images=2, deviation=1.0):
    """[count, images, 2, 2, 8] float16; the means differ, the standard deviation is the same everywhere."""
    means = np.random.default_rng(0).standard_normal((count, images, 2, 2, 4))
    return np.concatenate([means, np.full_like(means, deviation)], axis=-1).astype(np.float16)


_draw = jax.jit(draw_noise, static_argnums=0)


def make_draws(draws, index, moments=None):
    index = jnp.asarray(index, jnp.uint32)
    moments = make_moments(len(index)) if moments is None else moments
    return _draw(draws, {"moments": jnp.asarray(moments), "index": index}, jax.random.key(0))


def test_the_draws_of_an_example_do_not_depend_on_its_batch(draws):
    moments = make_moments(8)
    together = make_draws(draws, np.arange(8), moments)
    order = np.array([5, 2, 7])
    for all_draws, some_draws in zip(together, make_draws(draws, order, moments[order]), strict=True):
        np.testing.assert_array_equal(all_draws[order], some_draws)


def test_examples_and_runs_draw_differently(draws):
    moments = np.repeat(make_moments(1), 2, axis=0)
    latents, noise, timesteps, _ = make_draws(draws, [3, 4], moments)
    assert not np.any(latents[0] == latents[1])
    assert not np.any(noise[0] == noise[1])
    assert not np.any(timesteps[0] == timesteps[1])
    batch = {"moments": moments, "index": jnp.asarray([3, 4], jnp.uint32)}
    _, other_noise, _, _ = _draw(draws, batch, jax.random.key(1))
    assert not np.any(noise == other_noise)


@pytest.mark.parametrize("share_noise", [True, False])
@pytest.mark.parametrize("share_timesteps", [True, False])
def test_winner_and_loser_share_timestep_or_noise_or_both_or_neither(draws, share_timesteps, share_noise):
    draws = dataclasses.replace(draws, share_timesteps=share_timesteps, share_noise=share_noise)
    latents, noise, timesteps, _ = make_draws(draws, np.arange(64), np.ones((64, 2, 2, 2, 8)))
    assert np.mean(noise[:, 0] == noise[:, 1]) == float(share_noise)
    same_timestep = np.mean(timesteps[:, 0] == timesteps[:, 1])
    assert same_timestep == 1 if share_timesteps else same_timestep < 0.1
    # The posterior's noise is each image's own.
    assert not np.any(latents[:, 0] == latents[:, 1])


@pytest.mark.parametrize("share_noise", [True, False])
def test_a_noise_offset_is_one_normal_number_for_an_image_and_channel(draws, share_noise):
    plain, shifted = (
        make_draws(dataclasses.replace(draws, share_noise=share_noise, noise_offset=offset), np.arange(4000))
        for offset in (0.0, 0.5)
    )
    for index in (0, 2, 3):  # all but the noise
        np.testing.assert_array_equal(plain[index], shifted[index])
    offset = np.asarray(shifted[1], np.float64) - np.asarray(plain[1], np.float64)
    np.testing.assert_allclose(offset, np.broadcast_to(offset[..., :1, :1, :], offset.shape), atol=1e-6)
    of_channels = offset[:, :, 0, 0] / 0.5  # [B, P, C]
    assert np.all(of_channels[:, 0] == of_channels[:, 1]) == share_noise
    kind, p = scipy.stats.kstest(of_channels[:, 0].ravel(), "norm")
    assert p > 1e-3, kind
    # Of an image the covariance of two pixels of a channel is o^2, of a pixel 1 + o^2; of two channels 0.
    pixels = np.asarray(shifted[1])[:, 0].reshape(4000, -1, 4)
    covariance = np.cov(pixels.reshape(4000, -1).T)
    channel = np.arange(covariance.shape[0]) % 4
    expected = 0.25 * (channel[:, None] == channel) + np.eye(len(channel))
    np.testing.assert_allclose(covariance, expected, atol=0.12)


def test_the_noise_offset_of_an_example_does_not_depend_on_its_batch(draws):
    draws, moments = dataclasses.replace(draws, noise_offset=0.1), make_moments(8)
    together, order = make_draws(draws, np.arange(8), moments)[1], np.array([5, 2, 7])
    np.testing.assert_array_equal(together[order], make_draws(draws, order, moments[order])[1])


def test_the_target_holds_the_noise_with_its_offset(task, batches):
    """The network that gives back the target has no loss, whatever the offset."""
    draws = dataclasses.replace(task.loss.draws, noise_offset=3.0)
    batch, key = jax.tree.map(jnp.asarray, batches[0]), jax.random.key(0)
    latents, noise, _, _ = draw_noise(draws, batch, key)
    schedule = task.pipe.schedule

    class Perfect(PreferenceLoss):
        def forward(self, task, params, reference, noisy, levels, batch, dropout):
            x, t = np.asarray(noisy, np.float64), np.asarray(levels)
            signal = np.asarray(schedule.alphas_cumprod, np.float64)[t][..., None, None, None]
            eps = (x - np.sqrt(signal) * np.asarray(latents, np.float64)) / np.sqrt(1 - signal)
            return jnp.asarray(eps, jnp.float32), None

    loss, _ = Perfect(get_objective("ddpm"), draws)({}, task, {}, batch, key)
    assert np.abs(noise).max() > 3
    assert loss < 1e-6


def test_draws_have_the_distributions_they_should(draws):
    moments = make_moments(4000, deviation=0.5)
    latents, noise, timesteps, drop = make_draws(draws, np.arange(4000), moments)
    posterior = (latents - moments[..., :4].astype(np.float32)) / 0.5
    for normal in (posterior, noise):
        assert abs(normal.mean()) < 0.02
        assert abs(normal.std() - 1) < 0.02
    assert abs(np.corrcoef(posterior.ravel(), noise.ravel())[0, 1]) < 0.02
    assert timesteps.dtype == jnp.int32
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    counts, _ = np.histogram(timesteps[:, 0], bins=10, range=(0, 1000))
    assert np.all(np.abs(counts - 400) < 5 * np.sqrt(400 * 0.9))
    assert drop.shape == (4000,)
    assert abs(drop.mean() - draws.caption_dropout) < 4 * np.sqrt(0.2 * 0.8 / 4000)


def test_text_encoders_are_dropped_one_by_one_as_often_as_they_should(task, draws):
    """At the 46.4 % of Stable Diffusion 3's paper all three are dropped in a tenth of the examples."""
    loss = PreferenceLoss(task.loss.objective, dataclasses.replace(draws, encoder_dropout=0.464))
    indices = jnp.arange(4000, dtype=jnp.uint32)
    drop = np.asarray(loss._draw_encoders({"index": indices}, jax.random.key(0), 3))
    assert drop.shape == (4000, 3)
    assert np.all(np.abs(drop.mean(0) - 0.464) < 4 * np.sqrt(0.464 * 0.536 / 4000))
    assert abs(drop.all(1).mean() - 0.0999) < 4 * np.sqrt(0.0999 * 0.9 / 4000)
    part = np.asarray(loss._draw_encoders({"index": indices[7:9]}, jax.random.key(0), 3))
    np.testing.assert_array_equal(part, drop[7:9])


def test_latents_without_spread_are_the_means(draws):
    moments = make_moments(4, images=1, deviation=0.0)
    latents, noise, timesteps, _ = make_draws(draws, np.arange(4), moments)
    np.testing.assert_array_equal(latents, moments[..., :4].astype(np.float32))
    assert (noise.shape, timesteps.shape) == ((4, 1, 2, 2, 4), (4, 1))


def test_a_dropped_caption_becomes_the_empty_one_for_the_whole_pair(task, batches):
    seen = []

    class Watched(PreferenceLoss):
        def forward(self, task, params, reference, noisy, levels, batch, dropout):
            seen.append(np.asarray(batch["tokens"]))
            return jnp.zeros_like(noisy), jnp.zeros_like(noisy)

    batch, key = jax.tree.map(jnp.asarray, batches[0]), jax.random.key(0)
    for caption_dropout in (0.0, 0.5, 1.0):
        draws = dataclasses.replace(task.loss.draws, caption_dropout=caption_dropout)
        Watched(task.loss.objective, draws)({}, task, {}, batch, key)
    never, sometimes, always = seen
    np.testing.assert_array_equal(never, batches[0]["tokens"])
    np.testing.assert_array_equal(always, np.broadcast_to(task.pipe.empty_tokens, always.shape))
    *_, drop = draw_noise(dataclasses.replace(task.loss.draws, caption_dropout=0.5), batch, key)
    assert 0 < drop.sum() < len(drop)
    np.testing.assert_array_equal(sometimes, np.where(drop[:, None, None], always, never))


def test_what_is_rematerialised_is_not_kept_on_a_cpu():
    """Eight blocks of 4 MiB of attention weights each: with `jax.checkpoint` few of them exist at a time."""

    def block(x, kernel):
        return x + jax.nn.softmax(x @ kernel @ x.T) @ x

    def loss(kernels, x, run):
        return jnp.square(functools.reduce(run, kernels, x)).sum()

    kernels, x = jnp.full((8, 16, 16), 0.1), jnp.ones((1024, 16))
    kept, recomputed = (
        jax.jit(jax.grad(partial(loss, run=run)), compiler_options=COMPILER_OPTIONS["cpu"])
        .lower(list(kernels), x)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for run in (block, jax.checkpoint(block))
    )
    assert kept > 8 * 2**22 > 2 * recomputed
