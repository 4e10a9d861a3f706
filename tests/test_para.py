"""PaRa: directions taken out of the weights, against NumPy in float64; what is tuned; what other programs get."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from export_helpers import draw_offsets
from method_helpers import check_round_trip, check_single_steps, draw, personalize, predict, rows, run

from datencoder_jax.composition import compose
from datencoder_jax.models.edits import as_low_rank, ready
from datencoder_jax.pipeline import attention_shapes
from datencoder_jax.plan.shapes import stable_diffusion
from datencoder_jax.typing import LearningRates, LowRank, Removed, SequentialRemoval

RANK = 3


@pytest.fixture(scope="module")
def tuned(pipeline):
    return run(pipeline, "para", rank=RANK, learning_rates=LearningRates(0.0, 3e-2))


def removed(weight, directions):
    """Equation (1) in float64, in the paper's layout `W [out, in]`; its transpose is ours."""
    w, b = np.asarray(weight, np.float64).T, np.asarray(directions, np.float64)
    q = np.linalg.qr(b)[0]
    return (w - q @ q.T @ w).T


def test_the_start_is_random_directions(pipeline, tuned):
    shapes = attention_shapes(pipeline.base.unet)
    offsets = tuned.start.offsets
    found = {path: edit.directions.shape for path, edit in offsets.items()}
    assert found == {path: (outputs, RANK) for path, (_, outputs) in shapes.items()}
    lengths = np.concatenate([np.linalg.norm(edit.directions, axis=0) for edit in offsets.values()])
    assert 0.8 < lengths.mean() < 1.2 and np.std(lengths) > 0.01
    np.testing.assert_array_equal(tuned.start.embeddings, rows(pipeline, "robot"))
    assert tuned.concept.metadata["rank"] == str(RANK)
    again, other = (personalize(pipeline, "para", steps=0, rank=RANK, seed=seed).concept.offsets for seed in (0, 1))
    path = next(iter(offsets))
    np.testing.assert_array_equal(again[path].directions, offsets[path].directions)
    assert not np.array_equal(other[path].directions, offsets[path].directions)


def test_a_rank_past_the_width_is_the_width(pipeline):
    concept = personalize(pipeline, "para", steps=0, rank=99).concept
    assert {edit.directions.shape for edit in concept.offsets.values()} == {(8, 8)}


def test_the_network_is_that_of_the_reduced_weights(pipeline, tuned):
    unet, offsets = pipeline.base.unet, tuned.concept.offsets
    changed = dict(unet.params)
    for path, edit in offsets.items():
        changed[f"{path}.weight"] = removed(changed[f"{path}.weight"], edit.directions).astype(np.float32)
        assert np.linalg.matrix_rank(changed[f"{path}.weight"], tol=1e-4) == 8 - RANK
    found = jax.jit(lambda unet, o: predict(unet, unet.params, ready(o, unet.params), pipeline))(unet, offsets)
    wanted = jax.jit(lambda unet, params: predict(unet, params, None, pipeline))(unet, changed)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)
    for path, factors in as_low_rank(offsets, unet.params).items():
        total = np.asarray(unet.params[f"{path}.weight"], np.float64) + factors.down.astype(np.float64) @ factors.up
        np.testing.assert_allclose(total, removed(unet.params[f"{path}.weight"], offsets[path].directions), atol=1e-6)
        assert factors.down.shape[1] == RANK


@jax.jit
def weigh(directions, weight, cotangent):
    """A scalar of the change that directions make, and its gradient."""

    def scalar(b):
        factors = ready({"p": Removed(b)}, {"p.weight": weight})["p"]
        return ((factors.down @ factors.up) * cotangent).sum()

    return jax.value_and_grad(scalar)(directions)


def test_the_gradient_through_the_factorisation():
    """Against central differences in float64; none along the directions themselves, since only their span counts."""
    rng = np.random.default_rng(0)
    b, w, c = (rng.standard_normal(shape) for shape in ((6, 2), (5, 6), (5, 6)))
    value, gradient = weigh(*(jnp.asarray(x, jnp.float32) for x in (b, w, c)))

    def scalar(b):
        return ((removed(w, b) - w) * c).sum()

    np.testing.assert_allclose(value, scalar(b), rtol=1e-5)
    wanted = np.zeros_like(b)
    for place in np.ndindex(*b.shape):
        step = np.zeros_like(b)
        step[place] = 1e-5
        wanted[place] = (scalar(b + step) - scalar(b - step)) / 2e-5
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(b.T @ np.asarray(gradient), 0.0, atol=1e-4)
    _, of_longer = weigh(*(jnp.asarray(x, jnp.float32) for x in (10 * b, w, c)))
    np.testing.assert_allclose(of_longer, np.asarray(gradient) / 10, rtol=1e-3, atol=1e-5)


def test_the_gradient_reaches_what_is_tuned_and_nothing_else(pipeline, tuned):
    np.testing.assert_array_equal(tuned.concept.embeddings, tuned.start.embeddings)
    for path, edit in tuned.concept.offsets.items():
        moved = np.abs(np.asarray(edit.directions) - np.asarray(tuned.start.offsets[path].directions))
        assert (moved > 1e-4).mean() > 0.9, path
    assert tuned.made.report["trained"] == sum(out * RANK for _, out in attention_shapes(pipeline.base.unet).values())


def test_one_program_is_single_steps(tuned):
    check_single_steps(tuned)


def test_a_file_holds_every_bit(pipeline, tuned, tmp_path):
    check_round_trip(pipeline, tuned.concept, tmp_path / "c.safetensors")


