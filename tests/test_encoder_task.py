"""The tuning-encoder's task: its loss, its batches, and what does and does not depend on what."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.key_reuse import _core as key_reuse
from jax.sharding import AxisType
from tiny import pictures

from datencoder_jax.data.images import to_float
from datencoder_jax.encoder.features import vision_features
from datencoder_jax.encoder.tuning_encoder import TuningEncoder
from datencoder_jax.models.module import Model, abstract_params
from datencoder_jax.training.pairs import Pairs
from datencoder_jax.training.templates import TEMPLATES
from datencoder_jax.training.tuning_encoder import Frozen, TuningEncoderTask, Weights, offset_norm
from datencoder_jax.typing import LowRank, Variables

BATCH = 8
"""One sample for each of the test's devices."""
DRAWS = 2
"""Targets of every sample."""
ALL = slice(0, BATCH)
KEY = jax.random.key(0)
WEIGHTS = Weights(contrastive=0.5, norm=1e-2, temperature=0.1, neighbours=3, gamma=5.0)


@pytest.fixture(scope="module")
def task(pipeline):
    """On random pictures; concepts 0 and 1 have two views each in every batch."""
    shots = pictures(8).reshape(4, 2, 16, 16, 3)
    latents = np.random.default_rng(0).standard_normal((4, 2, 8, 8, 4)).astype(np.float16)
    ids = pipeline.tokenizer.encode(["a photo of S*", "S* at night"] * 4, {"S*": 1}).reshape(4, 2, -1)
    covered = np.random.default_rng(1).random((4, 2, 8, 8)).astype(np.float16)
    source = Pairs(shots, latents, covered, ids, batch_size=BATCH, share=0.5, seed=0, draws=DRAWS)
    templates = pipeline.tokenizer.encode([template.format("S*") for template in TEMPLATES[:3]], {"S*": 1})
    frozen = Frozen(pipeline.base, jnp.asarray(pipeline.tokenizer.encode([""])), jnp.asarray(templates))
    return TuningEncoderTask(
        pipeline.encoder.config, frozen, source, source.previews(2), batch_size=BATCH, weights=WEIGHTS, draws=DRAWS
    )


def changed(task, **changes):
    same = ("config", "frozen", "data", "previews", "batch_size", "weights", "draws")
    values = {name: getattr(task, name) for name in same}
    return TuningEncoderTask(**values | changes)


def sharded(task, **changes):
    return changed(task, mesh=jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2), **changes)


def run(task, params, batch=None, step=0):
    """`loss, values, gradient`."""
    batch = task.batch(0, ALL) if batch is None else batch
    (loss, values), grads = jax.jit(task.value_and_grad)(params, task.frozen, batch, KEY, jnp.int32(step))
    return float(loss), {name: float(value) for name, value in values.items()}, grads


def value(task, params, batch, steps=(0,)):
    """`loss, values` at each step, one program for them: without the gradient, which takes most of the compiling."""
    program = jax.jit(task.loss)
    found = [program(params, task.frozen, batch, KEY, jnp.int32(step)) for step in steps]
    return [(float(loss), {name: float(x) for name, x in values.items()}) for loss, values in found]


@pytest.fixture(scope="module")
def plain(pipeline, task):
    return run(task, pipeline.encoder.params)


def close(a, b, tolerance=1e-5):
    """Gradients agree to `tolerance` of the largest entry of each."""
    for name, x in a.items():
        np.testing.assert_allclose(x, b[name], atol=tolerance * max(float(jnp.abs(x).max()), 1e-3), err_msg=name)


def test_the_loss_is_the_sum_of_its_terms(task, plain):
    loss, values, _ = plain
    assert len(set(task.batch(0, ALL)["concepts"])) < BATCH  # some concepts twice: not each other's negatives
    assert values["contrastive"] > 0.1
    assert 0 < loss - values["denoise"] - 0.5 * values["contrastive"] < 0.1  # the penalty on the norm


def test_sharded_or_in_parts_it_is_the_same(pipeline, task, plain):
    for other in (sharded(task), changed(task, accumulate=4), changed(task, remat=True)):
        loss, values, grads = run(other, pipeline.encoder.params)
        assert loss == pytest.approx(plain[0], rel=1e-6)
        assert values == pytest.approx(plain[1], rel=1e-5)
        close(plain[2], grads)


