"""Every recipe, in every variant, is one that a run accepts."""

import importlib.util
from pathlib import Path

import jax
import pytest
from tables import each_row

from dspo_jax import limits
from dspo_jax.objectives import get_objective
from dspo_jax.parallel.mesh import make_mesh
from dspo_jax.training.optim import OptimizerSettings, make_optimizer
from dspo_jax.training.pair_stream import check_pairs
from dspo_jax.training.rounds import check_round_sizes
from dspo_jax.training.settings import parse
from dspo_jax.training.trajectory_stream import check_rows

CONFIGS = Path(__file__).parents[1] / "configs"
NOT_RECIPES = ("common.py", "online.py", "pick_a_pic.py")
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.py") if path.name not in NOT_RECIPES)
METHODS = ("draft", "alignprop", "refl", "ddpo", "dpok", "d3po", "online_dpo", "rwr", "raft", "iterated_dpo")
ONLINE = tuple(name for name in RECIPES if name.endswith(METHODS))
PUBLISHED = [
    name
    for name in RECIPES
    if name.startswith(("sd15_", "sdxl_"))
    and not name.endswith(("_lora", "_emu", "_spin"))
    and name not in ONLINE
]
DIFFERENTLY_NAMED = (
    *(
        "emoji_base",
        "emoji_flow_base",
        "emoji_flow_dpo",
        "own_pairs_sd15",
        "own_pairs_sd15_lora",
        "own_pairs_sdxl_lora",
    ),
    *("sd15_spin", "sdxl_emu"),
    *("sd3_medium_flow_dpo", "sd35_medium_flow_dpo"),
)
FLOW = ("sd3_medium_flow_dpo", "sd35_medium_flow_dpo")
# The papers print no settings for these.
ONE_VARIANT = ("sd15_kto", "sd15_mapo", "sd15_sft", "sdxl_mapo", "sdxl_sft")


def load(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def variants():
    for name in RECIPES:
        yield name, None
        if name in FLOW:
            yield name, "lora"
            yield name, "full"
        if name in PUBLISHED:
            yield name, "released"
            if name not in ONE_VARIANT:
                yield name, "paper"


@each_row(("name", "variant"), list(variants()))
def test_recipe_is_accepted(name, variant):
    config = load(name).get_config(*([] if variant is None else [variant]))
    arguments = {key: value for key, value in config.objective.items() if value is not None}
    objective = get_objective(arguments.pop("name"), **arguments)
    settings = limits.parse(OptimizerSettings, config.optimizer.to_dict(), "config.optimizer")
    make_optimizer(settings, config.steps, config.batch_size)
    assert (
        config.objective.name in name or objective.name == "dspo_sdxl" or name in DIFFERENTLY_NAMED + ONLINE
    )


@each_row("name", ONLINE)
def test_a_recipe_for_own_images_trains_by_what_it_is_named_after(name):
    settings = parse(load(name).get_config())
    assert settings.stream.needs_prompts
    dpo = "iterated_dpo" if settings.reference.every else "online_dpo"
    names = {"draft_k": "draft", "diffusion_dpo": dpo, "sft": "raft"}
    method = names.get(settings.method, settings.method)
    assert name.partition("_")[2] == method
    assert settings.rewards.train not in settings.rewards.validation
    assert (
        settings.steps % settings.stream.updates == settings.validation.every % settings.stream.updates == 0
    )
    assert settings.checkpoint.every % settings.stream.updates == 0
    if settings.reference.every:
        assert settings.reference.every % settings.stream.updates == 0
    if settings.stream.kind == "own_pairs":
        mesh = make_mesh({"data": 1}, jax.devices()[:1])
        check_pairs(settings, mesh)
        count = settings.batch_size * settings.stream.updates * settings.drawn_per_example
        assert check_round_sizes(settings, mesh, count) == settings.stream.batch_size
    if settings.stream.kind == "trajectories":
        for devices in (1, 8):
            mesh = make_mesh({"data": devices}, jax.devices()[:devices])
            check_rows(settings, mesh, settings.stream.num_inference_steps)


def test_self_play_goes_through_the_three_iterations_of_its_paper():
    settings = parse(load("sd15_spin").get_config())
    assert settings.stream.kind == "self_play"
    assert settings.steps == 3 * settings.reference.every
    assert settings.batch_size % settings.stream.batch_size == 0
    assert settings.reference.every % settings.validation.every == 0


@each_row("name", RECIPES)
def test_the_card_gives_the_command(name):
    assert f"python -m dspo_jax.train --config configs/{name}.py --workdir runs/" in load(name).__doc__


@each_row("name", ["sd15_dspo", "sdxl_dspo"])
def test_the_checkpoints_that_the_authors_chose_from_are_kept_to_the_end(name):
    config = load(name).get_config()
    assert config.checkpoint.max_to_keep > config.steps // config.checkpoint.every


def test_the_default_is_the_released_launcher_and_the_print_differs():
    sd15, sdxl = load("sd15_dspo"), load("sdxl_dspo")
    assert sd15.get_config().to_dict() == sd15.get_config("released").to_dict()
    assert sd15.get_config().optimizer.learning_rate == pytest.approx(2.048e-5)
    assert sd15.get_config("paper").optimizer.learning_rate == pytest.approx(2.048e-8)
    for name in (name for name in PUBLISHED if name not in ONE_VARIANT):
        shared = [
            (config.share_timesteps, config.share_noise)
            for config in (load(name).get_config(variant) for variant in ("released", "paper"))
        ]
        assert shared == [(True, True), (True, False)], name
    assert (sdxl.get_config().objective.released_switch, sdxl.get_config().optimizer.name) == (
        True,
        "adafactor",
    )
    assert sdxl.get_config().optimizer.factored_axes == "released"
    assert sdxl.get_config("paper").objective.released_switch is False


@each_row("name", PUBLISHED)
def test_an_unknown_variant_is_refused(name):
    with pytest.raises(ValueError, match=r"after the colon = 'papre': unknown.*allowed: .*released\)"):
        load(name).get_config("papre")
    if name in ONE_VARIANT:
        with pytest.raises(ValueError, match=r"= 'paper': unknown.*\(allowed: released\)"):
            load(name).get_config("paper")
