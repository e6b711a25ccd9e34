"""Compiles a step and keeps the facts about it; or compiles only until its memory is laid out.

The TPU's compiler takes most of its time for machine code, from which it estimates the time of a step. Memory
and collectives are settled before that.
"""

import dataclasses
import hashlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from dspo_jax.files import write_json
from dspo_jax.json_files import JsonObject, read_object
from dspo_jax.monitoring.devices import peak_bytes
from dspo_jax.planning import absent_gpu, works
from dspo_jax.planning.program_text import (
    assigned_bytes,
    collectives,
    kernels,
    loop_factor,
    read_instructions,
)
from dspo_jax.training.step import COMPILER_OPTIONS

# Messages of the TPU's compiler for a program that is too large: in its first passes, and in its last.
_TOO_LARGE = re.compile(
    r"memory required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)"
    r"|Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm"
)
_SECONDS_BETWEEN_LOOKS, _LOOKS_AT_WHOLE = 0.5, 5
# Raised when other facts are noted of a program than those that were kept.
_FORMS = {"gpu": "works, form 5", "tpu": "facts, form 2"}
_OPTIONS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # flags of XLA's compilers


def kept_facts(
    lowered: jax.stages.Lowered, device: jax.Device, topology: str | None = None, open_trips: int = 1
) -> JsonObject:
    """Returns `compile_facts`, kept for the next time by the program's text and compiler.

    Args:
      lowered: the program.
      device: one of those that it is for.
      topology: how they are connected; None for those that are here.
      open_trips: see `compile_facts`.
    """
    versions = [
        f"{name} {metadata.version(name)}"
        for name in ("jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
        if any(metadata.distributions(name=name))
    ]
    # The flags that `memory_facts` adds change only the files that the compiler writes.
    options = [flag for name in _OPTIONS for flag in os.environ.get(name, "").split()]
    options = [flag for flag in options if not flag.startswith("--xla_dump_")]
    options += [f"{name}={value}" for name, value in COMPILER_OPTIONS.get(device.platform, {}).items()]
    text = "\n".join([topology or "", device.device_kind, *versions, *options, lowered.as_text()])
    text = f"{_FORMS.get(device.platform, '')}\n{text}"
    if open_trips != 1:
        text = f"open loops {open_trips}\n{text}"
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dspo_jax" / "plans"
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
    if path.is_file():
        return read_object(path, "delete it, and the program is compiled again")
    if device.platform == "gpu":
        facts = compile_for_gpu(lowered, topology is not None, open_trips)
    else:
        facts = compile_facts(lowered, open_trips)
    write_json(path, facts, shared=True)
    return facts


def compile_facts(lowered: jax.stages.Lowered, open_trips: int = 1) -> JsonObject:
    """Compiles a program and returns the raw facts: memory, FLOPs, collectives, the compiler's estimate.

    Of a program that is too large only peak_bytes, as far as its compiler had counted, and hbm_bytes, which
    is None of all others.

    Args:
      lowered: the program.
      open_trips: how often a loop of it runs whose length is known only when it does.
    """
    before = time.perf_counter()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        too_large = _TOO_LARGE.search(str(error))
        if too_large is None:
            raise
        used, used_unit, limit, limit_unit = (group for group in too_large.groups() if group)
        peak, hbm = (
            int(float(size) * 1024 ** ("KMGT".index(unit) + 1))
            for size, unit in ((used, used_unit), (limit, limit_unit))
        )
        return {"peak_bytes": peak, "hbm_bytes": hbm}
    seconds = time.perf_counter() - before
    memory: Any = program.memory_analysis()
    costs = program.cost_analysis() or {}
    text = program.as_text() or ""
    instructions = list(read_instructions(text, open_trips))
    return {
        "peak_bytes": peak_bytes(memory),
        "hbm_bytes": None,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "bytes_accessed": costs.get("bytes accessed"),
        "compiler_seconds": expected_seconds(costs, text),
        "loop_factor": loop_factor(instructions),
        "collectives": collectives(instructions),
        "kernel_calls": kernels(instructions),
        "compile_seconds": seconds,
    }


def compile_for_gpu(lowered: jax.stages.Lowered, absent: bool, open_trips: int = 1) -> JsonObject:
    """Compiles a program for NVIDIA GPUs and returns the raw facts: memory, and what instructions do.

    Args:
      lowered: the program.
      absent: whether its devices are of `absent_gpu.find_devices`.
      open_trips: see `compile_facts`.
    """
    before = time.perf_counter()
    program = absent_gpu.compile_lowered(lowered) if absent else lowered.compile()
    seconds = time.perf_counter() - before
    memory: Any = program.memory_analysis()
    text = program.as_text() or ""
    found = works.read_works(text, open_trips)
    return {
        "peak_bytes": peak_bytes(memory),
        "hbm_bytes": None,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "bytes_accessed": sum(work.times * work.bytes for work in found if work.kind != works.COMMUNICATION),
        "collectives": collectives(read_instructions(text, open_trips)),
        "works": [dataclasses.asdict(work) | {"group": list(work.group)} for work in found],
        "compile_seconds": seconds,
    }


def memory_facts(command: Sequence[str], module: str) -> JsonObject | int:
    """Returns the memory and the collectives of a program that a command compiles, which is then ended.

    XLA notes them in a folder while it compiles. The command is a process of its own because the compiler
    lets no other thread run, and cannot be stopped.

    Args:
      command: compiles the program as the first of its name.
      module: XLA's name of the program, e.g. "jit_train_step".

    Returns:
      peak_bytes (without the program's own code), hbm_bytes (None), argument_bytes, temporary_bytes,
      collectives. The exit status of a command that ended before: it knew the answer, or failed.
    """
    names = [f"*after_optimizations{end}.txt" for end in ("-buffer-assignment", "")]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        notes = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re={module}"
        flags = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {notes}"}
        running = subprocess.Popen(command, env=os.environ | flags)
        try:
            # Threads of their own write them, at the same time: they are whole when they grow no more.
            looks = [[0, 0]]
            while 0 in looks[-1] or looks[-_LOOKS_AT_WHOLE:] != [looks[-1]] * _LOOKS_AT_WHOLE:
                if (status := running.poll()) is not None:
                    return status
                time.sleep(_SECONDS_BETWEEN_LOOKS)
                looks.append([sum(path.stat().st_size for path in Path(folder).glob(name)) for name in names])
        finally:
            running.kill()
            running.wait()
        buffers, text = (next(Path(folder).glob(name)).read_text(encoding="utf-8") for name in names)
    arguments, peak = assigned_bytes(buffers)
    return {
        "peak_bytes": peak,
        "hbm_bytes": None,
        "argument_bytes": arguments,
        "temporary_bytes": peak - arguments,
        "collectives": collectives(read_instructions(text)),
    }


def expected_seconds(costs: Mapping[str, float], text: str) -> float | None:
    """Returns the compiler's estimate of a program, or None where there is none.

    Args:
      costs: cost analysis of the program.
      text: of the compiled program.
    """
    # Such a call, which does nothing, is counted as -1 s: unknown.
    seconds = costs.get("optimal_seconds", -1.0) + text.count('custom_call_target="ConcatBitcast"')
    return seconds if seconds > 0 else None
