"""Reads what the instructions of a GPU's program move and compute: bytes and FLOPs of each, by kind.

The text is XLA's HLO after optimisation, the program of one device.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dspo_jax.planning.program_text import COLLECTIVES, Instruction, array_bytes, read_computations, trips

PRODUCTS, CONVOLUTIONS, ATTENTION = "products", "convolutions", "attention"
ELEMENTWISE, COPIES, OPTIMIZER = "norms and elementwise", "copies and transposes", "optimizer"
COMMUNICATION = "collectives"
KINDS = (PRODUCTS, CONVOLUTIONS, ATTENTION, ELEMENTWISE, COPIES, OPTIMIZER, COMMUNICATION)


@dataclasses.dataclass(frozen=True)
class Work:
    """Bytes and FLOPs of one instruction.

    Attributes:
      kind: one of `KINDS`.
      what: its operation: a fusion as XLA named it, a library's call by its target.
      bytes: read and written; of a collective sent.
      flops: of products, convolutions and attention.
      dtype: "bfloat16", "tf32" or "float32": the arithmetic of its FLOPs.
      head: width of an attention's heads.
      backward: whether it is an attention's backward pass.
      group: numbers of the devices that take part in a collective together.
      times: how often a run of the program comes by it.
      source: file and line of the code it comes from, "" where the text does not say.
    """

    kind: str
    what: str
    bytes: int
    flops: int = 0
    dtype: str = "bfloat16"
    head: int = 0
    backward: bool = False
    group: tuple[int, ...] = ()
    times: int = 1
    source: str = ""


_ARRAY = re.compile(r"\b([a-z]+[0-9][0-9a-z]*|pred)\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.-]+)")
_WORKSPACE = re.compile(r"\b[su]8\[\d*\]")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CALLS = re.compile(r"\b(?:calls|called_computations)=\{?%?([\w.-]+)")
_INSIDE = re.compile(
    r"\b(?:body|to_apply|branch_computations|true_computation|false_computation|calls|called_computations)"
    r"=\{?%?([\w.-]+(?:, %[\w.-]+)*)"
)
_CONTRACTED = re.compile(r'"?lhs_contracting_dim(?:ension)?s"?[=:][\[{]([^\]}]*)[\]}]')
_LABELS = re.compile(r"\bdim_labels=(\w+)_(\w+)->(\w+)")
_GROUP_COUNT = re.compile(r"\bfeature_group_count=(\d+)")
_SCORES = re.compile(r'"intermediate_tensor_shape": ?\{"element_type": ?"\w+", ?"dimensions": ?\[([^\]]*)\]')
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_SOURCE = re.compile(r'\bsource_file="([^"]*)" source_line=(\d+)')
_NUMBERS = re.compile(r"\b(\w+)=(\d+)")
_FRAME = re.compile(r"\bstack_frame_id=(\d+)")
# A collective's devices. "{{0,1},{2,3}}": two groups; the first is read. "[4,2]<=[2,4]T(1,0)": four
# groups of two, 0 to 7 as a transposed array. "mesh['a'=2,'b'=4] {'a'}": those along an axis.
_GROUPS = re.compile(r"\breplica_groups=\{\{([\d,]*)\}")
_SHORT_GROUPS = re.compile(r"\breplica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH_GROUPS = re.compile(r"\breplica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_AXIS = re.compile(r"'(\w+)'=(\d+)")

# Instructions that give a name to what there is; those whose inside is counted in their place; those that
# neither move nor compute; and those that a fusion which only moves is made of.
_NAMES = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")
_ENTERED = ("while", "conditional", "call", "async-start")
_WAITS = ("after-all", "opt-barrier", "copy-done", "async-update", "async-done")
_FREE = {*_NAMES, *_ENTERED, *_WAITS, "partition-id", "replica-id", *(f"{name}-done" for name in COLLECTIVES)}
_COPIES = ("copy", "copy-start", "transpose", "convert", "reshape", "reverse", "bitcast-convert")
_PARTS = ("slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "pad", "broadcast", "iota")
_MOVING = {*_NAMES, *_COPIES, *_PARTS}
_PARTLY_READ = ("slice", "dynamic-slice", "gather")


def read_works(text: str, open_trips: int = 1) -> list[Work]:
    """Lists what a compiled program's instructions do, those that are alike together.

    The body of a loop counts as often as it runs, and so does each branch of a condition. What a fusion keeps
    to itself is no traffic, and of an operand that it only takes slices from the slices count.

    Args:
      text: of the compiled program.
      open_trips: how often a loop runs whose length the text does not tell.
    """
    computations, entry = read_computations(text)
    types = {each.name: each.type for inside in computations.values() for each in inside}
    sources = _read_sources(text)
    has_gradient = "jvp(" in text
    found: dict[Work, int] = {}
    for instruction in _top_level(computations, entry, 1, open_trips):
        if instruction.op in _FREE:
            continue
        work = _work(instruction, types, computations, has_gradient)
        work = dataclasses.replace(work, source=_source(instruction, computations, sources))
        found[work] = found.get(work, 0) + instruction.times
    return [dataclasses.replace(work, times=times) for work, times in found.items()]


def _top_level(
    computations: Mapping[str, Sequence[Instruction]], name: str, times: int, open_trips: int
) -> Iterator[Instruction]:
    """Gives the instructions that run one after another, those of loops with how often."""
    for instruction in computations.get(name, ()):
        yield dataclasses.replace(instruction, times=times)
        if instruction.op in _ENTERED:
            loop = instruction.op == "while"
            inside = times * (trips(computations, instruction, open_trips) if loop else 1)
            for names in _INSIDE.findall(instruction.rest):
                for called in names.replace("%", "").split(", "):
                    yield from _top_level(computations, called, inside, open_trips)


def _work(
    instruction: Instruction,
    types: Mapping[str, str],
    computations: Mapping[str, Sequence[Instruction]],
    has_gradient: bool,
) -> Work:
    """Returns what one instruction does."""
    op, rest = instruction.op, instruction.rest
    operands = list(dict.fromkeys(_operands(rest)))
    kind_of_collective = op.removesuffix("-start")
    if kind_of_collective in COLLECTIVES:
        return _collective(kind_of_collective, instruction, [types.get(name, "") for name in operands])
    result = array_bytes(_WORKSPACE.sub("", instruction.type) if op == "custom-call" else instruction.type)
    read = sum(array_bytes(types.get(name, "")) for name in operands)
    if target := _TARGET.search(rest):
        return _library_call(target[1], instruction, types, read + result)
    if op in ("dot", "convolution"):
        flops, dtype = _flops(instruction, types)
        return Work(PRODUCTS if op == "dot" else CONVOLUTIONS, op, read + result, flops, dtype)
    name = op
    inside: Sequence[Instruction] = ()
    if op == "fusion" and (called := _CALLS.search(rest)):
        name, inside = re.sub(r"[.\d]+$", "", instruction.name), computations.get(called[1], ())
        read, result = _traffic_of_fusion(instruction, inside, types)
        products = [_flops(each, types) for each in inside if each.op in ("dot", "convolution")]
        if products:
            is_product = any(each.op == "dot" for each in inside)
            flops, dtype = sum(flops for flops, _ in products), products[0][1]
            return Work(PRODUCTS if is_product else CONVOLUTIONS, name, read + result, flops, dtype)
    elif op in ("dynamic-slice", "slice", "gather"):
        read = result
    elif op == "dynamic-update-slice":
        read = result = array_bytes(types.get(_operands(rest)[1], ""))
    if {each.op for each in inside or (instruction,)} <= _MOVING:
        return Work(COPIES, name, read + result)
    # A fusion that does not say what it is of holds instructions that do.
    named = _OP_NAME.findall(rest) or [found for each in inside for found in _OP_NAME.findall(each.rest)]
    within = sum("jvp(" in found for found in named)
    outside = has_gradient and bool(named) and 2 * within < len(named)
    return Work(OPTIMIZER if outside else ELEMENTWISE, name, read + result)


def _operands(rest: str) -> list[str]:
    return _OPERAND.findall(rest.split(")")[0])


def _traffic_of_fusion(
    fusion: Instruction, inside: Sequence[Instruction], types: Mapping[str, str]
) -> tuple[int, int]:
    """Returns the bytes that a fusion reads and writes."""
    users: dict[str, list[Instruction]] = {}
    for each in inside:
        for name in _operands(each.rest) if each.op != "parameter" else ():
            users.setdefault(name, []).append(each)
    inputs = {int(each.rest.split(")")[0]): each for each in inside if each.op == "parameter"}
    read = 0
    for index, name in enumerate(_operands(fusion.rest)):
        size = array_bytes(types.get(name, ""))
        within = users.get(inputs[index].name, []) if index in inputs else []
        if within and all(each.op in _PARTLY_READ for each in within):
            size = min(size, sum(array_bytes(each.type) for each in within))
        elif within and all(
            each.op == "dynamic-update-slice" and _operands(each.rest)[0] == inputs[index].name
            for each in within
        ):
            size = 0  # updated in place
        read += size
    # Of an array that is updated in place only the update is written.
    written = array_bytes(fusion.type)
    for each in inside:
        if each.op == "dynamic-update-slice" and _operands(each.rest)[0] in {
            each.name for each in inputs.values()
        }:
            written -= array_bytes(each.type) - array_bytes(types.get(_operands(each.rest)[1], ""))
    return read, max(written, 0)


def _flops(instruction: Instruction, types: Mapping[str, str]) -> tuple[int, str]:
    """Returns FLOPs and arithmetic of a product or convolution; a multiplication and an addition are two."""
    operands = [_arrays(types.get(name, ""))[:1] for name in _operands(instruction.rest)[:2]]
    if not all(operands) or not (results := _arrays(instruction.type)):
        return 0, "bfloat16"
    (left_dtype, left), (_, right) = (operand[0] for operand in operands)
    result = results[0][1]
    dtype = "bfloat16" if left_dtype in ("bf16", "f16") else "tf32"
    if '"HIGHEST"' in instruction.rest or "operand_precision={highest" in instruction.rest:
        dtype = "float32"
    if contracted := _CONTRACTED.search(instruction.rest):
        dimensions = [int(number) for number in re.findall(r"\d+", contracted[1])]
        return 2 * math.prod(result) * math.prod(left[number] for number in dimensions), dtype
    labels = _LABELS.search(instruction.rest)
    if labels is None:
        return 0, dtype
    # A library's backward calls keep the labels of the forward convolution. Each number of its output, or of
    # the output's gradient, meets the kernel of one output feature.
    features = labels[2].index("o")
    if "convBackwardFilter" in instruction.rest:
        output, kernel = right, result
    elif "convBackwardInput" in instruction.rest:
        output, kernel = left, right
    else:
        output, kernel = result, right
    return 2 * math.prod(output) * math.prod(kernel) // kernel[features], dtype


def _library_call(target: str, instruction: Instruction, types: Mapping[str, str], moved: int) -> Work:
    """Returns the work of a call of cuBLAS, cuDNN or another library."""
    if target.startswith("__cublas"):
        flops, dtype = _flops(instruction, types)
        return Work(PRODUCTS, target, moved, flops, dtype)
    if target.startswith("__cudnn$conv"):
        flops, dtype = _flops(instruction, types)
        return Work(CONVOLUTIONS, target, moved, flops, dtype)
    if target.startswith("__cudnn$fmha") and (scores := _SCORES.search(instruction.rest)):
        size = math.prod(int(number) for number in re.findall(r"\d+", scores[1]))
        batch, heads, positions, _ = (int(number) for number in re.findall(r"\d+", scores[1]))
        head = math.prod(_arrays(instruction.type)[0][1]) // (batch * heads * positions)
        backward = "Backward" in target
        # Two products forward; backward the scores again, and two for each of the two.
        return Work(
            ATTENTION, target, moved, (10 if backward else 4) * size * head, head=head, backward=backward
        )
    return Work(ELEMENTWISE, target, moved)


def _collective(kind: str, instruction: Instruction, operands: Sequence[str]) -> Work:
    """Returns what each device sends, in a ring: of an all-reduce the array twice, of the others once."""
    group = _first_group(instruction.rest)
    devices = len(group)
    size = sum(array_bytes(type_) for type_ in operands)
    # An all-gather's operand is one part of what all receive; the others' is the whole.
    parts = {"all-reduce": 2 * (devices - 1) / devices, "all-gather": devices - 1, "collective-permute": 1}
    sent = int(size * parts.get(kind, (devices - 1) / devices))
    return Work(COMMUNICATION, kind, sent, group=group)


def _first_group(rest: str) -> tuple[int, ...]:
    """Returns the numbers of the devices of a collective; 0 and 1 where it does not say."""
    if (listed := _GROUPS.search(rest)) and listed[1]:
        return tuple(int(number) for number in listed[1].split(","))
    if short := _SHORT_GROUPS.search(rest):
        shape, dimensions = ([int(size) for size in part.split(",")] for part in short.groups()[:2])
        numbers = np.arange(math.prod(dimensions)).reshape(dimensions)
        if short[3]:
            numbers = numbers.transpose([int(axis) for axis in short[3].split(",")])
        return tuple(numbers.reshape(-1, shape[-1])[0].tolist())
    if mesh := _MESH_GROUPS.search(rest):
        sizes = {name: int(size) for name, size in _AXIS.findall(mesh[1])}
        numbers = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        along = tuple(slice(None) if f"'{name}'" in mesh[2] else 0 for name in sizes)
        return tuple(numbers[along].reshape(-1).tolist())
    return 0, 1


def _arrays(type_: str) -> list[tuple[str, list[int]]]:
    """Returns dtype and shape of the arrays of a type."""
    return [
        (dtype, [int(size) for size in shape.split(",") if size]) for dtype, shape in _ARRAY.findall(type_)
    ]


def _read_sources(text: str) -> dict[int, str]:
    """Returns by stack frame the innermost line of this package, from the tables at the head of the text."""
    tables: dict[str, dict[int, str]] = {}
    current = None
    for line in text.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            current = tables.setdefault(line, {})
        elif not line.strip():
            current = None
        elif line.startswith(("%", "ENTRY")):
            break
        elif current is not None and (entry := re.match(r"(\d+) (.*)", line)):
            current[int(entry[1])] = entry[2]
    files = {number: name.strip('"') for number, name in tables.get("FileNames", {}).items()}
    lines = {}
    for number, row in tables.get("FileLocations", {}).items():
        numbers = dict(_NUMBERS.findall(row))
        lines[number] = files.get(int(numbers.get("file_name_id", 0)), ""), numbers.get("line", "")
    frames = {}
    for number, row in tables.get("StackFrames", {}).items():
        numbers = dict(_NUMBERS.findall(row))
        frames[number] = int(numbers.get("file_location_id", 0)), int(numbers.get("parent_frame_id", 0))
    # Some versions of XLA count the parents from 1, with 1 for none.
    shift = 1 if frames.get(1, (0, 0))[1] == 1 else 0
    found: dict[int, str] = {}
    for number in frames:
        frame = number
        while frame in frames:
            name, line = lines.get(frames[frame][0], ("", ""))
            _, package, path = name.rpartition("/dspo_jax/")
            if package and not path.startswith("kernels/device_kind"):
                found.setdefault(number, f"{path}:{line}")
                # What calls the kernels says more than they do.
                if not path.startswith("kernels/"):
                    found[number] = f"{path}:{line}"
                    break
            frame = frames[frame][1] - shift
    return found


def _source(
    instruction: Instruction, computations: Mapping[str, Sequence[Instruction]], sources: Mapping[int, str]
) -> str:
    """Returns file and line of an instruction, or of most of what it holds, by stack frame or as written."""
    found: collections.Counter[str] = collections.Counter()
    called = _CALLS.search(instruction.rest) if instruction.op == "fusion" else None
    for number, each in enumerate((instruction, *computations.get(called[1] if called else "", ()))):
        if frame := _FRAME.search(each.rest):
            found[sources.get(int(frame[1]), "")] += 1
        elif written := _SOURCE.search(each.rest):
            found[f"{written[1].rpartition('/dspo_jax/')[2]}:{written[2]}"] += 1
        if number == 0 and any(found):
            break
    found.pop("", None)
    return max(found, key=lambda name: found[name], default="")
