"""Time of a training step with the reference's errors stored, beside one that runs the reference.

    python -m benchmarks.stored_reference --config configs/emoji_diffusion_dpo.py

Both on the same synthetic batch and in turn, so that other work on the machine slows both; and the time that
it takes to compute the errors of a batch once, which is what a draw of `config.reference.draws` costs.
"""

import statistics
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
from absl import flags

from benchmarks import measuring, train_step
from dspo_jax import cli
from dspo_jax.errors import UserError
from dspo_jax.kernels.device_kind import on_mesh
from dspo_jax.parallel.mesh import replicated, shard_batch
from dspo_jax.training.losses.preference import PreferenceLoss
from dspo_jax.training.step import compile_step
from dspo_jax.training.task import Batch


def main(argv: Sequence[str]) -> None:
    """Measures."""
    del argv
    values = flags.FLAGS
    what, mesh, state, reference, batch, key = train_step.prepare(values.config)
    task = state.task
    if not (isinstance(task.loss, PreferenceLoss) and task.loss.objective.compares_errors):
        raise UserError(
            f"config.objective.name = {values.config.objective.name!r}: reads more of the reference than its "
            "error; choose an objective of one margin of errors, such as diffusion_dpo"
        )
    compute = jax.jit(on_mesh(partial(task.loss.reference_error, task), mesh), out_shardings=replicated(mesh))
    errors = np.asarray(compute(reference, batch, key))
    stored = batch | shard_batch({"reference_error": errors}, mesh)
    step = compile_step(state)

    def update(batch: Batch) -> jax.Array:
        nonlocal state
        state, metrics = step(state, reference, batch, key)
        return metrics["loss"]

    ways = {
        "runs the reference": partial(update, batch),
        "has its errors stored": partial(update, stored),
        "errors of a draw": partial(compute, reference, batch, key),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(values.rounds):
        for name, run in ways.items():
            seconds[name] += measuring.time_steps(run, jax.block_until_ready, values.steps)
    running, without, draw = (statistics.median(each) for each in seconds.values())
    for name, each in seconds.items():
        print(f"{name:<24}{statistics.median(each):8.3f} s [{min(each):.3f}, {max(each):.3f}]")
    print(
        f"time of a step, stored / run: {without / running:.3f}; a draw costs {draw / running:.3f} of a step"
    )
    results = [
        measuring.make_result(what, name, pairs=values.config.batch_size, seconds=each)
        for name, each in seconds.items()
    ]
    measuring.write(results, values.json)


if __name__ == "__main__":
    measuring.define_flags()
    flags.DEFINE_integer("rounds", 3, "How often each is measured, in turn.", lower_bound=1)
    cli.run(main)
