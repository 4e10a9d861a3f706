"""DisenDiff: the loss on attention maps in float64, the maps themselves, and several placeholders in one concept."""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_helpers import CONFIG, check_round_trip, check_single_steps, draw, personalize, rows, run

from datencoder_jax import tuning
from datencoder_jax.composition import compose
from datencoder_jax.errors import UserError
from datencoder_jax.models import attention
from datencoder_jax.objectives.calibration import calibration_loss
from datencoder_jax.pipeline import attention_shapes, map_layers
from datencoder_jax.plan.shapes import stable_diffusion
from datencoder_jax.toyworld.render import render, render_pair
from datencoder_jax.toyworld.world import Context, Instance

PAIR = {"word": "robot fish", "token": "A* B*"}
KEY = jax.random.key(2)


@pytest.fixture(scope="module")
def tuned(pipeline):
    return run(pipeline, "disendiff", **PAIR)


# --- the loss


def slow_loss(maps, slots, concepts):
    """Equations (1) to (4), pixel by pixel."""
    height, width, _ = maps.shape
    weights = np.exp(-0.5 * (np.arange(-1, 2) / 0.5) ** 2)
    weights /= weights.sum()

    def smooth(a):
        a = (a - a.min()) / (a.max() - a.min() + 1e-8)
        out = np.zeros_like(a)
        for y, x, dy, dx in itertools.product(range(height), range(width), range(-1, 2), range(-1, 2)):
            row, column = abs(y + dy), abs(x + dx)
            row, column = min(row, 2 * height - 2 - row), min(column, 2 * width - 2 - column)
            out[y, x] += weights[dy + 1] * weights[dx + 1] * a[row, column]
        return out

    def overlap(p, q):
        return ((p * q).sum() + 1) / (p.sum() + q.sum() - (p * q).sum() + 1)

    at = {slot: smooth(maps[:, :, list(slots).index(slot)]) for slot in range(2 * concepts)}
    classes = [at[2 * i + 1] ** 2 for i in range(concepts)]
    bound = sum(1 - overlap(classes[i], at[2 * i]) for i in range(concepts))
    pairs = [overlap(p, q) for p, q in itertools.combinations(classes, 2)]
    return bound + (np.mean(pairs) if pairs else 0.0)


loss_of = jax.jit(calibration_loss, static_argnames="concepts")
gradient_of = jax.jit(jax.grad(lambda *args: calibration_loss(*args).sum()), static_argnums=2)


@pytest.mark.parametrize("concepts", [1, 2, 3])
def test_the_loss_is_the_documented_one(concepts):
    rng = np.random.default_rng(concepts)
    maps = rng.dirichlet(np.ones(9), (2, 5, 4))
    slots = np.full((2, 9), -5)
    for row, first in zip(slots, (1, 3), strict=True):
        row[first : first + 2 * concepts] = np.arange(2 * concepts)
    wanted = [slow_loss(m, s, concepts) for m, s in zip(maps, slots, strict=True)]
    found = loss_of(jnp.asarray(maps, jnp.float32), jnp.asarray(slots, jnp.int32), concepts=concepts)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_binding_teaches_the_modifier_alone():
    maps = jnp.asarray(np.random.default_rng(0).dirichlet(np.ones(6), (1, 4, 4)), jnp.float32)
    slots = jnp.array([[-1, 0, 1, 2, 3, -1]])
    one, two = (np.abs(gradient_of(maps, slots, concepts)).sum(axis=(0, 1, 2)) for concepts in (1, 2))
    assert (
        one[1] > 1e-3 and not one[[0, 2, 3, 4, 5]].any()
    )  # one concept: its class word has nothing to keep apart from
    assert (two[1:5] > 1e-3).all() and not two[[0, 5]].any()


# --- the maps


