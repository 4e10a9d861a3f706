"""The models that cases use, each loaded once, and programs that are not computed."""

import functools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from tiny import write_tiny_base

from datencoder_jax import api, compile_ahead, loading
from datencoder_jax.compilation import Program
from datencoder_jax.pipeline import Pipeline, attention_shapes
from datencoder_jax.typing import Concept, LowRank


@functools.cache
def toyworld() -> Pipeline:
    """The embedded model."""
    return loading.load()


@functools.cache
def toyworld_concept() -> Concept:
    """A concept of the embedded model that changes one of its layers."""
    pipeline, rng = toyworld(), np.random.default_rng(0)
    path, (inputs, outputs) = next(iter(attention_shapes(pipeline.base.unet).items()))
    down, up = (rng.standard_normal(shape, dtype=np.float32) for shape in ((inputs, 2), (2, outputs)))
    embeddings = rng.standard_normal((1, sum(pipeline.base.widths)), dtype=np.float32)
    return Concept(embeddings, {path: LowRank(down, up)}, "S*", 0.5, "toyworld", pipeline.fingerprint, "robot")


@functools.cache
def tiny_folder() -> Path:
    """A diffusers folder of a tiny model."""
    folder = Path(tempfile.mkdtemp(prefix="corpus-"))
    import atexit

    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_tiny_base(folder)


@contextmanager
def without_computing() -> Iterator[None]:
    """Within it the embedded model is loaded once, and programs return zeros of the right shapes instead of running."""
    load, shapes = api.load, {}

    def load_once(model: Any = "toyworld", **options: Any) -> Pipeline:
        return toyworld() if str(model) == "toyworld" and not options else load(model, **options)

    def call(program: Program, *args: Any, quiet: bool = False, **options: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, options))
        key = (program.name, tree, *((np.shape(x), str(getattr(x, "dtype", x))) for x in leaves))
        if key not in shapes:
            shapes[key] = program._jitted.trace(*args, **options).out_info
        return jax.tree.map(
            lambda x: np.ones(x.shape, x.dtype) if x.dtype == bool else np.zeros(x.shape, x.dtype), shapes[key]
        )

    @contextmanager
    def compiling_ahead(pipeline: Pipeline, run: Any) -> Iterator[float]:
        run(pipeline)
        yield 0.0

    with ExitStack() as stack:
        for target, name, value in (
            (api, "load", load_once),
            (Program, "__call__", call),
            (compile_ahead, "compiling_ahead", compiling_ahead),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        yield
