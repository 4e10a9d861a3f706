"""Modules as values: a Flax NNX class, its configuration and a flat dictionary of parameters, bundled as one pytree.

NNX defines the modules; everywhere else they are functions of `(params, inputs)`. `Model` is the bundle. Its parameters
are the only leaves, so it can be an argument of `jax.jit`, be differentiated, sharded or cast like any pytree; the
class, configuration and computation type are static, small and cheap to hash.
"""

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from datencoder_jax.models.layers import without_draws
from datencoder_jax.typing import Params

_PUBLIC_LEAF = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


class _SameKey:
    """Stands for `nnx.Rngs` where only shapes matter: one key for every draw.

    In a traced constructor Rngs' counter makes NNX build, and drop, an error message that walks through all operations
    so far: a minute for a UNet of Stable Diffusion XL.
    """

    def params(self) -> jax.Array:
        return jax.random.key(0)

    __call__ = params


def _public_name(path: tuple) -> str:
    *modules, leaf = (str(part) for part in path)
    return ".".join([*modules, _PUBLIC_LEAF.get(leaf, leaf)])


@functools.cache
def _structure(
    kind: type, config: Any, dtype: str
) -> tuple[nnx.GraphDef, dict[str, tuple], dict[str, jax.ShapeDtypeStruct]]:
    """The graph definition, `public name -> state path`, and abstract parameters, without allocating any."""
    with without_draws():
        module = nnx.eval_shape(lambda: kind(config, dtype=jnp.dtype(dtype), rngs=_SameKey()))
    graphdef, state = nnx.split(module)
    flat = dict(nnx.to_flat_state(state))
    paths = {_public_name(path): path for path in flat}
    if len(paths) != len(flat):
        raise AssertionError(f"two parameters of {kind.__name__} share a public name")
    return graphdef, paths, {name: flat[path].get_value() for name, path in paths.items()}


def abstract_params(kind: type, config: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of every parameter of `kind(config)` by public (Hugging Face) name; allocates nothing."""
    return dict(_structure(kind, config, "float32")[2])


def init_params(kind: type, config: Any, key: jax.Array) -> Params:
    """Random float32 parameters for `kind(config)`, by public name."""
    # Not jitted: draws of one shape share a small program, where one program of them all takes minutes to compile.
    _, state = nnx.split(kind(config, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(key)))
    return {_public_name(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Model:
    """A module class, its configuration and its parameters.

    Attributes:
        kind: the NNX module class, called as `kind(config, dtype=..., rngs=...)`.
        config: the class's frozen configuration.
        params: parameters by Hugging Face name, in Flax layouts (linear `[in, out]`, convolution `HWIO`).
        dtype: name of the type computations run in; parameters are cast to it where they are used.
    """

    kind: type = field(metadata={"static": True})
    config: Any = field(metadata={"static": True})
    params: Params
    dtype: str = field(default="float32", metadata={"static": True})

    def __call__(self, *args, **kwargs):
        """The module's `__call__` at these parameters."""
        return self.bind()(*args, **kwargs)

    def bind(self) -> Any:
        """The NNX module holding these parameters, for calling a method other than `__call__`."""
        graphdef, paths, _ = _structure(self.kind, self.config, self.dtype)
        if self.params.keys() != paths.keys():
            odd = sorted(self.params.keys() ^ paths.keys())
            raise ValueError(f"{self.kind.__name__} does not have exactly these parameters: {odd[:5]} differ")
        return nnx.merge(graphdef, nnx.from_flat_state({path: nnx.Param(self.params[n]) for n, path in paths.items()}))

    def with_params(self, params: Params) -> "Model":
        """The same module at other parameters."""
        return replace(self, params=params)

    def cast(self, store: str, compute: str | None = None) -> "Model":
        """Parameters stored as `store` and computations in `compute` (as before when not given)."""
        params = {name: value.astype(store) for name, value in self.params.items()}
        return replace(self, params=params, dtype=compute or self.dtype)
