"""Some weights of a base model's files, in the precision that the files have.

A model in memory may be stored in less. What is added to its weights is added to those of its files, so that the sum
is rounded once.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from datencoder_jax.checkpoints.keys import Tensors, public
from datencoder_jax.checkpoints.layouts import from_torch_layout
from datencoder_jax.checkpoints.single_file import split
from datencoder_jax.checkpoints.weights import find_weights, opened
from datencoder_jax.models.module import Model, abstract_params


@contextmanager
def open_kernels(path: Path, component: str, model: Model) -> Iterator[Mapping[str, np.ndarray]]:
    """The weights of a component in a diffusers folder or a checkpoint of one file, each read when asked for.

    Args:
        component: one of `components.COMPONENTS`.
        model: the component in memory, for names and shapes.

    Yields:
        Float32 arrays by parameter name, in Flax layouts.

    Raises:
        UserError: a file is missing, damaged or holds something else.
    """
    abstract = abstract_params(model.kind, model.config)
    is_file = path.is_file()
    files = [path] if is_file else find_weights(path / component)
    with opened(files, str(path)) as tensors:
        parts = split(tensors, str(path))[1][component] if is_file else tensors
        arrays = public(parts, abstract, str(path))

        def read(name: str) -> np.ndarray:
            return from_torch_layout({name: arrays[name]}, {name: abstract[name]}, origin=str(path))[name]

        yield Tensors({name: lambda name=name: read(name) for name in abstract if name in arrays})
