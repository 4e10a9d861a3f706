"""All programs of a run compiled side by side, before it needs them.

Personalizing runs half a dozen programs one after the other, and the first run on a machine would compile them so, each
on about one core of the machine. But what they are is known before the first has run: the run is made once on arrays
without memory, in which every program answers with the shapes of its results and begins to compile in a thread.
"""

import functools
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
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


class CompilationThreads(Executor):
    """Threads that compile programs, of those that wait the last one first.

    A run's last programs are its largest and decide when all is done. Until `end_tracing` there is a thread less than
    asked for: tracing takes a core.
    """

    def __init__(self, threads: int):
        self._threads = ThreadPoolExecutor(threads, "compile")
        self._waiting: list[tuple[Future, Callable[[], Any]]] = []
        self._traced = threading.Event()
        self._threads.submit(self._traced.wait)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        self._waiting.append((future, functools.partial(fn, *args, **kwargs)))
        self._threads.submit(self._run_last)
        return future

    def end_tracing(self) -> None:
        """Has all threads compile."""
        self._traced.set()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.end_tracing()
        for future, _ in list(self._waiting) if cancel_futures else ():
            future.cancel()
        self._threads.shutdown(wait, cancel_futures=cancel_futures)

    def _run_last(self) -> None:
        future, function = self._waiting.pop()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function())
        except BaseException as error:  # whoever waits for it is told
            future.set_exception(error)


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
    executor, programs, started = CompilationThreads(at_once), set(), time.perf_counter()

    def start(program: Program, args: tuple, kwargs: dict[str, Any]) -> Any:
        programs.add(program)
        return jax.tree.map(hollow_array, program.compile_in_background(executor, *args, **kwargs).out_info)

    print(
        "preparing the programs, which compile meanwhile (cached afterwards) ...", end=" ", file=sys.stderr, flush=True
    )
    try:
        try:
            with dry_run(start), without_garbage_collection():
                run(without_weights(pipeline))
        finally:  # whatever is said of a failure gets a line of its own
            seconds = time.perf_counter() - started
            print(f"{len(programs)} in {seconds:.1f} s", file=sys.stderr, flush=True)
        executor.end_tracing()
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