def test_the_contrastive_weight_grows(pipeline, task, plain):
    slow = changed(task, weights=WEIGHTS._replace(contrastive_warmup=4))
    (early, values), (late, _) = value(slow, pipeline.encoder.params, task.batch(0, ALL), steps=(0, 3))
    assert plain[0] - early == pytest.approx(0.75 * 0.5 * values["contrastive"], rel=1e-4)
    assert late == pytest.approx(plain[0], rel=1e-6)


def test_errors_weigh_where_the_concept_is(pipeline, task, plain):
    """With focus 0 each half of the picture tells its own error, and together they tell what all pixels alike tell."""
    focused, batch = changed(task, weights=WEIGHTS._replace(focus=0.0)), task.batch(0, ALL)
    left = np.zeros_like(batch["covered"])
    left[..., :4] = 1.0
    program = jax.jit(focused.loss)

    def denoise(covered):
        _, values = program(pipeline.encoder.params, task.frozen, batch | {"covered": covered}, KEY, jnp.int32(0))
        return float(values["denoise"])

    halves = denoise(left), denoise(1.0 - left)
    assert np.mean(halves) == pytest.approx(plain[1]["denoise"], rel=1e-5)
    assert halves[0] != pytest.approx(halves[1], rel=1e-3)
    del batch["covered"]
    [(_, values)] = value(focused, pipeline.encoder.params, batch)
    assert values["denoise"] == pytest.approx(plain[1]["denoise"], rel=1e-6)


def test_each_target_counts_by_itself(pipeline, task, plain):
    """A batch whose samples are tried on several targets has the mean loss of those targets."""
    drawn = task._drawn(task.frozen.base, task.batch(0, ALL), KEY)
    bands = np.asarray(drawn["t"]) * DRAWS // task.frozen.base.schedule.num_train_timesteps
    np.testing.assert_array_equal(bands, np.tile(np.arange(DRAWS), (BATCH, 1)))  # spread over the noise levels
    each = ("t", "noise", "wanted", "covered", "ids")

    @jax.jit
    def denoise(params, k):
        samples = drawn | {name: jax.lax.dynamic_slice_in_dim(drawn[name], k, 1, axis=1) for name in each}
        one = changed(task, draws=1)
        inputs = one._inputs(task.frozen, samples)
        variables = Model(TuningEncoder, task.config, params)(inputs.features)
        return one._each(task.frozen.base, variables, inputs)[1]["denoise"].mean()

    alone = [float(denoise(pipeline.encoder.params, k)) for k in range(DRAWS)]
    assert np.mean(alone) == pytest.approx(plain[1]["denoise"], rel=1e-5) and alone[0] != pytest.approx(alone[1], 1e-3)


def test_one_picture_has_one_word_whatever_the_target(pipeline, task, plain):
    """Noise and timestep of the prediction are the batch's, those of the target are the sample's."""
    batch = task.batch(0, ALL)
    batch |= {name: np.repeat(batch[name][:1], BATCH, axis=0) for name in ("images", "latents")}
    [(_, values)] = value(task, pipeline.encoder.params, batch)
    assert values["concept_cosine"] == pytest.approx(1.0, abs=1e-5)
    assert plain[1]["concept_cosine"] < 0.999


def test_the_hard_path_teaches_the_word_and_nothing_else(pipeline, task):
    """With blend 0 only the nearest word is read, and only `v*` can change it."""
    weights = WEIGHTS._replace(contrastive=0.0, norm=0.0)
    *_, grads = run(changed(task, config=replace(task.config, blend=0.0), weights=weights), pipeline.encoder.params)
    assert float(jnp.abs(grads["token_head.bias"]).max()) > 1e-6
    assert all(float(jnp.abs(g).max()) == 0.0 for name, g in grads.items() if name.startswith(("up_", "down_")))


def picture_batch(template=0):
    return {
        "images": pictures(BATCH),
        "concepts": np.arange(BATCH, dtype=np.int32),
        "templates": np.full(BATCH, template, np.int32),
    }


