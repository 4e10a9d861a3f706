"""A plan as a table for people."""

from collections.abc import Callable, Sequence

from datencoder_jax.plan.costs import KINDS
from datencoder_jax.plan.measure import Result

_GB = 1e9


def table(results: Sequence[Result]) -> str:
    """One column per program; sizes in GB (1e9 bytes), of one chip and one run."""
    rows: list[tuple[str, Callable[[Result], str]]] = [
        ("chips", lambda r: str(r.program.devices)),
        ("images a run", lambda r: str(r.program.images)),
        ("arguments", lambda r: _number(r.room.arguments / _GB)),
        ("results", lambda r: _number(r.room.results / _GB)),
        ("temporaries", lambda r: _number(r.room.temporaries / _GB)),
        ("program", lambda r: _number(r.room.code / _GB)),
        ("other networks", lambda r: _number(r.room.beside / _GB)),
        ("memory needed", lambda r: _number(r.room.total / _GB)),
        ("memory there is", lambda r: _number(r.room.available / _GB) if r.room.available else "?"),
        ("fits", lambda r: "yes" if r.fits else "NO"),
        ("TFLOP", lambda r: _number(r.costs.flops / 1e12) if r.costs else ""),
        ("moved in memory", lambda r: _number(r.costs.bytes / _GB) if r.costs else ""),
        ("kernels", lambda r: f"{r.costs.kernels:,}" if r.costs else ""),
        ("sent to chips", lambda r: _number(r.costs.sent / _GB) if r.costs else ""),
        *((f"  {kind}", _traffic(kind)) for kind in KINDS if any(r.costs and kind in r.costs.traffic for r in results)),
    ]
    if any(r.times for r in results):
        rows += [
            ("estimated ms, computing", lambda r: _number(1e3 * r.times.compute) if r.times else ""),
            ("estimated ms, memory", lambda r: _number(1e3 * r.times.memory) if r.times else ""),
            ("estimated ms, links", lambda r: _number(1e3 * r.times.links) if r.times else ""),
            ("estimated images/s", lambda r: _number(r.images_per_second) if r.images_per_second else ""),
        ]
    rows.append(("seconds to compile", lambda r: f"{r.seconds:.0f}"))
    cells = [["", *(r.program.name for r in results)], *([name, *(say(r) for r in results)] for name, say in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(results) + 1)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in cells
    )


ROW_HEADER = (
    "| model | method | setting | program | memory | of it work | fits | TFLOP | moved | kernels | ms at least "
    "| bound by | compile s |\n" + "|---" * 13 + "|"
)


def row(labels: Sequence[str], result: Result) -> str:
    """A program as a row under `ROW_HEADER`."""
    cells = [*labels, _number(result.room.total / _GB), _number(result.room.temporaries / _GB)]
    cells.append("yes" if result.fits else "NO")
    if result.costs:
        cells += [_number(result.costs.flops / 1e12), _number(result.costs.bytes / _GB), f"{result.costs.kernels:,}"]
    else:
        cells += [""] * 3
    cells += [_number(1e3 * result.times.least), result.times.limit] if result.times else [""] * 2
    return f"| {' | '.join([*cells, f'{result.seconds:.0f}'])} |"


def _traffic(kind: str) -> Callable[[Result], str]:
    def say(result: Result) -> str:
        traffic = result.costs and result.costs.traffic.get(kind)
        if not traffic:
            return ""
        return f"{'' if traffic.known else '>= '}{traffic.count} x, {_number(traffic.bytes / _GB)}"

    return say


def _number(value: float) -> str:
    """Three significant digits."""
    if value == 0:
        return "0"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.001 else f"{value:.0e}"
