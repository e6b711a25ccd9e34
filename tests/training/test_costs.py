"""FLOPs of an example, against XLA's count of the networks and of the program that runs them."""

from functools import partial

import jax
import pytest
from tiny_run import make_config

from dspo_jax.monitoring.devices import count_flops
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.samplers.sampler import State
from dspo_jax.sampling.guidance import GuidedDenoiser
from dspo_jax.sampling.rendering import Drawing
from dspo_jax.training.costs import flops_per_drawing, flops_per_example
from dspo_jax.training.make_task import make_task
from dspo_jax.training.settings import parse


def shapes(tree):
    """The same with an axis of one example before the others."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), tree)


def inputs(images):
    """Noisy latents and timesteps of an example."""
    return shapes(
        (jax.ShapeDtypeStruct((images, 4, 4, 4), "float32"), jax.ShapeDtypeStruct((images,), "int32"))
    )


def prepare(model, changes):
    """A task, the shapes of its parameters, and the FLOPs of denoiser and text encoder for one image."""
    task = make_task(parse(make_config(model, "", changes)), load_pipeline(model))
    pipe = task.pipe
    params = {name: pipe.networks[name].abstract_params() for name in pipe.components}
    batch = shapes(pipe.conditioning_shapes(1))
    latents, timesteps = (jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in inputs(1))
    conditioning = jax.eval_shape(pipe.encode_conditioning, params, batch)
    denoiser = count_flops(pipe.predict, params, latents, timesteps, conditioning)
    return task, params, denoiser, count_flops(pipe.encode_conditioning, params, batch)


@pytest.mark.parametrize(
    ("changes", "denoiser_passes", "text_passes"),
    [
        ({"objective.name": "dspo"}, 2 * (1 + 2 + 1), 2),
        ({"objective.name": "dspo", "objective.detach": True}, 3 + 1 + 2, 4),
        ({"objective.name": "dspo", "objective.detach": True, "train_text_encoder": True}, 3 + 1 + 2, 6),
        ({"objective.name": "sft"}, 3, 1),
        ({"objective.name": "ddpm", "train_text_encoder": True}, 6, 3),
        ({"objective.name": "dspo", "lora.rank": 2}, 2 * (1 + 1 + 1), 2),
        ({"objective.name": "kto"}, 3 + 1, 2),
        ({"objective.name": "mapo"}, 6, 1),
    ],
)
def test_flops_of_a_pair_are_those_of_its_passes(shallow_model, changes, denoiser_passes, text_passes):
    task, _, denoiser, encoder = prepare(shallow_model, changes)
    counted = flops_per_example(task, 2, (16, 16))
    assert counted == pytest.approx(denoiser_passes * denoiser + text_passes * encoder)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_flops_of_a_drawing_are_those_of_its_steps_written_out(shallow_model, guidance):
    task, params, *_ = prepare(shallow_model, {})
    pipe, drawing = task.pipe, Drawing(steps=3, guidance_scale=guidance)
    sampler, denoiser = drawing.make_sampler(pipe), GuidedDenoiser(pipe, drawing)

    def draw(params, tokens, x):
        text = denoiser.encode(params, tokens, pipe.latent_size)
        for i in range(3):
            x = sampler.transition(lambda x, t: denoiser.predict(params, x, t, text), State(x), i)[0].latents
        return x

    tokens = jax.ShapeDtypeStruct((1, *pipe.empty_tokens.shape), "int32")
    expected = count_flops(draw, params, tokens, jax.ShapeDtypeStruct((1, 4, 4, 4), "float32"))
    assert flops_per_drawing(task, drawing) == pytest.approx(expected, rel=0.02)


@pytest.mark.ci
@pytest.mark.parametrize(
    "changes",
    [
        {"objective.name": "dspo"},
        {"objective.name": "dspo", "objective.detach": True},
        {"objective.name": "dspo", "objective.detach": True, "train_text_encoder": True},
        {"objective.name": "ddpm", "train_text_encoder": True},
        {"objective.name": "kto"},
        {"objective.name": "mapo"},
    ],
)
def test_the_passes_of_a_loss_are_those_of_its_program(shallow_model, changes):
    task, params, denoiser, encoder = prepare(shallow_model, changes)
    trained = params if task.train_text_encoder else {"unet": params["unet"]}
    passes = task.loss.passes(2)
    batch = shapes(task.pipe.conditioning_shapes(passes.policy))
    forward = count_flops(partial(task.loss.forward, task), trained, params, *inputs(passes.policy), batch)
    # The images of a pair share the keys and values of their text, 2 % of these small networks.
    expected = (passes.policy + passes.reference) * denoiser + passes.encoded * encoder
    assert forward == pytest.approx(expected, rel=0.03)

    def step(params, reference, batch):
        return jax.value_and_grad(task.loss, has_aux=True)(params, task, reference, batch, jax.random.key(0))

    batch = shapes(task.loss.input_shapes(task.pipe, 2, (16, 16)))
    # No gradient flows into the inputs of the first layers.
    assert count_flops(step, trained, params, batch) == pytest.approx(
        flops_per_example(task, 2, (16, 16)), rel=0.1
    )
