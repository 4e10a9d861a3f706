"""The tuning-encoder: what it reads, what it fills, what it is before training, and its folder."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SIDE, UNET, VISION, pictures, random_model

from datencoder_jax import api
from datencoder_jax.checkpoints.encoder_folder import read_encoder, write_encoder
from datencoder_jax.checkpoints.folders import write_component
from datencoder_jax.data.images import to_float
from datencoder_jax.encoder.features import denoiser_features, extract, tapped_layers, vision_features
from datencoder_jax.encoder.tuning_encoder import TuningEncoder
from datencoder_jax.errors import UserError
from datencoder_jax.loading import with_encoder
from datencoder_jax.models.module import Model, abstract_params, init_params
from datencoder_jax.models.unet import UNet2DConditionModel, UNetConfig
from datencoder_jax.pipeline import attention_shapes, projection_shapes, with_vision
from datencoder_jax.toyworld.dataset import render_batch
from datencoder_jax.toyworld.world import Context
from datencoder_jax.training.anchors import Anchors, read_anchors
from datencoder_jax.training.encoder_stage import encoder_config
from datencoder_jax.tuning import TuningConfig
from datencoder_jax.typing import Features

BATCH = 3


@pytest.fixture(scope="module")
def stable_diffusion():
    """The UNet of Stable Diffusion 1.x as shapes; nothing is allocated."""
    config = UNetConfig()
    return Model(UNet2DConditionModel, config, abstract_params(UNet2DConditionModel, config))


@pytest.fixture(scope="module")
def untrained(pipeline):
    config = pipeline.encoder.config
    return Model(TuningEncoder, config, init_params(TuningEncoder, config, jax.random.key(0)))


@pytest.fixture(scope="module")
def features(pipeline):
    config = pipeline.encoder.config
    keys = jax.random.split(jax.random.key(1), 3)
    return Features(
        jax.random.normal(keys[0], (BATCH, config.vision_taps, config.vision_width)),
        jax.random.normal(keys[1], (BATCH, VISION.patches, config.vision_width)),
        jax.random.normal(keys[2], (BATCH, config.denoiser_width)),
        jnp.array([10, 500, 900]),
    )


@jax.jit
def predict(encoder, features):
    return encoder(features)


@pytest.fixture(scope="module")
def predicted(pipeline, features):
    return predict(pipeline.encoder, features)


# --- the inventory


def test_the_inventory_of_stable_diffusion(stable_diffusion):
    inventory = attention_shapes(stable_diffusion)
    assert len(inventory) == 128
    assert sum(inputs + outputs for inputs, outputs in inventory.values()) == 199_296
    # Sixteen transformer blocks, two attentions each, q, k, v and out.
    assert {path.split(".attn")[1] for path in inventory} == {
        f"{n}.to_{name}" for n in (1, 2) for name in ("q", "k", "v", "out.0")
    }
    assert len({path.split(".attn")[0] for path in inventory}) == 16
    first = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert inventory[f"{first}.attn2.to_k"] == (768, 320) and inventory[f"{first}.attn1.to_out.0"] == (320, 320)


def test_every_attention_weight_is_in_the_inventory(stable_diffusion):
    weights = {name for name in stable_diffusion.params if ".attn" in name and name.endswith(".weight")}
    assert {f"{path}.weight" for path in attention_shapes(stable_diffusion)} == weights


def test_a_projection_that_is_not_known_is_an_error():
    known = {"a.attn1.to_q.weight": (4, 4), "a.attn1.to_out.0.bias": (4,), "a.norm1.weight": (4,)}
    assert projection_shapes(known) == {"a.attn1.to_q": (4, 4)}
    with pytest.raises(UserError, match=r"a\.attn2\.add_k_proj\.weight"):
        projection_shapes(known | {"a.attn2.add_k_proj.weight": (4, 4)})


def test_the_encoder_fills_the_inventory(pipeline, predicted):
    shapes = attention_shapes(pipeline.base.unet)
    assert predicted.offsets.keys() == shapes.keys() and len(shapes) == 4 * 2 * 4
    for path, (inputs, outputs) in shapes.items():
        down, up = predicted.offsets[path]
        assert down.shape == (BATCH, inputs, 2) and up.shape == (BATCH, 2, outputs)
    assert predicted.embeddings.shape == (BATCH, 1, 12)


# --- features


def test_the_width_of_stable_diffusions_features(stable_diffusion):
    latents = jax.ShapeDtypeStruct((2, 64, 64, 4), jnp.float32)
    t, context = jax.ShapeDtypeStruct((2,), jnp.int32), jax.ShapeDtypeStruct((2, 77, 768), jnp.float32)
    pooled = jax.eval_shape(denoiser_features, stable_diffusion, latents, t, context)
    assert pooled.shape == (2, 10_880) and pooled.dtype == jnp.float32


def test_every_second_layer_is_tapped():
    assert tapped_layers(12) == (2, 4, 6, 8, 10, 12)
    assert tapped_layers(3) == (1, 3)
    assert tapped_layers(1) == (1,)


def test_the_configuration_is_read_off_the_model(pipeline):
    config = encoder_config(pipeline, rank=3, blend=0.25)
    assert (config.vision_width, config.vision_taps, config.embedding_dim) == (VISION.hidden_size, 2, 12)
    assert config.denoiser_width == 3 * UNET.block_out_channels[0]  # conv_in, one block, mid
    assert config.reference_norm == pytest.approx(0.3 * 12**0.5, rel=0.1)
    assert config.rank == 3 and config.blend == 0.25


def images_and_latents(count):
    keys = jax.random.split(jax.random.key(2), 3)
    images = jax.random.uniform(keys[0], (count, SIDE, SIDE, 3))
    latents = jax.random.normal(keys[1], (count, SIDE // 2, SIDE // 2, 4))
    return images, latents, jnp.arange(count) * 300, jax.random.normal(keys[2], (count, 5, 12))


def test_features_are_of_each_sample_and_carry_no_gradient(pipeline):
    base, (images, latents, t, context) = pipeline.base, images_and_latents(2)

    @jax.jit
    def run(vision, unet, images, latents):
        def total(vision, unet, images, latents):
            found = extract(vision_features(vision, images), unet, latents, t, context)
            return sum(x.sum() for x in found[:3]), found

        return jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True)(vision, unet, images, latents)

    gradients, found = run(base.vision, base.unet, images, latents)
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradients))
    assert found.classes.shape == (2, 2, 8) and found.patches.shape == (2, 4, 8) and found.denoiser.shape == (2, 24)
    for part in found[:3]:
        assert part.dtype == jnp.float32 and not np.allclose(part[0], part[1], atol=1e-3)
    classes, patches, _ = jax.jit(vision_features)(base.vision, images)
    np.testing.assert_allclose(found.classes, classes, atol=1e-5)
    np.testing.assert_allclose(found.patches, patches, atol=1e-5)


def test_the_vision_tower_sees_normalized_pictures(pipeline):
    small = jnp.stack([jnp.full((4, 4, 3), value, jnp.float32) for value in (-1.0, 1.0)])
    seen = pipeline.base.vision_input(small)
    assert seen.shape == (2, SIDE, SIDE, 3)
    for row, pixel in zip(seen, (0.0, 1.0), strict=True):
        expected = (pixel - pipeline.base.pixel_mean) / pipeline.base.pixel_std
        np.testing.assert_allclose(row, np.broadcast_to(expected, row.shape), rtol=1e-5)


# --- the network


def test_an_untrained_encoder_leaves_the_base_model_as_it_is(pipeline, untrained, features):
    variables = predict(untrained, features)
    assert all(not offset.up.any() and offset.down.any() for offset in variables.offsets.values())
    _, latents, t, context = images_and_latents(BATCH)
    unet = jax.jit(lambda model, offsets: model(latents, t, context, offsets=offsets))
    np.testing.assert_array_equal(unet(pipeline.base.unet, variables.offsets), unet(pipeline.base.unet, None))


def test_predictions_are_of_each_sample(pipeline, features, predicted):
    for leaf in jax.tree.leaves(predicted):
        assert all(not np.allclose(leaf[i], leaf[j], atol=1e-4) for i, j in ((0, 1), (0, 2), (1, 2)))
    turned = predict(pipeline.encoder, jax.tree.map(lambda x: x[::-1], features))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[::-1], b, atol=1e-5), predicted, turned)


@pytest.mark.parametrize("part", ("classes", "patches", "denoiser", "t"))
def test_every_feature_matters(pipeline, features, predicted, part):
    value = getattr(features, part)
    changed = features._replace(**{part: value[jnp.array([1, 1, 2])]})
    other = predict(pipeline.encoder, changed)
    for before, after in zip(jax.tree.leaves(predicted), jax.tree.leaves(other), strict=True):
        assert not np.array_equal(before[0], after[0])
        np.testing.assert_allclose(before[1:], after[1:], atol=1e-5)


def test_gradients_reach_every_parameter_after_one_step(untrained, features):
    def loss(params):
        embeddings, offsets, *_ = untrained.with_params(params)(features)
        rng, total = np.random.default_rng(0), 0.0
        for product in (embeddings, *(o.down @ o.up for o in offsets.values())):
            total += (product * rng.standard_normal(product.shape, dtype=np.float32)).sum()
        return total

    gradient = jax.jit(jax.grad(loss))
    first = gradient(untrained.params)
    # With B = 0 nothing reaches A, and so the queries only through B's and the embedding's heads.
    assert all(not value.any() for name, value in first.items() if name.startswith("down_heads"))
    stepped = jax.tree.map(lambda x, g: x - 1e-2 * g, untrained.params, first)
    second = gradient(stepped)
    assert [name for name, value in second.items() if not (np.isfinite(value).all() and value.any())] == []
    # Every query has its own layer to fill.
    assert (jnp.abs(second["queries"]).sum(axis=1) > 0).all()


# --- its folder


def test_written_and_read_back(pipeline, tmp_path):
    write_encoder(tmp_path / "e", pipeline.encoder, "abc", "eye", dtype="float32")
    found = read_encoder(tmp_path / "e", "abc", "eye")
    assert found.config == pipeline.encoder.config and hash(found.config) == hash(pipeline.encoder.config)
    assert found.params.keys() == pipeline.encoder.params.keys()
    for name, value in pipeline.encoder.params.items():
        np.testing.assert_array_equal(found.params[name], value, err_msg=name)
    write_encoder(tmp_path / "e", pipeline.encoder, "abc", "eye")  # replaces it, in half precision
    half = read_encoder(tmp_path / "e", "abc", "eye")
    for name, value in pipeline.encoder.params.items():
        assert half.params[name].dtype == jnp.float32
        np.testing.assert_array_equal(half.params[name], value.astype(jnp.float16).astype(jnp.float32), err_msg=name)


def test_what_is_no_encoder_for_this_model_is_refused(pipeline, tmp_path):
    folder = tmp_path / "e"
    with pytest.raises(UserError, match="home folder"):
        read_encoder("~nosuchuser/x", "abc", "eye")
    with pytest.raises(UserError, match="no encoder folder"):
        read_encoder(folder, "abc", "eye")
    write_encoder(folder, pipeline.encoder, "abc", "eye")
    with pytest.raises(UserError, match="another base model"):
        read_encoder(folder, "abd", "eye")
    with pytest.raises(UserError, match="another vision tower"):
        read_encoder(folder, "abc", "eyes")
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"_class_name": "UNet2DConditionModel"}, "does not hold a tuning-encoder"),
        ({"inventory": [["a", "b"]]}, "does not describe"),
        ({"inventory": 3}, "does not describe"),
        ({"rank": "4"}, "rank cannot be '4'"),
        ({"rank": -1}, "does not describe"),
        ({"blend": True}, "blend cannot be True"),
        ({"vision_width": None}, "vision_width"),  # null is an option left out, and this one has no default
        ({"inventory": config["inventory"][1:]}, "queries"),
        ({"width": 16}, "model.safetensors"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message) as info:
            read_encoder(folder, "abc", "eye")
        assert "\n" not in str(info.value)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "vision_width"}))
    with pytest.raises(UserError, match="vision_width"):
        read_encoder(folder, "abc", "eye")


def test_an_encoder_is_used_with_its_own_vision_tower(pipeline, tmp_path):
    eyes, marks = pipeline.base.eyes, (pipeline.fingerprint, pipeline.vision_fingerprint)
    changed = eyes.with_params({name: value + 0.01 for name, value in eyes.params.items()})
    for name, tower, dtype in (("same", eyes, "float32"), ("half", eyes, "float16"), ("other", changed, "float32")):
        write_component(tmp_path / name, tower, dtype=dtype)
    write_encoder(tmp_path / "encoder", pipeline.encoder, *marks)
    for name, dtype in (("same", "float32"), ("same", "bfloat16"), ("half", "float32")):
        seeing = with_vision(pipeline, tmp_path / name, dtype=dtype)
        assert with_encoder(seeing, tmp_path / "encoder").vision_fingerprint == pipeline.vision_fingerprint
    with pytest.raises(UserError, match="another vision tower"):
        with_encoder(with_vision(pipeline, tmp_path / "other"), tmp_path / "encoder")
    # One that does not name its tower is told by its sizes, as far as they tell.
    write_encoder(tmp_path / "old", pipeline.encoder, pipeline.fingerprint, "")
    with_encoder(pipeline, tmp_path / "old")
    for change in ({"vision_width": 24}, {"vision_taps": 1}):
        config = replace(pipeline.encoder.config, **change)
        write_encoder(tmp_path / "wide", random_model(TuningEncoder, config, 1), pipeline.fingerprint, "")
        with pytest.raises(UserError, match="name the tower it was trained with"):
            with_encoder(pipeline, tmp_path / "wide")


def test_a_larger_value_than_half_precision_holds_is_refused(pipeline, tmp_path):
    params = pipeline.encoder.params | {"queries": pipeline.encoder.params["queries"] * 1e6}
    with pytest.raises(UserError, match="queries"):
        write_encoder(tmp_path / "e", replace(pipeline.encoder, params=params), "abc", "eye")
    assert not (tmp_path / "e").exists()


def test_sizes_of_an_encoder_for_stable_diffusion(pipeline, stable_diffusion):
    inventory = tuple((path, *shape) for path, shape in attention_shapes(stable_diffusion).items())
    config = replace(
        pipeline.encoder.config,
        inventory=inventory,
        denoiser_width=10_880,
        embedding_dim=768,
        width=512,
        rank=4,
        heads=8,
    )
    count = sum(x.size for x in abstract_params(TuningEncoder, config).values())
    assert len(config.shapes) == 6 and count < 60e6  # a decoder of its own for every projection would be 400e6


# --- what may be added: earlier patches, and words to start from


def test_patches_of_earlier_layers_are_read_each_by_its_own_projection(pipeline, features):
    config = replace(pipeline.encoder.config, patch_taps=2)
    encoder = Model(TuningEncoder, config, init_params(TuningEncoder, config, jax.random.key(0)))
    assert "early_patch_proj.0.weight" in encoder.params
    early, late = features.patches, features.patches[::-1]
    both = features._replace(patches=jnp.concatenate([early, late], axis=1))
    swapped = features._replace(patches=jnp.concatenate([late, early], axis=1))
    assert not np.allclose(predict(encoder, both).embeddings, predict(encoder, swapped).embeddings, atol=1e-6)


def test_the_tower_gives_the_patches_of_its_last_tapped_layers(pipeline):
    base = pipeline.base
    images, *_ = images_and_latents(1)
    once = jax.jit(vision_features)(base.vision, images)
    twice = jax.jit(vision_features, static_argnums=2)(base.vision, images, 2)
    count = VISION.patches
    assert twice.patches.shape[1] == 2 * count
    np.testing.assert_array_equal(twice.patches[:, count:], once.patches)
    taps = tapped_layers(VISION.num_hidden_layers)
    hidden = jax.jit(lambda vision, x: vision(x).hidden)(base.vision, images)
    np.testing.assert_array_equal(twice.patches[:, :count], hidden[taps[-2]][:, 1:])


def test_an_anchored_encoder_starts_at_the_word_that_fits_the_picture_best(pipeline, features):
    anchors = Anchors(jnp.eye(3), jnp.arange(36.0).reshape(3, 12))
    config = replace(pipeline.encoder.config, **anchors.sizes)
    params = init_params(TuningEncoder, config, jax.random.key(0))
    params |= {"token_head.weight": jnp.zeros_like(params["token_head.weight"])} | anchors.params
    encoder = Model(TuningEncoder, config, params)
    seen = features._replace(projected=jnp.array([[0.1, 0.2, 0.9], [5.0, 1.0, 4.0], [-3.0, -1.0, -2.0]]))
    np.testing.assert_array_equal(predict(encoder, seen).embeddings[:, 0], anchors.vectors[jnp.array([2, 0, 1])])

    gradient = jax.jit(jax.grad(lambda params: encoder.with_params(params)(seen).embeddings.sum()))(params)
    assert not gradient["anchors.keys"].any() and not gradient["anchors.vectors"].any()
    assert gradient["token_head.bias"].any()
    with pytest.raises(ValueError, match="projection of the picture"):
        encoder(features)


def test_anchors_are_words_as_the_text_tower_reads_them(pipeline):
    if not pipeline.base.text.config.with_projection:
        with pytest.raises(UserError, match="share no space"):
            read_anchors(pipeline, ("robot",))
    world = api.load("toyworld")
    found = read_anchors(world, ("robot", "teapot"))
    np.testing.assert_allclose(jnp.linalg.norm(found.keys, axis=1), 1.0, rtol=1e-5)
    ids = [world.tokenizer.word_id(word) for word in ("robot", "teapot")]
    np.testing.assert_array_equal(found.vectors, world.base.table[jnp.array(ids)])
    picture = to_float(render_batch([1_200_002], [Context("beach")], [0]))  # a teapot
    projected = vision_features(world.base.eyes, world.base.vision_input(jnp.asarray(picture))).projected
    assert int((projected @ found.keys.T).argmax()) == 1


@pytest.mark.parametrize("sees", [("classes", "patches"), ("denoiser",)])
def test_an_encoder_may_see_less(pipeline, features, sees):
    config = replace(pipeline.encoder.config, sees=sees)
    encoder = Model(TuningEncoder, config, init_params(TuningEncoder, config, jax.random.key(0)))
    assert ("denoiser_proj.weight" in encoder.params) == ("denoiser" in sees) != ("patch_proj.weight" in encoder.params)
    before = predict(encoder, features).embeddings
    for part in ("classes", "patches", "denoiser"):
        value = getattr(features, part)
        after = predict(encoder, features._replace(**{part: value[jnp.array([1, 1, 2])]})).embeddings
        assert np.array_equal(before, after) == (part not in sees)
    with pytest.raises(ValueError, match="sees is"):
        replace(config, sees=("smell",))


def test_an_encoder_without_a_hypernetwork_predicts_words_alone_and_tunes_both(pipeline, tmp_path):
    config = encoder_config(pipeline, rank=2, width=8, depth=1, heads=2, hypernetwork=False)
    encoder = Model(TuningEncoder, config, init_params(TuningEncoder, config, jax.random.key(0)))
    write_encoder(tmp_path / "encoder", encoder, pipeline.fingerprint, pipeline.vision_fingerprint)
    loaded = replace(
        pipeline, encoder=read_encoder(tmp_path / "encoder", pipeline.fingerprint, pipeline.vision_fingerprint)
    )
    options = {"config": TuningConfig(draws=2, views=2), "quiet": True}
    start = api.personalize(loaded, pictures(1), steps=0, **options).concept
    tuned = api.personalize(loaded, pictures(1), steps=1, **options).concept
    assert set(start.offsets) == set(attention_shapes(pipeline.base.unet))
    assert all(not np.any(offset.up) for offset in start.offsets.values())
    assert any(np.any(offset.up) for offset in tuned.offsets.values())


def test_gains_are_of_a_concept_that_is_not_tuned(pipeline, tmp_path):
    gained = replace(pipeline.encoder, config=replace(pipeline.encoder.config, gains=(0.5, 2.0)))
    write_encoder(tmp_path / "encoder", gained, pipeline.fingerprint, pipeline.vision_fingerprint)
    assert read_encoder(tmp_path / "encoder", pipeline.fingerprint, pipeline.vision_fingerprint).config.gains == (
        0.5,
        2.0,
    )
    both = (pipeline, replace(pipeline, encoder=gained))
    options = {"config": TuningConfig(draws=2, views=2), "quiet": True}
    plain, amplified = (api.personalize(each, pictures(1), steps=0, **options).concept for each in both)
    shares = {path: 0.5 if "attn2.to_v" in path else 2.0 if "attn1" in path else 1.0 for path in plain.offsets}
    assert sorted(set(shares.values())) == [0.5, 1.0, 2.0] and any("attn1.to_v" in path for path in shares)
    for path, offset in plain.offsets.items():
        before, after = (np.asarray(each.down) @ np.asarray(each.up) for each in (offset, amplified.offsets[path]))
        assert before.any()
        np.testing.assert_allclose(after, shares[path] * before, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(amplified.embeddings, plain.embeddings)
    tuned, same = (api.personalize(each, pictures(1), steps=1, **options).concept for each in both)
    for path, offset in tuned.offsets.items():
        np.testing.assert_array_equal(same.offsets[path].up, offset.up)


@pytest.mark.parametrize("gains", [(1.0, -1.0), (float("nan"), 1.0)])
def test_gains_are_numbers(pipeline, gains):
    with pytest.raises(ValueError, match="gains are"):
        replace(pipeline.encoder.config, gains=gains)
