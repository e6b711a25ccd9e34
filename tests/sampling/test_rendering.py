"""How images are rendered as a value: its checks, and that nothing is passed along beside it."""

import ast
import inspect
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from tables import each_row

import dspo_jax
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.sampling import drawing_flags
from dspo_jax.sampling.options import read_drawing_flags
from dspo_jax.sampling.prompts import Prompt
from dspo_jax.sampling.rendering import Drawing, Rendering


@each_row(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "--batch_size=0: must be at least 1"),
        ({"vae_tile": -8}, "--vae_tile=-8: must be 0"),
        ({"image_format": "pgn"}, "--format = 'pgn': unknown; did you mean 'png'"),
        ({"compute_dtype": "float16"}, "--compute_dtype = 'float16': unknown; did you mean 'bfloat16'"),
    ],
)
def test_what_nothing_can_be_rendered_with_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Rendering(**changes)


@each_row(
    ("changes", "message"),
    [
        ({"sampler": "dim", "eta": 0.5}, "--sampler = 'dim': unknown; did you mean 'ddim'"),
        ({"sampler": "euler", "eta": 0.5}, "eta = 0.5: sampler 'euler' has none"),
        ({"guidance_scale": math.inf}, "--guidance_scale=inf: must be a finite number"),
        ({"guidance_interval": (9, 3)}, "--guidance_interval=9,3: the first must not be above the last"),
    ],
)
def test_what_nothing_can_be_drawn_with_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Drawing(**changes)


def test_an_interval_of_one_timestep_is_guided():
    assert Drawing(guidance_interval=(500, 500)).guidance_interval == (500, 500)


def test_the_flags_that_are_not_given_are_the_defaults_of_the_values(monkeypatch):
    defaults = {}

    def note(name, default, *help, **limits):
        defaults[name] = default

    kinds = ("bool", "enum", "float", "integer", "list", "string")
    monkeypatch.setattr(drawing_flags, "flags", SimpleNamespace(**{f"DEFINE_{kind}": note for kind in kinds}))
    drawing_flags.define_drawing_flags()
    assert read_drawing_flags(SimpleNamespace(**defaults), [Prompt("a fox")]) == (
        [Prompt("a fox")],
        Rendering(),
    )


def test_latents_are_those_of_the_model_or_of_the_size(tiny_model):
    pipe = load_pipeline(tiny_model)
    assert Rendering().latent_shape(pipe) == (4, 4, 4)
    assert Rendering(size=(24, 40)).latent_shape(pipe) == (6, 10, 4)
    with pytest.raises(ValueError, match="--height=0: must be a positive multiple of 4"):
        Rendering(size=(0, 40)).latent_shape(pipe)


@each_row("room", ["sampling", "evaluation", "feedback"])
def test_no_function_has_more_than_seven_parameters_or_hands_on_a_dictionary(room):
    functions = [
        (file.name, node)
        for file in (Path(inspect.getfile(dspo_jax)).parent / room).glob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert functions
    for file, function in functions:
        given = function.args
        names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        assert len(set(names) - {"self"}) <= 7, f"{file}: {function.name}"
        assert given.kwarg is None, f"{file}: {function.name}"
