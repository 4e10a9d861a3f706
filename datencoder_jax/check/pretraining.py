"""A step of pretraining a tuning-encoder, at the largest batch that fits into the device's memory."""

import gc
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from datencoder_jax.check.part import Comparison, LeftOut, Outcome, print_progress
from datencoder_jax.check.speed import compare_with_peak, peak_bytes
from datencoder_jax.check.workload import Workload, fill_randomly
from datencoder_jax.encoder.tuning_encoder import TuningEncoder
from datencoder_jax.models.module import Model, abstract_params
from datencoder_jax.pipeline import Pipeline
from datencoder_jax.plan.shapes import ENCODER
from datencoder_jax.plan.work import trace_work
from datencoder_jax.runtime.target import current_target
from datencoder_jax.training import loop
from datencoder_jax.training import mesh as on_mesh
from datencoder_jax.training.encoder_stage import abstract_task, frozen_of

LARGEST_BATCH = 16
SMALL_BATCH = 2
"""Images of a batch: the largest that is tried, and that of the embedded model."""


def make_config(is_small: bool) -> ConfigDict:
    """What a step depends on in `configs/sd15_laion.py`, with the embedded model's sizes where it is small."""
    sizes = {"rank": 2, "width": 32, "depth": 1, "heads": 2} if is_small else ENCODER
    return ConfigDict(
        {
            "stage": "encoder",
            "encoder": {**sizes, "blend": 0.5},
            "weights": {
                "contrastive": 0.002,
                "norm": 3e-4,
                "temperature": 0.1,
                "neighbours": 3,
                "gamma": 5.0,
                "contrastive_warmup": 2000,
            },
            "draws": 1,
            "accumulate": 1,
            "remat": True,
            "mesh": {"data": 1, "fsdp": 1},
            "steps": 100_000,
            "seed": 0,
            "ema": 0.9995,
            "optim": {
                "lr": 4e-4,
                "schedule": "cosine",
                "warmup": 2000,
                "decay": 0.1,
                "weight_decay": 0.01,
                "no_decay": "bias|norm|queries",
                "clip": 1.0,
                "b1": 0.9,
                "b2": 0.99,
            },
        }
    )


def check_pretraining(workload: Workload) -> Outcome:
    """Measures a step at the largest batch that fits, halved from the first that does not.

    Raises:
        LeftOut: not even one image fits.
    """
    batch = SMALL_BATCH if workload.is_small else LARGEST_BATCH
    while batch:
        print_progress(f"pretraining step, batch {batch}")
        try:
            return _measure_step(workload.pipeline, make_config(workload.is_small), batch)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
        gc.collect()  # what the step that did not fit has placed
        batch //= 2
    raise LeftOut("a step of pretraining does not fit with a batch of 1")


def _measure_step(pipeline: Pipeline, config: Any, batch_size: int) -> Outcome:
    config.update(batch_size=batch_size, resolution=pipeline.resolution)
    mesh = on_mesh.make_mesh(config.mesh, jax.local_devices()[:1])
    task, shapes = abstract_task(config, pipeline.base, mesh)
    params: Any = abstract_params(TuningEncoder, task.config)
    params = fill_randomly(Model(TuningEncoder, task.config, params)).params
    params = on_mesh.place(params, on_mesh.of_params(params, mesh))
    shardings = jax.tree.map(lambda x: x.sharding, loop.state_shapes(task, config, mesh, params))
    # Compiled, so that no two of the state's arrays share the memory that the step takes over.
    state = jax.jit(lambda params: loop.start(params, config), out_shardings=shardings)(params)
    frozen = frozen_of(pipeline)
    frozen = on_mesh.place(frozen, on_mesh.of_frozen(frozen, mesh))
    by_row = NamedSharding(mesh, on_mesh.BY_ROW)
    batch = {name: jax.device_put(values, by_row) for name, values in _random_batch(shapes).items()}
    started = time.perf_counter()
    traced = loop.trace_step(task, config, state, frozen, batch, mesh)
    step = traced.lower().compile(current_target().compiler_options())
    compile_seconds = time.perf_counter() - started
    seconds, loss = [], float("nan")
    for _ in range(3):
        started = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        loss = float(metrics["loss"])
        seconds.append(time.perf_counter() - started)
    warm = min(seconds[1:])
    values: dict[str, Any] = {
        "model": pipeline.name,
        "batch": batch_size,
        "cold_seconds": compile_seconds + seconds[0],
        "compile_seconds": compile_seconds,
        "warm_seconds": warm,
        "images_per_second": batch_size / warm,
        "peak_bytes": peak_bytes(),
        **compare_with_peak(trace_work(traced).total, warm),
    }
    return Outcome(values, [Comparison("pretraining loss is finite", 0.0 * loss, 0.0)])


def _random_batch(shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """Images of noise, each a concept of its own, under the templates by turns."""
    rng, (count,) = np.random.default_rng(0), shapes["concepts"].shape
    return {
        name: rng.integers(0, 256, shape.shape, np.uint8) if len(shape.shape) > 1 else np.arange(count, dtype=np.int32)
        for name, shape in shapes.items()
    }
