"""Tuning a concept: one program, deterministic, donating what it may and holding no weights as constants."""

import functools
import re
from dataclasses import replace
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.key_reuse import _core as key_reuse
from tiny import SIDE, in_half_precision, pictures

from datencoder_jax import api, drawing, tuning
from datencoder_jax.bookkeeping import PERSONALIZE
from datencoder_jax.diffusion.schedule import alphas_cumprod, stratified_timesteps
from datencoder_jax.errors import UserError
from datencoder_jax.methods import METHODS, datencoder
from datencoder_jax.models import batches
from datencoder_jax.tuning import TuningConfig
from datencoder_jax.typing import LearningRates, LowRank, Variables

CONFIG = TuningConfig(draws=4, views=4)
STEPS = 3
RATES = LearningRates(1e-2, 1e-2)


def personalize(pipeline, **changes):
    """Two pictures of a concept; every test that can shares this program."""
    options = {"images": pictures(2), "steps": STEPS, "config": CONFIG, "learning_rates": RATES, "quiet": True}
    return api.personalize(pipeline, **options | changes)


def hard_ids(pipeline):
    return jnp.asarray(pipeline.tokenizer.encode(["a photo of a S*"], words={"S*": "robot"}))


def make_problem(pipeline, **changes):
    tokenizer, base = pipeline.tokenizer, pipeline.base
    values = {
        "base": base,
        "latents": jax.random.normal(jax.random.key(1), (CONFIG.views, SIDE // 2, SIDE // 2, 4)),
        "soft_ids": jnp.asarray(tokenizer.encode(["a photo of a S*"], {"S*": 1})),
        "hard": jax.jit(lambda base, ids: base.condition(ids))(base, hard_ids(pipeline)),
        "blend": jnp.float32(0.5),
        "rates": Variables(jnp.float32(1e-2), jnp.float32(1e-2)),
        "key": jax.random.key(2),
    }
    return tuning.Problem(**values | changes)


@pytest.fixture(scope="module")
def predicted(pipeline):
    """The encoder's prediction for the two pictures, as a seed of 0 makes it."""
    return personalize(pipeline, steps=0).concept


@pytest.fixture(scope="module")
def tuned(pipeline):
    return personalize(pipeline)


def start(predicted):
    variables = Variables(jnp.array(predicted.embeddings), jax.tree.map(jnp.array, predicted.offsets))
    return tuning.start(variables)


def tune(state, problem):
    return tuning.tune(state, problem, steps=STEPS, config=CONFIG, quiet=True)


def fresh(pipeline):
    """Variables as an untrained encoder predicts them."""
    inventory = pipeline.encoder.config.inventory
    offsets = {path: LowRank(jnp.ones((inputs, 2)), jnp.zeros((2, outputs))) for path, inputs, outputs in inventory}
    return Variables(jnp.zeros((1, 12)), offsets)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(a, b):
    return any(not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def parts(concept):
    return Variables(concept.embeddings, concept.offsets)


# --- the loop


def test_one_program_of_steps_equals_single_steps(pipeline, predicted):
    problem = make_problem(pipeline)
    together, losses = tune(start(predicted), problem)

    step = jax.jit(tuning.tune_step, static_argnames="config")
    state, single = start(predicted), []
    for _ in range(STEPS):
        state, loss = step(problem, state, config=CONFIG)
        single.append(loss)
    # On a CPU of today every bit is equal. That is not promised: a compiler may fuse a loop's body otherwise than the
    # step by itself, and Adam's division by the gradient's size enlarges what a sum in another order changes.
    np.testing.assert_allclose(losses, single, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), together.variables, state.variables)
    assert int(together.step) == int(state.step) == STEPS


@pytest.mark.parametrize("momentum", [0.9, 0.6])
def test_a_step_is_adams_with_the_momentum_asked_for(pipeline, predicted, momentum):
    config, problem = replace(CONFIG, momentum=momentum), make_problem(pipeline)
    loss_of = jax.jit(jax.grad(tuning.tune_loss), static_argnames="config")
    state, first, second = start(predicted), 0.0, 0.0
    expected = np.asarray(state.variables.embeddings, np.float64)
    for k in range(1, 4):
        key = jax.random.fold_in(problem.key, state.step)
        gradient = np.asarray(loss_of(state.variables, problem, key, config=config).embeddings, np.float64)
        first = momentum * first + (1 - momentum) * gradient
        second = 0.99 * second + 0.01 * gradient**2
        step = (first / (1 - momentum**k)) / (np.sqrt(second / (1 - 0.99**k)) + 1e-8)
        expected = expected - float(problem.rates.embeddings) * step
        state, _ = tuning.tune_step(problem, state, config)
        np.testing.assert_allclose(state.variables.embeddings, expected, rtol=1e-4, atol=1e-6)


def test_few_steps_have_less_momentum(pipeline, monkeypatch):
    assert [tuning.momentum_for(steps) for steps in (0, 1, 5, 10, 50, 300)] == [0.0, 0.0, 0.0, 0.5, 0.9, 0.9]
    assert api.tuning_config(pipeline, METHODS["perfusion"], 20, 10) == TuningConfig(
        draws=pipeline.memory.draws,
        views=40,
        norm_weight=0.0,
        momentum=0.5,
        remat=pipeline.memory.remat,
        scan_layers=pipeline.memory.scan_layers,
    )
    used = []

    def run(state, problem, *, config, **options):
        used.append(config.momentum)
        return state, np.zeros(1)

    monkeypatch.setattr(tuning, "run", run)
    personalize(pipeline, config=None, steps=10)
    assert used == [0.5]


@pytest.mark.parametrize(("count", "views"), [(1, 16), (3, 18), (4, 16), (9, 18), (16, 32), (20, 40)])
def test_every_picture_is_cropped_and_all_are_seen_alike(pipeline, count, views):
    config = api.tuning_config(pipeline, METHODS["datencoder"], count, 12)
    assert config.views == views and views % count == 0


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_the_documented_one(pipeline, predicted, kind):
    base = replace(pipeline.base, schedule=replace(pipeline.base.schedule, prediction_type=kind))
    problem, key, variables = make_problem(pipeline, base=base), jax.random.key(5), start(predicted).variables
    found = jax.jit(tuning.tune_loss, static_argnames="config")(variables, problem, key, config=CONFIG)

    view_key, t_key, noise_key = jax.random.split(key, 3)
    z = problem.latents[jax.random.randint(view_key, (CONFIG.draws,), 0, len(problem.latents))]
    t = stratified_timesteps(t_key, CONFIG.draws, base.schedule.num_train_timesteps)
    e = jax.random.normal(noise_key, z.shape)
    a = alphas_cumprod(base.schedule)[np.asarray(t)].reshape(-1, 1, 1, 1)
    token, word = pipeline.base.table.shape[0], pipeline.tokenizer.word_id("robot")
    soft, hard = np.asarray(problem.soft_ids), np.asarray(hard_ids(pipeline))
    assert token in soft and word in hard and token not in hard

    def context(ids, *concept):
        return jnp.repeat(base.text(ids, *concept).last_hidden, CONFIG.draws, axis=0)

    made = base.unet(
        np.sqrt(a) * z + np.sqrt(1 - a) * e,
        t,
        context(problem.soft_ids, variables.embeddings),
        offsets=variables.offsets,
        hard_context=context(hard_ids(pipeline)),
        blend=0.5,
    )
    wanted = e if kind == "epsilon" else np.sqrt(a) * e - np.sqrt(1 - a) * z
    v, lengths = np.asarray(variables.embeddings), np.linalg.norm(base.table, axis=1)[np.asarray(base.words)]
    penalty = CONFIG.norm_weight * np.square(v).sum() / lengths.mean() ** 2
    np.testing.assert_allclose(found, np.square(np.asarray(made - wanted)).mean() + penalty, rtol=1e-4)


def test_only_the_soft_path_learns(pipeline, predicted):
    """At blend 0 the concept is not in the picture: what is left is the penalty on its norm."""
    problem, variables = make_problem(pipeline, blend=jnp.float32(0)), start(predicted).variables
    grads = jax.jit(jax.grad(tuning.tune_loss), static_argnames="config")(
        variables, problem, jax.random.key(5), config=CONFIG
    )
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads.offsets))
    rho = np.linalg.norm(pipeline.base.table, axis=1)[np.asarray(pipeline.base.words)].mean()
    expected = 2 * CONFIG.norm_weight * np.asarray(variables.embeddings) / rho**2
    np.testing.assert_allclose(grads.embeddings, expected, rtol=1e-4)


