"""What the vision tower sees is the same in pretraining, which resizes on the host, and in personalization."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import datencoder_jax
from datencoder_jax.base import Base
from datencoder_jax.data.images import to_float
from datencoder_jax.data.items import Item
from datencoder_jax.data.reading import fit_square, read_image
from datencoder_jax.data.views import Crop, make_views

WHOLE = Crop(1.0, 0.5, 0.5, False)
PHOTOGRAPHS = sorted((Path(__file__).parent / "data" / "dreambench_mini").glob("*/00.jpg"))[:3]


def seen(picture, side):
    """What the tower sees in personalization, as pixels in [0, 255]."""
    half = jnp.full(3, 0.5)
    base = SimpleNamespace(
        eyes=SimpleNamespace(config=SimpleNamespace(image_size=side)), pixel_std=half, pixel_mean=half
    )
    return (np.asarray(Base.vision_input(base, to_float(picture[None])))[0] + 1.0) * 127.5


@pytest.mark.parametrize("sizes", [(512, 224), (256, 224), (448, 224), (96, 224), (64, 64)])
@pytest.mark.parametrize("file", PHOTOGRAPHS, ids=lambda file: file.parent.name)
def test_pretraining_and_personalization_see_the_same(file, sizes):
    picture = read_image(file)
    images, vision = make_views(Item("a", picture), WHOLE, sizes, 1)
    np.testing.assert_array_equal(images, fit_square(picture, sizes[0]))
    found = seen(images, sizes[1])
    # Halves are rounded one way or the other.
    assert abs(found - vision).max() < 2.01 and (abs(found - vision) > 0.01).mean() < 0.01


def test_contrasts_stay_within_the_range_of_pixels():
    edges = (np.indices((64, 64)).sum(0) // 5 % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2)
    assert seen(edges, 48).min() >= 0 and seen(edges, 48).max() <= 255


def test_the_embedded_model_resizes_nothing():
    assets = Path(datencoder_jax.__file__).parent / "assets" / "toyworld"
    vision = json.loads((assets / "image_encoder" / "config.json").read_text())["image_size"]
    unet = json.loads((assets / "unet" / "config.json").read_text())["sample_size"]
    vae = json.loads((assets / "vae" / "config.json").read_text())["block_out_channels"]
    side = unet * 2 ** (len(vae) - 1)
    assert vision == side == 32
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    np.testing.assert_array_equal(fit_square(picture, side), picture)
    np.testing.assert_allclose(seen(picture, vision), picture, atol=1e-4)
    images, tower = make_views(Item("a", picture), WHOLE, (side, vision), 1)
    assert (images == picture).all() and (tower == picture).all()