def test_it_has_half_the_numbers_of_a_lora():
    """The paper's count, of square matrices; the keys and values of text have wider inputs."""
    shapes = attention_shapes(stable_diffusion("1.5", "float32").unet).items()
    square = [shape for path, shape in shapes if not path.endswith(("attn2.to_k", "attn2.to_v"))]
    assert 2 * sum(out for _, out in square) == sum(sum(shape) for shape in square)


# --- several concepts, and LoRAs of other programs


def share(change, weight):
    """Of the squared length of the weights."""
    return (np.asarray(change, np.float64) ** 2).sum() / (np.asarray(weight, np.float64) ** 2).sum()


@pytest.mark.parametrize("apart", [1e-7, 1e-3, 1.0])
def test_concepts_remove_one_after_the_other(apart):
    """The paper's way; of spans that nearly coincide no more is removed than is in them."""
    rng = np.random.default_rng(0)
    first, third = rng.standard_normal((2, 40, 4)).astype(np.float32)
    second = first + np.float32(apart) * rng.standard_normal((40, 4), np.float32)
    weight = rng.standard_normal((30, 40), np.float32)
    wanted = np.asarray(weight, np.float64)
    for directions in (first, second, third):
        wanted = removed(wanted, directions)
    edit = SequentialRemoval((first, second, third))
    for factors in (
        jax.jit(lambda edit, weight: ready({"p": edit}, {"p.weight": weight})["p"])(edit, weight),
        as_low_rank({"p": edit}, {"p.weight": weight})["p"],
    ):
        total = weight + np.asarray(factors.down, np.float64) @ factors.up
        # Where the second span is the first but for rounding, what is left of it is rounding too.
        np.testing.assert_allclose(total, wanted, atol=2e-5 if apart > 1e-6 else 0.5)
        assert share(total - weight, weight) == pytest.approx(share(wanted - weight, weight), rel=1e-3)


def test_joining_concepts_removes_what_each_removes_in_turn(pipeline):
    pair = [personalize(pipeline, "para", rank=RANK, seed=0, token=token).concept for token in ("S*", "T*")]
    twin = replace(pair[0], token="U*")
    params, shapes = pipeline.base.unet.params, attention_shapes(pipeline.base.unet)
    for concepts in (pair, pair[::-1], [pair[0], twin], [*pair, twin]):
        joined = as_low_rank(compose(concepts).variables.offsets, params)
        for path in shapes:
            wanted = np.asarray(params[f"{path}.weight"], np.float64)
            for concept in concepts:
                wanted = removed(wanted, concept.offsets[path].directions)
            found = params[f"{path}.weight"] + joined[path].down.astype(np.float64) @ joined[path].up
            np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert isinstance(compose(pair, [1.0, 0.0]).variables.offsets[path], Removed)
    assert compose(pair, [0.0, 0.0]).variables.offsets[path].directions.shape[1] == 0


def test_concepts_of_one_seed_start_at_directions_of_their_own(pipeline):
    starts = [
        personalize(pipeline, "para", steps=0, rank=1, token=token).concept.offsets for token in ("S*", "A*", "B*")
    ]
    for path in starts[0]:
        a, b, c = (np.linalg.qr(np.asarray(start[path].directions))[0] for start in starts)
        assert max(abs(x.T @ y).item() for x, y in ((a, b), (a, c), (b, c))) < 0.99
    again = personalize(pipeline, "para", steps=0, rank=1, token="A*").concept.offsets
    jax.tree.map(np.testing.assert_array_equal, dict(again), dict(starts[1]))
    # The numbers of the default placeholder are those of a key of the seed alone.
    key = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 3)[0]
    path, (_, outputs) = next(iter(attention_shapes(pipeline.base.unet).items()))
    first = jax.random.normal(jax.random.fold_in(key, 0), (outputs, 1)) * outputs**-0.5
    np.testing.assert_array_equal(starts[0][path].directions, first)


def with_changes(pipeline, changes):
    """As `loading.with_lora` leaves a pipeline."""
    unet = pipeline.base.unet
    params = dict(unet.params)
    for path, change in changes.items():
        params[f"{path}.weight"] = params[f"{path}.weight"] + change.down @ change.up
    return replace(pipeline, base=replace(pipeline.base, unet=unet.with_params(params)), loras=changes)


def test_a_lora_of_another_program_comes_after_what_is_removed(pipeline, tuned):
    """So it adds all of its change, in the directions that the concept removed too."""
    shapes = attention_shapes(pipeline.base.unet)
    changes = draw_offsets({path: shapes[path] for path in list(shapes)[::2]})
    changed = with_changes(pipeline, changes)
    factors = as_low_rank(tuned.concept.offsets, pipeline.base.unet.params)
    whole = {
        path: LowRank(np.concatenate([x.down, y.down], 1), np.concatenate([x.up, y.up]))
        for path, x in factors.items()
        for y in (changes.get(path, LowRank(x.down[:, :0], x.up[:0])),)
    }
    wanted = draw(pipeline, replace(tuned.concept, offsets=whole))
    found = draw(changed, tuned.concept)
    assert np.abs(found - wanted).max() <= 1
    before = draw(replace(changed, loras={}), tuned.concept)
    assert np.abs(before - wanted).max() > 5
    # A concept that is tuned with the LoRA is tuned as it is drawn.
    own = run(changed, "para", rank=RANK, learning_rates=LearningRates(0.0, 3e-2))
    kept = {path: edit.kept for path, edit in own.start.offsets.items() if isinstance(edit, SequentialRemoval)}
    assert kept.keys() == changes.keys()
    assert {type(edit) for edit in own.concept.offsets.values()} == {Removed}
    assert own.made.report["trained"] == tuned.made.report["trained"]
