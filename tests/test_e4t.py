"""E4T: its equations, what learns from its loss, its encoder in the loop of the sampler, its files."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.key_reuse import _core as key_reuse
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny import SIDE, pictures, random_model

from datencoder_jax import api, sampling, tuning
from datencoder_jax.checkpoints.concept_file import load_concept, save_concept
from datencoder_jax.checkpoints.encoder_folder import read_encoder, write_encoder
from datencoder_jax.checkpoints.export import Target, export_concept
from datencoder_jax.composition import compose
from datencoder_jax.data.images import to_float
from datencoder_jax.diffusion.samplers import make_plan
from datencoder_jax.diffusion.schedule import alphas_cumprod, snr_weight, stratified_timesteps
from datencoder_jax.encoder.domain_encoder import DomainEncoder, encoder_of, offsets_of
from datencoder_jax.encoder.features import denoiser_features
from datencoder_jax.errors import UserError
from datencoder_jax.loading import with_encoder
from datencoder_jax.methods import METHODS
from datencoder_jax.methods.datencoder import see
from datencoder_jax.models.module import abstract_params
from datencoder_jax.pipeline import attention_shapes
from datencoder_jax.training.e4t import E4TFrozen, E4TTask, E4TWeights
from datencoder_jax.training.encoder_stage import domain_config
from datencoder_jax.training.mesh import partition
from datencoder_jax.training.pairs import Pairs
from datencoder_jax.tuning import TuningConfig
from datencoder_jax.typing import Concept, Features, LearningRates

CONFIG = TuningConfig(draws=3, views=4, norm_weight=0.01)
RATES = LearningRates(1e-3, 1e-2)
BATCH, KEY = 4, jax.random.key(0)
WEIGHTS = E4TWeights(norm=0.01, gamma=5.0)


@pytest.fixture(scope="module")
def domain(pipeline):
    """The tiny pipeline with an E4T encoder whose every weight is random, as are the shared offsets."""
    config = domain_config(pipeline, "creature", rank=2, width=8, depth=1, heads=2)
    return replace(pipeline, encoder=None, domain=random_model(DomainEncoder, config, 5))


def personalize(pipeline, **changes):
    options = {"images": pictures(2), "method": "e4t", "config": CONFIG, "learning_rates": RATES, "quiet": True}
    return api.personalize(pipeline, **options | changes)


@pytest.fixture(scope="module")
def plain(domain):
    """A concept of two pictures as the encoder has it."""
    return personalize(domain, steps=0).concept


@pytest.fixture(scope="module")
def variables(plain):
    return compose([plain]).variables


@pytest.fixture(scope="module")
def problem(domain, variables):
    rates = jax.tree.map(jnp.float32, METHODS["e4t"].rates_of(variables, RATES))
    latents = jax.random.normal(jax.random.key(1), (CONFIG.views, SIDE // 2, SIDE // 2, 4))
    ids = jnp.asarray(domain.tokenizer.encode(["a photo of a S*"], {"S*": 1}))
    return tuning.Problem(domain.base.only("unet", "text", "text_2"), latents, ids, None, jnp.float32(1), rates, KEY)


def word(pipeline):
    return np.asarray(pipeline.base.table)[pipeline.tokenizer.word_id("creature")]


one_step = jax.jit(tuning.tune_step, static_argnames="config")


@jax.jit
def predicted(base, ids, vectors, noisy, t, offsets):
    return base.unet(noisy, t, base.text(ids, vectors).last_hidden, offsets=offsets)


def draw(*args):
    """What the UNet says of noisy latents, float64."""
    return np.asarray(predicted(*args), np.float64)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- the embedding


def test_the_embedding_is_the_word_and_a_tenth_of_the_prediction(domain, variables):
    """v*(z_t, t) = v_domain + 0.1 mean_i E(I_i, z_t, t), one picture and latent at a time."""
    latents, t = jax.random.normal(KEY, (3, SIDE // 2, SIDE // 2, 4)), jnp.array([7, 400, 990])
    found = jax.jit(lambda *args: domain.base.vectors(*args))(variables, latents, t)
    reader = variables.reader
    empty = domain.base.condition(jnp.asarray(domain.tokenizer.encode([""]))).context

    @jax.jit
    def predict(i, latent, t):
        maps = domain.base.unet.bind().features(latent[None], t[None], empty, None)
        pooled = jnp.concatenate([x.mean(axis=(1, 2)) for x in maps], axis=1)
        return reader.encoder(Features(reader.classes[i][None], reader.patches[i][None], pooled, t[None])).embeddings

    for k in range(3):
        each = [np.asarray(predict(i, latents[k], t[k]), np.float64)[0, 0] for i in range(2)]
        expected = np.asarray(word(domain), np.float64) + 0.1 * np.mean(each, axis=0)
        np.testing.assert_allclose(found[k, 0], expected, rtol=1e-4, atol=1e-5)
        assert not np.allclose(each[0], each[1])
    assert not np.allclose(found[0], found[1])


def test_without_steps_it_is_the_encoder_as_pretrained(domain, variables):
    reader, config = variables.reader, domain.domain.config
    np.testing.assert_array_equal(variables.embeddings, word(domain)[None])
    same(reader.encoder.params, encoder_of(config, domain.domain.params).params)
    same(variables.offsets, offsets_of(config, domain.domain.params))
    projections = {path.rpartition("transformer_blocks.0.")[2] for path in variables.offsets}
    assert projections == {f"attn{k}.to_{name}" for k in (1, 2) for name in "qkv"}
    assert all(np.abs(offset.up).max() > 0 for offset in variables.offsets.values())


# --- tuning


def test_the_loss_and_its_update(domain, variables, problem):
    """The denoising loss with one embedding per sample, the penalty on what is added, and Adam's first step."""
    base, key = domain.base, jax.random.fold_in(KEY, 0)
    view_key, t_key, noise_key = jax.random.split(key, 3)
    z = problem.latents[jax.random.randint(view_key, (CONFIG.draws,), 0, len(problem.latents))]
    t = stratified_timesteps(t_key, CONFIG.draws, base.schedule.num_train_timesteps)
    noise = jax.random.normal(noise_key, z.shape)
    a = alphas_cumprod(base.schedule)[np.asarray(t)].reshape(-1, 1, 1, 1)
    noisy = np.sqrt(a) * z + np.sqrt(1 - a) * noise
    vectors = jax.jit(lambda *args: base.vectors(*args))(variables, noisy, t)
    made = draw(base, jnp.repeat(problem.soft_ids, CONFIG.draws, axis=0), vectors, noisy, t, variables.offsets)
    rho = np.linalg.norm(np.asarray(base.table, np.float64), axis=1)[np.asarray(base.words)].mean()
    added = np.asarray(vectors, np.float64)[:, 0] - word(domain)
    penalty = np.square(added).sum(axis=1).mean() / rho**2
    expected = np.square(made - np.asarray(noise, np.float64)).mean() + 0.01 * penalty
    after, found = one_step(problem, tuning.start(variables), config=CONFIG)
    assert penalty > 1e-4
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    grads = jax.tree.map(lambda moment: moment / (1 - 0.9), after.optimiser.mu)

    # All of the encoder and of the offsets learns, and nothing else does.
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves((grads.offsets, grads.reader.encoder)))
    for part in ("classes", "patches", "context", "scale"):
        assert not np.asarray(getattr(grads.reader, part)).any()
    same(after.variables.embeddings, variables.embeddings)
    same(after.variables.reader._replace(encoder=None), variables.reader._replace(encoder=None))
    for before, moved, gradient, rate in (
        (variables.offsets, after.variables.offsets, grads.offsets, RATES.offsets),
        (variables.reader.encoder, after.variables.reader.encoder, grads.reader.encoder, RATES.embeddings),
    ):
        leaves = (jax.tree.leaves(tree) for tree in (before, moved, gradient))
        for x, y, g in zip(*leaves, strict=True):
            g = np.asarray(g, np.float64)
            step = rate * g / (np.abs(g) + 1e-8)
            large = np.abs(g) > 1e-5  # elsewhere rounding decides
            np.testing.assert_allclose((np.asarray(y, np.float64) - x)[large], -step[large], rtol=1e-2, atol=1e-7)


