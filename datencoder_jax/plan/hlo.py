"""A compiled program's text as instructions, each with how often it runs.

XLA's own cost analysis counts the body of a loop once. Here a body counts as often as its loop turns, where that is
known: XLA says so itself on some devices, and elsewhere the loop's condition compares a counter with a constant.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
        name: without the `%`.
        shape: of the result as it is written, layout and all.
        opcode: such as `fusion`.
        operands: names; a constant's value.
        attributes: what stands behind the operands.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute such as `body` names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found and found[1]


@dataclass
class Computation:
    """Instructions by name, in order; the last to be marked ROOT is the result."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""


@dataclass(frozen=True)
class Executed:
    """An instruction of a program with how often it runs.

    Attributes:
        instruction: what runs.
        computation: where it stands.
        times: how often, as far as known.
        known: whether every loop around it has a known number of turns; each unknown one counts as one turn.
        fused: whether it is a part of a fusion, whose inner results reach no memory.
        inside: of a fusion, its parts.
    """

    instruction: Instruction
    computation: Computation
    times: int
    known: bool
    fused: bool
    inside: Computation | None = None


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Computations by name, and the name of the one that the program starts in."""
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        if current is None:
            header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line)
            if header:
                current = computations[header[2]] = Computation(header[2])
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif " = " in line:
            instruction = _instruction(line)
            current.instructions[instruction.name] = instruction
            if line.lstrip().startswith("ROOT "):
                current.root = instruction.name
    return computations, entry


def _instruction(line: str) -> Instruction:
    head, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    end = _closing(rest, opening)
    listed = re.sub(r"/\*.*?\*/", "", rest[opening + 1 : end])
    operands = [part.split()[-1].lstrip("%") for part in _parts(listed) if part.strip()]
    return Instruction(head.lstrip("%"), shape, rest[:opening], tuple(operands), rest[end + 1 :])


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"an unbalanced line of HLO: {text[:80]}")


def _parts(text: str) -> list[str]:
    """What top-level commas separate."""
    parts, depth, start = [], 0, 0
    for match in re.compile(r"[(){}\[\],]").finditer(text):
        if match[0] in "({[":
            depth += 1
        elif match[0] in ")}]":
            depth -= 1
        elif depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]


def executed(text: str) -> Iterator[Executed]:
    """Every instruction that a program runs; of a branch, those of all its sides."""
    computations, entry = parse(text)
    yield from _executed(computations, computations[entry], 1, True, False)


def _executed(
    computations: dict[str, Computation], computation: Computation, times: int, known: bool, fused: bool
) -> Iterator[Executed]:
    for instruction in computation.instructions.values():
        inside = computations[instruction.called("calls") or ""] if instruction.opcode == "fusion" else None
        yield Executed(instruction, computation, times, known, fused, inside)
        if instruction.opcode == "while":
            turns = trip_count(computations, computation, instruction)
            body = computations[instruction.called("body") or ""]
            yield from _executed(
                computations, body, times * (1 if turns is None else turns), known and turns is not None, fused
            )
        for name in _callees(instruction):
            inner = fused or instruction.opcode == "fusion"
            yield from _executed(computations, computations[name], times, known, inner)


def _callees(instruction: Instruction) -> list[str]:
    """Computations that an instruction runs once; not the scalar functions of reductions."""
    if instruction.opcode in ("fusion", "async-start"):
        return [name for name in [instruction.called("calls")] if name]
    if instruction.opcode == "call":
        return [name for name in [instruction.called("to_apply")] if name]
    if instruction.opcode == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        if branches:
            return [name.strip().lstrip("%") for name in branches[1].split(",")]
        return [n for n in (instruction.called("true_computation"), instruction.called("false_computation")) if n]
    return []


def trip_count(computations: dict[str, Computation], parent: Computation, loop: Instruction) -> int | None:
    """How often a `while` turns; None where its text does not tell."""
    if said := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(said[1])
    condition = computations[loop.called("condition") or ""]
    scope: dict[str, int | None] = {}
    test, names = condition.instructions[condition.root], condition
    if test.opcode == "fusion":  # its parameters are the fusion's operands
        inner = computations[test.called("calls") or ""]
        for parameter in inner.instructions.values():
            if parameter.opcode == "parameter":
                operand = test.operands[int(parameter.operands[0])]
                scope[parameter.name] = _constant(condition, operand, parent, loop)
        test, names = inner.instructions[inner.root], inner
    if test.opcode != "compare":
        return None
    counter, limit = (scope[name] if name in scope else _constant(names, name, parent, loop) for name in test.operands)
    if counter is None or limit is None:
        return None
    direction = re.search(r"direction=(\w+)", test.attributes)
    turns = {"LT": limit - counter, "LE": limit - counter + 1, "GT": counter - limit, "GE": counter - limit + 1}
    return turns.get(direction[1] if direction else "")


def _constant(computation: Computation, name: str, parent: Computation, loop: Instruction) -> int | None:
    """The integer that a name stands for when `loop` begins."""
    instruction = computation.instructions.get(name)
    if instruction is None:
        return None
    if instruction.opcode == "constant":
        value = instruction.operands[0]
        return int(value) if re.fullmatch(r"-?\d+", value) else None
    if instruction.opcode in ("copy", "bitcast", "convert"):
        return _constant(computation, instruction.operands[0], parent, loop)
    if instruction.opcode == "get-tuple-element" and computation is not parent:
        start = parent.instructions.get(loop.operands[0])
        index = re.search(r"index=(\d+)", instruction.attributes)
        if start is not None and index is not None and start.opcode == "tuple":
            return _constant(parent, start.operands[int(index[1])], parent, loop)
    return None


_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")


def arrays(shape: str) -> list[tuple[str, tuple[int, ...], str]]:
    """Type, sides and layout of every array in a shape, which may be a tuple of them."""
    return [
        (kind, tuple(int(side.lstrip("<=")) for side in sides.split(",") if side), layout)
        for kind, sides, layout in _ARRAY.findall(shape)
    ]


def size(shape: str) -> float:
    """Bytes of a shape."""
    total = 0.0
    for kind, sides, _ in arrays(shape):
        count = _bits(kind) / 8
        for side in sides:
            count *= side
        total += count
    return total


def _bits(kind: str) -> int:
    if kind == "pred":
        return 8
    found = re.search(r"\d+", kind)
    return int(found[0]) if found else 0  # a token
