"""All programs of a run compiled side by side, before it needs them.

Personalizing runs half a dozen programs one after the other, and the first run on a machine would compile them so, each
on about one core of the machine. But what they are is known before the first has run: the run is made once on arrays
without memory, in which every program answers with the shapes of its results and begins to compile in a thread.
"""

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from datencoder_jax.compilation import Program, dry_run
from datencoder_jax.pipeline import Pipeline

_AT_ONCE = 8
"""Programs that compile at a time at most: each takes the machine's memory while it does."""


def hollow_array(shape: Any) -> Any:
    """An array of ones of a `jax.ShapeDtypeStruct`'s shape and type that takes no memory; keys are ordinary arrays."""
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), shape.shape)
    return np.broadcast_to(np.ones((), shape.dtype), shape.shape)


def without_weights(pipeline: Pipeline) -> Pipeline:
    """A loaded pipeline with hollow arrays in place of its weights."""
    parts = {name: getattr(pipeline, name) for name in ("base", "encoder", "domain")}
    return replace(pipeline, **jax.tree.map(hollow_array, parts))


@contextmanager
def compiling_ahead(pipeline: Pipeline, run: Callable[[Pipeline], Any]) -> Iterator[float]:
    """Within it every program that a run will call compiles in the background; the calls wait for what is not done yet.

    Args:
        pipeline: what the run will be made with.
        run: calls the API with the pipeline that it is given, which is one without weights.

    Yields:
        Seconds that it took to begin.
    """
    at_once = min(os.cpu_count() or 1, _AT_ONCE)
    executor, programs, started = ThreadPoolExecutor(at_once, "compile"), set(), time.perf_counter()

    def start(program: Program, args: tuple, kwargs: dict[str, Any]) -> Any:
        programs.add(program)
        return jax.tree.map(hollow_array, program.compile_in_background(executor, *args, **kwargs).out_info)

    print("tracing the programs of this run ...", end=" ", file=sys.stderr, flush=True)
    try:
        try:
            with dry_run(start), without_garbage_collection():
                run(without_weights(pipeline))
        finally:  # whatever is said of a failure gets a line of its own
            seconds = time.perf_counter() - started
            print(f"{len(programs)} in {seconds:.1f} s", file=sys.stderr, flush=True)
        yield seconds
    finally:  # what nobody waits for any more is not begun
        executor.shutdown(wait=False, cancel_futures=True)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Turns off Python's garbage collector: tracing makes millions of objects that stay, and looking through them for
    garbage takes a third of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
