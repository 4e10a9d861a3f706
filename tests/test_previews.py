"""The images that pretraining shows while it runs."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absent_gpu import allow_cudnn, with_fused_attention
from jax.sharding import NamedSharding, PartitionSpec
from tiny import SIDE, in_half_precision

from datencoder_jax.data.images import grid
from datencoder_jax.data.reading import enlarge
from datencoder_jax.encoder.reading import read_again
from datencoder_jax.models import batches
from datencoder_jax.models.batches import map_in_batches
from datencoder_jax.models.vae import AutoencoderKL
from datencoder_jax.runtime.target import Target, lowering_for, sharing_batch
from datencoder_jax.training import mesh as on_mesh
from datencoder_jax.training import previews
from datencoder_jax.training.e4t import E4TFrozen, E4TTask, E4TWeights
from datencoder_jax.training.mesh import make_mesh
from datencoder_jax.training.previews import PreviewDrawer, Previews, write_previews
from datencoder_jax.training.tuning_encoder import Frozen, TuningEncoderTask, Weights, latent_shape, latents_of
from datencoder_jax.typing import Reader

COUNT, KEY = 3, jax.random.key(0)


@pytest.fixture(scope="module")
def wide(pipeline):
    return with_fused_attention(pipeline)


@pytest.mark.parametrize("stage", ["encoder", "e4t"])
def test_previews_trace_for_a_gpu_through_cudnn(wide, stage, monkeypatch):
    """Each image has an embedding of its own, and all of them one empty prompt."""
    allow_cudnn(monkeypatch)
    half = replace(wide, base=in_half_precision(wide.base))
    task, params = make_task(half, stage)
    images, ids, _ = task.previews
    with lowering_for(Target("cuda", (9, 0))):
        traced = jax.jit(task.draw_previews).trace(params, task.frozen, images, ids)
    assert "dot_product_attention_fwd" in str(traced.jaxpr)
    assert {x.shape for x in traced.out_info.values()} == {images.shape}


def test_every_latent_may_have_pictures_of_its_own(pipeline, wide):
    """What is predicted for one is what it would be alone."""
    base, encoder = wide.base, wide.encoder
    config, rng = base.vision.config, np.random.default_rng(0)
    seen = encoder.config
    patches = (config.image_size // config.patch_size) ** 2
    classes = rng.standard_normal((COUNT, 2, seen.vision_taps, config.hidden_size)).astype(np.float32)
    states = rng.standard_normal((COUNT, 2, seen.patch_taps * patches, config.hidden_size)).astype(np.float32)
    empty = base.condition(jnp.asarray(wide.tokenizer.encode([""])))
    latents = jax.random.normal(KEY, (COUNT, SIDE // 2, SIDE // 2, 4))
    read = jax.jit(
        lambda classes, patches, latents: read_again(
            Reader(encoder, classes, patches, empty.context, empty.pooled, jnp.ones(1)),
            jnp.zeros((1, sum(base.widths))),
            base.unet,
            latents,
            jnp.int32(400),
        )
    )
    together = read(classes, states, latents)
    for k in range(COUNT):
        alone = read(classes[k], states[k], latents[k : k + 1])[0]
        np.testing.assert_allclose(together[k], alone, rtol=2e-4, atol=2e-5)
    assert not np.allclose(together[0], together[1], atol=1e-3)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_batches_are_joined(size):
    """The function never sees more rows than are asked for, and every row once."""
    seen, rows = [], jnp.arange(10.0).reshape(5, 2)

    def double(batch):
        seen.append(len(batch))
        return {"twice": 2 * batch, "sum": batch.sum(axis=1)}

    found = map_in_batches(double, rows, size)
    np.testing.assert_array_equal(found["twice"], 2 * rows)
    np.testing.assert_array_equal(found["sum"], rows.sum(axis=1))
    assert max(seen) == min(size, 5)


@pytest.mark.parametrize(("count", "size"), [(8, 1), (24, 2), (16, 4), (5, 2)])
def test_every_device_is_at_its_own_rows_all_the_time(count, size):
    """A batch that a mesh does not divide is taken as on one device."""
    mesh, seen = make_mesh({"data": 4, "fsdp": 2}), []

    def double(batch):
        seen.append(len(batch))
        return {"twice": 2 * batch, "sum": batch.sum(axis=1)}

    rows = jax.random.normal(KEY, (count, 16))
    if count % mesh.size == 0:
        rows = jax.device_put(rows, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
    with sharing_batch(mesh):
        compiled = jax.jit(lambda rows: map_in_batches(double, rows, size)).lower(rows).compile()
    found = compiled(rows)
    np.testing.assert_array_equal(found["twice"], 2 * rows)
    np.testing.assert_allclose(found["sum"], rows.sum(axis=1), rtol=1e-6)
    assert max(seen) <= size * (8 if count % 8 == 0 else 1)
    assert not re.search("all-gather|all-to-all|collective-permute", compiled.as_text())


def make_task(pipeline, stage, **options):
    """A task of either stage with three previews, and its encoder's weights."""
    base, tokenizer = pipeline.base, pipeline.tokenizer
    images = np.asarray(jax.random.randint(KEY, (COUNT, SIDE, SIDE, 3), 0, 256), np.uint8)
    ids = tokenizer.encode(["a photo of S*"] * COUNT, {"S*": 1})
    empty, shown = jnp.asarray(tokenizer.encode([""])), Previews(images, ids, images)
    if stage == "e4t":
        frozen = E4TFrozen(base, empty, jnp.asarray(ids[:1]), jnp.zeros((1, sum(base.widths))))
        kind, encoder, weights = E4TTask, pipeline.domain, E4TWeights(norm=0.1, gamma=5.0)
    else:
        kind, encoder, weights = TuningEncoderTask, pipeline.encoder, Weights(0.1, 0.1, 0.1, 4, 5.0)
        frozen = Frozen(base, empty, jnp.asarray(ids[:1]))
    return kind(encoder.config, frozen, None, shown, batch_size=8, weights=weights, **options), encoder.params