def test_maps_are_the_softmax_of_the_layers_asked_for(pipeline, monkeypatch):
    """Against the queries and keys that attention is given, in float64; the prediction stays the same to the bit."""
    layers, given = map_layers(pipeline.base.unet, 8), []
    assert layers and all(path.endswith("attn2") and not path.startswith("mid") for path in layers)

    def spy(q, k, v, **options):
        given.append((q, k))
        return attend(q, k, v, **options)

    attend = attention.attend
    monkeypatch.setattr(attention, "attend", spy)
    rng = np.random.default_rng(0)
    z = rng.standard_normal((2, 8, 8, pipeline.base.unet.config.in_channels), dtype=np.float32)
    context = rng.standard_normal((2, 7, 12), dtype=np.float32)

    def watch(unet):
        given.clear()
        maps = dict.fromkeys(layers)
        out = unet(z, jnp.array([300]), context, maps=maps)
        return out, maps, [pair for pair in given if pair[1].shape[1] == 7]

    found, maps, pairs = jax.jit(watch)(pipeline.base.unet)
    plain = jax.jit(lambda unet: unet(z, jnp.array([300]), context))(pipeline.base.unet)
    np.testing.assert_allclose(found, plain, rtol=0, atol=1e-6)
    softmaxes = []
    for q, k in (jax.tree.map(lambda x: np.asarray(x, np.float64), pair) for pair in pairs):
        scores = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1]))
        softmaxes.append((scores / scores.sum(axis=-1, keepdims=True)).mean(axis=1))
    for path, found in maps.items():
        assert found.shape == (2, 64, 7), path
        assert min(np.abs(found - wanted).max() for wanted in softmaxes) < 1e-6


def test_the_layers_of_stable_diffusion_are_those_of_16_pixels():
    unet = stable_diffusion("1.5", "float32").unet
    names = {path.rpartition(".transformer_blocks")[0] for path in map_layers(unet, 64)}
    assert names == {f"down_blocks.2.attentions.{i}" for i in range(2)} | {
        f"up_blocks.1.attentions.{i}" for i in range(3)
    }


@pytest.fixture(scope="module")
def graded(tuned):
    """Loss and gradient by the weight of calibration, with and without computing states again."""
    variables = tuning.Variables(jnp.asarray(tuned.concept.embeddings), dict(tuned.concept.offsets))
    program = jax.jit(jax.value_and_grad(tuning.tune_loss), static_argnames="config")

    def grade(weight, remat=False):
        problem = tuned.problem._replace(calibration=jnp.float32(weight))
        return program(variables, problem, KEY, config=replace(CONFIG, remat=remat))

    return {weight: grade(weight) for weight in (0.0, 1.0, 3.0)} | {"again": grade(3.0, remat=True)}


def test_blocks_are_computed_again_whether_their_maps_are_collected_or_not(tuned):
    variables = tuning.Variables(jnp.asarray(tuned.concept.embeddings), dict(tuned.concept.offsets))

    def again(weight):
        problem = tuned.problem._replace(calibration=weight)
        loss = functools.partial(tuning.tune_loss, config=replace(CONFIG, remat=True))
        return str(jax.make_jaxpr(loss)(variables, problem, KEY)).count("prevent_cse=")

    assert again(jnp.float32(1.0)) == again(None) > 0


def test_the_loss_has_calibration_in_it(graded):
    zero, one, three = (float(graded[weight][0]) for weight in (0.0, 1.0, 3.0))
    assert 0.1 < one - zero < 3.0  # two bindings and one overlap, each between 0 and 1
    np.testing.assert_allclose(three - zero, 3 * (one - zero), rtol=1e-4)


def test_calibration_reaches_keys_and_modifiers_but_no_values_of_the_layer_itself(graded):
    """The maps of the last layer are of its keys; values only matter to layers after it."""
    zero, three = graded[0.0][1], graded[3.0][1]
    moved = {path: np.abs(three.offsets[path].weight - zero.offsets[path].weight).max() for path in zero.offsets}
    assert all(change > 1e-6 for path, change in moved.items() if path.endswith("to_k") and "mid" not in path)
    last = max(path for path in moved if path.startswith("up_blocks"))
    assert last.endswith("to_v") and moved[last] < 1e-7
    assert (np.abs(three.embeddings - zero.embeddings)[::2].max(axis=1) > 1e-6).all()


def test_states_computed_again_give_the_same_gradient(graded):
    (loss, gradient), (again, of_again) = graded[3.0], graded["again"]
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), gradient, of_again)


# --- what is tuned


def test_each_placeholder_has_a_modifier_and_its_word(pipeline, tuned):
    start, concept = np.asarray(tuned.start.embeddings), tuned.concept
    np.testing.assert_array_equal(start[1::2], rows(pipeline, "robot", "fish"))
    np.testing.assert_array_equal(start[0], start[2])
    np.testing.assert_array_equal(concept.embeddings[1::2], start[1::2])
    assert (np.abs(concept.embeddings - start)[::2] > 1e-4).all()
    assert not np.array_equal(concept.embeddings[0], concept.embeddings[2])
    ends = ("attn2.to_k", "attn2.to_v")
    assert concept.offsets.keys() == {p for p in attention_shapes(pipeline.base.unet) if p.endswith(ends)}
    assert all((np.abs(edit.weight) > 1e-4).mean() > 0.9 for edit in concept.offsets.values())
    assert tuned.made.report["trained"] == 2 * 12 + sum(np.size(edit.weight) for edit in concept.offsets.values())
    wanted = pipeline.tokenizer.encode(["a photo of a A* and a B*"], {"A*": 2, "B*": 2})
    np.testing.assert_array_equal(tuned.problem.soft_ids, wanted)
    assert tuned.problem.calibration == np.float32(0.01)


