"""What the loop asks of a task: what is trained, on what, and how well it goes."""

from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from datencoder_jax.typing import Params

Metrics = dict[str, jax.Array]


class Task(Protocol):
    """What is trained.

    It has previews in one of two ways: as a `PreviewedTask`, or, where they need the frozen models, as a
    `training.previews.DrawingTask`.

    Three more members are optional:

    - `value_and_grad(params, frozen, batch, key, step) -> ((loss, metrics), grads)`, for a task whose gradient is not
      that of `loss` in one piece, such as one that accumulates over parts of the batch;
    - `data_report() -> dict[str, int]`, what is wrong with the data so far by reason, which is logged;
    - `identity: dict[str, str]`, what the task depends on beside its recipe (`base`, `data`): stored in checkpoints; a
      run is not continued under another one.

    Attributes:
        frozen: any pytree the loss reads but does not train; an argument of the step, never a constant in it.
        batch_size: of all devices together.
    """

    frozen: Any
    batch_size: int

    def init(self, key: jax.Array) -> Params:
        """Initial parameters, float32."""
        ...

    def batch(self, step: int, rows: slice) -> dict[str, np.ndarray]:
        """These rows of the step's global batch.

        A pure function of its arguments, so that the step is the whole position in the data: every process asks for its
        own rows, and together they are the batch that one process would have had. Called from several threads at once.
        """
        ...

    def loss(
        self, params: Params, frozen: Any, batch: dict[str, jax.Array], key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """A scalar, and further scalars to log, of the global batch; `step` is an int32 scalar."""
        ...


class PreviewedTask(Task, Protocol):
    """A task whose previews take its own weights alone."""

    def preview(self, params: Params, path: Path) -> dict[str, float]:
        """Writes a sample grid to `path` and returns scores, from the averaged weights on one device."""
        ...


def whole(task: Task) -> slice:
    """The rows that are all of a batch."""
    return slice(0, task.batch_size)
