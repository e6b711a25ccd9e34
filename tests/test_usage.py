"""Help, usage lines and lists of the commands."""

import json
import re
import subprocess
import sys

import pytest
from flax.traverse_util import flatten_dict
from processes import ROOT
from tables import each_row

import dspo_jax
from configs import common
from dspo_jax import samplers
from dspo_jax.__main__ import COMMANDS
from dspo_jax.conversion.export_model import ADAPTER_FORMATS
from dspo_jax.evaluation.prompt_sets import SETS
from dspo_jax.feedback.labelling import PAIRS
from dspo_jax.list import KINDS, entries
from dspo_jax.objectives import OBJECTIVES
from dspo_jax.objectives.policy_gradient import POLICY_GRADIENTS
from dspo_jax.objectives.reward_gradient import REWARD_GRADIENTS
from dspo_jax.pipelines import published
from dspo_jax.rewards import REWARDS
from dspo_jax.rewards.publish import PUBLISHED_HEAD, RECIPES
from dspo_jax.sampling import rendering
from dspo_jax.weights import layout

# Asks every command for its help in a process of its own, and notes what had been imported by then.
ASK = """
import contextlib, io, json, os, runpy, sys

for name in json.load(sys.stdin):
    read, write = os.pipe()
    if os.fork() == 0:
        sys.argv = [name, "-h"]
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            heavy = sorted({"jax", "numpy", "tensorflow_datasets", "transformers"} & sys.modules.keys())
            with os.fdopen(write, "w") as file:
                json.dump([name, end.code, said.getvalue(), heavy], file)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        print(file.read())
"""


@pytest.fixture(scope="module")
def helps():
    """Module of each command -> (exit status, help, slow packages that were imported)."""
    result = subprocess.run(
        [sys.executable, "-c", ASK],
        cwd=ROOT,
        input=json.dumps(list(COMMANDS.values())),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    return {name: (code, said, heavy) for name, code, said, heavy in answers}


def test_every_command_says_at_once_what_it_takes(helps):
    assert helps.keys() == set(COMMANDS.values())
    for name, (code, said, heavy) in helps.items():
        assert code == 0, name
        assert said.startswith(f"usage: python -m {name} "), name
        assert heavy == [], name
    code, said, _ = helps["dspo_jax.sample"]
    assert "--model=MODEL --prompts=PROMPTS --out=OUT [options]" in said
    required, options, drawing, processes = said.split("\n\n")[-4:]
    assert required.startswith("Required:\n  --model ")
    assert "\n  --seeds=0 " in options
    assert "\n  --steps=50 " in drawing
    assert "\n  --num_processes " in processes
    assert "pdb" not in said


@each_row(
    ("command", "names"),
    [
        ("dspo_jax.sample", [*samplers.SAMPLERS, *rendering.FORMATS, *rendering.COMPUTE_DTYPES]),
        ("dspo_jax.evaluate", [*SETS, *samplers.SAMPLERS]),
        ("dspo_jax.data.label", [*REWARDS, *PAIRS]),
        ("dspo_jax.rewards.convert", [*RECIPES, PUBLISHED_HEAD]),
        ("dspo_jax.convert", [*ADAPTER_FORMATS, *layout.DTYPES]),
        ("dspo_jax.plan", [*published.MODELS]),
        ("dspo_jax.train", [*published.MODELS]),
        ("dspo_jax.list", [*KINDS]),
    ],
)
def test_help_names_everything_that_a_flag_can_be(command, names, helps):
    """Help is written out, as asking the registries would take seconds."""
    words = re.findall(r"[\w.+-]*\w", helps[command][1])
    assert [name for name in names if name not in words] == []


@each_row(
    ("arguments", "beginning"),
    [
        (["-?"], "usage: python -m dspo_jax COMMAND "),
        (["--version"], f"dspo_jax {dspo_jax.__version__} (jax "),
        (["sample", "-?"], "usage: python -m dspo_jax.sample "),
        (["sample", "--helpshort"], "usage: python -m dspo_jax.sample "),
        (["sample", "--model=a", "--help=1"], "usage: python -m dspo_jax.sample "),
        (["sample", "--helpfull"], "usage: python -m dspo_jax.sample "),
        (["sample", "--version"], f"dspo_jax {dspo_jax.__version__} (jax "),
    ],
)
def test_every_spelling_of_help_and_the_version_are_answered(arguments, beginning):
    said = run(*arguments)
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.startswith(beginning)


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "dspo_jax", *arguments], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.ci
def test_the_package_names_its_commands_and_runs_them():
    said = run()
    assert (said.returncode, said.stderr) == (0, "")
    lines = said.stdout.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(COMMANDS)
    wrong = run("trian")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: command = 'trian': unknown; did you mean 'train'?")
    assert run("sample").stderr == (
        "error: --model, --prompts and --out are not set: python -m dspo_jax.sample --model=MODEL "
        "--prompts=PROMPTS --out=OUT [options] (--help lists all)\n"
    )
    assert run("train", "--config=configs/sd15_dpso.py", "--workdir=run").stderr == (
        "error: --config=configs/sd15_dpso.py: no such file; did you mean configs/sd15_dspo.py? "
        "(python -m dspo_jax list: all recipes)\n"
    )
    assert run("train", "--config=configs/sd15_dspo.py", "--published=sd15").stderr == (
        "error: --published, --pairs and --gpu: only go with --dry_run\n"
    )


def test_lists_have_a_line_for_everything():
    found = {kind: dict(entries(kind)) for kind in KINDS}
    assert found["objectives"].keys() == OBJECTIVES.keys()
    assert found["policy_gradients"].keys() == POLICY_GRADIENTS.keys()
    assert found["reward_gradients"].keys() == REWARD_GRADIENTS.keys()
    assert found["rewards"].keys() == REWARDS.keys()
    assert found["prompt_sets"]["hpsv2"].startswith("3,200 prompts: ")
    assert "configs/sd15_dspo.py" in found["recipes"]
    assert "configs/pick_a_pic.py" not in found["recipes"]
    assert "configs/encode/folder.py" in found["encode_recipes"]
    assert all(all(rows.values()) for rows in found.values())
    assert found["objectives"]["diffusion_dpo"].endswith(" Also: dpo, diffusion-dpo.")
    defaults = flatten_dict(common.get_config().to_dict(), sep=".")
    assert found["keys"].keys() == defaults.keys()
    assert found["keys"]["optimizer.b2"] == "0.999."
    assert found["keys"]["lora.rank"].startswith("0. Adapters are trained in place of whole networks")
    assert found["keys"]["objective.kappa"] == "None. mapo: k of its score"
    assert found["gpus"]["rtx4090"].startswith("NVIDIA GeForce RTX 4090: 22.4 GiB, 1,008 GB/s")
    listed = run("list", "--only=published")
    assert listed.stdout == (
        "published architectures, for --published:\n"
        "  sd15         StableDiffusionPipeline\n  sd21         StableDiffusionPipeline\n"
        "  sdxl         StableDiffusionXLPipeline\n  sd3-medium   StableDiffusion3Pipeline\n"
        "  sd35-medium  StableDiffusion3Pipeline\n  sd35-large   StableDiffusion3Pipeline\n\n"
    )


def test_recipes_are_modules_in_a_clone_too():
    from dspo_jax.recipes import emoji_diffusion_dpo

    assert emoji_diffusion_dpo.get_config().objective.name == "diffusion_dpo"
    with pytest.raises(ImportError, match="cannot import name 'emoji_dpo'"):
        from dspo_jax.recipes import emoji_dpo  # noqa: F401