def test_one_program_of_steps_equals_single_steps(variables, problem):
    copies = tuning.start(jax.tree.map(jnp.copy, variables))
    together, losses = tuning.tune(copies, problem, steps=3, config=CONFIG, quiet=True)
    state, single = tuning.start(variables), []
    for _ in range(3):
        state, loss = one_step(problem, state, config=CONFIG)
        single.append(loss)
    np.testing.assert_allclose(losses, single, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), together.variables, state.variables)


# --- sampling


def request_of(pipeline, prompts=("S* at night", "a photo of a S*"), negative=""):
    tokenizer = pipeline.tokenizer
    ids, noise = jnp.asarray(tokenizer.encode(list(prompts), {"S*": 1})), (len(prompts), SIDE // 2, SIDE // 2, 4)
    return sampling.Request(
        ids,
        None,
        jnp.asarray(tokenizer.encode([negative])),
        jax.random.normal(jax.random.key(3), noise),
        jnp.float32(2.0),
        jnp.float32(1.0),
    )


def test_the_embedding_is_predicted_anew_at_every_step(domain, variables):
    """The sampler equals a loop in Python that asks the encoder at every step, and is told something else each time."""
    base, request, plan = domain.base, request_of(domain), make_plan("ddim", domain.base.schedule, 3)
    found = sampling.draw_latents(base, plan, request, variables, in_parts=True, quiet=True)

    @jax.jit
    def predict(z, t):
        vectors = base.vectors(variables, z, t)
        negative = jnp.repeat(base.text(request.negative_ids).last_hidden, 2, axis=0)
        context = jnp.concatenate([negative, base.text(request.soft_ids, vectors).last_hidden])
        u, c = jnp.split(base.unet(jnp.concatenate([z, z]), t, context, offsets=variables.offsets), 2)
        return u + 2.0 * (c - u), vectors

    z, seen = np.asarray(request.noise, np.float64), []
    for t, a, signal, noise in zip(plan.timesteps, plan.alpha_bar, plan.signal, plan.noise, strict=True):
        eps, vectors = predict(jnp.asarray(z, jnp.float32), t)
        seen.append(np.asarray(vectors))
        eps, a = np.asarray(eps, np.float64), np.float64(a)
        z = np.float64(signal) * (z - np.sqrt(1 - a) * eps) / np.sqrt(a) + np.float64(noise) * eps
    np.testing.assert_allclose(found, z, rtol=1e-3, atol=1e-3)
    assert all(np.abs(seen[k + 1] - seen[k]).max() > 1e-4 for k in range(2))
    assert np.abs(seen[0][0] - seen[0][1]).max() > 1e-4  # and for every picture by itself


# --- files and other concepts


def test_a_concept_file_holds_all_of_it(domain, tmp_path):
    """Tuned, saved, read again and drawn: the same numbers and pictures."""
    concept = personalize(domain, steps=3, seed=1).concept
    assert (concept.blend, concept.nearest_word, concept.metadata["method"]) == (1.0, "creature", "e4t")
    save_concept(tmp_path / "c.safetensors", concept)
    found = load_concept(tmp_path / "c.safetensors", domain.fingerprint, attention_shapes(domain.base.unet), width=12)
    same((found.embeddings, found.offsets, found.reader), (concept.embeddings, concept.offsets, concept.reader))
    assert found.reader.encoder.config == concept.reader.encoder.config
    options = {"num": 2, "sampling_steps": 3, "batch_size": 2, "quiet": True}
    drawn = [api.generate(domain, ["S* at night"], concept=each, **options).images for each in (concept, found)]
    np.testing.assert_array_equal(*drawn)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": np.ones(2, np.float32)}, "do not fit: scale"),
        ({"classes": np.ones((3, 2), np.float32)}, "do not fit: classes"),
        ({"patches": np.ones((3, 4, 8), np.float32)}, "do not fit: patches"),
        ({"context": np.full((1, 2, 12), np.nan, np.float32)}, "not finite"),
    ],
)
def test_a_reader_that_does_not_fit_is_refused(plain, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        save_concept(tmp_path / "c.safetensors", replace(plain, reader=plain.reader._replace(**changes)))


def test_a_damaged_reader_is_one_sentence(plain, tmp_path):
    path = tmp_path / "c.safetensors"
    save_concept(path, plain)
    with safe_open(path, "numpy") as file:
        arrays, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    for damage in (
        lambda a, m: a.pop("reader.patches"),
        lambda a, m: a.pop("reader.encoder.queries"),
        lambda a, m: m.pop("reader"),
        lambda a, m: m.update(reader="{}"),
        lambda a, m: a.update({"reader.more": a["embeddings"]}),
    ):
        some, said = dict(arrays), dict(metadata)
        damage(some, said)
        save_file(some, path, said)
        with pytest.raises(UserError, match="is damaged: its reader") as info:
            load_concept(path)
        assert "\n" not in str(info.value)


def test_with_others_only_its_own_vector_is_predicted(domain, plain):
    other = Concept(np.ones((2, 12), np.float32), {}, "T*", 1.0, "tiny", domain.fingerprint, "robot")
    variables = compose([other, plain]).variables
    np.testing.assert_allclose(variables.reader.scale, [0, 0, 0.1])
    latents, t = jnp.zeros((1, SIDE // 2, SIDE // 2, 4)), jnp.array([5])
    vectors = jax.jit(lambda *args: domain.base.vectors(*args))(variables, latents, t)
    np.testing.assert_array_equal(vectors[0, :2], other.embeddings)
    assert np.abs(vectors[0, 2] - plain.embeddings[0]).max() > 1e-3
    with pytest.raises(UserError, match="one concept at a time"):
        compose([plain, replace(plain, token="T*")])


def test_other_programs_are_not_given_it(plain, tmp_path):
    target = Target((12,), SIDE)
    for kind in ("diffusers", "kohya", "embedding"):
        with pytest.raises(UserError, match="anew at every step"):
            export_concept(tmp_path, plain, target, name="cat", kinds=[kind])


# --- encoders on disk


def test_an_encoder_is_taken_for_what_it_is(domain, pipeline, tmp_path):
    """Each method says in a sentence what is missing where the other's encoder is given."""
    write_encoder(tmp_path / "e4t", domain.domain, domain.fingerprint, domain.vision_fingerprint, dtype="float32")
    write_encoder(tmp_path / "tuning", pipeline.encoder, pipeline.fingerprint, pipeline.vision_fingerprint)
    found = read_encoder(tmp_path / "e4t", domain.fingerprint, domain.vision_fingerprint)
    assert found.kind is DomainEncoder and found.config == domain.domain.config
    same(found.params, domain.domain.params)
    bare = replace(domain, domain=None)
    wrong = with_encoder(bare, tmp_path / "e4t"), with_encoder(bare, tmp_path / "tuning")
    for method, given, message in (
        ("datencoder", wrong[0], "datencoder starts from a tuning-encoder, and an E4T encoder of one domain is none"),
        ("e4t", wrong[1], "e4t starts from an E4T encoder of the picture's domain, and a tuning-encoder is none"),
        ("e4t", bare, "name the folder of one with --encoder"),
    ):
        with pytest.raises(UserError, match=message) as info:
            personalize(given, method=method)
        assert "\n" not in str(info.value)
    path = tmp_path / "e4t" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"shared": [["elsewhere", 8, 8], *values["shared"][1:]]}))
    with pytest.raises(UserError, match="elsewhere"):
        with_encoder(bare, tmp_path / "e4t")


