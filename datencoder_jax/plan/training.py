"""The training step and the previews of a recipe, traced for devices that need not be present."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from datencoder_jax.base import Base
from datencoder_jax.encoder.domain_encoder import DomainEncoder
from datencoder_jax.encoder.tuning_encoder import TuningEncoder
from datencoder_jax.models.module import abstract_params
from datencoder_jax.plan.dry_run import PlannedProgram
from datencoder_jax.training import loop
from datencoder_jax.training import mesh as on_mesh
from datencoder_jax.training.encoder_stage import PREVIEWS_OF_CONCEPTS, abstract_task
from datencoder_jax.training.previews import trace_previews


def trace_training_step(config: Any, base: Base, devices: list) -> PlannedProgram:
    """The step that the training loop runs for a recipe of an encoder, on these devices.

    Args:
        config: a resolved recipe of the stages "encoder" or "e4t".
        base: its base model, of shapes.

    Raises:
        UserError: the devices do not make the recipe's mesh, or cannot share its batch.
    """
    task, params, batch, mesh = _abstract_run(config, base, devices)
    return trace_task_step(task, config, params, batch, mesh)


def trace_preview_drawing(config: Any, base: Base, devices: list) -> PlannedProgram:
    """The program that draws the previews of a recipe of an encoder on these devices, the training state beside it.

    Args, errors: as of `trace_training_step`.
    """
    task, params, batch, mesh = _abstract_run(config, base, devices)
    count = config.get("previews", PREVIEWS_OF_CONCEPTS)
    count += -count % mesh.size
    rows = {
        "images": jax.ShapeDtypeStruct((count, *batch["images"].shape[1:]), np.uint8),
        "ids": jax.ShapeDtypeStruct((count, base.text.config.max_position_embeddings), np.int32),
    }
    state = loop.state_shapes(task, config, mesh, params)
    frozen = _place(task.frozen, on_mesh.of_frozen(task.frozen, mesh))
    rows = _place(rows, jax.tree.map(lambda _: NamedSharding(mesh, on_mesh.BY_ROW), rows))
    arguments = state.ema, frozen, rows["images"], rows["ids"]
    traced = trace_previews(task, *arguments, mesh, keep_unused=True)
    parts = {"state": bytes_per_chip(state), "frozen": bytes_per_chip(frozen), "batch": bytes_per_chip(rows)}
    return PlannedProgram("previews", arguments, traced, mesh.size, count, sum(parts.values()), parts)


def _abstract_run(config: Any, base: Base, devices: list) -> tuple[Any, Any, dict, Mesh]:
    """Task, parameters and global batch of a recipe, of shapes, and its mesh."""
    mesh = on_mesh.make_mesh(config.mesh, devices)
    on_mesh.rows_here(config.batch_size, mesh)
    task, batch = abstract_task(config, base, mesh)
    params = abstract_params(DomainEncoder if config.stage == "e4t" else TuningEncoder, task.config)
    return task, params, batch, mesh


def trace_task_step(task: Any, config: Any, params: Any, batch: Any, mesh: Any) -> PlannedProgram:
    """The step of any training task, from shapes of its parameters and of a global batch."""
    state = loop.state_shapes(task, config, mesh, params)
    frozen = _place(task.frozen, on_mesh.of_frozen(task.frozen, mesh))
    batch = _place(batch, jax.tree.map(lambda _: NamedSharding(mesh, on_mesh.BY_ROW), batch))
    traced = loop.trace_step(task, config, state, frozen, batch, mesh, keep_unused=True)
    parts = {"state": bytes_per_chip(state), "frozen": bytes_per_chip(frozen), "batch": bytes_per_chip(batch)}
    return PlannedProgram(
        "train", (state, frozen, batch), traced, mesh.size, config.batch_size, sum(parts.values()), parts
    )


def _place(tree: Any, shardings: Any) -> Any:
    def place(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding)

    return jax.tree.map(place, tree, shardings)


def bytes_per_chip(tree: Any) -> int:
    """Bytes that one device holds of a tree of shapes with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
