"""Attention's implementations against each other, in value and gradient, and which of them a target gets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from datencoder_jax.models import dot_product_attention
from datencoder_jax.models.attention import Attention
from datencoder_jax.models.dot_product_attention import attend, choose_implementation
from datencoder_jax.models.edits import ready
from datencoder_jax.runtime.target import Target, batch_mesh, current_target, lowering_for, sharing_batch
from datencoder_jax.training.mesh import make_mesh
from datencoder_jax.typing import LowRank

HOPPER, AMPERE, TURING = (Target("cuda", capability) for capability in ((9, 0), (8, 0), (7, 5)))
TPU, CPU = Target("tpu"), Target("cpu")
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def draw(queries, keys, heads, head_dim, dtype="float32", batch=2):
    """q, k, v and a weight for every output, of a loss that all of them reach."""
    shapes = (queries, keys, keys, queries)
    return [
        jax.random.normal(key, (batch, length, heads, head_dim)).astype(dtype)
        for key, length in zip(jax.random.split(jax.random.key(queries + keys), 4), shapes, strict=True)
    ]


def value_and_gradient(implementation, q, k, v, weight):
    def loss(q, k, v):
        out = attend(q, k, v, implementation=implementation)
        return (out * weight).astype(jnp.float32).sum(), out

    (_, out), gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return out, *gradient


def close(found, wanted, tolerance):
    """Relative to the largest number."""
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "head_dim"),
    [
        (4096, 77, 1, 40),  # cross-attention of Stable Diffusion 1.5
        (1024, 1024, 3, 80),  # an odd number of heads
        (300, 300, 5, 64),  # lengths that are no whole blocks
        (257, 257, 1, 80),  # CLIP's vision tower
    ],
)
@pytest.mark.parametrize("implementation", ["blocks", "heads", "flash"])
def test_implementations_equal_xla_in_value_and_gradient(implementation, queries, keys, heads, head_dim, dtype):
    arrays = draw(queries, keys, heads, head_dim, dtype)
    with pltpu.force_tpu_interpret_mode():
        found = value_and_gradient(implementation, *arrays)
    # bfloat16 is held against float32, so that the reference does not round what it is to judge.
    wanted = value_and_gradient("xla", *(x.astype("float32") for x in arrays))
    close(found, [x.astype(dtype) for x in wanted], TOLERANCE[dtype])


def test_flash_attention_on_4096_queries():
    arrays = draw(4096, 4096, 1, 40, batch=1)
    with pltpu.force_tpu_interpret_mode():
        found = value_and_gradient("flash", *arrays)
    close(found, value_and_gradient("xla", *arrays), TOLERANCE["float32"])


@pytest.mark.parametrize("queries", [8, 10])
@pytest.mark.parametrize("implementation", ["blocks", "heads"])
def test_blocks_that_do_and_do_not_divide_the_queries(implementation, queries, monkeypatch):
    monkeypatch.setattr(dot_product_attention, "_BLOCK_QUERIES", 4)
    arrays = draw(queries, 6, 3, 8)
    close(value_and_gradient(implementation, *arrays), value_and_gradient("xla", *arrays), 1e-6)


@pytest.mark.parametrize("implementation", ["blocks", "heads", "flash"])
def test_rows_that_a_mesh_shares(implementation):
    """The gradient of replicated keys adds up over devices, and each device attends to its own rows."""
    q, k, v, weight = draw(256, 256, 2, 32, batch=8)
    k, v = k[:1], v[:1]

    def loss(q, k, v):
        rows = [jnp.broadcast_to(x, (len(q), *x.shape[1:])) for x in (k, v)]
        return (attend(q, *rows, implementation=implementation) * weight).sum()

    with pltpu.force_tpu_interpret_mode():
        wanted = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
        with sharing_batch(make_mesh({"data": 4, "fsdp": 2})):
            found = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    close(found, wanted, 1e-5)


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("pair", [False, True])
def test_a_layer_with_two_paths_and_its_maps_on_a_tpu(dual, pair, monkeypatch):
    """One attention layer, its offsets, second path, pair of streams and maps, through the kernels of a TPU."""

    def choose(q, k, causal, target):  # in float32, in which rounding hides nothing
        return "flash" if target.platform == "tpu" else "xla"

    monkeypatch.setattr(dot_product_attention, "choose_implementation", choose)
    from flax import nnx

    width, heads = 48, 3
    layer = Attention(width, 24, heads, 16, path="attn2", dtype=jnp.float32, rngs=nnx.Rngs(0))
    keys = jax.random.split(jax.random.key(1), 6)
    h = jax.random.normal(keys[0], (4, 128, width))
    context, hard = (jax.random.normal(key, (4, 77, 24)) for key in keys[1:3])
    offsets = {
        f"attn2.{name}": LowRank(jax.random.normal(keys[3], (inputs, 2)), jax.random.normal(keys[4], (2, width)) / 64)
        for name, inputs in (("to_q", width), ("to_k", 24), ("to_v", 24), ("to_out.0", width))
    }

    def run(h, offsets):
        maps = {"attn2": None}
        out = layer(
            h,
            context,
            offsets=ready(offsets, {}),
            hard_context=hard if dual else None,
            dual=dual,
            pair=pair,
            blend=0.25,
            maps=maps,
        )
        return out.sum(), (out, maps["attn2"])

    def values_and_gradient(target):
        with lowering_for(target), pltpu.force_tpu_interpret_mode():
            (_, extra), gradient = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(h, offsets)
        return jax.tree.leaves((extra, gradient))

    with lowering_for(TPU):
        text = str(jax.make_jaxpr(run)(h, offsets))
    assert "pallas_call" in text
    close(values_and_gradient(TPU), values_and_gradient(CPU), TOLERANCE["float32"])


def test_causal_attention_sees_no_later_position():
    q, k, v, _ = draw(5, 5, 2, 4)
    before = attend(q, k, v, causal=True)
    after = attend(q, k.at[:, 3:].add(5.0), v.at[:, 3:].add(5.0), causal=True)
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    np.testing.assert_allclose(before[:, 0], v[:, 0], rtol=1e-6)
    assert np.abs(before[:, 3:] - after[:, 3:]).max() > 1


@pytest.mark.parametrize(
    ("implementation", "causal", "message"),
    [
        ("blocks", True, "no causal mask"),
        ("triton", False, "not known; choose one of: xla, blocks, heads, cudnn, flash"),
    ],
)
def test_what_there_is_not_is_refused(implementation, causal, message):
    x = jnp.ones((1, 4, 1, 4))
    with pytest.raises(ValueError, match=message):
        attend(x, x, x, causal=causal, implementation=implementation)


def shape(queries, head_dim, dtype="bfloat16", heads=8, batch=8):
    return jax.ShapeDtypeStruct((batch, queries, heads, head_dim), dtype)


@pytest.mark.parametrize(
    ("target", "queries", "keys", "head_dim", "dtype", "causal", "wanted"),
    [
        (HOPPER, 4096, 4096, 40, "bfloat16", False, "cudnn"),
        (HOPPER, 4096, 77, 40, "bfloat16", False, "cudnn"),
        (AMPERE, 257, 257, 80, "float16", False, "cudnn"),
        (HOPPER, 64, 64, 160, "bfloat16", False, "xla"),  # the innermost level of 1.5
        (HOPPER, 64, 64, 20, "bfloat16", False, "xla"),
        (HOPPER, 4096, 4096, 512, "bfloat16", False, "blocks"),  # the VAE
        (HOPPER, 4096, 4096, 40, "float32", False, "blocks"),
        (HOPPER, 77, 77, 64, "bfloat16", True, "xla"),
        (TURING, 4096, 4096, 40, "float16", False, "blocks"),
        (Target("rocm"), 1024, 1024, 40, "bfloat16", False, "xla"),
        (TPU, 4096, 4096, 40, "bfloat16", False, "flash"),
        (TPU, 1024, 1024, 80, "bfloat16", False, "flash"),
        (TPU, 4096, 77, 40, "bfloat16", False, "xla"),
        (TPU, 256, 256, 160, "bfloat16", False, "xla"),
        (TPU, 4096, 4096, 512, "float32", False, "blocks"),  # XL's VAE
        (TPU, 2048, 2048, 64, "bfloat16", True, "xla"),
        (CPU, 4096, 4096, 40, "float32", False, "heads"),
        (CPU, 1024, 1024, 40, "float32", False, "heads"),
        (CPU, 4096, 77, 40, "float32", False, "xla"),
        (CPU, 1024, 1024, 40, "bfloat16", False, "xla"),
    ],
)
def test_the_implementation_follows_from_shapes_and_target(target, queries, keys, head_dim, dtype, causal, wanted):
    q, k = shape(queries, head_dim, dtype), shape(keys, head_dim, dtype)
    assert choose_implementation(q, k, causal, target) == wanted


def test_a_batch_that_a_mesh_does_not_divide_has_no_kernel():
    with sharing_batch(make_mesh({"data": 8})):
        q = shape(4096, 40, batch=1)
        assert choose_implementation(q, q, False, HOPPER) == choose_implementation(q, q, False, TPU) == "blocks"
        q = shape(4096, 40, batch=16)
        assert choose_implementation(q, q, False, HOPPER) == "cudnn"


def test_a_trace_for_one_target_is_not_reused_for_another(monkeypatch):
    monkeypatch.setattr(dot_product_attention, "_FLASH_FROM", 1)
    function = jax.jit(lambda x: attend(x, x, x))
    x = jnp.ones((1, 128, 1, 64), jnp.bfloat16)
    plain = function.lower(x).as_text()
    with lowering_for(TPU):
        kernel = str(function.trace(x).jaxpr)
    assert "pallas_call" in kernel and function.lower(x).as_text() == plain
    assert current_target().platform == "cpu" and batch_mesh() is None


def test_a_default_device_is_the_target():
    with jax.default_device(jax.devices("cpu")[1]):
        assert current_target() == CPU
    with jax.default_device("cpu"):
        assert current_target() == CPU


@pytest.mark.parametrize(
    ("platform", "capability", "limit", "wanted"),
    [
        ("gpu", "8.9", 18_000_000_000, Target("cuda", (8, 9), 24_000_000_000)),
        ("gpu", "gfx90a", None, Target("rocm")),
        ("tpu", None, 16_000_000_000, Target("tpu", None, 16_000_000_000)),
        ("cpu", None, 10**9, Target("cpu")),
    ],
)
def test_targets_of_devices(platform, capability, limit, wanted, monkeypatch):
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)

    class Device:
        def memory_stats(self):
            return limit and {"bytes_limit": limit}

    Device.platform = platform
    if capability:
        Device.compute_capability = capability
    assert Target.of(Device()) == wanted
