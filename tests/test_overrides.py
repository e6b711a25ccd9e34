"""What a command line changes of a recipe: a new name, `None`; every recipe with every objective."""

import pytest
from absl import flags
from ml_collections import config_flags
from tables import each_row
from test_recipes import CONFIGS, RECIPES, variants

from dspo_jax import limits, overrides
from dspo_jax.objectives import OBJECTIVES, get_objective
from dspo_jax.training.optim import OPTIMIZERS, OptimizerSettings, make_optimizer

# ml_collections loads a config file so.
pytestmark = pytest.mark.filterwarnings(r"ignore:the load_module\(\) method is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def none_is_parsed(monkeypatch):
    of_types = config_flags.config_flags._FIELD_TYPE_TO_PARSER
    monkeypatch.setattr(config_flags.config_flags, "_FIELD_TYPE_TO_PARSER", dict(of_types))
    overrides.accept_none()


def parse(recipe, *options):
    """The config of a command line, and what it says."""
    values, argv = flags.FlagValues(), ["command", f"--config={CONFIGS / recipe}", *options]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    return values.config, overrides.settle(values)


def objective_of(config):
    arguments = {key: value for key, value in config.objective.items() if value is not None}
    return get_objective(arguments.pop("name"), **arguments)


@each_row("objective", sorted(OBJECTIVES))
@each_row(("name", "variant"), list(variants()))
def test_every_recipe_takes_every_objective(name, variant, objective):
    recipe = f"{name}.py" if variant is None else f"{name}.py:{variant}"
    given, _ = parse(recipe)
    config, lines = parse(recipe, f"--config.objective.name={objective}")
    made = objective_of(config)
    assert made.name == objective
    if objective == given.objective.name:
        assert (config.to_dict(), lines) == (given.to_dict(), [])
        return
    assert made.hyperparameters == get_objective(objective).hyperparameters  # its own defaults, all of them
    was = {key: value for key, value in given.objective.items() if value is not None and key != "name"}
    assert len(lines) == bool(was)
    for key, value in was.items():
        assert f"{key} = {value!r}" in lines[0]


# What an optimizer asks for besides.
NEEDS = {
    "prodigy": ("--config.optimizer.learning_rate=1.0", "--config.optimizer.scale_lr=False"),
    "schedule_free": ("--config.optimizer.schedule=constant",),
}


@each_row("optimizer", OPTIMIZERS)
@each_row("name", RECIPES)
def test_every_recipe_takes_every_optimizer(name, optimizer):
    config, lines = parse(f"{name}.py", f"--config.optimizer.name={optimizer}", *NEEDS.get(optimizer, ()))
    settings = limits.parse(OptimizerSettings, config.optimizer.to_dict(), "config.optimizer")
    make_optimizer(settings, config.steps, config.batch_size)
    assert (config.optimizer.name, lines) == (optimizer, [])


def test_what_the_user_gives_stays_wherever_it_stands():
    config, lines = parse(
        "sd15_dspo.py:paper",
        "--config.objective.beta=250",
        "--config.objective.name=diffusion_dpo",
        "--config.objective.reduction",
        "sum",
    )
    given = {"beta": 250.0, "reduction": "sum", "time_weight": "none"}
    assert objective_of(config).hyperparameters.items() >= given.items()
    assert lines == [
        "config.objective.name = 'diffusion_dpo': dropped what the recipe sets for 'dspo': lam = 0.001"
    ]


def test_an_argument_of_the_old_objective_is_refused_when_the_user_gives_it():
    config, _ = parse("sd15_dspo.py", "--config.objective.name=mapo", "--config.objective.lam=0.1")
    with pytest.raises(ValueError, match="argument of objective 'mapo' = 'lam': unknown"):
        objective_of(config)


def test_the_recipe_s_own_name_drops_nothing():
    config, lines = parse("sd15_dspo.py", "--config.objective.name=dspo")
    assert (config.objective.lam, lines) == (0.001, [])


@each_row(
    ("key", "unset"),
    [
        ("objective.lam", None),  # float
        ("objective.detach", None),  # bool
        ("objective.reduction", None),  # str
        ("reference_dtype", None),
        ("model", None),
        ("timesteps.last", None),  # int
        ("data.weights", ()),
        ("samples.prompts", ()),
    ],
)
def test_none_unsets(key, unset):
    config, _ = parse("sd15_dspo.py:paper", f"--config.{key}=None")
    for part in key.split("."):
        config = config[part]
    assert config == unset


@each_row(
    "key",
    ["steps", "ema_decay", "share_noise", "data.split", "optimizer.name", "objective.name", "mesh['data']"],
)
def test_none_is_refused_where_a_value_is_needed(key):
    with pytest.raises(ValueError, match=r"=None: needs a value; without the option") as error:
        parse("sd15_dspo.py", f"--config.{key}=None")
    assert str(error.value).startswith(f"--config.{key}=None: ")


def test_another_source_says_that_its_arguments_are_in_its_own_recipe():
    from dspo_jax.data.sources import get_source

    config, lines = parse("encode/pickapic_sd15.py", "--config.source.name=folder")
    arguments = {key: config.source[key] for key in config.source if key not in ("name", "max_skipped")}
    with pytest.raises(ValueError, match=r"take one of 'folder' in configs/encode/"):
        get_source(config.source.name, **arguments)
    assert lines == []


def test_a_number_of_steps_replaces_the_recipes_epochs():
    config, lines = parse("own_pairs_sd15_lora.py", "--config.steps=100")
    assert (config.steps, config.epochs) == (100, None)
    assert lines == ["config.steps: dropped what the recipe sets: epochs = 10"]
    config, lines = parse("own_pairs_sd15_lora.py", "--config.steps=100", "--config.epochs=2.0")
    assert (config.epochs, lines) == (2.0, [])


def test_an_alias_of_the_recipes_own_objective_changes_nothing():
    config, lines = parse("emoji_diffusion_dpo.py", "--config.objective.name=dpo")
    assert (config.objective.name, config.objective.beta, lines) == ("diffusion_dpo", 2000.0, [])
