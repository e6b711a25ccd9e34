"""Held-out pairs: does the model rank them as people did? Implicit accuracy, margins and errors by timestep.

    python -m dspo_jax.validate --model runs/mine --data data/pairs --split test --draws 16

The implicit reward of an image is the decrease of its denoising error against the reference, averaged over
draws of timestep and noise (Diffusion-DPO, S4.1, where it serves as a reward model in Table S2).
Every call uses the same noise and the same timesteps, so that curves over a run compare like with like.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dspo_jax import cli
from dspo_jax.files import write_json
from dspo_jax.parallel.process_flags import define_process_flags
from dspo_jax.sampling.drawing_flags import define_text_flags


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    import jax
    from rich.console import Console
    from rich.table import Table

    from dspo_jax.parallel import processes
    from dspo_jax.parallel.mesh import use_cpu_cores
    from dspo_jax.training.validation import judge
    from dspo_jax.training.validation_scalars import format_accuracy

    del argv
    use_cpu_cores()
    processes.initialize_from_flags()
    values = flags.FLAGS
    dtype = values.compute_dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    scores = judge(
        values.model,
        values.reference,
        values.data,
        split=values.split,
        draws=values.draws,
        batch_size=values.batch_size,
        compute_dtype=dtype,
        text={name: values[name].value for name in ("max_chunks", "clip_skip", "max_sequence_length")},
    )
    if not processes.is_first():
        return
    if values.out:
        write_json(Path(values.out), scores, shared=True)
    table = Table(title=f"{values.data}, {values.split}: {values.draws} draw(s) for each example, {dtype}")
    for heading in ("timestep", "implicit accuracy", "margin"):
        table.add_column(heading, justify="right")
    for name in scores:
        if name.startswith("implicit_accuracy_t"):
            timestep = name.removeprefix("implicit_accuracy_t")
            table.add_row(timestep, f"{scores[name]:.3f}", f"{scores[f'margin_t{timestep}']:+.3g}")
    table.add_row("averaged", format_accuracy(scores), f"{scores['margin']:+.3g}")
    Console().print(table)


def run() -> None:
    """Defines the flags and runs the command."""
    flags.DEFINE_string(
        "model", None, "A training workdir (WORKDIR@best: its best step) or a diffusers folder."
    )
    flags.DEFINE_string(
        "reference", None, "What it was compared with in training (default: what its workdir says)."
    )
    flags.DEFINE_string(
        "data",
        None,
        "Pairs or labelled images written by dspo_jax.encode, or several such folders, separated by commas.",
    )
    flags.DEFINE_string("split", "validation", "Which of its splits.")
    flags.DEFINE_integer(
        "draws", 8, "Draws of timestep and noise for each pair; the timesteps lie evenly.", lower_bound=1
    )
    flags.DEFINE_integer("batch_size", 32, "Pairs in one call of the networks.", lower_bound=1)
    flags.DEFINE_enum(
        "compute_dtype",
        None,
        ["float32", "bfloat16"],
        "Of the networks (default: bfloat16 on an accelerator).",
    )
    define_text_flags()
    flags.DEFINE_string("out", None, "A .json file for the numbers.")
    define_process_flags()
    cli.run(main, required=("model", "data"))


if __name__ == "__main__":
    run()
