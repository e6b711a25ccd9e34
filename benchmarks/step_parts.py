"""Savings of each part of the training step: arithmetic, time and memory of the step without it.

    python -m benchmarks.step_parts --config configs/emoji_diffusion_dpo.py

One part at a time is undone, and the steps are timed in turn in one process. The arithmetic is counted in the
program before XLA optimises it: what should be saved if nothing else limited the step.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks import measuring, train_step
from dspo_jax import cli
from dspo_jax.models.model import Params
from dspo_jax.models.remat import POLICIES
from dspo_jax.monitoring.devices import count_flops, peak_bytes
from dspo_jax.pipelines.conditioning import Conditioning
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.training.step import TrainState, compile_step
from dspo_jax.training.step import train_step as one_step
from dspo_jax.training.task import Batch

AS_IT_IS = "as it is"

_predict_pairs, _encode_conditioning, _jit = Pipeline.predict_pairs, Pipeline.encode_conditioning, jax.jit


def _a_call_for_each_image(
    pipe: Pipeline,
    params: Params,
    noisy: jax.Array,
    timesteps: jax.Array,
    batch: Batch,
    **remat: Any,
) -> jax.Array:
    calls = []
    for i in range(noisy.shape[1]):
        image = slice(i, i + 1)
        part = {**batch, **{name: batch[name][:, image] for name in pipe.image_inputs}}
        calls.append(_predict_pairs(pipe, params, noisy[:, image], timesteps[:, image], part, **remat))
    return jnp.concatenate(calls, axis=1)


def _text_for_each_image(
    pipe: Pipeline,
    params: Params,
    noisy: jax.Array,
    timesteps: jax.Array,
    batch: Batch,
    **remat: Any,
) -> jax.Array:
    def alone(array: jax.Array) -> jax.Array:
        return array.reshape(-1, 1, *array.shape[2:])

    repeated = {
        name: alone(array) if name in pipe.image_inputs else jnp.repeat(array, noisy.shape[1], axis=0)
        for name, array in batch.items()
        if name in pipe.conditioning_inputs
    }
    out = _predict_pairs(pipe, params, alone(noisy), alone(timesteps), repeated, **remat)
    return out.reshape(noisy.shape)


def _states_for_each_image(pipe: Pipeline, params: Params, batch: Batch, **remat: Any) -> Conditioning:
    states, pooled, sizes = _encode_conditioning(pipe, params, batch, **remat)
    states, pooled = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), (states, pooled))
    return Conditioning(states, pooled, sizes)


def _jit_without_donation(f: Any, donate_argnums: Any = (), **settings: Any) -> Any:
    del donate_argnums
    return _jit(f, **settings)


# Part -> what is replaced while the step is traced without it.
UNDOING: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "winner and loser in one call": (Pipeline, "predict_pairs", _a_call_for_each_image),
    "text encoded once for a pair": (Pipeline, "predict_pairs", _text_for_each_image),
    "text's keys and values once for a pair": (Pipeline, "encode_conditioning", _states_for_each_image),
    "state donated": (jax, "jit", _jit_without_donation),
}


def trace(
    part: str, state: TrainState, reference: Params, batch: Batch, key: jax.Array
) -> tuple[Any, float | None]:
    """Returns the compiled step of a state without a part, and the FLOPs of its program."""
    undoing = mock.patch.object(*UNDOING[part]) if part in UNDOING else contextlib.nullcontext()
    with undoing:
        step = compile_step(state).lower(state, reference, batch, key).compile()
        # A function of its own, or JAX would not trace it again.
        return step, count_flops(lambda *inputs: one_step(*inputs), state, reference, batch, key)


def main(argv: Sequence[str]) -> None:
    """Measures, prints the table and writes the results."""
    del argv
    values = flags.FLAGS
    what, mesh, state, reference, batch, key = train_step.prepare(values.config)
    tasks = {part: state.task for part in (AS_IT_IS, *UNDOING)}
    precision = state.task.precision
    tasks |= {
        f"remat {precision.remat}, not {policy}": dataclasses.replace(
            state.task, precision=dataclasses.replace(precision, remat=policy)
        )
        for policy in POLICIES
        if policy != precision.remat
    }
    traced = {}
    seconds: dict[str, list[float]] = {part: [] for part in tasks}
    for part, task in tasks.items():
        traced[part] = trace(part, dataclasses.replace(state, task=task), reference, batch, key)
        print(f"compiled: {part}", flush=True)
    for turn in range(values.steps + 1):
        for part, (step, _) in traced.items():
            started = time.perf_counter()
            state, _ = step(dataclasses.replace(state, task=tasks[part]), reference, batch, key)
            jax.block_until_ready(state)
            if turn:
                seconds[part].append(time.perf_counter() - started)
    table = Table("part", "arithmetic", "time", "memory, GiB", title=f"the step without it, {what}")
    results, plain = [], statistics.median(seconds[AS_IT_IS])
    for part, (step, flops) in traced.items():
        memory, count = step.memory_analysis(), traced[AS_IT_IS][1]
        result = measuring.make_result(
            f"{what}; without: {part}",
            "dspo_jax",
            pairs=values.config.batch_size,
            seconds=seconds[part],
            device=f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
            arithmetic=flops / count if flops and count else None,
            ratio=statistics.median(seconds[part]) / plain,
            memory_gib=memory and peak_bytes(memory) / 2**30,
        )
        shown = (result[name] for name in ("arithmetic", "ratio", "memory_gib"))
        table.add_row(part, *("" if each is None else f"{each:.3f}" for each in shown))
        results.append(result)
    Console().print(table)
    measuring.write(results, values.json)


if __name__ == "__main__":
    measuring.define_flags()
    cli.run(main)