def test_the_prediction_is_the_mean_over_pictures_and_noise_levels(pipeline):
    base, encoder = pipeline.base, pipeline.encoder
    images, empty, key = api.prepare(pipeline, pictures(2)), pipeline.tokenizer.encode([""]), jax.random.key(4)
    found = jax.jit(datencoder._predict)(base, encoder, images, empty, key)
    latents = base.vae.bind().to_latents(images)
    levels = datencoder.levels(base.schedule.num_train_timesteps)
    noise = jax.random.normal(key, (2 * len(levels), *latents.shape[1:])).reshape(2, len(levels), *latents.shape[1:])
    one = jax.jit(datencoder.predict_each)
    each = [
        one(encoder, base, images[i][None], latents[i][None], t[None], noise[i, j][None], empty)
        for i in range(2)
        for j, t in enumerate(levels)
    ]
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0)[0], *each)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, mean)


def test_the_memory_of_a_prediction_does_not_grow_with_its_pictures(pipeline, monkeypatch):
    """Pictures of 512 px are looked at one by one, and small ones together: here too for the first program."""
    empty, key = jnp.asarray(pipeline.tokenizer.encode([""])), jax.random.key(0)

    def compile_prediction(count):
        images = jnp.asarray(np.stack(pictures(count)) / 127.5 - 1.0, jnp.float32)
        inputs = (pipeline.base, pipeline.encoder, images, empty, key)
        compiled = jax.jit(datencoder._predict).lower(*inputs).compile()
        return compiled(*inputs), compiled.memory_analysis().temp_size_in_bytes

    together, _ = compile_prediction(3)
    monkeypatch.setattr(batches, "_PIXELS", SIDE * SIDE)
    one_by_one, few = compile_prediction(3)
    _, many = compile_prediction(12)
    for own, expected in zip(jax.tree.leaves(one_by_one), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-6)
    assert many < 1.25 * few, (few, many)


