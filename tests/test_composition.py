"""Several concepts in one picture: which vectors a placeholder reads, and that offsets are summed."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from export_helpers import draw_offsets, tiny_concept

from datencoder_jax import api, drawing, sampling
from datencoder_jax.composition import compose
from datencoder_jax.diffusion.samplers import make_plan
from datencoder_jax.errors import UserError
from datencoder_jax.pipeline import attention_shapes
from datencoder_jax.typing import Variables

PROMPT = ["a photo of a S* with a S*2"]


@pytest.fixture(scope="module")
def pair(pipeline):
    """Two concepts of two and of three vectors, whose offsets differ in rank and in the layers they change."""
    shapes = attention_shapes(pipeline.base.unet)
    few = {path: shape for path, shape in shapes.items() if ".attn2." in path}
    second = tiny_concept(pipeline, vectors=3, token="S*2", nearest_word="robot", blend=0.7)
    first = tiny_concept(pipeline)
    return first, replace(second, embeddings=-second.embeddings, offsets=draw_offsets(few, seed=1, ranks=(1, 3)))


def embedding(concept, token):
    """As one comes from elsewhere."""
    return replace(concept, offsets={}, token=token, blend=1.0, metadata={})


def generate(pipeline, prompts, **changes):
    """Two pictures a prompt in three steps."""
    options = {"num": 2, "sampling_steps": 3, "batch_size": 2, "quiet": True}
    return api.generate(pipeline, prompts, **options | changes).images


def close(a, b, levels=1):
    assert a.shape == b.shape and np.abs(a.astype(int) - b).max() <= levels


def far(a, b):
    return np.abs(a.astype(int) - b).max() > 5


def dense(concept, path):
    offset = concept.offsets.get(path)
    return 0.0 if offset is None else np.asarray(offset.down, np.float64) @ np.asarray(offset.up, np.float64)


# --- the sum


def test_the_sum_is_the_weighted_sum_of_products(pipeline, pair):
    summed = compose(pair, [0.5, -2.0]).variables.offsets
    assert summed.keys() == attention_shapes(pipeline.base.unet).keys()
    for path, offset in summed.items():
        wanted = 0.5 * dense(pair[0], path) - 2.0 * dense(pair[1], path)
        np.testing.assert_allclose(offset.down @ offset.up, wanted, atol=1e-5)
    ranks = {offset.down.shape[1] for path, offset in summed.items() if ".attn2." in path}
    assert ranks == {2 + 1, 2 + 3}  # the ranks add up


def test_summed_offsets_are_merged_weights(pipeline, pair):
    base, weights = pipeline.base, [0.5, -2.0]
    merged = {
        f"{path}.weight": base.unet.params[f"{path}.weight"]
        + sum(w * dense(c, path) for w, c in zip(weights, pair, strict=True)).astype(np.float32)
        for path in pair[0].offsets
    }
    rng = np.random.default_rng(0)
    z, context = rng.standard_normal((2, 8, 8, 4), "f4"), rng.standard_normal((2, 5, 12), "f4")

    @jax.jit
    def run(unet, offsets):
        return unet(z, jnp.array([20, 700]), context, offsets=offsets)

    found = run(base.unet, compose(pair, weights).variables.offsets)
    wanted = run(base.unet.with_params(base.unet.params | merged), None)
    scale = np.abs(wanted).max()
    assert np.abs(found - wanted).max() < 1e-5 * scale
    assert np.abs(found - run(base.unet, None)).max() > 0.1 * scale


# --- vectors and words


def test_placeholders_read_their_own_vectors(pipeline, pair):
    composition = compose(pair)
    assert composition.placeholders == {"S*": 2, "S*2": 3} and composition.words == {"S*": "cat", "S*2": "robot"}
    vectors = np.concatenate([concept.embeddings for concept in pair])
    np.testing.assert_array_equal(composition.variables.embeddings, vectors)
    size = pipeline.tokenizer.vocab_size
    ids = pipeline.tokenizer.encode([*PROMPT, "S*2 and S*2, S*"], composition.placeholders)
    first, second = [size, size + 1], [size + 2, size + 3, size + 4]
    for row, wanted in zip(ids, (first + second, second + second + first), strict=True):
        np.testing.assert_array_equal(row[row >= size], wanted)
    # The order of the concepts is that of the vectors alone.
    turned = compose(pair[::-1])
    again = pipeline.tokenizer.encode(PROMPT, turned.placeholders)[0]
    read = [
        np.asarray(c.variables.embeddings)[i[i >= size] - size] for c, i in ((composition, ids[0]), (turned, again))
    ]
    np.testing.assert_array_equal(*read)
    hard = pipeline.tokenizer.encode(PROMPT, words=composition.words)
    np.testing.assert_array_equal(hard, pipeline.tokenizer.encode(["a photo of a cat with a robot"]))


def test_blends(pair):
    first, second = pair
    assert compose([first]).blend == 0.3
    assert compose(pair).blend == pytest.approx(0.5)
    # What comes from elsewhere knows of no second path, and leaves the blend to the concept beside it.
    assert compose([first, embedding(second, "T*")]).blend == 0.3
    assert compose([embedding(first, "T*")]).blend == 1.0
    # A concept of vectors alone may have been tuned along both paths.
    assert compose([replace(first, offsets={})]).blend == 0.3


def test_a_weight_that_would_do_nothing_is_refused(pair):
    first, second = pair
    compose([first, embedding(second, "T*")], [0.5, 1.0])
    with pytest.raises(UserError, match=r"'T\*' has no weight offsets that a weight of 0.5"):
        compose([first, embedding(second, "T*")], [1.0, 0.5])


# --- pictures


def test_one_concept_is_itself(pipeline, pair):
    concept = pair[0]
    drawn = generate(pipeline, ["a photo of a S*"], concept=concept)
    np.testing.assert_array_equal(generate(pipeline, ["a photo of a S*"], concept=[concept], weights=[1.0]), drawn)
    # As it was before there were several.
    noise, keys = drawing.initial_noise(pipeline, 1, 2, seed=0)
    tokenizer = pipeline.tokenizer
    request = sampling.Request(
        jnp.asarray(np.repeat(tokenizer.encode(["a photo of a S*"], {"S*": 2}), 2, axis=0)),
        jnp.asarray(np.repeat(tokenizer.encode(["a photo of a cat"]), 2, axis=0)),
        jnp.asarray(tokenizer.encode([""])),
        noise,
        jnp.float32(7.5),
        jnp.float32(0.3),
        keys,
    )
    variables = Variables(jnp.asarray(concept.embeddings), jax.tree.map(jnp.asarray, concept.offsets))
    base = pipeline.base.only("unet", "vae", "text", "text_2")
    plan = make_plan("ddim", base.schedule, 3)
    found = sampling.generate(base, plan, request, variables, quiet=True)
    np.testing.assert_array_equal(found.pictures, drawn[0])


def test_a_weight_of_zero_leaves_the_offsets_out(pipeline, pair):
    first, second = pair
    drawn = generate(pipeline, PROMPT, concept=pair)
    without = generate(pipeline, PROMPT, concept=pair, weights=[1.0, 0.0])
    vectors = replace(second, offsets={}, blend=0.0)
    close(generate(pipeline, PROMPT, concept=[first, vectors], blend=0.5), without)
    assert far(drawn, without)
    # And a weight scales them.
    half = {path: offset._replace(up=0.5 * offset.up) for path, offset in second.offsets.items()}
    scaled = generate(pipeline, PROMPT, concept=pair, weights=[1.0, 0.5])
    close(generate(pipeline, PROMPT, concept=[first, replace(second, offsets=half)]), scaled)


def row(pipeline, word):
    return np.asarray(pipeline.base.table)[[pipeline.tokenizer.word_id(word)]]


@pytest.mark.parametrize("blend", [1.0, 0.3])
def test_an_embedding_may_be_meant_for_the_negative_prompt(pipeline, pair, blend):
    """A word's own row in the placeholder's place is the word, along both paths."""
    word = replace(embedding(pair[1], "bad"), embeddings=row(pipeline, "fish"), nearest_word="robot")
    other = replace(word, embeddings=pair[1].embeddings)
    beside, prompt = ([], ["a photo of a house"]) if blend == 1.0 else ([pair[0]], ["a photo of a S*"])
    drawn = generate(pipeline, prompt, concept=[*beside, word], negative="a bad photo")
    close(generate(pipeline, prompt, concept=beside, negative="a fish photo"), drawn)
    assert far(generate(pipeline, prompt, concept=[*beside, other], negative="a bad photo"), drawn)


def test_a_concept_of_ones_own_is_missed_in_any_prompt(pipeline, pair):
    own = replace(embedding(pair[1], "S*"), metadata={"method": "textual_inversion"})
    with pytest.raises(UserError, match="'a dog' does not contain the placeholder"):
        generate(pipeline, ["a S*", "a dog"], concept=own)


# --- misuse


def test_misuse_is_one_sentence(pipeline, pair):
    first, second = pair
    for match, options in (
        (r"two concepts share the placeholder 'S\*'; .*--token", {"concept": [first, replace(second, token="S*")]}),
        ("2 concepts need as many weights, not 1", {"concept": pair, "weights": [1.0]}),
        ("1 concepts need as many weights, not 0", {"concept": first, "weights": []}),
        ("weights of concepts must be finite", {"concept": first, "weights": [float("nan")]}),
        ("made for elsewhere, not for tiny", {"concept": [first, replace(second, fingerprint="0", base="elsewhere")]}),
    ):
        with pytest.raises(UserError, match=match) as info:
            generate(pipeline, PROMPT, **options)
        assert "\n" not in str(info.value)
    with pytest.raises(UserError, match=r"does not contain the placeholder 'S\*' or 'S\*2'"):
        generate(pipeline, ["a photo of a robot"], concept=pair)


def test_what_cannot_be_meant_is_refused(pipeline, pair):
    other = replace(pair[0], fingerprint="0" * 32, embeddings=np.zeros((1, 20), np.float32))
    lonely = embedding(pair[0], "Q*")
    for options, message in (
        ({"concept": [pair[0], other]}, "was made for"),
        ({"concept": lonely}, r"'Q\*' is in none of the prompts"),
        ({"weights": [1.0]}, "without concepts"),
    ):
        with pytest.raises(UserError, match=message):
            api.generate(pipeline, ["a photo of S*"], num=1, sampling_steps=1, quiet=True, **options)
