"""Imports published models, and exports trained runs.

python -m dspo_jax.convert import --model=DIR_OR_HUB_ID --out=model
python -m dspo_jax.convert import --model=fine_tune.safetensors --base=DIR --out=model
python -m dspo_jax.convert import --model=DIR --lora=style.safetensors:0.8 --out=model
python -m dspo_jax.convert export --run=runs/emoji --out=exported
python -m dspo_jax.convert export --run=runs/emoji --out=exported.safetensors
python -m dspo_jax.convert export --run=runs/lora --out=adapters.safetensors --lora=diffusers
python -m dspo_jax.convert export --run=runs/emoji --out=exported --push_to_hub=owner/name
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dspo_jax import cli, spelling
from dspo_jax.errors import UserError
from dspo_jax.locks import reserve

_FORMATS = ("diffusers", "kohya")
_PROCESS = ("prediction_type", "rescale_betas_zero_snr")
_COMMANDS = {
    "import": ("model", "base", "lora", *_PROCESS, "out"),
    "export": ("run", "step", "dtype", "base", "lora", "push_to_hub", "public", "out"),
}


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    from dspo_jax.conversion.export_model import export
    from dspo_jax.conversion.hub import check_upload, push_to_hub
    from dspo_jax.conversion.import_model import import_model
    from dspo_jax.weights.checkpoints import find_best
    from dspo_jax.weights.saved_params import parse_step, split_run

    settings = flags.FLAGS
    command = argv[1]
    for name in ("model", "run", "step", "dtype", "base", "lora", *_PROCESS, "push_to_hub", "public"):
        if name not in _COMMANDS[command] and settings[name].present:
            raise UserError(f"--{name}={settings[name].value}: not an option of {command}")
    needed = _COMMANDS[command][0]
    if settings[needed].value is None:
        raise UserError(f"--{needed} is missing: name what to {command}")
    out, repository = Path(settings.out), settings.push_to_hub
    if repository:
        check_upload(repository)
    elif settings.public:
        raise UserError("--public: says who may see an upload; name the repository with --push_to_hub")
    with reserve(out):
        if command == "import":
            asked = {name: settings[name].value for name in _PROCESS}
            process = {name: value for name, value in asked.items() if value is not None}
            import_model(settings.model, out, base=settings.base, process=process, loras=settings.lora)
            print(f"{out}: diffusers folder of {settings.model}")
        else:
            run, step = split_run(settings.run) or (Path(settings.run), None)
            if settings.step is not None and step is not None:
                raise UserError(f"--run={settings.run} and --step={settings.step}: name the step once")
            step = parse_step(settings.step, run) if settings.step else step
            newest = step is None
            adapters = _choose_format(settings.lora)
            step = export(
                run,
                out,
                step=step,
                dtype=settings.dtype,
                base=settings.base,
                adapters=adapters,
            )
            kind = "single-file checkpoint" if out.suffix == ".safetensors" else "diffusers folder"
            kind = f"adapters for {adapters}" if adapters else kind
            print(f"{out}: {kind} of {run} at step {step}", flush=True)
            best = find_best(run / "checkpoints") if newest else None
            if best is not None and best[0] != step:
                print(f"the held-out pairs find step {best[0]} better: --step=best exports it")
            if repository:
                print(push_to_hub(out, repository, public=settings.public))


def _choose_format(texts: Sequence[str]) -> str | None:
    """Returns what an export's --lora asks for, as the import's may be repeated and names files."""
    if len(texts) > 1:
        raise UserError(f"--lora={texts[1]}: an export writes adapters once; give one --lora")
    for text in texts:
        if text not in _FORMATS:
            raise UserError(spelling.unknown("--lora", text, _FORMATS))
    return next(iter(texts), None)


def run() -> None:
    """Defines the flags and runs the command."""
    flags.DEFINE_string("model", None, "import: a diffusers folder, a hub id, or a .safetensors checkpoint.")
    flags.DEFINE_string("run", None, "export: workdir of the training run.")
    flags.DEFINE_string("out", None, "What to write; must not exist.")
    flags.DEFINE_string(
        "base",
        None,
        "import of a single file: a diffusers folder or hub id of the same architecture. "
        "export: the model that the run started from; default: where the run found it.",
    )
    flags.DEFINE_string(
        "step", None, "export: which checkpoint, or best, by the held-out pairs; default: the newest."
    )
    flags.DEFINE_enum(
        "dtype",
        None,
        ("float32", "bfloat16", "float16"),
        "export: of the trained components; default: as in the base model.",
    )
    flags.DEFINE_enum(
        "prediction_type",
        None,
        ("epsilon", "v_prediction"),
        "import of a single file that does not say it itself; default: as the base.",
    )
    flags.DEFINE_bool(
        "rescale_betas_zero_snr",
        None,
        "import of a single file: whether it was trained with zero terminal SNR, where it does not say it "
        "itself; default: as the base.",
    )
    flags.DEFINE_multi_string(
        "lora",
        [],
        "import: a LoRA file to add to the weights, FILE or FILE:WEIGHT; may be repeated. "
        "export of a run with LoRA, diffusers or kohya: only the adapters, as these name them; default: the "
        "whole model with the adapters added.",
    )
    flags.DEFINE_string(
        "push_to_hub",
        None,
        "export: upload the result to this repository of the model hub, owner/name, which is made private "
        "if it is not there. The token is that of HF_TOKEN, or of hf auth login.",
    )
    flags.DEFINE_boolean("public", False, "export: the repository of --push_to_hub is public.")
    cli.run(main, required=("out",), commands=tuple(_COMMANDS))


if __name__ == "__main__":
    run()
