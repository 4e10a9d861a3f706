"""A program compiled and not run: what it needs of a chip's memory, and how fast a chip could be at best.

With the operations `F` of `plan.work`, the bytes moved in memory `M` and the bytes sent to other chips `S` of
`plan.costs`, all of one chip, and the chip's peaks `f`, `m` and `s`, a run takes at least

    T = max(F / f, M / m, S / s)                                                                     (1)

seconds (the roofline of Williams et al. 2009). It is an estimate: no program reaches a peak, the three need not
overlap, and XLA counts bytes that stay in a chip's inner memory too.
"""

import re
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax

from datencoder_jax.plan.costs import Costs, costs
from datencoder_jax.plan.devices import Machine
from datencoder_jax.plan.dry_run import PlannedProgram
from datencoder_jax.plan.work import trace_work
from datencoder_jax.runtime.hardware import Chip


@dataclass(frozen=True)
class Room:
    """Bytes of one chip's memory.

    Attributes:
        arguments: what the program reads, all of it, used or not.
        results: what it returns, but for what takes the place of an argument.
        temporaries: what it works in.
        code: the program.
        beside: what stays on the chip and is no argument, such as networks that the program does not read.
        available: of the chip; None where that is not known.
    """

    arguments: int
    results: int
    temporaries: int
    code: int
    beside: int
    available: int | None

    @property
    def total(self) -> int:
        return self.arguments + self.results + self.temporaries + self.code + self.beside

    @property
    def fits(self) -> bool:
        return self.available is None or self.total <= self.available


@dataclass(frozen=True)
class Times:
    """Seconds that one run takes at least by each of a chip's limits; equation (1)."""

    compute: float
    memory: float
    links: float

    @property
    def least(self) -> float:
        return max(self.compute, self.memory, self.links)

    @property
    def limit(self) -> str:
        """Which of them it is."""
        return max(asdict(self).items(), key=lambda item: item[1])[0]


@dataclass(frozen=True)
class Result:
    """What is known of a program.

    Attributes:
        program: what was compiled.
        room: its memory.
        costs: what a run does; None where the compiler refused.
        times: estimates; None where the chip's peaks are not known.
        seconds: spent compiling.
        refused: what the compiler said; None where it did compile.
        text: the compiled program; "" where there is none.
    """

    program: PlannedProgram
    room: Room
    costs: Costs | None
    times: Times | None
    seconds: float
    refused: str | None = None
    text: str = ""

    @property
    def fits(self) -> bool:
        return self.refused is None and self.room.fits

    def for_program(self, program: PlannedProgram) -> "Result":
        """The same for a program that compiles to the same, beside other networks."""
        beside = max(program.resident - self.room.arguments, 0)
        return replace(self, program=program, room=replace(self.room, beside=beside))

    @property
    def images_per_second(self) -> float | None:
        return self.program.images / self.times.least if self.times else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON; bytes, operations and seconds, of one chip and one run."""
        found: dict[str, Any] = {
            "program": self.program.name,
            "chips": self.program.devices,
            "images": self.program.images,
            "fits": self.fits,
            "memory_bytes": asdict(self.room) | {"total": self.room.total, "parts": self.program.parts},
            "compile_seconds": self.seconds,
        }
        if self.refused:
            found["refused"] = self.refused
        if self.costs:
            found |= {
                "flops": self.costs.flops,
                "bytes": self.costs.bytes,
                "sent": self.costs.sent,
                "collectives": {kind: asdict(traffic) for kind, traffic in self.costs.traffic.items()},
                "kernels": self.costs.kernels,
                "loops_known": self.costs.known,
            }
        if self.times:
            found["estimate"] = asdict(self.times) | {
                "seconds": self.times.least,
                "limit": self.times.limit,
                "images_per_second": self.images_per_second,
            }
        return found


def measure(program: PlannedProgram, machine: Machine) -> Result:
    """Compiles a program for a machine."""
    started = time.perf_counter()
    try:
        compiled = program.traced.lower().compile(machine.compiler_options())
    except jax.errors.JaxRuntimeError as error:
        needed = refused_for_memory(str(error))
        if needed is None:
            raise
        required, available = needed
        room = Room(program.resident, 0, max(required - program.resident, 0), 0, 0, available)
        return Result(program, room, None, None, time.perf_counter() - started, str(error).splitlines()[0])
    seconds, sizes = time.perf_counter() - started, compiled.memory_analysis()
    assert sizes is not None, "every compiler used here tells the memory of a program"
    room = Room(
        sizes.argument_size_in_bytes,
        sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        sizes.temp_size_in_bytes,
        sizes.generated_code_size_in_bytes,
        max(program.resident - sizes.argument_size_in_bytes, 0),
        machine.memory,
    )
    found, work = costs(compiled, program.devices), trace_work(program.traced)
    found = replace(found, flops=work.total / program.devices, known=found.known and work.known)
    return Result(
        program, room, found, machine.chip and estimate(found, machine.chip), seconds, text=compiled.as_text() or ""
    )


def estimate(found: Costs, chip: Chip) -> Times:
    """Equation (1)."""
    return Times(found.flops / chip.flops, found.bytes / chip.hbm_bandwidth, found.sent / chip.link_bandwidth)


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)\s*([KMGT]?)i?B?"


def refused_for_memory(message: str) -> tuple[int, int | None] | None:
    """Bytes that a refused program needs and those there are, from the compiler's words; None for other refusals."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern in (
        rf"required for [\w ]+ \({_SIZE}\) exceeds available \w+ \({_SIZE}\)",
        rf"Used {_SIZE} of {_SIZE} \w+",
    ):
        if found := re.search(pattern, message):
            return _bytes(found[1], found[2]), _bytes(found[3], found[4])
    if found := re.search(rf"allocate {_SIZE}", message):
        return _bytes(found[1], found[2]), None
    return 0, None


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])