# --- pretraining


@pytest.fixture(scope="module")
def task(domain):
    shots = pictures(8).reshape(4, 2, SIDE, SIDE, 3)
    latents = np.random.default_rng(0).standard_normal((4, 2, 8, 8, 4)).astype(np.float16)
    tokenizer, base = domain.tokenizer, domain.base
    ids = tokenizer.encode(["a photo of S*", "S* at night"] * 4, {"S*": 1}).reshape(4, 2, -1)
    covered = np.random.default_rng(1).random((4, 2, 8, 8)).astype(np.float16)
    source = Pairs(shots, latents, covered, ids, batch_size=BATCH, share=0.5, seed=0)
    frozen = E4TFrozen(base, jnp.asarray(tokenizer.encode([""])), jnp.asarray(ids[0]), jnp.asarray(word(domain))[None])
    config = domain.domain.config
    return E4TTask(config, frozen, source, source.previews(2), batch_size=BATCH, weights=WEIGHTS)


@pytest.fixture(scope="module")
def trained(task, domain):
    """`(loss, values), gradient`."""
    batch = task.batch(0, slice(0, BATCH))
    return jax.jit(task.value_and_grad)(domain.domain.params, task.frozen, batch, KEY, jnp.int32(0))


def test_the_loss_of_pretraining(task, domain, trained):
    """Its terms in float64, and all parameters learn: those of the encoder and of the offsets."""
    params, base, config = domain.domain.params, domain.base, domain.domain.config
    batch = task.batch(0, slice(0, BATCH))
    (loss, values), grads = trained

    drawn = task._drawn(base, batch, KEY)
    a = alphas_cumprod(base.schedule)[np.asarray(drawn["t"])].astype(np.float64)
    root, rest = (np.sqrt(x).reshape(-1, 1, 1, 1) for x in (a, 1 - a))
    z = root * batch["wanted"][:, 0].astype(np.float64) + rest * np.asarray(drawn["noise"], np.float64)
    noisy = jnp.asarray(z, jnp.float32)

    @jax.jit
    def predict(noisy, t):
        seen = see(base, to_float(batch["images"]))
        empty = jnp.repeat(base.text(task.frozen.empty_ids).last_hidden, BATCH, axis=0)
        features = Features(seen.classes, seen.patches, denoiser_features(base.unet, noisy, t, empty), t)
        return encoder_of(config, params)(features).embeddings

    shift = 0.1 * np.asarray(predict(noisy, drawn["t"]), np.float64)
    vectors = jnp.asarray(word(domain) + shift, jnp.float32)
    made = draw(base, jnp.asarray(batch["ids"][:, 0]), vectors, noisy, drawn["t"], offsets_of(config, params))
    error = np.square(made - np.asarray(drawn["noise"], np.float64)).mean(axis=(1, 2, 3))
    weight = np.asarray(snr_weight(jnp.asarray(a, jnp.float32), WEIGHTS.gamma, "epsilon"), np.float64)
    rho = np.linalg.norm(np.asarray(base.table, np.float64), axis=1)[np.asarray(base.words)].mean()
    penalty = np.square(shift).sum(axis=(1, 2)) / rho**2
    np.testing.assert_allclose(loss, (weight * error + 0.01 * penalty).mean(), rtol=1e-3)
    np.testing.assert_allclose(values["shift"], np.sqrt(penalty).mean(), rtol=1e-3)
    assert set(grads) == set(params) and all(np.abs(g).max() > 0 for g in grads.values())


