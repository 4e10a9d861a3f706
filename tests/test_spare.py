"""Directions that are tuned beside the predicted ones."""

import numpy as np
import pytest
from tiny import pictures

from datencoder_jax import api, tuning
from datencoder_jax.checkpoints.concept_file import load_concept, save_concept
from datencoder_jax.errors import UserError
from datencoder_jax.tuning import TuningConfig
from datencoder_jax.typing import LearningRates, LowRank

CONFIG = TuningConfig(draws=2, views=2)
SPARE = 3


def run(pipeline, steps, **options):
    options |= {"config": CONFIG, "learning_rates": LearningRates(1e-3, 1e-2), "quiet": True}
    return api.personalize(pipeline, list(pictures(1)), steps=steps, **options)


def factors(found) -> dict[str, LowRank]:
    """Of a concept, or of the variables it is tuned from."""
    return found.offsets


@pytest.fixture(scope="module")
def beginning(pipeline):
    """The variables before the first step, without and with further directions."""
    found, real = [], tuning.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "start", lambda variables: found.append(variables) or real(variables))
        for options in ({}, {"spare": SPARE}):
            run(pipeline, 1, options=options)
    return found


@pytest.fixture(scope="module")
def tuned(pipeline):
    return run(pipeline, 2, options={"spare": SPARE}).concept


def test_the_prediction_is_where_it_starts(beginning):
    plain, wide = beginning
    np.testing.assert_array_equal(plain.embeddings, wide.embeddings)
    assert factors(plain).keys() == factors(wide).keys()
    for path, own in factors(plain).items():
        rank, x = own.down.shape[1], factors(wide)[path]
        np.testing.assert_array_equal(x.down[:, :rank], own.down)
        np.testing.assert_array_equal(x.up[:rank], own.up)
        assert x.down.shape[1] == rank + SPARE and x.up.shape == (rank + SPARE, own.up.shape[1])
        assert not np.asarray(x.up[rank:]).any()


def test_further_directions_are_three_times_as_large_as_those_of_lora(beginning):
    scaled = [np.ravel(x.down[:, -SPARE:]) * x.down.shape[0] ** 0.5 / 3 for x in factors(beginning[1]).values()]
    assert len({float(x[0]) for x in scaled}) == len(scaled)  # each has its own
    everything = np.concatenate(scaled)
    assert everything.std() == pytest.approx(1.0, rel=0.1) and abs(everything.mean()) < 0.1


def test_they_are_tuned_with_the_others(pipeline, beginning, tuned):
    start, plain = factors(beginning[1]), factors(run(pipeline, 2).concept)
    for path, x in factors(tuned).items():
        assert np.abs(x.up[-SPARE:]).max() > 1e-3
        assert not np.array_equal(x.down[:, 0], start[path].down[:, 0])
        assert plain[path].down.shape[1] == x.down.shape[1] - SPARE
    assert tuned.metadata["option_spare"] == str(SPARE)


def test_a_concept_that_is_not_tuned_has_none(pipeline):
    plain, wide = (run(pipeline, 0, options=options).concept for options in ({}, {"spare": SPARE}))
    for path, x in factors(plain).items():
        np.testing.assert_array_equal(x.down, factors(wide)[path].down)
        np.testing.assert_array_equal(x.up, factors(wide)[path].up)


def test_a_file_draws_the_same(pipeline, tuned, tmp_path):
    save_concept(tmp_path / "concept.safetensors", tuned)
    again = load_concept(tmp_path / "concept.safetensors")
    first, second = (
        api.generate(pipeline, ["a S*"], concept=each, num=1, sampling_steps=2, quiet=True).images
        for each in (tuned, again)
    )
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("value", [-1, 1.5])
def test_misuse_is_one_sentence(pipeline, value):
    with pytest.raises(UserError, match=rf"spare of datencoder is {value}, not a whole number of 0 or more"):
        run(pipeline, 1, options={"spare": value})