def test_no_steps_are_the_prediction(pipeline, predicted):
    key = jax.random.split(jax.random.fold_in(jax.random.key(0), PERSONALIZE), 3)[0]
    images = api.prepare(pipeline, pictures(2))
    expected = datencoder.predict(
        pipeline.base, pipeline.encoder, images, pipeline.tokenizer.encode([""]), key, quiet=True
    )
    same(parts(predicted), expected)
    assert personalize(pipeline, steps=0).report["losses"] == []


def test_tuning_starts_from_what_it_is_given(pipeline, predicted, tuned):
    initial = parts(predicted)
    same(parts(personalize(pipeline, initial=initial, steps=0).concept), initial)
    same(parts(personalize(pipeline, initial=initial).concept), parts(tuned.concept))
    same(initial, parts(predicted))  # the program takes over a copy


def test_the_loss_falls(pipeline, predicted):
    problem, still = make_problem(pipeline), Variables(jnp.float32(0), jnp.float32(0))

    def loss(variables):
        """The mean over fixed draws: a few steps that change nothing."""
        copies = (jax.tree.map(jnp.copy, variables) for _ in range(8))
        keys = jax.random.split(jax.random.key(3), 8)
        problems = (problem._replace(rates=still, key=key) for key in keys)
        return np.mean([tune(tuning.start(c), p)[1] for c, p in zip(copies, problems, strict=True)])

    state = start(predicted)
    before = loss(state.variables)
    for _ in range(30 // STEPS):
        state, _ = tune(state, problem)
    assert int(state.step) == 30
    assert loss(state.variables) < 0.95 * before


def test_same_seed_same_concept(pipeline, tuned):
    again = personalize(pipeline)
    same(parts(again.concept), parts(tuned.concept))
    assert again.report["losses"] == tuned.report["losses"]
    assert differ(parts(personalize(pipeline, seed=1).concept), parts(tuned.concept))


def test_every_picture_counts(pipeline, tuned):
    assert tuned.concept.embeddings.shape == (1, 12) and tuned.concept.metadata["pictures"] == "2"
    images = pictures(2)
    assert differ(parts(personalize(pipeline, images=images[::-1]).concept), parts(tuned.concept))
    images[1] = 255 - images[1]
    assert differ(parts(personalize(pipeline, images=images).concept), parts(tuned.concept))


@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_pictures(pipeline, count):
    images = jax.ShapeDtypeStruct((count, SIDE, SIDE, 3), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, pipeline.tokenizer.length), jnp.int32)
    shape = jax.eval_shape(datencoder._predict, pipeline.base, pipeline.encoder, images, ids, jax.random.key(0))
    assert shape.embeddings.shape == (1, 12)
    for views in (3, 16, 17):
        encode = functools.partial(tuning.encode_views, config=TuningConfig(views=views))
        assert jax.eval_shape(encode, pipeline.base, images, jax.random.key(0)).shape == (views, 8, 8, 4)


