"""Every recipe of configs/encode/ is one that the encoder accepts, and its arguments can be set."""

import sys
from pathlib import Path
from unittest import mock

import pytest
from absl import flags
from ml_collections import config_flags
from tables import each_row

from dspo_jax.data.sources import get_source

RECIPES = Path(__file__).parents[2] / "configs" / "encode"
NAMES = sorted(path.stem for path in RECIPES.glob("*.py") if path.name not in ("common.py", "__init__.py"))
NEED_NO_PATH = ("emoji", "emoji_images")
OWN_SETTINGS = {"emoji_images": {"min_occurrences": 20}}

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # in ml_collections


def load(name, *arguments):
    """The config and the source of a recipe, with arguments as on the command line."""
    values, argv = flags.FlagValues(), ["encode", *arguments]
    with mock.patch.object(sys, "argv", argv):  # where ml_collections looks for overrides
        config_flags.DEFINE_config_file("config", str(RECIPES / f"{name}.py"), flag_values=values)
        values(argv)
    settings = values.config.source.to_dict()
    name, _ = settings.pop("name"), settings.pop("max_skipped")
    return values.config, get_source(name, **settings)


@each_row("name", NAMES)
def test_the_recipe_builds_its_source_and_its_card_gives_the_command(name):
    config, source = load(name)
    assert config.resolution in (None, 64, 512, 1024)
    assert source == get_source(config.source.name, **OWN_SETTINGS.get(name, {}))
    card = (RECIPES / f"{name}.py").read_text().split('"""')[1]
    assert f"python -m dspo_jax.encode --config configs/encode/{name}.py" in card
    assert "--config.model=MODEL_DIR --out OUT" in card


def test_the_data_of_the_published_recipes_are_mirrored_as_in_the_release():
    flips = {name: load(name)[0].flip for name in NAMES}
    released = {"pickapic_sd15", "pickapic_sdxl"}
    assert flips == {name: "independent" if name in released else "none" for name in NAMES}


@each_row("name", [name for name in NAMES if name not in NEED_NO_PATH])
def test_where_the_data_are_must_be_said(name):
    _, source = load(name)
    with pytest.raises(
        ValueError, match=r"config.source.(path|dataset) is not set: give --config.source.\1="
    ):
        source.splits  # noqa: B018


def test_arguments_are_set_on_the_command_line(tmp_path):
    _, source = load(
        "pickapic_sd15",
        f"--config.source.path={tmp_path}",
        "--config.source.models=('a', 'b')",
        "--config.source.one_pair_per_prompt=True",
        "--config.source.min_margin=0.5",
        "--config.source.caption_pattern=^a fox",
    )
    assert source == get_source(
        "pick_a_pic",
        path=str(tmp_path),
        models=("a", "b"),
        one_pair_per_prompt=True,
        min_margin=0.5,
        caption_pattern="^a fox",
    )
    assert load("parquet", "--config.source.loser=")[1].images_per_example == 1
    assert load("hpdv2_sd15", "--config.source.comparisons=best")[1].comparisons == "best"
    assert load("hpdv3_sdxl", "--config.source.path=train.json")[1] == get_source("hpd_v3", path="train.json")
