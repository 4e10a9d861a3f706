"""Seconds, memory and share of a device's peak: prediction, drawing and tuning, and a step of pretraining.

For the operations `F` of a stage's programs (`plan.work`, counted on the programs of a dry run of the same calls), its
warm seconds `T` and the device's peak `f`,

    T_least = F / f,    share of the peak = T_least / T                                             (1)

`T_least` is the plan's estimate by work alone. What a plan says of memory traffic comes from compiling every program a
second time, and is left to `datencoder plan`.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from datencoder_jax import api, compilation
from datencoder_jax.check.part import Outcome, print_progress
from datencoder_jax.check.workload import Workload
from datencoder_jax.compile_ahead import without_weights
from datencoder_jax.pipeline import Pipeline
from datencoder_jax.plan.dry_run import record_run
from datencoder_jax.plan.work import trace_work
from datencoder_jax.runtime.hardware import find_chip

STEPS = 12
PICTURES = 4
STAGES = ("prediction", "drawing", "tuning")
"""In this order each takes more memory than those before, so that the device's peak is the stage's own."""


class Timing(NamedTuple):
    """Seconds of a stage.

    Attributes:
        seconds: that it ran.
        compile_seconds: that its programs were compiled before.
        peak_bytes: of the device so far; None where it does not tell.
    """

    seconds: float
    compile_seconds: float
    peak_bytes: int | None


def check_speed(workload: Workload, *, steps: int = STEPS, pictures: int = PICTURES) -> Outcome:
    """Measures every stage twice: cold, with all compiling, and warm.

    Args:
        steps: of tuning.
        pictures: that are drawn.
    """
    pipeline, image = workload.pipeline, workload.image
    work = count_stage_work(pipeline, image, steps, pictures)
    compilation.forget_compiled()
    print_progress(f"{pipeline.name}: the first run, which compiles")
    cold = _run_stages(pipeline, image, steps, pictures, quiet=False)
    print_progress(f"{pipeline.name}: the second run")
    warm = _run_stages(pipeline, image, steps, pictures, quiet=True)
    values = {
        "model": pipeline.name,
        "resolution": pipeline.resolution,
        "dtype": pipeline.base.unet.dtype,
        "memory_setting": vars(pipeline.memory),
        "steps": steps,
        "pictures": pictures,
    }
    return Outcome(values | {"stages": {name: _describe(work[name], cold[name], warm[name]) for name in STAGES}})


def _describe(work: float, cold: Timing, warm: Timing) -> dict[str, Any]:
    return {
        "cold_seconds": cold.seconds + cold.compile_seconds,
        "compile_seconds": cold.compile_seconds,
        "warm_seconds": warm.seconds,
        "peak_bytes": cold.peak_bytes,
        **compare_with_peak(work, warm.seconds),
    }


def compare_with_peak(work: float, seconds: float) -> dict[str, float | None]:
    """Equation (1); None where the device's peak is not known."""
    chip = find_chip(jax.devices()[0])
    least = work / chip.flops if chip else None
    return {"tflop": work / 1e12, "least_seconds": least, "share_of_peak": least and least / seconds}


def peak_bytes() -> int | None:
    """The most memory of the device that was in use so far; None where it does not tell."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _stages(pipeline: Pipeline, image: np.ndarray, steps: int, pictures: int, quiet: bool) -> dict[str, Callable]:
    """The calls of the API, which run in the order of `STAGES`; each returns its report's seconds."""
    concepts = []

    def predict() -> dict[str, float]:
        result = api.personalize(pipeline, [image], steps=0, quiet=quiet)
        concepts.append(result.concept)
        return result.report["seconds"]

    def draw() -> dict[str, float]:
        prompt = pipeline.prompts[0]
        return api.generate(pipeline, [prompt], concept=concepts[-1], num=pictures, quiet=quiet).report["seconds"]

    def tune() -> dict[str, float]:
        return api.personalize(pipeline, [image], steps=steps, quiet=quiet).report["seconds"]

    return {"prediction": predict, "drawing": draw, "tuning": tune}


def _run_stages(pipeline: Pipeline, image: np.ndarray, steps: int, pictures: int, quiet: bool) -> dict[str, Timing]:
    keys = {"prediction": "predict", "drawing": "sample", "tuning": "tune"}
    timings = {}
    for name, run in _stages(pipeline, image, steps, pictures, quiet).items():
        started = time.perf_counter()
        seconds = run()
        print_progress(f"{name}: {time.perf_counter() - started:.1f} s")
        timings[name] = Timing(seconds[keys[name]], seconds["compile"], peak_bytes())
    return timings


def count_stage_work(pipeline: Pipeline, image: np.ndarray, steps: int, pictures: int) -> dict[str, float]:
    """The operations of each stage, from a dry run."""
    hollow, device = without_weights(pipeline), jax.local_devices()[0]
    work: dict[str, float] = {}
    predicting: set[Any] = set()
    for stage, call in _stages(hollow, image, steps, pictures, quiet=True).items():
        programs = list(record_run(call, hollow, device))
        if stage == "prediction":
            predicting = {(program.name, program.signature) for program in programs}
        elif stage == "tuning":  # which begins with a prediction, and is timed without it
            programs = [program for program in programs if (program.name, program.signature) not in predicting]
        work[stage] = sum(program.calls * trace_work(program.traced).total for program in programs)
    return work