def test_a_rate_of_zero_freezes_its_part(pipeline, predicted):
    words = personalize(pipeline, learning_rates=LearningRates(1e-2, 0.0)).concept
    same(words.offsets, predicted.offsets)
    assert differ(words.embeddings, predicted.embeddings)
    weights = personalize(pipeline, learning_rates=LearningRates(0.0, 1e-2)).concept
    same(weights.embeddings, predicted.embeddings)
    assert all(differ(weights.offsets[path], offset) for path, offset in predicted.offsets.items())


def test_the_report(pipeline, tuned):
    report = tuned.report
    assert len(report["losses"]) == report["steps"] == STEPS and np.isfinite(report["losses"]).all()
    cosines = [cosine for _, cosine in report["nearest_words"]]
    assert len(cosines) == 5 and cosines == sorted(cosines, reverse=True) and -1 <= cosines[-1] <= cosines[0] <= 1
    assert report["hard_word"] == tuned.concept.nearest_word
    assert set(report["seconds"]) == {"predict", "tune", "compile"}
    assert (tuned.concept.blend, tuned.concept.token) == (0.5, "S*")
    assert tuned.concept.fingerprint == pipeline.fingerprint
    details = tuned.concept.metadata
    assert {name: details[name] for name in ("rank", "learning_rate_embeddings", "learning_rate_offsets")} == {
        "rank": "2",
        "learning_rate_embeddings": "0.01",
        "learning_rate_offsets": "0.01",
    }
    assert details["datencoder_jax"] == metadata.version("datencoder_jax")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": []}, "no picture"),
        ({"images": pictures(1) / 255}, "uint8 arrays"),
        ({"images": [np.zeros((8, 8), np.uint8)]}, "uint8 arrays"),
        ({"images": pictures(5)}, "5 pictures need at least as many views, not 4"),
        ({"steps": -1}, "steps"),
        ({"blend": 1.5}, "blend"),
        ({"token": " "}, "placeholder"),
        ({"token": "photo"}, "placeholder"),
        ({"learning_rates": LearningRates(float("nan"), 0.0)}, "diverged"),
    ],
)
def test_misuse_is_one_sentence(pipeline, options, message):
    with pytest.raises(UserError, match=message) as info:
        personalize(pipeline, **options)
    assert "\n" not in str(info.value)


# --- the program


