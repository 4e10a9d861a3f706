"""The towers and scores of the evaluation, compiled for a GPU and a TPU; their float32 products are exact."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from datencoder_jax.evaluation import judge, picture_scores
from datencoder_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from datencoder_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from datencoder_jax.models.dino import DINOConfig, DINOModel
from datencoder_jax.models.module import Model, abstract_params
from datencoder_jax.plan import inspection
from datencoder_jax.plan.devices import find_machine
from datencoder_jax.plan.dry_run import PlannedProgram
from datencoder_jax.runtime.target import lowering_for

ROWS = 8
# ViT-B/32 of CLIP and ViT-S/16 of DINO, which DreamBooth's scores are of.
VISION = CLIPVisionConfig(with_projection=True)
TEXT = CLIPTextConfig(hidden_size=512, intermediate_size=2048, num_attention_heads=8, with_projection=True)


def programs():
    """Name, jitted function and arguments of every program of the scores."""
    pixels, three = shape(ROWS, 224, 224, 3, dtype="uint8"), shape(1, 1, 1, 3)
    own = model(judge.Judge, judge.load_judge().config)
    yield (
        "CLIP-I",
        picture_scores._look,
        (model(CLIPVisionModel, VISION), picture_scores._projected, pixels, three, three),
    )
    yield "CLIP-T", picture_scores._read, (model(CLIPTextModel, TEXT), shape(ROWS, 77, dtype="int32"))
    yield (
        "DINO",
        picture_scores._look,
        (model(DINOModel, DINOConfig()), picture_scores._class_token, pixels, three, three),
    )
    yield "judge", judge._verdict, (own, shape(ROWS, 32, 32, 3, dtype="uint8"))


def shape(*sides, dtype="float32"):
    return jax.ShapeDtypeStruct(sides, jnp.dtype(dtype))


def model(kind, config):
    return Model(kind, config, abstract_params(kind, config))


@pytest.mark.parametrize("name", ["CLIP-I", "CLIP-T", "DINO", "judge"])
@pytest.mark.parametrize("topology", ["H100", "v5e:1x1"])
def test_scores_are_computed_exactly(topology, name, compiled):
    machine = find_machine(topology)
    function, arguments = next((function, arguments) for label, function, arguments in programs() if label == name)
    sharding = SingleDeviceSharding(machine.devices[0])
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) if hasattr(x, "shape") else x, arguments
    )
    with lowering_for(machine.target):
        traced = function.trace(*arguments)
    result = compiled(PlannedProgram(name, arguments, traced, 1, ROWS, 0, {}), machine, "scores")
    assert not inspection.host_callbacks(result.text)
    products = list(inspection.products(result.text))
    assert products and all(product.exact for product in products if "f32" in product.operands)
