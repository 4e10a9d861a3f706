"""Prompts to pictures: what a picture depends on, and that the two paths and guidance are what they say."""

import inspect
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.key_reuse import _core as key_reuse
from tiny import SIDE, in_half_precision

from datencoder_jax import api, drawing, sampling, tuning
from datencoder_jax.base import Base
from datencoder_jax.diffusion.guidance import guidance_scale
from datencoder_jax.diffusion.samplers import make_plan, sample
from datencoder_jax.errors import UserError
from datencoder_jax.methods import datencoder
from datencoder_jax.models import batches
from datencoder_jax.prior import PriorOptions, draw_prior
from datencoder_jax.typing import Concept, LowRank, Variables

PROMPTS = ["a photo of S* on the beach", "a pencil sketch of S*"]


def generate(pipeline, prompts, **changes):
    """Two pictures at a time in three steps: nearly every test runs the same programs."""
    options = {"num": 2, "sampling_steps": 3, "batch_size": 2, "quiet": True}
    return api.generate(pipeline, prompts, **options | changes).images


def plain(prompts, word="robot"):
    return [prompt.replace("S*", word) for prompt in prompts]


def make_concept(pipeline, *, seed=0, **changes):
    """A concept unlike any word, with offsets that change the picture."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    inventory = pipeline.encoder.config.inventory
    values = {
        "embeddings": 0.3 * draw(1, 12),
        "offsets": {p: LowRank(draw(i, 2) / i**0.5, draw(2, o)) for p, i, o in inventory},
        "token": "S*",
        "blend": 0.5,
        "base": pipeline.name,
        "fingerprint": pipeline.fingerprint,
        "nearest_word": "robot",
    }
    return Concept(**values | changes)


def as_word(pipeline, word, **changes):
    """A concept that is a word of the vocabulary, without offsets."""
    concept = make_concept(pipeline, **changes)
    zero = {path: LowRank(o.down, np.zeros_like(o.up)) for path, o in concept.offsets.items()}
    row = pipeline.base.table[jnp.array([pipeline.tokenizer.word_id(word)])]
    return replace(concept, embeddings=np.asarray(row), offsets=zero)


def close(a, b, levels=1):
    """Equal up to rounding: programs of other shapes may add in another order."""
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    assert np.abs(a.astype(int) - b).max() <= levels


def far(a, b):
    """Visibly different."""
    return np.abs(a.astype(int) - b).max() > 5


@pytest.fixture(scope="module")
def concept(pipeline):
    return make_concept(pipeline)


@pytest.fixture(scope="module")
def drawn(pipeline, concept):
    return generate(pipeline, PROMPTS, concept=concept)


# --- what a picture depends on


def test_pictures_are_what_was_asked_for(drawn):
    assert drawn.shape == (2, 2, SIDE, SIDE, 3) and drawn.dtype == np.uint8
    assert drawn.std(axis=(2, 3, 4)).min() > 5
    assert far(drawn[0], drawn[1]) and far(drawn[:, 0], drawn[:, 1])


def test_a_picture_is_the_same_alone_and_among_others(pipeline, concept, drawn):
    # Three pictures a prompt, two at a time: batches mix prompts, and the last is filled up.
    more = generate(pipeline, [PROMPTS[1], "S*", PROMPTS[0]], concept=concept, num=3)
    np.testing.assert_array_equal(more[0, :2], drawn[1])
    np.testing.assert_array_equal(more[2, :2], drawn[0])
    alone = generate(pipeline, PROMPTS[:1], concept=concept, num=1)
    close(alone, drawn[:1, :1])


def test_the_seed_decides(pipeline, concept, drawn):
    np.testing.assert_array_equal(generate(pipeline, PROMPTS, concept=concept), drawn)
    other = generate(pipeline, PROMPTS, concept=concept, seed=1)
    assert all(far(other[i, j], drawn[i, k]) for i in range(2) for j in range(2) for k in range(2))


def test_one_program_for_every_batch_sampler_and_setting(pipeline, concept, drawn, caplog):
    before = sampling.generate.compilations
    other = make_concept(pipeline, seed=1, blend=0.9)
    with jax.log_compiles(True), caplog.at_level("WARNING"):
        generate(pipeline, PROMPTS, concept=other, num=2, seed=5, sampler="dpm++2m", guidance=2.0, negative="night")
    assert sampling.generate.compilations == before
    assert not [record.message for record in caplog.records if "compil" in record.message.lower()]


def test_few_programs_draw_any_number_of_pictures(pipeline, concept):
    """Five to eight pictures are one program, nine are the one of a full batch, and all are the same pictures."""
    options = {"concept": concept, "batch_size": 8}
    many = generate(pipeline, PROMPTS[:1], num=8, **options)
    before = sampling.generate.compilations
    for num in (5, 6, 7, 9):
        images = generate(pipeline, PROMPTS[:1], num=num, **options)
        assert images.shape[:2] == (1, num)
        np.testing.assert_array_equal(images[:, :8], many[:, :num])
    assert sampling.generate.compilations == before


def test_an_inventory_of_samplers(pipeline, concept, drawn):
    other = generate(pipeline, PROMPTS, concept=concept, sampler="dpm++2m")
    assert far(other, drawn) and other.std() > 5


def test_the_negative_prompt_steers(pipeline, concept, drawn):
    assert far(generate(pipeline, PROMPTS, concept=concept, negative="a red fish at night"), drawn)
    # Without guidance there is nothing it could push away from.
    one, two = (generate(pipeline, PROMPTS, concept=concept, guidance=1.0, negative=n) for n in ("", "a red fish"))
    close(one, two)
    assert far(one, drawn)


def test_without_a_concept_the_placeholder_is_a_word_like_others(pipeline):
    images = generate(pipeline, ["a photo of S*"])
    assert images.shape == (1, 2, SIDE, SIDE, 3)


def test_a_cut_prompt_warns_once(pipeline, concept):
    with pytest.warns(UserWarning, match=r"cut: '.*robot'") as caught:
        generate(pipeline, ["S* " + "red " * 40 + "robot"], concept=concept)
    assert len(caught) == 1


# --- the two paths


def test_a_concept_that_is_a_word_draws_the_word(pipeline):
    concept = as_word(pipeline, "robot", nearest_word="fish")
    close(generate(pipeline, PROMPTS, concept=concept, blend=1.0), generate(pipeline, plain(PROMPTS)))
    # Nor does the other path change it, when that reads the same word.
    same = as_word(pipeline, "robot", nearest_word="robot")
    close(generate(pipeline, PROMPTS, concept=same, blend=0.4), generate(pipeline, plain(PROMPTS)))


def test_a_blend_of_zero_is_the_base_model_under_the_hard_word(pipeline, concept, drawn):
    images = generate(pipeline, PROMPTS, concept=concept, blend=0.0)
    close(images, generate(pipeline, plain(PROMPTS)))
    assert far(images, drawn)


def test_a_blend_of_one_has_no_hard_path(pipeline, concept, drawn):
    one, two = (replace(concept, nearest_word=word) for word in ("robot", "fish"))
    np.testing.assert_array_equal(*(generate(pipeline, PROMPTS, concept=c, blend=1.0) for c in (one, two)))
    assert far(generate(pipeline, PROMPTS, concept=two), drawn)


def test_the_blend_is_the_concepts_unless_asked_otherwise(pipeline, concept, drawn):
    np.testing.assert_array_equal(generate(pipeline, PROMPTS, concept=concept, blend=0.5), drawn)
    assert far(generate(pipeline, PROMPTS, concept=replace(concept, blend=0.9)), drawn)


def test_guidance_of_one_is_the_conditional_prediction(pipeline):
    base, plan = pipeline.base, make_plan("ddim", pipeline.base.schedule, 3)
    prompts = plain(PROMPTS)

    @jax.jit
    def conditional(base, ids, noise):
        context = base.text(ids).last_hidden
        latents = sample(plan, lambda x, t: base.unet(x, t, context), noise)
        return base.vae.bind().to_images(latents)

    images = conditional(base, pipeline.tokenizer.encode(prompts), drawing.initial_noise(pipeline, 2, 1, seed=0)[0])
    expected = np.asarray(jnp.round((images + 1.0) * 127.5)).astype(np.uint8)
    close(generate(pipeline, prompts, num=1, guidance=1.0)[:, 0], expected)


def test_at_or_below_one_there_is_no_guidance(pipeline, concept):
    """The prompt alone: pictures differ by prompt, as they do not under the negative prompt's prediction."""
    zero, half, one = (generate(pipeline, PROMPTS, concept=concept, guidance=g) for g in (0.0, 0.5, 1.0))
    assert far(zero[0], zero[1])
    np.testing.assert_array_equal(zero, half)
    np.testing.assert_array_equal(zero, one)
    negative = generate(pipeline, PROMPTS, concept=concept, guidance=-3.0, negative="a red fish")
    np.testing.assert_array_equal(zero, negative)
    # Two passes at a scale of 1 draw the same.
    close(one, generate(pipeline, PROMPTS, concept=concept, guidance=1.0 + 1e-6))