def test_one_compilation_serves_every_concept(pipeline, tuned, caplog):
    before = tuning.tune.compilations
    assert tuning.tune.seconds > 0
    with jax.log_compiles(True), caplog.at_level("WARNING"):
        changed = personalize(
            pipeline,
            images=pictures(2, seed=1),
            learning_rates=LearningRates(3e-3, 1e-4),
            blend=0.25,
            seed=7,
            hard_word="robot",
        )
    assert tuning.tune.compilations == before
    # Nothing else is compiled either, down to the copy of a single array.
    assert not [record.message for record in caplog.records if "compil" in record.message.lower()]
    assert differ(parts(changed.concept), parts(tuned.concept))


def test_steps_and_settings_are_in_the_program(pipeline):
    state = jax.eval_shape(lambda: tuning.start.function(fresh(pipeline)))
    problem = jax.eval_shape(lambda: make_problem(pipeline))
    for steps, draws in ((1, 2), (5, 3)):
        run = functools.partial(tuning._tune, steps=steps, config=TuningConfig(draws=draws))
        after, losses = jax.eval_shape(run, state, problem)
        assert losses.shape == (steps,)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


def test_the_state_is_donated(pipeline, predicted, monkeypatch):
    monkeypatch.setattr(tuning.tune, "_compiled", {})  # those of other tests have other variables
    state = start(predicted)
    before = {id(leaf): leaf for leaf in jax.tree.leaves(state)}
    problem = make_problem(pipeline)
    after, _ = tune(state, problem)
    assert all(leaf.is_deleted() for leaf in before.values())
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, problem)))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(after.variables))
    (program,) = tuning.tune._compiled.values()
    assert program.memory_analysis().alias_size_in_bytes >= 3 * size  # the variables and both of Adam's moments


def largest_constant(function, *args):
    """Bytes of the largest constant inside the program of a function."""
    text = jax.jit(function).lower(*args).as_text()
    return max(len(digits) // 2 for digits in re.findall(r'dense<"0x([0-9A-F]+)">', text))


def test_the_base_model_is_an_argument(pipeline, predicted):
    state, problem = start(predicted), make_problem(pipeline)
    run = functools.partial(tuning._tune, steps=STEPS, config=CONFIG)
    schedule = 4 * problem.base.schedule.num_train_timesteps
    assert largest_constant(run, state, problem) == schedule
    # The check would notice: with the model in a closure its token table is a constant.
    assert largest_constant(lambda s: run(s, problem), state) == problem.base.table.nbytes > schedule


def test_the_base_model_is_untouched(pipeline, predicted):
    before = jax.tree.map(np.array, pipeline.base)
    personalize(pipeline)
    same(jax.tree.leaves(pipeline.base), jax.tree.leaves(before))


def test_half_precision_needs_no_implicit_promotion(pipeline):
    base = jax.eval_shape(lambda: in_half_precision(pipeline.base))
    problem = jax.eval_shape(lambda: make_problem(pipeline))._replace(base=base)
    state = jax.eval_shape(lambda: tuning.start.function(fresh(pipeline)))
    after, losses = jax.eval_shape(functools.partial(tuning._tune, steps=2, config=CONFIG), state, problem)
    assert losses.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(after.variables)} == {jnp.dtype("float32")}
    images = jax.ShapeDtypeStruct((2, SIDE, SIDE, 3), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, pipeline.tokenizer.length), jnp.int32)
    made = jax.eval_shape(datencoder._predict, base, pipeline.encoder, images, ids, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype("float32")}


def test_no_key_is_used_twice(pipeline, predicted):
    run = functools.partial(tuning._tune, steps=2, config=CONFIG)
    key_reuse.check_key_reuse(run, start(predicted), make_problem(pipeline))
    images, key = jnp.zeros((2, SIDE, SIDE, 3)), jax.random.key(0)
    key_reuse.check_key_reuse(functools.partial(tuning.encode_views, config=CONFIG), pipeline.base, images, key)
    ids = pipeline.tokenizer.encode([""])
    key_reuse.check_key_reuse(datencoder._predict, pipeline.base, pipeline.encoder, images, ids, key)
    with pytest.raises(jax.errors.KeyReuseError):  # the check would notice
        key_reuse.check_key_reuse(lambda k: jax.random.normal(k) + jax.random.uniform(k), key)


