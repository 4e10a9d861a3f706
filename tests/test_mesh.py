"""The mesh, the table of shardings, and where arrays lie by it."""

import os
import re
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from line_task import Line, settings
from tiny import pictures

from datencoder_jax.api import load
from datencoder_jax.encoder.tuning_encoder import EncoderConfig, TuningEncoder
from datencoder_jax.errors import UserError
from datencoder_jax.evaluation.judge import Judge, JudgeConfig
from datencoder_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from datencoder_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from datencoder_jax.models.module import Model, abstract_params
from datencoder_jax.models.unet import UNet2DConditionModel, UNetConfig
from datencoder_jax.models.vae import AutoencoderKL, VAEConfig
from datencoder_jax.pipeline import attention_shapes
from datencoder_jax.training import mesh as on_mesh
from datencoder_jax.training.loop import start, state_shapes
from datencoder_jax.training.mesh import AXES, BY_ROW, WHOLE, make_mesh, partition

GOLDEN = Path(__file__).parent / "golden"


# --- the mesh


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"data": -1, "fsdp": 1}, (8, 1)),
        ({"data": -1, "fsdp": 4}, (2, 4)),
        ({"data": 2, "fsdp": -1}, (2, 4)),
        ({"data": 1, "fsdp": 2}, (1, 2)),  # fewer than there are
        ({"data": -1}, (8, 1)),
    ],
)
def test_a_mesh_of_all_devices_or_of_some(sizes, shape):
    mesh = make_mesh(sizes)
    assert mesh.axis_names == AXES and mesh.devices.shape == shape
    assert len(set(mesh.devices.flat)) == mesh.size


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": -1, "fsdp": 3}, "8 devices are no multiple of 3; set mesh.fsdp"),
        ({"data": 4, "fsdp": 4}, "takes 16 devices and there are 8; set mesh.data to -1"),
        ({"data": -1, "fsdp": -1}, "-1 for one of them"),
        ({"data": 0, "fsdp": 1}, "sizes from 1"),
        ({"data": 1, "model": 2}, "takes data and fsdp"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(sizes)


# --- the table


def encoder(unet: UNetConfig, vision: CLIPVisionConfig, width: int, **sizes) -> EncoderConfig:
    shapes = attention_shapes(Model(UNet2DConditionModel, unet, abstract_params(UNet2DConditionModel, unet)))
    return EncoderConfig(
        vision_width=vision.hidden_size,
        vision_taps=5,
        denoiser_width=4 * unet.block_out_channels[-1],
        embedding_dim=unet.cross_attention_dim,
        inventory=tuple((path, *shape) for path, shape in shapes.items()),
        width=width,
        **sizes,
    )


def stable_diffusion_15():
    unet = UNetConfig()
    vision = CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        projection_dim=1024,
        patch_size=14,
        with_projection=True,
    )
    return {
        "UNet": (UNet2DConditionModel, unet),
        "VAE": (AutoencoderKL, VAEConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2)),
        "text": (CLIPTextModel, CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)),
        "vision": (CLIPVisionModel, vision),
        "encoder": (TuningEncoder, encoder(unet, vision, 768, depth=4, heads=12)),
    }


def toyworld():
    pipeline = load("toyworld")
    base = pipeline.base
    models = {"UNet": base.unet, "VAE": base.vae, "text": base.text, "vision": base.vision, "encoder": pipeline.encoder}
    return {name: (model.kind, model.config) for name, model in models.items()} | {"judge": (Judge, JudgeConfig())}


def table(networks, fsdp: int) -> str:
    """Every parameter, those alike but for their numbers together, and how the table splits each shape."""
    lines = [f"Over {fsdp} devices along fsdp. How many, name, shape: the dimension that is split, or whole."]
    for network, (kind, config) in networks.items():
        rows: Counter = Counter()
        total, held = 0, 0
        for name, x in abstract_params(kind, config).items():
            spec = partition(name, x.shape, fsdp)
            total, held = total + x.size, held + (x.size // fsdp if spec else x.size)
            said = f"split {len(spec) - 1}" if spec else "whole"
            rows[re.sub(r"\d+", "*", name), str(list(x.shape)), said] += 1
        lines.append(f"\n{network}: {total:,} parameters, {held:,} on a device")
        lines += [f"{count:4} {name} {shape}: {said}" for (name, shape, said), count in sorted(rows.items())]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("name", "networks", "fsdp"),
    [("sd15", stable_diffusion_15, 16), ("toyworld", toyworld, 8)],
    ids=["sd15", "toyworld"],
)
def test_the_table_matches_every_parameter(name, networks, fsdp):
    """The golden texts are for reading; `GOLDEN=write` renews them."""
    path, made = GOLDEN / f"sharding_{name}.txt", table(networks(), fsdp)
    if os.environ.get("GOLDEN") == "write":
        path.write_text(made, encoding="utf-8")
    assert made == path.read_text(encoding="utf-8")


def test_a_parameter_without_a_rule_is_named():
    with pytest.raises(ValueError, match=r"no rule of .*SHARDING matches the parameter 'gate.alpha'"):
        partition("gate.alpha", (64, 64), 8)
    for name in ("conv1.weights", "my_queries", "blocks.0.cross_q.weight.more"):
        with pytest.raises(ValueError, match="no rule"):
            partition(name, (64, 64), 8)