@pytest.mark.parametrize("stage", ["encoder", "e4t"])
def test_previews_are_drawn_by_the_whole_mesh(wide, stage):
    """Three previews on eight devices: as on one device, with weights that stay split."""
    task, params = make_task(wide, stage)
    drawn = {}
    for sizes in ({"data": 1}, {"data": 4, "fsdp": 2}):
        mesh = make_mesh(sizes)
        placed = on_mesh.place(task.frozen, on_mesh.of_frozen(task.frozen, mesh))
        drawer = PreviewDrawer(task, placed, mesh)
        drawn[mesh.size] = drawer(on_mesh.place(params, on_mesh.of_params(params, mesh)))
        if mesh.size > 1:
            taken, count = drawer.compiled.memory_analysis().argument_size_in_bytes, len(jax.tree.leaves(placed))
            assert taken < 0.75 * sum(x.nbytes for x in jax.tree.leaves((task.frozen, params))) and count
    for name in ("vanilla", "encoder"):
        one, eight = drawn[1][name], drawn[8][name]
        assert one.shape == eight.shape == task.previews.images.shape and one.dtype == np.uint8
        assert np.abs(one.astype(int) - eight).mean() < 2
    assert (drawn[1]["vanilla"] != drawn[1]["encoder"]).any()


def test_a_training_step_encodes_a_few_images_of_every_device_at_a_time(pipeline, monkeypatch):
    """Eight, whatever the batch: here 128 on one device, and 16 on each of eight."""
    monkeypatch.setattr(batches, "_PIXELS", SIDE * SIDE)
    seen, encode = [], AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", lambda self, x: seen.append(len(x)) or encode(self, x))
    images = np.asarray(jax.random.randint(KEY, (128, SIDE, SIDE, 3), 0, 256), np.uint8)
    noise = jax.random.normal(KEY, (128, *latent_shape(pipeline.base, {"images": images})))
    samples = {"images": images, "latent_noise": noise}
    of_one = jax.jit(latents_of)(pipeline.base, samples)
    assert max(seen) == 8
    with sharing_batch(make_mesh({"data": 8})):
        of_eight = jax.jit(lambda base, samples: latents_of(base, samples))(pipeline.base, samples)
    assert max(seen) == 64
    np.testing.assert_allclose(of_one, of_eight, rtol=1e-4, atol=1e-5)


def test_a_grids_columns_are_labelled():
    images = np.random.default_rng(0).integers(0, 200, (6, 4, 4, 3), np.uint8)
    plain = np.asarray(grid(images, 4, scale=24))
    labelled = np.asarray(grid(images, 4, scale=24, labels=("input", "truth")))
    header = len(labelled) - len(plain)
    assert header > 0 and labelled.shape[1] == plain.shape[1] == 4 * (96 + 2) + 2
    assert (labelled[header:] == plain).all()  # the pictures are as they were
    assert (plain[2:98, 2:98] == enlarge(images[0], 24)).all() and (plain[100:, 200:] == 255).all()
    inks = [labelled[:header, 2 + 98 * column : 98 * (column + 1)] for column in range(4)]
    assert all((ink < 128).any() for ink in inks)
    assert (inks[0] == inks[2]).all() and (inks[1] == inks[3]).all() and not (inks[0] == inks[1]).all()


def test_long_labels_do_not_reach_the_next_column():
    images = np.zeros((2, 48, 48, 3), np.uint8)
    both, first = (
        np.asarray(grid(images, 2, labels=labels)) for labels in (("word alone", " "), ("word alone", "   "))
    )
    assert (both[: len(both) - 52, 50:] == 255).all() and both.shape == first.shape


def test_the_columns_of_previews_are_named(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(previews, "write_grid", lambda *given, **options: written.append((given, options)))
    given, word, encoded, truth = (np.full((COUNT, SIDE, SIDE, 3), value, np.uint8) for value in (10, 20, 30, 40))
    shown = Previews(given, np.zeros((COUNT, 77), np.int32), truth)
    scores = write_previews(shown, {"vanilla": word, "encoder": encoded}, tmp_path / "preview.png")
    ((_, images), options) = written[0]
    assert len(images) == 4 * COUNT and options["labels"] == ("input", "word alone", "encoder", "truth")
    assert options["columns"] % len(options["labels"]) == 0
    assert images[:4, 0, 0, 0].tolist() == [10, 20, 30, 40]
    assert scores["vanilla"] == pytest.approx(4 * scores["encoder"], rel=1e-4)
