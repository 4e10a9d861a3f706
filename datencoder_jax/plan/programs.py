"""The programs that a plan compiles, each a function with the shapes of its arguments and where they lie."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, SingleDeviceSharding

from datencoder_jax import sampling, tuning
from datencoder_jax.base import Base
from datencoder_jax.diffusion.samplers import make_plan
from datencoder_jax.encoder.tuning_encoder import TuningEncoder
from datencoder_jax.memory import Memory
from datencoder_jax.methods import datencoder
from datencoder_jax.models.module import Model, abstract_params
from datencoder_jax.pipeline import attention_shapes
from datencoder_jax.training import loop
from datencoder_jax.training import mesh as on_mesh
from datencoder_jax.training.encoder_stage import abstract_task
from datencoder_jax.tuning import Problem, TuningConfig
from datencoder_jax.typing import Condition, LowRank, Variables

TUNING_STEPS, SAMPLING_STEPS = 12, 25
"""Of the programs that tune and draw."""

_shape: Any = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Program:
    """What is compiled.

    Attributes:
        name: what it does.
        function: jitted.
        arguments: shapes with their shardings.
        devices: how many it runs on.
        pictures: how many it takes or makes in one run.
        resident: bytes of networks that stay on the chip beside it.
        parts: bytes per chip of what its arguments are, by name.
    """

    name: str
    function: Any
    arguments: tuple
    devices: int
    pictures: int
    resident: int = 0
    parts: dict[str, int] | None = None


def train(config: Any, base: Base, devices: list) -> Program:
    """The step that the training loop runs for a recipe of an encoder, on these devices.

    Raises:
        UserError: the devices do not make the recipe's mesh, or cannot share its batch.
    """
    mesh = on_mesh.make_mesh(config.mesh, devices)
    on_mesh.rows_here(config.batch_size, mesh)
    task: Any
    task, batch = abstract_task(config, base, mesh)
    params: Any = abstract_params(TuningEncoder, task.config)
    state = loop.state_shapes(task, config, mesh, params)
    frozen = _placed(task.frozen, on_mesh.of_frozen(task.frozen, mesh))
    batch = _placed(batch, jax.tree.map(lambda _: NamedSharding(mesh, on_mesh.BY_ROW), batch))
    results = jax.tree.map(lambda x: x.sharding, state), NamedSharding(mesh, on_mesh.WHOLE)
    step = jax.jit(loop.make_step(task, config), donate_argnums=0, out_shardings=results, keep_unused=True)
    parts = {"state": bytes_per_chip(state), "frozen": bytes_per_chip(frozen), "batch": bytes_per_chip(batch)}
    return Program("train", step, (state, frozen, batch), mesh.size, config.batch_size, parts=parts)


def personalize(base: Base, encoder: Model | None, memory: Memory, resolution: int, device: Any) -> Iterator[Program]:
    """The large programs that make a concept and draw it under a memory setting, on one chip, in the order they run.

    They are predict, encode, tune and draw; where networks come and go, see before predict and decode after draw. The
    small ones are left out: they read prompts, and run the UNet without a gradient to find where the concept is.

    Args:
        base: shapes.
        encoder: shapes of a tuning-encoder; without one nothing is predicted, and a LoRA is tuned, which leaves the
            text alone.
    """
    tokens = base.text.config.max_position_embeddings
    f32, side = jnp.float32, resolution // base.vae.config.factor
    scalar, key = _shape((), f32), jax.eval_shape(lambda: jax.random.key(0))
    vectors = _shape((1, sum(base.widths)), f32)
    rank = 4 if encoder is None else encoder.config.rank
    offsets = {
        path: LowRank(_shape((inputs, rank), f32), _shape((rank, outputs), f32))
        for path, (inputs, outputs) in attention_shapes(base.unet).items()
    }
    variables = Variables(vectors, offsets)
    ids, images = _shape((1, tokens), jnp.int32), _shape((1, resolution, resolution, 3), f32)
    config = TuningConfig(draws=memory.draws, remat=memory.remat)
    condition = jax.eval_shape(lambda base, ids: base.condition(ids), base, ids)

    def problem(base: Base, latents, key, soft: Condition | None, hard: Condition | None) -> Problem:
        rates = Variables(jnp.float32(0), jnp.float32(0))
        return Problem(base, latents, jnp.zeros((1, tokens), jnp.int32), hard, jnp.float32(0.5), rates, key, soft)

    def tune(base, latents, key, variables, soft, hard):
        return tuning.tune.function(
            tuning.start(variables), problem(base, latents, key, soft, hard), steps=TUNING_STEPS, config=config
        )

    def program(name: str, function: Callable, networks: tuple, rest: tuple, pictures: int) -> Program:
        arguments = (*networks, *rest)
        placed = jax.tree.map(lambda x: _shape(x.shape, x.dtype, sharding=SingleDeviceSharding(device)), arguments)
        # Whatever the program does not read lies beside it, unless networks come and go.
        beside = 0 if memory.in_parts else _bytes((base, encoder)) - _bytes(networks)
        return Program(
            name, jax.jit(function, keep_unused=True), placed, 1, pictures, beside, {"networks": _bytes(networks)}
        )

    if encoder is not None and not memory.in_parts:
        yield program("predict", datencoder.predict.function, (base, encoder), (images, ids, key), 1)
    elif encoder is not None:
        look, _, _, mean = (part.function for part in datencoder.IN_PARTS)
        see = partial(look, patch_taps=encoder.config.patch_taps)
        eyes, latent = base.only("vision"), _shape((1, side, side, base.unet.config.in_channels), f32)
        yield program("see", see, (eyes,), (images,), 1)
        seen = jax.eval_shape(see, eyes, images), latent, condition, key
        yield program("predict", mean, (base.only("unet"), encoder), seen, 1)

    yield program(
        "encode",
        lambda base, images, key: tuning.encode_views(base, images, key, config),
        (base.only("vae"),),
        (images, key),
        config.views,
    )
    latents = _shape((config.views, side, side, base.unet.config.in_channels), f32)
    networks = base.only("unet") if encoder is None else base.only("unet", "text", "text_2")
    texts = (condition, None) if encoder is None else (None, condition)
    yield program("tune", tune, (networks,), (latents, key, variables, *texts), TUNING_STEPS * memory.draws)

    rows = _shape((memory.batch, tokens), jnp.int32)
    noise = _shape((memory.batch, *latents.shape[1:]), f32)
    plan = jax.eval_shape(lambda: make_plan("ddim", base.schedule, SAMPLING_STEPS))
    keys = _shape((memory.batch,), key.dtype)
    request = sampling.Request(rows, None if encoder is None else rows, ids, noise, scalar, scalar, keys)
    if not memory.in_parts:
        yield program("draw", sampling.generate.function, (base,), (plan, request, variables), memory.batch)
        return
    prompts = jax.eval_shape(sampling.read, base.only("text", "text_2"), request, vectors)
    yield program("draw", sampling.denoise, (base.only("unet"),), (plan, request, prompts, variables), memory.batch)
    yield program("decode", sampling.decode_checked, (base.only("vae"),), (noise,), memory.batch)


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, sharding: _shape(x.shape, x.dtype, sharding=sharding), tree, shardings)


def bytes_per_chip(tree: Any) -> int:
    """Of placed shapes, what one chip holds."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        total += _bytes(_shape(shape, leaf.dtype))
    return total


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
