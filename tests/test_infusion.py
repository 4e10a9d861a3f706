"""Infusion: residuals and pairs of streams against NumPy, what is trained, the plain stream, files and sizes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import SIDE, pictures

from datencoder_jax import api, tuning
from datencoder_jax.bookkeeping import PERSONALIZE
from datencoder_jax.checkpoints.concept_file import load_concept, save_concept
from datencoder_jax.composition import compose
from datencoder_jax.methods import infusion
from datencoder_jax.methods.method import Setup
from datencoder_jax.models.attention import Attention
from datencoder_jax.models.edits import ReadyResidual, apply, paired, ready
from datencoder_jax.pipeline import attention_shapes, projection_shapes
from datencoder_jax.plan.shapes import stable_diffusion
from datencoder_jax.tuning import TuningConfig
from datencoder_jax.typing import Concept, LearningRates, LowRank, Residual, Variables

CONFIG = TuningConfig(draws=2, views=4)
RATES = LearningRates(0.0, 3e-2)
STEPS, WIDTH = 3, 12


def personalize(pipeline, **changes):
    options = {"method": "infusion", "steps": STEPS, "word": "robot", "config": CONFIG, "learning_rates": RATES}
    return api.personalize(pipeline, pictures(2), **options | {"quiet": True} | changes)


def draw(pipeline, concept, prompt="a photo of a S*"):
    options = {"num": 1, "sampling_steps": 2, "quiet": True}
    return api.generate(pipeline, [prompt], concept=concept, **options).images.astype(int)


@pytest.fixture(scope="module")
def tuned(pipeline):
    return personalize(pipeline)


@pytest.fixture(scope="module")
def beginning(pipeline):
    return personalize(pipeline, steps=0).concept


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- the edit


def test_a_residual_is_added_where_its_vector_stands():
    rng = np.random.default_rng(0)
    residual, y = rng.standard_normal((2, 6)).astype(np.float32), rng.standard_normal((2, 5, 6)).astype(np.float32)
    slots = np.array([[-9, 0, 1, -9, -9], [-9, -9, 1, -9, 0]])
    made = ready({"p": Residual(jnp.asarray(residual))}, {}, slots=jnp.asarray(slots))
    expected = y.copy()
    for b, p in zip(*np.nonzero(slots >= 0), strict=True):
        expected[b, p] += residual[slots[b, p]]
    np.testing.assert_allclose(apply(made["p"], y, y), expected, rtol=1e-6)
    both = paired(made)
    np.testing.assert_array_equal(both["p"].added[2:], made["p"].added)
    assert not both["p"].added[:2].any()
    shared, own = LowRank(jnp.ones((3, 1)), jnp.ones((1, 3))), LowRank(jnp.ones((2, 3, 1)), jnp.ones((2, 1, 3)))
    both = paired(made | {"shared": shared, "own": own})
    assert both["shared"].down.shape == (3, 1) and both["own"].down.shape == (4, 3, 1)
    assert paired({"shared": shared}) is None and paired(None) is None


def attention(q, k, v, heads):
    """Of one sample, in float64."""
    q, k, v = (x.reshape(len(x), heads, -1) for x in (q, k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(axis=-1, keepdims=True), v).reshape(len(q), -1)


def test_the_second_stream_attends_as_the_first_to_its_own_values():
    layer = Attention(8, 6, 2, 4, path="a", dtype=jnp.float32, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    h, context, added = (rng.standard_normal(shape) for shape in ((4, 7, 8), (4, 5, 6), (4, 5, 8)))
    edit = {"a.to_v": ReadyResidual(jnp.asarray(added, jnp.float32))}
    found = layer(jnp.asarray(h, jnp.float32), jnp.asarray(context, jnp.float32), offsets=edit, pair=True)
    w = {name: np.asarray(getattr(layer, name).kernel[...], np.float64) for name in ("to_q", "to_k", "to_v")}
    out, bias = (np.asarray(x[...], np.float64) for x in (layer.to_out[0].kernel, layer.to_out[0].bias))
    for row in range(4):
        plain = row % 2
        values = context[row] @ w["to_v"] + added[row]
        expected = attention(h[plain] @ w["to_q"], context[plain] @ w["to_k"], values, 2) @ out + bias
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-5)


def test_self_attention_is_each_streams_own():
    layer = Attention(8, None, 2, 4, path="a", dtype=jnp.float32, rngs=nnx.Rngs(0))
    h = jnp.asarray(np.random.default_rng(2).standard_normal((4, 7, 8)), jnp.float32)
    np.testing.assert_array_equal(layer(h, pair=True), layer(h))


# --- the streams


@pytest.fixture(scope="module")
def streams(pipeline, tuned):
    """Predictions of the base model, of both streams, and of the second, with residuals of several sizes."""
    base, rng = pipeline.base, np.random.default_rng(3)
    latents = jnp.asarray(rng.standard_normal((2, SIDE // 2, SIDE // 2, 4)), jnp.float32)
    t, concept = jnp.array([300, 700]), tuned.concept
    ids = jnp.asarray(pipeline.tokenizer.encode(["a photo of a S*", "a S* in the snow"], {"S*": 1}))

    def both(base, embeddings, offsets):
        soft = base.condition(ids, embeddings)
        edits = base.edits(Variables(embeddings, offsets), soft)
        context = jnp.concatenate([soft.context, soft.context])
        batch = jnp.concatenate([latents, latents]), jnp.concatenate([t, t]), context
        return base.unet(*batch, offsets=paired(edits), pair=True), base.denoise(latents, t, soft, offsets=edits)

    def plain(base):
        words = jnp.asarray(pipeline.tokenizer.encode(["a photo of a robot", "a robot in the snow"]))
        return base.denoise(latents, t, base.condition(words))

    run, networks = jax.jit(both), base.only("unet", "text")
    sizes = {scale: jax.tree.map(lambda x, s=scale: s * jnp.asarray(x), concept.offsets) for scale in (0.0, 1.0, 10.0)}
    found = {scale: run(networks, jnp.asarray(concept.embeddings), offsets) for scale, offsets in sizes.items()}
    return jax.jit(plain)(networks), found


def test_the_plain_stream_is_the_base_model_to_the_last_bit(streams):
    plain, found = streams
    for two, _ in found.values():
        np.testing.assert_array_equal(two[:2], found[0.0][0][:2])
        # The base model alone is another program, of half the batch.
        np.testing.assert_allclose(two[:2], plain, rtol=1e-5, atol=1e-5)


def test_the_concepts_stream_is_what_is_predicted(streams):
    plain, found = streams
    for scale, (two, predicted) in found.items():
        np.testing.assert_allclose(predicted, two[2:], rtol=1e-5, atol=1e-5)
        assert (np.abs(predicted - plain).max() > 1e-3) == (scale > 0)


def test_zero_residuals_are_the_base_model(streams):
    plain, found = streams
    np.testing.assert_array_equal(found[0.0][0][2:], found[0.0][0][:2])
    np.testing.assert_allclose(found[0.0][1], plain, rtol=1e-5, atol=1e-5)


def test_a_prompt_of_one_row_is_every_samples(pipeline, tuned):
    base, embeddings = pipeline.base, jnp.asarray(tuned.concept.embeddings)
    latents = jax.random.normal(jax.random.key(4), (3, SIDE // 2, SIDE // 2, 4))
    ids = jnp.asarray(pipeline.tokenizer.encode(["a photo of a S*"], {"S*": 1}))
    offsets = jax.tree.map(lambda x: 10.0 * jnp.asarray(x), tuned.concept.offsets)

    def predict(base, ids):
        soft = base.condition(ids, embeddings)
        return base.denoise(
            latents, jnp.array([10, 300, 700]), soft, offsets=base.edits(Variables(embeddings, offsets), soft)
        )

    run, networks = jax.jit(predict), base.only("unet", "text")
    np.testing.assert_allclose(run(networks, ids), run(networks, jnp.tile(ids, (3, 1))), rtol=1e-5, atol=1e-5)


# --- tuning


def test_the_start_is_the_class_word_and_zeros(pipeline, beginning):
    base = pipeline.base
    np.testing.assert_array_equal(beginning.embeddings, np.asarray(base.table)[[pipeline.tokenizer.word_id("robot")]])
    shapes = attention_shapes(base.unet)
    expected = {path: (1, out) for path, (_, out) in shapes.items() if path.endswith(".attn2.to_v")}
    assert {path: edit.residual.shape for path, edit in beginning.offsets.items()} == expected
    assert not any(edit.residual.any() for edit in beginning.offsets.values())
    assert beginning.nearest_word == "robot" and beginning.blend == 1.0


def test_residuals_alone_are_trained(pipeline, tuned, beginning):
    np.testing.assert_array_equal(tuned.concept.embeddings, beginning.embeddings)
    assert all(np.abs(edit.residual).min() > 0 for edit in tuned.concept.offsets.values())
    assert tuned.report["trained"] == sum(edit.residual.size for edit in beginning.offsets.values())


def test_the_fused_loop_equals_single_steps(pipeline, tuned, beginning):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), PERSONALIZE), 3)
    images = api.prepare(pipeline, pictures(2))
    variables = Variables(*jax.tree.map(jnp.asarray, (beginning.embeddings, beginning.offsets)))
    ids = jnp.asarray(pipeline.tokenizer.encode(["a photo of a S*"], {"S*": 1}))
    problem = tuning.Problem(
        pipeline.base.only("unet"),
        tuning.encode_views_program(pipeline.base.only("vae"), images, keys[1], config=CONFIG, quiet=True),
        ids,
        None,
        jnp.float32(1),
        jax.tree.map(jnp.float32, infusion.rates_of(variables, RATES)),
        keys[2],
        tuning.read_prompt(pipeline.base.only("text", "text_2"), ids, variables.embeddings, quiet=True),
    )
    step, state = jax.jit(tuning.tune_step, static_argnames="config"), tuning.start(variables)
    for _ in range(STEPS):
        state, _ = step(problem, state, config=CONFIG)
    found = tuned.concept.offsets
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, state.variables.offsets)


# --- files and pictures


def test_a_file_holds_every_bit_and_draws_the_same(pipeline, tuned, tmp_path):
    save_concept(tmp_path / "c", tuned.concept)
    loaded = load_concept(tmp_path / "c", pipeline.fingerprint, attention_shapes(pipeline.base.unet), width=WIDTH)
    same((loaded.embeddings, loaded.offsets), (tuned.concept.embeddings, tuned.concept.offsets))
    np.testing.assert_array_equal(draw(pipeline, loaded), draw(pipeline, tuned.concept))


def test_pictures_are_the_base_models_until_it_has_learned(pipeline, tuned, beginning):
    plain = api.generate(pipeline, ["a photo of a robot"], num=1, sampling_steps=2, quiet=True).images.astype(int)
    assert np.abs(draw(pipeline, beginning) - plain).max() <= 1
    assert np.abs(draw(pipeline, tuned.concept) - plain).max() > 1


def test_residuals_of_two_concepts_stay_with_their_vectors(tuned):
    first = tuned.concept
    second = replace(
        first, token="T*", offsets={path: Residual(-edit.residual) for path, edit in first.offsets.items()}
    )
    for path, edit in compose([first, second], [1.0, 0.5]).variables.offsets.items():
        residual = first.offsets[path].residual
        np.testing.assert_array_equal(edit.residual, np.concatenate([residual, -0.5 * residual]))


# --- sizes


@pytest.mark.parametrize(("layers", "numbers"), [("all", 12_480), ("last", 2_880)])
def test_numbers_for_stable_diffusion(layers, numbers, tmp_path, pipeline, monkeypatch):
    unet = stable_diffusion("1.5", "float32").unet
    shapes = projection_shapes({name: tuple(x.shape) for name, x in unet.params.items()})
    large = replace(pipeline, base=replace(pipeline.base, unet=unet))
    monkeypatch.setattr(infusion, "attention_shapes", lambda _: shapes)
    made = infusion.start(Setup(large, jnp.zeros(0), [1], jax.random.key(0)), layers)
    assert sum(edit.residual.size for edit in made.offsets.values()) == numbers
    save_concept(tmp_path / "c", Concept(np.zeros((1, 768), np.float32), made.offsets, "S*", 1.0, "sd", "f", "dog"))
    assert 0 < (tmp_path / "c").stat().st_size - 4 * (numbers + 768) < 4_000  # beside them, names and settings


def test_the_last_levels_are_of_the_decoder(pipeline):
    concept = personalize(pipeline, steps=0, options={"layers": "last"}).concept
    assert concept.offsets and all(path.startswith("up_blocks.0.") for path in concept.offsets)  # it has one level