def test_without_guidance_the_unet_runs_on_half_the_batch(pipeline, monkeypatch):
    rows = []
    real = Base.denoise

    def denoise(base, latents, *args, **options):
        rows.append(len(latents))
        return real(base, latents, *args, **options)

    monkeypatch.setattr(Base, "denoise", denoise)
    plan, request, variables = arguments(pipeline, count=3)
    for scale in (request.guidance, guidance_scale(1.0), guidance_scale(0.0), guidance_scale(1.5)):
        rows.clear()
        asked = request._replace(guidance=scale)
        # A new function each time: JAX remembers what it has traced.
        jax.eval_shape(lambda *args: sampling.sample_latents(*args), pipeline.base, plan, asked, variables)
        assert set(rows) == {3 if scale is None else 6}
    assert guidance_scale(1.0) is None and guidance_scale(0.0) is None and guidance_scale(1.5) == 1.5


def test_the_prior_is_drawn_without_guidance_where_the_model_has_none(pipeline, monkeypatch):
    requests = []
    latents = jnp.zeros((2, SIDE // 2, SIDE // 2, 4))
    monkeypatch.setattr(
        sampling, "draw_latents", lambda base, plan, request, *a, **k: requests.append(request) or latents
    )
    monkeypatch.setattr(tuning, "read_prompt", lambda *args, **options: None)
    for guidance in (0.0, 2.0):
        turbo = replace(pipeline, guidance=guidance)
        draw_prior(turbo, "robot", PriorOptions(pictures=2), SIDE // 2, 0, True)
    assert requests[0].guidance is None and requests[1].guidance == 2.0


def test_the_guidance_is_the_models_unless_asked_otherwise(pipeline):
    def report(pipeline, **options):
        return api.generate(pipeline, plain(PROMPTS), num=1, sampling_steps=3, quiet=True, **options).report

    assert report(pipeline)["guidance"] == 7.5
    assert report(replace(pipeline, name="elsewhere", guidance=2.0))["guidance"] == 2.0
    assert report(replace(pipeline, guidance=2.0), guidance=3.0)["guidance"] == 3.0


# --- decoding


def test_decoding_in_chunks_is_decoding_at_once(pipeline, monkeypatch):
    latents = jax.random.normal(jax.random.key(0), (5, SIDE // 2, SIDE // 2, 4))
    monkeypatch.setattr(batches, "_PIXELS", 2 * SIDE * SIDE)  # two at a time, one left over
    chunked = jax.jit(lambda base, z: sampling.decode(base, z))(pipeline.base, latents)
    whole = jax.jit(lambda base, z: base.vae.bind().to_images(z))(pipeline.base, latents)
    close(np.asarray(chunked), np.asarray(jnp.round((whole + 1.0) * 127.5)).astype(np.uint8))
    monkeypatch.setattr(batches, "_PIXELS", 1)  # a picture larger than the limit goes alone
    assert jax.eval_shape(lambda base, z: sampling.decode(base, z), pipeline.base, latents).shape[0] == 5


# --- the program


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (datencoder.predict_each, "encoder base images latents t noise empty_ids"),
        (sampling.Request, "soft_ids hard_ids negative_ids noise guidance blend keys class_ids"),
        (sampling.sample_latents, "base plan request variables"),
        (sampling.decode, "base latents"),
    ],
)
def test_what_pretraining_calls_keeps_its_form(function, names):
    assert list(inspect.signature(function).parameters) == names.split()


def arguments(pipeline, count=2):
    ids = jnp.asarray(pipeline.tokenizer.encode(["a robot"] * count))
    noise = jnp.zeros((count, SIDE // 2, SIDE // 2, 4))
    request = sampling.Request(ids, ids, ids[:1], noise, jnp.float32(4), jnp.float32(0.5))
    concept = make_concept(pipeline)
    variables = Variables(jnp.asarray(concept.embeddings), jax.tree.map(jnp.asarray, concept.offsets))
    return make_plan("ddim", pipeline.base.schedule, 3), request, variables


def test_no_key_is_used_twice(pipeline):
    key_reuse.check_key_reuse(sampling._generate, pipeline.base, *arguments(pipeline))


def test_the_model_is_an_argument(pipeline):
    text = jax.jit(sampling._generate).lower(pipeline.base, *arguments(pipeline)).as_text()
    assert not re.search(r'dense<"0x[0-9A-F]{1000}', text)


def test_half_precision_needs_no_implicit_promotion(pipeline):
    base = jax.eval_shape(lambda: in_half_precision(pipeline.base))
    images, finite = jax.eval_shape(sampling._generate, base, *arguments(pipeline))
    assert finite.shape == (2,) and finite.dtype == bool
    assert images.shape == (2, SIDE, SIDE, 3) and images.dtype == jnp.uint8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "no prompt"),
        ({"prompts": "a photo of S*"}, "list of texts"),
        ({"prompts": ["a robot"]}, "placeholder"),
        ({"num": 0}, "number of pictures"),
        ({"batch_size": 0}, "batch size"),
        ({"sampler": "heun"}, "sampler"),
        ({"sampling_steps": 0}, "steps"),
        ({"blend": -0.1}, "blend"),
        ({"blend": float("nan")}, "blend"),
    ],
)
def test_misuse_is_one_sentence(pipeline, concept, options, message):
    with pytest.raises(UserError, match=message) as info:
        generate(pipeline, **{"prompts": PROMPTS, "concept": concept} | options)
    assert "\n" not in str(info.value)


def test_the_package_offers_the_function():
    import datencoder_jax

    assert datencoder_jax.generate is api.generate and datencoder_jax.personalize is api.personalize
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        assert datencoder_jax.train


def test_a_concept_of_another_model_is_refused(pipeline, concept):
    with pytest.raises(UserError, match="made for elsewhere, not for tiny"):
        generate(pipeline, PROMPTS, concept=replace(concept, fingerprint="0" * 32, base="elsewhere"))
