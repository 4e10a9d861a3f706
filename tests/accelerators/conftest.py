"""Compiling for accelerators that are not there, which `make test-accelerators` does in an environment of its own.

The rows of what was compiled are printed at the end and written to `$ACCELERATORS_TABLE`.
"""

import os
from pathlib import Path

from datencoder_jax.plan.environment import prepare_environment

prepare_environment()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_enable_compilation_cache", False)  # compiling is what is tested
jax.config.update("jax_optimization_level", "O0")  # as plans do

HEADER = (
    "device",
    "program",
    "memory, GB",
    "of it work",
    "fused attention",
    "TFLOP",
    "moved, GB",
    "kernels",
    "compile, s",
)


def pytest_terminal_summary(terminalreporter):
    rows = [
        row
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, row in getattr(report, "user_properties", ())
        if name == "compiled" and report.when == "call"
    ]
    if not rows:
        return
    lines = [f"| {' | '.join(cells)} |" for cells in (HEADER, ("---",) * len(HEADER), *sorted(rows))]
    terminalreporter.section("compiled for accelerators")
    terminalreporter.write_line("\n".join(lines))
    if path := os.environ.get("ACCELERATORS_TABLE"):
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


_results = {}


@pytest.fixture
def compiled(record_property):
    """Compiles a planned program for a machine, once in all tests, and keeps its row for the table."""
    from datencoder_jax.plan import inspection
    from datencoder_jax.plan.measure import measure

    def compile_program(program, machine, label):
        model = label.split(" ")[0]
        key = (machine.name, model, program.name, program.signature)
        if program.signature and key in _results:
            return _results[key].for_program(program)
        result = measure(program, machine)
        assert result.refused is None, result.refused
        if _results and next(iter(_results))[:2] != key[:2]:  # compiled texts take gigabytes
            _results.clear()
        _results[key] = result
        forward, backward = inspection.fused_attention(result.text)
        cells = (
            f"{result.room.total / 1e9:.2f}",
            f"{result.room.temporaries / 1e9:.2f}",
            f"{forward} + {backward}" if forward else "",
            f"{result.costs.flops / 1e12:.3g}",
            f"{result.costs.bytes / 1e9:.3g}",
            f"{result.costs.kernels:,}",
            f"{result.seconds:.0f}",
        )
        record_property("compiled", (machine.name.split(",")[0], f"{label}: {program.name}", *cells))
        return result

    yield compile_program
    jax.clear_caches()