def test_a_concept_and_its_pictures_share_no_noise(pipeline):
    seen = []

    def spy(base, encoder, images, ids, key, **_):
        seen.append(key)
        return datencoder.Prediction(fresh(pipeline), jnp.ones((2, 2)))

    spy.seconds = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datencoder, "predict_and_compare", spy)
        personalize(pipeline, steps=0, seed=3)
    first = jax.random.normal(seen[0], (SIDE // 2, SIDE // 2, 4))
    assert not np.array_equal(first, drawing.initial_noise(pipeline, 1, 1, seed=3)[0])


# --- views


views_of = jax.jit(tuning.views_of, static_argnames="config")


def test_the_first_view_of_each_picture_is_the_picture():
    images = api.to_float(pictures(3))
    views = views_of(images, jax.random.key(0), config=TuningConfig(views=8, crop=0.5))
    np.testing.assert_array_equal(views[:3], images)
    assert views.shape == (8, SIDE, SIDE, 3)
    assert all(differ(view, images[i % 3]) for i, view in enumerate(views) if i >= 3)


def test_crops_stay_inside_the_picture():
    columns = jnp.broadcast_to(jnp.arange(SIDE, dtype=jnp.float32)[None, :, None], (SIDE, SIDE, 3))
    rows = jnp.swapaxes(columns, 0, 1)
    config = TuningConfig(views=64, crop=0.5, flip=False)
    x, y = (views_of(image[None], jax.random.key(1), config=config) for image in (columns, rows))
    for ramp in (x[:, 3, :, 0], y[:, :, 3, 0]):
        steps = np.diff(ramp, axis=1)
        share = np.median(steps, axis=1)
        assert share[0] == 1 and (share >= 0.5 - 1e-5).all() and (share <= 1 + 1e-5).all()
        assert share.min() < 0.6 and share[1:].max() > 0.9
        # Pixel centres: the corner is half a step before the first one. Edges are repeated, so the ends may be short.
        middle = np.asarray(ramp[:, SIDE // 2 - 1 : SIDE // 2 + 1].mean(axis=1)) + 0.5
        assert (middle - share * SIDE / 2 >= -1e-3).all() and (middle + share * SIDE / 2 <= SIDE + 1e-3).all()
        assert ramp.min() >= 0 and ramp.max() <= SIDE - 1
    # Both axes are moved, each on its own.
    assert np.corrcoef(np.asarray(x[1:, 3, 8, 0]), np.asarray(y[1:, 8, 3, 0]))[0, 1] < 0.8


@pytest.mark.parametrize("allowed", [True, False])
def test_flips_only_when_allowed(allowed):
    images = api.to_float(pictures(1))
    config = TuningConfig(views=32, crop=1.0, flip=allowed)
    views = np.asarray(views_of(images, jax.random.key(2), config=config))
    mirrored = [np.allclose(view, images[0, :, ::-1], atol=1e-5) for view in views]
    plain = [np.allclose(view, images[0], atol=1e-5) for view in views]
    assert all(a != b for a, b in zip(mirrored, plain, strict=True))
    assert plain[0] and (4 < sum(mirrored) < 28 if allowed else not any(mirrored))


def test_many_steps_are_several_calls_of_one_program(pipeline, predicted, monkeypatch):
    monkeypatch.setattr(tuning, "_FUSED", 4)
    problem, state = make_problem(pipeline), start(predicted)
    before = tuning.tune.compilations
    state, losses = tuning.run(state, problem, steps=9, config=CONFIG, quiet=True)
    assert tuning.tune.compilations - before <= 1 and int(state.step) == 9 and losses.shape == (9,)
    whole, together = tuning.tune(start(predicted), problem, steps=9, config=CONFIG, quiet=True)
    np.testing.assert_allclose(losses, together, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), state.variables, whole.variables)
