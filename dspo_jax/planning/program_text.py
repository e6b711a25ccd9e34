"""Reads the text of a compiled program: loops, collectives, kernels that are not XLA's own.

XLA's cost analysis counts the body of a loop once, however often it runs, and of a custom kernel what its
author declared. What is read here puts both right. The text is XLA's HLO after optimisation
(`jax.stages.Compiled.as_text()`), the program of one device.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


# "%name = type op(operands), attributes"; the type of a tuple stands in parentheses, with blanks.
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[a-z][\w-]*)\((?P<rest>.*)$"
)


_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) .*\{$")


_END = re.compile(r"^\}(, execution_thread=.*)?\s*$")


_ARRAY = re.compile(r"\b([a-z]+[0-9][0-9a-z]*|pred)\[([\d,]*)\]")


_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|branch_computations|true_computation|false_computation|called_computations)"
    r"=\{?%?([\w.-]+(?:, %[\w.-]+)*)"
)


_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")


_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


_CHANNEL = re.compile(r"\bchannel_id=(\d+)")


_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), ([^|:]*)", re.MULTILINE)


_OPERANDS = re.compile(r"operand_layout_constraints=\{((?:[^{}]|\{[^{}]*\})*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of the text.

    Attributes:
      name: unique in the program.
      op: e.g. "fusion".
      type: of its result, as written.
      rest: operands and attributes, as written.
      times: how often a run of the program comes by it.
      asynchronous: whether it runs beside others, inside an `async-start`, or a fusion of a collective and
        what is computed meanwhile.
    """

    name: str
    op: str
    type: str
    rest: str
    times: int
    asynchronous: bool = False


def read_instructions(text: str, open_trips: int = 1) -> Iterator[Instruction]:
    """Every instruction of the entry computation and of what it calls, with how often it runs.

    The inside of a fusion is given too.

    Args:
      text: of the compiled program.
      open_trips: how often a loop runs whose length the text does not tell.
    """
    computations, entry = read_computations(text)
    yield from _walk(computations, entry, 1, open_trips, asynchronous=False)


def entry_instructions(text: str) -> Sequence[Instruction]:
    """Returns the instructions of the entry computation alone, in the order in which they run."""
    computations, entry = read_computations(text)
    return computations[entry]


def read_computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the instructions of every computation by its name, and the name of the entry computation."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            found = _COMPUTATION.match(line)
            if found and not line.startswith("HloModule"):
                current = computations.setdefault(found["name"], [])
                entry = found["name"] if found["entry"] else entry
        elif _END.match(line):
            current = None
        elif found := _INSTRUCTION.match(line):
            current.append(Instruction(found["name"], found["op"], found["type"], found["rest"], 1))
    return computations, entry


def _walk(
    computations: Mapping[str, Sequence[Instruction]],
    name: str,
    times: int,
    open_trips: int,
    *,
    asynchronous: bool,
) -> Iterator[Instruction]:
    for instruction in computations.get(name, ()):
        yield dataclasses.replace(instruction, times=times, asynchronous=asynchronous)
        inside, beside = times, asynchronous or instruction.op in ("async-start", "fusion")
        if instruction.op == "while":
            inside *= trips(computations, instruction, open_trips)
        for names in _CALLED.findall(instruction.rest):
            for called in names.replace("%", "").split(", "):
                yield from _walk(computations, called, inside, open_trips, asynchronous=beside)


def trips(computations: Mapping[str, Sequence[Instruction]], loop: Instruction, open_trips: int = 1) -> int:
    """Counts how often the body of a loop runs: as noted there, by its condition, or else `open_trips`."""
    if noted := _TRIPS.search(loop.rest):
        return int(noted[1])
    if condition := _CONDITION.search(loop.rest):
        bounds = [
            int(instruction.rest.split(")")[0])
            for instruction in computations.get(condition[1], ())
            if instruction.op == "constant" and re.match(r"\d+\)", instruction.rest)
        ]
        if len(bounds) == 1:
            return bounds[0]
    return open_trips


def array_bytes(type_: str) -> int:
    """Returns bytes of a type as the text writes it: one array or a tuple of them."""
    total = 0
    for dtype, shape in _ARRAY.findall(type_):
        bits = 8 if dtype == "pred" else int(re.match(r"[a-z]+(\d+)", dtype)[1])  # type: ignore[index]
        total += math.prod(int(size) for size in shape.split(",") if size) * max(bits, 8) // 8
    return total


def assigned_bytes(text: str) -> tuple[int, int]:
    """Counts a device's bytes of main memory, by XLA's text of the buffers: (of arguments, of all)."""
    arguments = everything = 0
    for size, kind in _ALLOCATION.findall(text):
        if "color " not in kind:  # another memory of the device
            everything += int(size)
            arguments += int(size) if "parameter " in kind else 0
    return arguments, everything


def collectives(instructions: Iterable[Instruction]) -> dict[str, dict[str, int]]:
    """Counts what a device sends and receives: {kind: {"count", "bytes", "asynchronous"}}.

    Bytes are of the results, and "asynchronous" is how many of them come while something else is computed.
    The TPU's compiler spreads one over several fusions: by its channel it is known, and counts once.
    """
    found: dict[str, dict[str, int]] = {}
    seen = set()
    for instruction in instructions:
        kind = instruction.op.removesuffix("-start")
        channel = _CHANNEL.search(instruction.rest)
        if kind in COLLECTIVES and not (channel and (kind, channel[1]) in seen):
            seen.add((kind, channel and channel[1]))
            type_ = instruction.type
            if instruction.op != kind and kind != "all-reduce":
                type_ = _elements(type_)[1]  # a start returns its operands, then its results
            entry = found.setdefault(kind, {"count": 0, "bytes": 0, "asynchronous": 0})
            size = instruction.times * array_bytes(type_)
            entry["count"] += instruction.times
            entry["bytes"] += size
            started = instruction.op != kind and '"is_sync":true' not in instruction.rest
            entry["asynchronous"] += size if started or instruction.asynchronous else 0
    return found


def _elements(type_: str) -> list[str]:
    """Returns the types in a tuple, which may be tuples themselves."""
    found, depth = [""], 0
    for letter in type_[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            found.append("")
        else:
            found[-1] += letter
    return found


def loop_factor(instructions: Iterable[Instruction]) -> float:
    """Divides the program's estimated cycles by those with each loop once; 1 without an estimate."""
    once = often = 0
    for instruction in instructions:
        once += estimated_cycles(instruction)
        often += estimated_cycles(instruction) * instruction.times
    return often / once if once else 1.0


def estimated_cycles(instruction: Instruction) -> int:
    """Returns the cycles that the TPU's compiler expects of an instruction; 0 where it notes none."""
    noted = _CYCLES.search(instruction.rest)
    return int(noted[1]) if noted else 0


def kernels(instructions: Iterable[Instruction]) -> list[tuple[str, list[tuple[int, ...]], int, int]]:
    """Lists TPU kernels that are not XLA's: (name, shapes of the operands, bytes in and out, how often)."""
    found = []
    for instruction in instructions:
        if 'custom_call_target="tpu_custom_call"' in instruction.rest:
            operands = _OPERANDS.search(instruction.rest)
            types = operands[1] if operands else ""
            shapes = [
                tuple(int(size) for size in shape.split(",") if size) for _, shape in _ARRAY.findall(types)
            ]
            size = array_bytes(types) + array_bytes(instruction.type)
            found.append((instruction.name, shapes, size, instruction.times))
    return found