def test_in_parts_it_is_the_same_and_no_key_is_used_twice(task, domain, trained):
    halves = E4TTask(
        task.config, task.frozen, task.data, task.previews, batch_size=BATCH, weights=WEIGHTS, accumulate=2
    )
    params, batch = domain.domain.params, task.batch(0, slice(0, BATCH))
    loss, _ = jax.jit(halves.loss)(params, task.frozen, batch, KEY, jnp.int32(0))
    np.testing.assert_allclose(loss, trained[0][0], rtol=1e-5)
    key_reuse.check_key_reuse(task._drawn, domain.base, batch, KEY)
    key_reuse.check_key_reuse(task._drawn, domain.base, {"concepts": batch["concepts"], "images": batch["images"]}, KEY)


@pytest.mark.parametrize("side", [SIDE, 2 * SIDE])
def test_previews_are_as_large_as_the_pictures(task, domain, side):
    images, ids, _ = task.previews
    shown = jax.ShapeDtypeStruct((len(images), side, side, 3), jnp.uint8)
    drawn = jax.eval_shape(task.draw_previews, domain.domain.params, task.frozen, shown, ids)
    assert set(drawn) == {"vanilla", "encoder"}
    assert all(x.shape == shown.shape and x.dtype == shown.dtype for x in drawn.values())


def test_an_untrained_encoder_is_the_word_and_the_base_model(task):
    """Every parameter has a place on the mesh, the offsets start at nothing and the prediction near it."""
    params = task.init(KEY)
    assert {name: x.shape for name, x in params.items()} == {
        name: x.shape for name, x in abstract_params(DomainEncoder, task.config).items()
    }
    assert all(partition(name, x.shape, 2) is not None for name, x in params.items())
    offsets = offsets_of(task.config, params)
    assert all(not offset.up.any() and np.abs(offset.down).max() > 0 for offset in offsets.values())
    assert not params["token_head.bias"].any()
