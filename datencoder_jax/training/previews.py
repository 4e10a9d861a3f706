"""Images that an encoder draws while it trains, by all devices of the mesh from the weights that lie on them.

A preview is drawn by a program of its own, like a training step: every device has its rows of the concepts, and the
frozen base model and the averaged weights stay where the training step has them.
"""

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from datencoder_jax.compilation import Compilation, announce, compile_lowered
from datencoder_jax.data.images import to_float, write_grid
from datencoder_jax.runtime.target import Target, lowering_for, sharing_batch
from datencoder_jax.training import mesh as on_mesh
from datencoder_jax.typing import Params

LABELS = ("input", "word alone", "encoder", "truth")
"""The columns of a preview: the picture given, the base model under a word, what the encoder draws, the truth."""


class Previews(NamedTuple):
    """Concepts that samples are drawn of while training.

    Attributes:
        images: uint8 `[n, H, W, 3]`.
        ids: of the prompts to draw, with the placeholder, `[n, L]`.
        truth: what `ids` describe, uint8 `[n, H, W, 3]`; the pictures themselves where that is not known.
    """

    images: np.ndarray
    ids: np.ndarray
    truth: np.ndarray


class DrawingTask(Protocol):
    """A task whose previews are drawn on the mesh; the other members are those of `training.task.Task`."""

    previews: Previews | None

    def draw_previews(self, params: Params, frozen: Any, images: jax.Array, ids: jax.Array) -> dict[str, jax.Array]:
        """What the grid shows beside input and truth, by name: uint8 `[n, H, W, 3]` each; jitted for the mesh."""
        ...


def trace_previews(
    task: DrawingTask, params: Params, frozen: Any, images: Any, ids: Any, mesh: Mesh, *, keep_unused: bool = False
) -> jax.stages.Traced:
    """`task.draw_previews` at these arrays (or shapes with shardings), traced for the devices of `mesh`.

    Args:
        keep_unused: keep arguments that the program does not read, for counting their memory.
    """
    whole = NamedSharding(mesh, on_mesh.WHOLE)
    jitted = jax.jit(task.draw_previews, out_shardings=whole, keep_unused=keep_unused)
    with lowering_for(Target.of(mesh.devices.flat[0])), sharing_batch(mesh if mesh.size > 1 else None):
        return jitted.trace(params, frozen, images, ids)


class PreviewDrawer:
    """Draws a task's previews as often as it is asked, and compiles once. All processes have to call it.

    Args:
        frozen: of the task, on the devices of `mesh`.
    """

    def __init__(self, task: DrawingTask, frozen: Any, mesh: Mesh):
        assert task.previews is not None
        self.task, self.frozen, self.mesh, self.previews = task, frozen, mesh, task.previews
        self.compiled: jax.stages.Compiled | None = None
        rows = [fill_up(x, mesh.size) for x in (self.previews.images, self.previews.ids)]
        by_row = NamedSharding(mesh, on_mesh.BY_ROW)
        self.images, self.ids = on_mesh.place(rows, [by_row, by_row])

    def __call__(self, params: Params) -> dict[str, np.ndarray]:
        """Images uint8 `[n, H, W, 3]` by name, on every process."""
        if self.compiled is None:
            self.compiled = self._compile(params)
        drawn = self.compiled(params, self.frozen, self.images, self.ids)
        return {name: np.asarray(x.addressable_data(0))[: len(self.previews.images)] for name, x in drawn.items()}

    def _compile(self, params: Params) -> jax.stages.Compiled:
        def prepare() -> Compilation:
            lowered = trace_previews(self.task, params, self.frozen, self.images, self.ids, self.mesh).lower()
            return compile_lowered(lowered, Target.of(self.mesh.devices.flat[0]).compiler_options())

        return announce("preparing the previews", prepare, quiet=jax.process_index() > 0)


def fill_up(rows: np.ndarray, multiple: int) -> np.ndarray:
    """`rows` with the last of them repeated until `multiple` divides their number."""
    return np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % multiple, axis=0)])


def write_previews(previews: Previews, drawn: dict[str, np.ndarray], path: Path) -> dict[str, float]:
    """Writes rows of input, what was drawn and truth, and returns each drawing's squared error to the truth."""
    rows = np.stack([previews.images, *drawn.values(), previews.truth], axis=1)
    scale = max(1, 96 // previews.images.shape[1])
    write_grid(path, rows.reshape(-1, *previews.images.shape[1:]), columns=16, scale=scale, labels=LABELS)
    truth = to_float(previews.truth)
    return {name: float(np.square(to_float(images) - truth).mean()) for name, images in drawn.items()}
