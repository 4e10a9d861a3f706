"""What personalization takes of a device's memory: a table for Stable Diffusion 1.5 and XL, by setting.

    python -m datencoder_jax.footprint --topology v5e:2x2

Nothing is allocated or run: every program is compiled for the device from shapes alone, and the compiler says how much
it needs. With a topology the device is a TPU chip that need not be there (the `libtpu` package is its compiler);
without one it is this machine's.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from datencoder_jax import sampling, tuning
from datencoder_jax.diffusion.samplers import make_plan
from datencoder_jax.diffusion.schedule import ScheduleConfig
from datencoder_jax.memory import PRESETS, Memory
from datencoder_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from datencoder_jax.models.module import Model, abstract_params
from datencoder_jax.models.unet import UNet2DConditionModel, UNetConfig
from datencoder_jax.models.vae import AutoencoderKL, VAEConfig
from datencoder_jax.pipeline import Base, attention_shapes
from datencoder_jax.tuning import Problem, TuningConfig
from datencoder_jax.typing import Condition, LearningRates, LowRank, Variables

_L = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768)
_G = replace(
    _L,
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
    hidden_act="gelu",
    with_projection=True,
)
_XL = UNetConfig(
    sample_size=128,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(320, 640, 1280),
    attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
_VAE = VAEConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
_SCHEDULE = ScheduleConfig(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
_TOKENS = 77


def stable_diffusion(version: str, dtype: str) -> Base:
    """Stable Diffusion "1.5" or "XL" as shapes, stored and computed in `dtype` (XL's VAE computes in float32)."""

    shape: Any = jax.ShapeDtypeStruct

    def model(kind: type, config: Any, compute: str = dtype) -> Model:
        shapes = abstract_params(kind, config).items()
        return Model(kind, config, {name: shape(x.shape, jnp.dtype(dtype)) for name, x in shapes}, compute)

    large = version == "XL"
    vector = shape((3,), jnp.float32)
    return Base(
        unet=model(UNet2DConditionModel, _XL if large else UNetConfig()),
        vae=model(AutoencoderKL, _VAE, "float32" if large else dtype),
        text=model(CLIPTextModel, _L),
        text_2=model(CLIPTextModel, _G) if large else None,
        vision=None,
        words=shape((_L.vocab_size,), jnp.bool_),
        word_norm=shape((), jnp.float32),
        pixel_mean=vector,
        pixel_std=vector,
        schedule=_SCHEDULE,
    )


def programs(base: Base, memory: Memory, resolution: int, method: str) -> Iterator[tuple[str, Callable, Any]]:
    """Name, function and abstract arguments of every program that tunes or draws under a memory setting."""
    f32, side = jnp.float32, resolution // base.vae.config.factor
    shape: Any = jax.ShapeDtypeStruct
    scalar, key = shape((), f32), jax.eval_shape(lambda: jax.random.key(0))
    vectors = shape((1, sum(base.widths)), f32)
    offsets = {
        path: LowRank(shape((inputs, 4), f32), shape((4, outputs), f32))
        for path, (inputs, outputs) in attention_shapes(base.unet).items()
    }
    variables = Variables(vectors, offsets)
    ids, images = shape((1, _TOKENS), jnp.int32), shape((1, resolution, resolution, 3), f32)
    config = TuningConfig(draws=memory.draws, remat=memory.remat)
    condition = jax.eval_shape(lambda base, ids: base.condition(ids), base, ids)
    frozen = method == "lora"

    def problem(base: Base, latents, key, soft: Condition | None, hard: Condition | None) -> Problem:
        rates = LearningRates(jnp.float32(0), jnp.float32(0))
        return Problem(base, latents, jnp.zeros((1, _TOKENS), jnp.int32), hard, jnp.float32(0.5), rates, key, soft)

    def tune(base, latents, key, variables, soft, hard):
        return tuning.tune.function(
            tuning.start(variables), problem(base, latents, key, soft, hard), steps=12, config=config
        )

    yield (
        "encode",
        lambda base, images, key: tuning.encode_views(base, images, key, config),
        (base.only("vae"), images, key),
    )
    latents = shape((config.views, side, side, 4), f32)
    networks = base.only("unet") if frozen else base.only("unet", "text", "text_2")
    texts = (condition, None) if frozen else (None, condition)
    yield "tune", tune, (networks, latents, key, variables, *texts)

    rows = shape((memory.batch, _TOKENS), jnp.int32)
    noise = shape((memory.batch, side, side, 4), f32)
    plan = jax.eval_shape(lambda: make_plan("ddim", base.schedule, 25))
    keys = shape((memory.batch,), key.dtype)
    request = sampling.Request(rows, None if frozen else rows, ids, noise, scalar, scalar, keys)
    if not memory.in_parts:
        yield "draw", sampling.generate.function, (base, plan, request, variables)
        return
    prompts = jax.eval_shape(sampling.read, base.only("text", "text_2"), request, vectors)
    yield "draw", sampling.denoise, (base.only("unet"), plan, request, prompts, offsets)
    yield "decode", sampling.decode, (base.only("vae"), noise)


def gigabytes(base: Base, function: Callable, arguments: tuple, device: Any, resident: bool) -> float:
    """What a program needs on `device`: arguments, results, room to work; and all networks, where they stay there."""
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)), arguments
    )
    sizes: Any = jax.jit(function).lower(*placed).compile().memory_analysis()
    total = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    if resident:
        total += _bytes(base) - _bytes(arguments[0])
    return total / 1e9


def _tried(*arguments: Any) -> float:
    """As `gigabytes`, infinite for what the device has no room for."""
    try:
        return gigabytes(*arguments)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--topology", help="such as v5e:2x2 (default: this machine's device)")
    parser.add_argument("--models", nargs="+", choices=("1.5", "XL"), default=["1.5", "XL"])
    parser.add_argument("--methods", nargs="+", choices=("datencoder", "lora"), default=["datencoder", "lora"])
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument(
        "--memory", nargs="+", type=int, choices=(0, *PRESETS), default=[0, *PRESETS], help="0: no setting"
    )
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    if args.topology:
        from jax.experimental import topologies

        device = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices[0]
    else:
        device = jax.devices()[0]
    print(f"{device.device_kind}, {args.resolution} px, weights in {args.dtype}; GB")
    print("| model | method | setting | encode | tune | draw | decode | most |\n|---|---|---|---|---|---|---|---|")
    seen = {}
    for version in args.models:
        base = stable_diffusion(version, args.dtype)
        for method in args.methods:
            for size in args.memory:
                memory = PRESETS[size] if size else Memory()
                found = {}
                for name, function, arguments in programs(base, memory, args.resolution, method):
                    key = (version,) if name == "encode" else (version, method, size, name)  # no setting changes that
                    if key not in seen:
                        print(f"compiling for {' '.join(map(str, key))}", file=sys.stderr, flush=True)
                        resident = name != "encode" and not memory.in_parts
                        seen[key] = _tried(base, function, arguments, device, resident)
                    found[name] = seen[key]
                cells = [f"{found[name]:.1f}" if name in found else "" for name in ("encode", "tune", "draw", "decode")]
                setting = f"`--memory {size}`" if size else "none"
                print(
                    f"| {version} | {method} | {setting} | {' | '.join(cells)} | {max(found.values()):.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
