"""Programs as they are traced: their operations, also those within loops and other programs, with types and places."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

import datencoder_jax
from datencoder_jax.compilation import Program

_PACKAGE = f"{Path(datencoder_jax.__file__).parent}/"
PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")


@dataclass(frozen=True)
class Operation:
    """An equation of a jaxpr, after those that it is within, outermost last."""

    equations: tuple[Any, ...]

    @property
    def name(self) -> str:
        return self.equations[0].primitive.name

    @property
    def types(self) -> set[str]:
        """Of operands that are floating-point numbers."""
        dtypes = (getattr(x.aval, "dtype", None) for x in self.equations[0].invars)
        return {str(dtype) for dtype in dtypes if dtype is not None and jnp.issubdtype(dtype, jnp.floating)}

    @property
    def is_exact(self) -> bool:
        """Whether a product asks for the highest precision of both factors."""
        return self.equations[0].params["precision"] == (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)

    @property
    def places(self) -> list[str]:
        """The package's functions that it was traced in, innermost first, such as "models/edits.py apply"."""
        frames = [frame for equation in self.equations for frame in equation.source_info.traceback.frames]
        inside = [frame for frame in frames if frame.file_name.startswith(_PACKAGE)]
        return [f"{frame.file_name.removeprefix(_PACKAGE)} {frame.function_name}" for frame in inside]

    def is_within(self, places: tuple[str, ...]) -> bool:
        return any(place.startswith(prefix) for place in self.places for prefix in places)

    def __str__(self) -> str:
        return f"{self.name} of {' and '.join(sorted(self.types))} in {self.places[:3]}"


def operations(jaxpr: Any, *, outer: tuple[Any, ...] = ()) -> Iterator[Operation]:
    """All operations of a jaxpr, also of those in its equations' parameters: of jit, scan, cond, custom_vjp, ..."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield Operation((equation, *outer))
        is_jaxpr = lambda x: isinstance(x, ClosedJaxpr | Jaxpr)  # noqa: E731
        for inner in filter(is_jaxpr, jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)):
            yield from operations(inner, outer=(equation, *outer))


def products(jaxpr: Any) -> list[Operation]:
    return [operation for operation in operations(jaxpr) if operation.name in PRODUCTS]


class TracedPrograms:
    """Traces every `Program` that is called within it, and runs none: results are random numbers of the right types.

    Attributes:
        traces: `jax.stages.Traced` by the program's name, one for each call.
    """

    def __init__(self):
        self.traces: dict[str, list[Any]] = {}
        self._draws = np.random.default_rng(0)

    def __enter__(self) -> "TracedPrograms":
        traced = self

        def call(program: Program, *args: Any, quiet: bool = False, **options: Any) -> Any:
            trace = program._jitted.trace(*args, **options)
            traced.traces.setdefault(program.name, []).append(trace)
            return jax.tree.map(traced._draw, trace.out_info)

        self._patch = mock.patch.object(Program, "__call__", call)
        self._patch.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._patch.stop()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return ((name, trace) for name, traces in self.traces.items() for trace in traces)

    def operations(self) -> list[Operation]:
        return [operation for _, trace in self for operation in operations(trace.jaxpr)]

    def _draw(self, abstract: Any) -> jax.Array:
        if abstract.dtype == bool:
            return jnp.ones(abstract.shape, bool)
        if jnp.issubdtype(abstract.dtype, jnp.floating):
            return jnp.asarray(self._draws.standard_normal(abstract.shape), abstract.dtype)
        return jnp.zeros(abstract.shape, abstract.dtype)