def test_calibration_can_be_left_out(pipeline):
    free = run(pipeline, "disendiff", **PAIR, options={"calibration": 0}, steps=1)
    assert free.problem.calibration is None


def test_one_program_is_single_steps(tuned):
    check_single_steps(tuned)


def test_a_single_placeholder_is_custom_diffusion_with_binding(pipeline):
    start = personalize(pipeline, "disendiff", steps=0, word="robot").concept
    other = personalize(pipeline, "custom_diffusion", steps=0, word="robot").concept
    np.testing.assert_array_equal(start.embeddings, other.embeddings)
    assert start.offsets.keys() == other.offsets.keys()


# --- several placeholders


def test_placeholders_share_the_vectors(pipeline, tuned, tmp_path):
    concept = tuned.concept
    assert concept.placeholders == {"A*": 2, "B*": 2} and concept.subject == "A* and a B*"
    assert concept.words == {"A*": "robot", "B*": "fish"} and concept.nearest_word == "robot fish"
    check_round_trip(pipeline, concept, tmp_path / "c.safetensors", ["a B* and a A*", "a B*"])
    first, second = draw(pipeline, concept, ["a photo of a A*", "a photo of a B*"])
    assert np.abs(first - second).max() > 0
    np.testing.assert_array_equal(draw(pipeline, concept, ["a photo of a A*"])[0], first)  # one of the two alone
    with pytest.raises(UserError, match="does not contain the placeholder 'A\\*' or 'B\\*'"):
        draw(pipeline, concept, ["a photo of a robot"])


def test_placeholders_of_others_are_taken(tuned):
    one, other = tuned.concept, replace(tuned.concept, token="C* B*")
    with pytest.raises(UserError, match="two concepts share the placeholder 'B\\*'"):
        compose([one, other])
    made = compose([one, replace(other, token="C* D*")])
    assert list(made.placeholders) == ["A*", "B*", "C*", "D*"] and made.words["D*"] == "fish"


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lora", PAIR, "lora takes one placeholder, without spaces, not 'A\\* B\\*'; several take: disendiff"),
        ("disendiff", PAIR | {"word": "robot"}, "one word of one token for each placeholder .* is 1 tokens"),
        ("disendiff", PAIR | {"word": "robotfish"}, "takes one word of one token for each placeholder"),
        ("disendiff", PAIR | {"token": "A* A*"}, "must be different words"),
        ("disendiff", PAIR | {"token": " "}, "cannot be the placeholder"),
        ("disendiff", PAIR | {"options": {"calibration": "much"}}, "calibration of disendiff is 'much', not a number"),
        ("disendiff", PAIR | {"options": {"calibration": -1}}, "calibration of disendiff is -1, not a number of 0 or"),
        ("disendiff", PAIR | {"token": "and B*"}, "cannot be the placeholder"),
        ("disendiff", PAIR | {"hard_word": "robot"}, "needs a word for each of A\\* B\\*, not 'robot'"),
    ],
)
def test_misuse_is_one_sentence(pipeline, method, options, message):
    with pytest.raises(UserError, match=message) as info:
        personalize(pipeline, method, **options)
    assert "\n" not in str(info.value)


# --- a picture of two


def test_a_picture_of_two_individuals():
    one, other = (Instance.from_id(id) for id in (1_000_003, 1_000_004))
    context = Context("studio")
    both, swapped = render_pair(one, other, context, 5), render_pair(other, one, context, 5)
    assert both.shape == (32, 32, 3) and not np.array_equal(both, swapped)
    np.testing.assert_array_equal(render_pair(one, one, context, 5), render(one, Context("studio", count=2), 5))
    left, right = render_pair(one, one, context, 5), render_pair(other, other, context, 5)
    np.testing.assert_array_equal(both[:, :15], left[:, :15])
    np.testing.assert_array_equal(both[:, 17:], right[:, 17:])
