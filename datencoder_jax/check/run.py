"""Running the parts of a check, one after the other, within a budget of time."""

import time
from collections.abc import Callable, Iterator, Mapping

from datencoder_jax.check.attention import check_attention, choose_shapes
from datencoder_jax.check.concept import check_concept
from datencoder_jax.check.diffusers_baseline import check_diffusers
from datencoder_jax.check.part import LeftOut, Outcome, Part, PartFunction, print_progress
from datencoder_jax.check.pretraining import check_pretraining
from datencoder_jax.check.speed import check_speed
from datencoder_jax.check.versions import read_versions
from datencoder_jax.check.workload import Workload
from datencoder_jax.runtime.target import current_target

PARTS = ("versions", "attention", "concept", "speed", "pretraining", "diffusers")
"""In the order in which they run."""


def list_parts(quick: bool) -> dict[str, PartFunction]:
    """All parts by name.

    Args:
        quick: leave out the pretraining step and the large shapes of attention.
    """
    workload, target = Workload(), current_target()

    def skip_pretraining() -> Outcome:
        raise LeftOut("--quick leaves the pretraining step out")

    return {
        "versions": read_versions,
        "attention": lambda: check_attention(choose_shapes(target, quick)),
        "concept": check_concept,
        "speed": lambda: check_speed(workload),
        "pretraining": skip_pretraining if quick else lambda: check_pretraining(workload),
        "diffusers": lambda: check_diffusers(workload),
    }


def run_parts(
    parts: Mapping[str, PartFunction], minutes: float, clock: Callable[[], float] = time.monotonic
) -> Iterator[Part]:
    """Runs every part; a part that fails does not keep the others from running.

    Args:
        minutes: after which no part is begun.
        clock: seconds since any moment.
    """
    end = clock() + 60 * minutes
    for name, run in parts.items():
        started = clock()
        if started >= end:
            yield Part(name, left_out=f"the {minutes:g} minutes of --minutes were over before it began")
            continue
        try:
            part = Part(name, run())
        except LeftOut as reason:
            part = Part(name, left_out=str(reason))
        except Exception as error:
            part = Part(name, failure=_describe_error(error))
        part = Part(name, part.outcome, clock() - started, part.left_out, part.failure)
        print_progress(f"{name}: {part.status}, {part.seconds:.1f} s")
        yield part


def _describe_error(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