@pytest.mark.parametrize(
    ("name", "shape", "fsdp", "spec"),
    [
        ("conv_in.weight", (3, 3, 4, 320), 8, PartitionSpec(None, None, None, "fsdp")),
        ("conv_out.weight", (3, 3, 320, 4), 8, WHOLE),  # no multiple
        ("hidden.weight", (320, 160), 8, PartitionSpec(None, "fsdp")),
        ("hidden.bias", (160,), 8, WHOLE),
        ("text_encoder/text_model.embeddings.token_embedding.weight", (99, 128), 8, PartitionSpec(None, "fsdp")),
        ("logit_scale", (), 8, WHOLE),
    ],
)
def test_rules(name, shape, fsdp, spec):
    assert partition(name, shape, fsdp) == spec


# --- arrays


def test_moments_and_averages_follow_their_parameters():
    mesh = make_mesh({"data": 2, "fsdp": 4})
    shapes = state_shapes(Line(), settings(), mesh)
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    found = Counter(
        leaf.sharding.spec for path, leaf in jax.tree_util.tree_leaves_with_path(shapes) if "weight" in str(path[-1])
    )
    assert found == {split.spec: 4}  # parameter, average, two moments
    others = [x for path, x in jax.tree_util.tree_leaves_with_path(shapes) if "weight" not in str(path[-1])]
    assert all(leaf.sharding.is_fully_replicated for leaf in others)
    assert jax.tree.structure(shapes) == jax.tree.structure(start(Line().init(jax.random.key(0)), settings()))


def test_frozen_models_are_split_and_the_rest_is_whole(pipeline):
    mesh = make_mesh({"data": 2, "fsdp": 4})
    frozen = {"base": pipeline.base, "ids": np.zeros((1, 3), np.int32)}
    placed = on_mesh.place(frozen, on_mesh.of_frozen(frozen, mesh))
    params = placed["base"].unet.params
    assert len(params["conv_in.weight"].sharding.device_set) == 8
    assert params["conv_in.weight"].addressable_shards[0].data.shape == (3, 3, 4, 2)
    assert params["conv_in.bias"].sharding.is_fully_replicated and placed["ids"].sharding.is_fully_replicated
    assert placed["base"].word_norm.sharding.is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, placed, frozen)
    whole = on_mesh.fetch(params, mesh)
    assert all(len(value.devices()) == 1 for value in whole.values())
    jax.tree.map(np.testing.assert_array_equal, whole, dict(pipeline.base.unet.params))


def test_a_process_draws_the_rows_that_its_devices_hold():
    mesh = make_mesh({"data": 2, "fsdp": 4})
    assert on_mesh.rows_here(16, mesh) == [slice(0, 16)]

    class Elsewhere:
        """Of eight devices in two processes, those at these places of the mesh are here."""

        def __init__(self, *here):
            self.here = here

        def __call__(self, mesh, spec):
            rows = NamedSharding(mesh, spec).devices_indices_map((16,))
            held = {d: rows[d] for k, d in enumerate(mesh.devices.flat) if k in self.here}
            return type("Sharding", (), {"addressable_devices_indices_map": lambda _, shape: held})()

    real, found = on_mesh.NamedSharding, []
    try:
        for here in ((0, 1, 2, 3), (4, 5, 6, 7), (0, 1, 4, 5), (2, 3, 6, 7)):
            on_mesh.NamedSharding = Elsewhere(*here)
            found.append(on_mesh.rows_here(16, mesh))
    finally:
        on_mesh.NamedSharding = real
    assert found[:2] == [[slice(0, 8)], [slice(8, 16)]]  # disjoint and complete
    assert found[2:] == [[slice(0, 4), slice(8, 12)], [slice(4, 8), slice(12, 16)]]


def test_batches_come_in_order_and_lie_by_row():
    mesh = make_mesh({"data": 2, "fsdp": 4})

    def draw(step, rows):
        return {"x": np.arange(100 * step, 100 * step + 16)[rows], "images": pictures(16, step)[rows]}

    made = list(on_mesh.batches(draw, 16, mesh, range(3, 7), threads=3))
    assert [int(batch["x"][0]) for batch in made] == [300, 400, 500, 600]
    for step, batch in zip(range(3, 7), made, strict=True):
        np.testing.assert_array_equal(batch["images"], pictures(16, step))
        assert batch["images"].sharding == NamedSharding(mesh, BY_ROW)
        assert [shard.data.shape[0] for shard in batch["images"].addressable_shards] == [2] * 8


def test_a_forward_pass_is_the_same_on_sharded_weights(pipeline):
    """And a device holds a quarter of what is split."""
    text, mesh = pipeline.base.text, make_mesh({"data": 2, "fsdp": 4})
    placed = on_mesh.place(text, on_mesh.of_frozen(text, mesh))
    ids = pipeline.tokenizer.encode(["a robot", "a house"] * 4)
    run = jax.jit(lambda model, ids: model(ids).last_hidden)
    found = run(placed, jax.device_put(ids, NamedSharding(mesh, BY_ROW)))
    np.testing.assert_allclose(found, run(text, ids), rtol=1e-5, atol=1e-5)
    weight = placed.params["text_model.encoder.layers.0.mlp.fc1.weight"]
    assert weight.addressable_shards[0].data.size * 4 == weight.size
