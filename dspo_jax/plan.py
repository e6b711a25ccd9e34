"""Plans a run on devices that are not here: compiles its step for TPUs or NVIDIA GPUs by name.

    python -m dspo_jax.plan --config sd15_dspo --published sd15 --topology v5p:4x4x4 --pairs_per_device 8
    python -m dspo_jax.plan --config sd15_dspo --published sd15 --topology h100:8 --pairs_per_device 16

No accelerator is needed and no weights are read; `pip install 'dspo_jax[plan]'` brings the TPU's compiler,
and `pip install 'dspo_jax[plan-gpu]'` that of NVIDIA GPUs. Without --topology the step is compiled for the
devices that are here. A step of a full-size model takes many minutes to compile for a TPU, one or two for a
GPU; what was found is kept, and asking again for the same program answers at once.

For a GPU the time is a roofline of each instruction (planning/roofline.py). For a TPU it is the compiler's
estimate, which counts the body of a loop once, and of a kernel that is not XLA's only what its author
declared. Both are put right here, and what was added is shown.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags, logging

from dspo_jax import cli
from dspo_jax.errors import UserError
from dspo_jax.files import write_json


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    from dspo_jax.pipelines import published
    from dspo_jax.pipelines.loading import load_pipeline, with_text
    from dspo_jax.planning import absent_gpu, compilation
    from dspo_jax.planning.plan import (
        assume_stored_states,
        describe_plan,
        explain,
        find_devices,
        image_size,
        plan,
    )
    from dspo_jax.training.settings import parse

    del argv
    values, config = flags.FLAGS, flags.FLAGS.config
    if not (values.published or config.model):
        raise UserError(
            "config.model is not set: give --config.model=DIR, a diffusers folder, or --published=NAME, "
            "such as sd15, sdxl or sd35-medium (dspo_jax.list --only=published)"
        )
    facts = None
    # A GPU's compiler is done as soon.
    if values.memory_only and not absent_gpu.is_gpu(values.topology or ""):
        if not values.topology:
            raise UserError("--memory_only: ends the TPU's compiler early; give it a --topology")
        command = [sys.executable, "-m", "dspo_jax.plan", *sys.argv[1:], "--nomemory_only"]
        answer = compilation.memory_facts(command, "jit_train_step")
        if isinstance(answer, int):  # it ended by itself, and has said everything
            return answer
        facts = answer
    devices = find_devices(values.topology)
    pipe = published.architecture(values.published) if values.published else load_pipeline(config.model)
    if values.part != "step":
        config.accumulation = 1
    config.batch_size = len(devices) * (values.pairs_per_device or max(1, config.batch_size // len(devices)))
    settings = parse(config)
    pipe = with_text(pipe, **dataclasses.asdict(settings.text))
    pipe = assume_stored_states(settings, pipe)
    settings = settings.with_sampler(pipe.schedule)
    size = image_size(settings.data, pipe, values.resolution)
    if facts is None:
        what = settings.method if values.part == "step" else values.part
        print(f"{what} of {pipe.path}, {size[0]}x{size[1]} pixels", flush=True)
        logging.info("compiling; for a full-size model that takes many minutes")
    found = plan(settings, pipe, devices, size=size, topology=values.topology, facts=facts, part=values.part)
    for line in (*describe_plan(found), *(explain(found) if values.explain else ())):
        print(line)
    if values.json:
        write_json(Path(values.json), dataclasses.asdict(found), shared=True)
    return 0


def run() -> None:
    """Defines the flags and runs the command."""
    cli.define_config("The run, e.g. configs/sd15_dspo.py.")
    flags.DEFINE_string(
        "topology",
        None,
        "TPUs, e.g. v5e:2x4 or v5p:4x4x4, or GPUs, e.g. rtx4090, h100:8 or h100:2x8, two hosts of eight "
        "(default: the devices that are here).",
    )
    flags.DEFINE_enum(
        "published",
        None,
        ("sd15", "sd21", "sdxl", "sd3-medium", "sd35-medium", "sd35-large"),
        "A published model's shapes, in place of config.model's.",
    )
    flags.DEFINE_integer(
        "pairs_per_device", None, "In a step (default: by config.batch_size).", lower_bound=1
    )
    flags.DEFINE_enum(
        "part",
        "step",
        ("step", "sample", "encode", "judge", "decode"),
        "What is compiled: the training step; drawing, encoding or decoding --pairs_per_device images; or a "
        "pass over held-out pairs.",
    )
    flags.DEFINE_bool("explain", False, "For a GPU: the instructions that take longest, with lines of code.")
    flags.DEFINE_integer("resolution", None, "Side of the images (default: the data's, or the model's).")
    flags.DEFINE_bool(
        "memory_only", False, "Compile only until the step's memory is known, a small part of the way."
    )
    flags.DEFINE_string("json", None, "A .json file for the numbers.")
    cli.run(main, required=("config",))


if __name__ == "__main__":
    run()
