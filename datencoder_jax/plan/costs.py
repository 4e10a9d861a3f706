"""What a compiled program computes, moves in memory, and sends to other chips, per chip and run.

For CPUs and TPUs XLA counts each instruction once (`cost_analysis`), and the body of a loop too. With `n_i` how often
instruction `i` runs and `w_i` its weight,

    total = counted by XLA * sum_i n_i w_i / sum_i w_i                                               (1)

where `w` is the operations of matrix products and convolutions for FLOPs, and what is read and written for bytes.
For GPUs XLA counts nothing: bytes are `sum_i n_i w_i`, and operations those of the traced program (`plan.work`).
A collective among `g` chips whose operand has `b` bytes sends from each chip, on a ring,

    all-gather b (g - 1),   reduce-scatter and all-to-all b (g - 1) / g,   all-reduce 2 b (g - 1) / g,   permute b   (2)
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from datencoder_jax.plan import hlo
from datencoder_jax.plan.hlo import Computation, Executed, Instruction
from datencoder_jax.plan.work import meeting_pairs

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")


@dataclass
class Traffic:
    """Collectives of one kind.

    Attributes:
        count: how many run.
        bytes: that each chip sends in them; equation (2).
        known: whether all loops they are in have a known number of turns.
    """

    count: int = 0
    bytes: float = 0.0
    known: bool = True


@dataclass
class Costs:
    """What one run of a program costs one chip.

    Attributes:
        flops, bytes: operations, and bytes read and written; equation (1).
        kernels: how many fusions, library calls and copies run.
        traffic: collectives by kind.
        known: whether every loop with a product or a collective in it has a known number of turns; each unknown one
            counts as one turn.
    """

    flops: float
    bytes: float
    traffic: dict[str, Traffic] = field(default_factory=dict)
    known: bool = True
    kernels: int = 0

    @property
    def sent(self) -> float:
        """Bytes that each chip sends to others."""
        return sum(traffic.bytes for traffic in self.traffic.values())


def costs(compiled: Any, devices: int) -> Costs:
    """Costs of a compiled program for so many devices."""
    counted = compiled.cost_analysis() or {}
    return count(compiled.as_text(), devices, counted.get("flops"), counted.get("bytes accessed"))


def count(text: str, devices: int, flops: float | None, bytes: float | None) -> Costs:
    """Of a program by its text, and by what XLA counts; None where it does not."""
    found = Costs(flops or 0.0, bytes or 0.0)
    products, moved = _Share(), _Share()
    seen = set()
    for step in hlo.executed(text):
        product = operations(step.instruction, step.computation)
        products.add(product, step.times)
        moved.add(_moved(step), step.times)
        if not step.fused and step.instruction.opcode in _KERNELS:
            found.kernels += step.times
        kind = _kind(step)
        if kind and not _seen(step.instruction, kind, seen):
            traffic = found.traffic.setdefault(kind, Traffic())
            traffic.count += step.times
            traffic.bytes += step.times * sent(kind, step.instruction, step.computation, devices)
            traffic.known &= step.known
        if (kind or product) and not step.known:
            found.known = False
    found.flops = products.all if flops is None else flops * products.ratio
    found.bytes = moved.all if bytes is None else bytes * moved.ratio
    return found


@dataclass
class _Share:
    """The two sums of equation (1)."""

    once: float = 0.0
    all: float = 0.0

    def add(self, weight: float, times: int) -> None:
        self.once += weight
        self.all += weight * times

    @property
    def ratio(self) -> float:
        return self.all / self.once if self.once else 1.0


def _kind(step: Executed) -> str | None:
    """Collective kind of an instruction; None for the second half of an asynchronous pair, and for all others."""
    kind = step.instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    # A TPU writes a reduce-scatter as a fusion of an all-reduce and the slice of it that stays.
    return "reduce-scatter" if kind == "all-reduce" and "all-reduce-scatter" in step.computation.name else kind


def _seen(instruction: Instruction, kind: str, seen: set) -> bool:
    """Whether it is a further part of a collective that a TPU spreads over several fusions."""
    if "chain_id=" not in instruction.attributes:
        return False
    chain = re.findall(r'(?:chain_id|channel_id)="?(\d+)', instruction.attributes)
    key = (kind, *chain)
    if key in seen:
        return True
    seen.add(key)
    return False


def sent(kind: str, instruction: Instruction, computation: Computation, devices: int) -> float:
    """Bytes that each chip sends in a collective; equation (2)."""
    operand = sum(hlo.size(_shape(computation, name)) for name in instruction.operands)
    group = group_size(instruction.attributes, devices)
    return (
        operand
        * {
            "all-gather": group - 1,
            "reduce-scatter": (group - 1) / group,
            "all-to-all": (group - 1) / group,
            "all-reduce": 2 * (group - 1) / group,
            "collective-permute": 1,
        }[kind]
    )


def group_size(attributes: str, devices: int) -> int:
    """How many chips take part in one of a collective's groups.

    They are listed, `{{0,1},{2,3}}`; or counted, `[2,4]<=[8]`; or named as axes of a mesh,
    `mesh['a'=2,'b'=4] {'b'}` or `... {'a':(1)2}` for a part of an axis.
    """
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=(?:\w+ = )?mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sides = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part) if part else sides[name] for name, part in axes)
    return devices


def operations(instruction: Instruction, computation: Computation) -> float:
    """Of a matrix product or a convolution, a multiplication and an addition being two; 0 for anything else."""
    if instruction.opcode == "dot":
        left = _sides(computation, instruction.operands[0])
        return (
            2.0
            * _elements(instruction.shape)
            * math.prod(left[i] for i in _numbers("lhs_contracting_dims", instruction))
        )
    if instruction.opcode == "convolution":
        return _convolution(instruction, computation)
    return 0.0


def _convolution(instruction: Instruction, computation: Computation) -> float:
    """Operations of a convolution, without those on padding and on the zeros of a dilation."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        return 0.0
    left, right = (_sides(computation, name) for name in instruction.operands[:2])
    result = hlo.arrays(instruction.shape)[0][1]
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    options = dict(part.split("=") for part in window[1].split()) if window else {}
    taps = 1.0
    spatial = [label for label in labels[1] if label.isdigit()]
    for axis in spatial:
        i = int(axis)

        def option(name: str, default: str, i: int = i) -> str:
            return options[name].split("x")[i] if name in options else default

        before = int(option("pad", "0_0").split("_")[0])
        stride, spread, apart = (int(option(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        taps *= meeting_pairs(
            left[labels[1].index(axis)],
            right[labels[2].index(axis)],
            result[labels[3].index(axis)],
            before,
            stride,
            spread,
            apart,
        )
    inputs, outputs = (right[labels[2].index(axis)] for axis in "io")
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    batch = left[labels[1].index("b")] // (int(groups[1]) if groups else 1)
    return 2.0 * batch * inputs * outputs * taps


_KERNELS = frozenset(("fusion", "custom-call", "copy", "dot", "convolution", "sort", "scatter", "reduce-window"))
"""Instructions that a device launches as a kernel of their own."""

_NOTHING = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all")
)
"""Instructions that move nothing by themselves."""


def _moved(step: Executed) -> float:
    """Bytes that an instruction reads and writes; of what it takes a slice of, the slice."""
    instruction, computation = step.instruction, step.computation
    if step.fused or instruction.opcode in _NOTHING or instruction.opcode.endswith("-done"):
        return 0.0
    operands = [hlo.size(_shape(computation, name)) for name in instruction.operands]
    if step.inside is not None:
        return _result(step.inside, step.inside.root) + sum(
            min(whole, _read(step.inside, index)) for index, whole in enumerate(operands)
        )
    if instruction.opcode in _SLICES:
        return 2 * hlo.size(instruction.shape)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * operands[1]
    return hlo.size(instruction.shape) + sum(operands)


_SLICES = ("slice", "dynamic-slice", "gather")


def _read(fusion: Computation, index: int) -> float:
    """Bytes that a fusion reads of one of its operands; infinite for all there are."""
    name = next(
        (i.name for i in fusion.instructions.values() if i.opcode == "parameter" and i.operands == (str(index),)), ""
    )
    total = 0.0
    for user in fusion.instructions.values():
        if name in user.operands:
            if user.opcode in _SLICES and user.operands[0] == name:
                total += hlo.size(user.shape)
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                return math.inf
    return total


def _result(fusion: Computation, name: str) -> float:
    """Bytes that a fusion writes for one of its results; of a buffer that it updates in place, the update."""
    instruction = fusion.instructions[name]
    if instruction.opcode == "tuple":
        return sum(_result(fusion, operand) for operand in instruction.operands)
    if instruction.opcode == "dynamic-update-slice":
        return hlo.size(_shape(fusion, instruction.operands[1]))
    if instruction.opcode == "bitcast":
        return _result(fusion, instruction.operands[0])
    return hlo.size(instruction.shape)


def _shape(computation: Computation, name: str) -> str:
    found = computation.instructions.get(name)
    return found.shape if found else ""


def _sides(computation: Computation, name: str) -> tuple[int, ...]:
    return hlo.arrays(_shape(computation, name))[0][1]


def _elements(shape: str) -> int:
    return math.prod(hlo.arrays(shape)[0][1])


def _numbers(attribute: str, instruction: Instruction) -> list[int]:
    found = re.search(rf"{attribute}=\{{([\d,]*)\}}", instruction.attributes)
    return [int(number) for number in found[1].split(",") if number] if found else []