def test_pictures_alone_are_enough(pipeline, task):
    """Without latents they are made here, without prompts a template is read, and the target is the picture itself.

    Moments and vision states that were computed beforehand say the same in their place, as does a vision view apart.
    """
    base, batch, params = pipeline.base, picture_batch(), pipeline.encoder.params
    [(loss, values)] = value(task, params, batch)
    assert np.isfinite(loss) and values["contrastive"] > 0.1
    mean, log_variance = base.vae.bind().encode(to_float(batch["images"]))
    classes, patches, _ = vision_features(base.vision, base.vision_input(to_float(batch["images"])))
    known = {name: batch[name] for name in ("concepts", "templates")}
    known |= {"moments": jnp.concatenate([mean, log_variance], -1), "classes": classes, "patches": patches}
    [(same, others)] = value(task, params, known)
    assert same == pytest.approx(loss, rel=1e-5) and others == pytest.approx(values, rel=1e-4)

    program = jax.jit(lambda *args: task.loss(*args)[0])

    def total(**changes):
        return float(program(params, task.frozen, batch | changes, KEY, jnp.int32(0)))

    assert total(vision=batch["images"]) == pytest.approx(loss, rel=1e-5)
    assert total(vision=batch["images"][::-1]) != pytest.approx(loss, rel=1e-5)
    assert total(vision=batch["images"], templates=batch["templates"] + 1) != pytest.approx(loss, rel=1e-5)


def test_batches_are_a_function_of_the_step_and_rows_are_its_rows(task):
    one, again, other = task.batch(3, ALL), task.batch(3, ALL), task.batch(4, ALL)
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert not np.array_equal(one["images"], other["images"])
    halves = [task.batch(3, rows) for rows in (slice(0, 4), slice(4, BATCH))]
    jax.tree.map(lambda whole, *parts: np.testing.assert_array_equal(whole, np.concatenate(parts)), one, *halves)
    seen, wanted = one["latents"], one["wanted"]
    assert wanted.shape[:2] == (BATCH, DRAWS)
    paired = [not np.array_equal(a, b) for a, targets in zip(seen, wanted, strict=True) for b in targets]
    assert 0 < sum(paired) < BATCH * DRAWS
    for concept, targets in zip(one["concepts"], wanted, strict=True):
        assert all(any(np.array_equal(z, view) for view in task.data.latents[concept]) for z in targets)


def test_a_single_view_per_concept_is_its_own_target(task):
    views = {name: getattr(task.data, name)[:, :1] for name in ("images", "latents", "covered", "ids")}
    batch = replace(task.data, **views, share=1.0).batch(0, ALL)
    np.testing.assert_array_equal(np.repeat(batch["latents"][:, None], DRAWS, axis=1), batch["wanted"])


def test_training_starts_in_the_midst_of_the_words(task, pipeline, monkeypatch):
    params = dict(pipeline.encoder.params)
    monkeypatch.setattr("datencoder_jax.training.tuning_encoder.init_params", lambda *_: params)
    words = np.asarray(pipeline.base.table)[np.asarray(pipeline.base.words)]
    midst = (words / np.linalg.norm(words, axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(task.init(KEY)["token_head.bias"], midst, atol=1e-6)
    assert {name: x.shape for name, x in task.init(KEY).items()} == {
        name: x.shape for name, x in abstract_params(TuningEncoder, task.config).items()
    }


def test_the_norm_of_the_offsets_needs_no_product():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape, dtype=np.float32))

    offsets = {"a": LowRank(draw(3, 5, 2), draw(3, 2, 7)), "b": LowRank(draw(3, 4, 2), jnp.zeros((3, 2, 4)))}
    expected = np.mean([np.linalg.norm(o.down @ o.up, axis=(1, 2)) for o in offsets.values()], axis=0)
    np.testing.assert_allclose(offset_norm(Variables(draw(3, 1, 2), offsets)), expected, rtol=1e-5)


def test_no_key_is_used_twice(pipeline, task):
    encoder = pipeline.encoder
    for batch in (task.batch(0, ALL), picture_batch()):
        for each in (task, sharded(task), changed(task, accumulate=2)):
            key_reuse.check_key_reuse(each.value_and_grad, encoder.params, each.frozen, batch, KEY, jnp.int32(0))
    key_reuse.check_key_reuse(task.draw_previews, encoder.params, task.frozen, task.previews.images, task.previews.ids)
