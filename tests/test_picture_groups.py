"""Pictures that look like different things: how they are grouped, and what `personalize` says of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import datencoder_jax
from datencoder_jax import api
from datencoder_jax.cli import main
from datencoder_jax.encoder.tuning_encoder import EncoderConfig
from datencoder_jax.methods import datencoder
from datencoder_jax.methods.datencoder import group_alike
from datencoder_jax.toyworld.render import render
from datencoder_jax.toyworld.world import Context, Instance

pytest_plugins = ("cli_fixtures",)

ROBOT, FISH = 1_100_023, 1_100_003
"""Test individuals."""


def test_rows_are_grouped_by_pairs_that_are_alike():
    cosines = np.array([[1, 0.1, 0.5, 0], [0.1, 1, 0.4, 0], [0.5, 0.4, 1, 0.2], [0, 0, 0.2, 1]])
    assert group_alike(cosines, 0.3) == [[0, 1, 2], [3]]  # 0 and 1 by way of 2
    assert group_alike(cosines, 0.45) == [[0, 2], [1], [3]]
    assert group_alike(cosines, 0.2) == [[0, 1, 2, 3]]
    assert group_alike(np.ones((1, 1)), 0.3) == [[0]]


def test_cosines_are_those_of_the_embeddings():
    embeddings = jax.random.normal(jax.random.key(0), (3, 2, 5))
    rows = np.asarray(embeddings, np.float64).reshape(3, -1)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(datencoder._cosines(embeddings), rows @ rows.T, atol=1e-6)
    assert np.isfinite(np.asarray(datencoder._cosines(jnp.zeros((2, 1, 4))))).all()


def test_an_impossible_cosine_is_refused():
    with pytest.raises(ValueError, match="between -1 and 1"):
        EncoderConfig(1, 1, 1, 1, (), same_cosine=1.5)


def test_an_encoder_that_nobody_has_measured_says_nothing(pipeline):
    pictures = [np.full((32, 32, 3), value, np.uint8) for value in (0, 255)]
    assert pipeline.encoder.config.same_cosine is None
    assert api.personalize(pipeline, pictures, steps=0, quiet=True).report["picture_groups"] is None


@pytest.fixture(scope="module")
def toyworld():
    return datencoder_jax.load("toyworld")


def draw(instance, scene="studio", seed=0):
    return render(Instance.from_id(instance), Context(scene), seed)


def test_the_embedded_encoder_tells_a_fish_from_a_robot(toyworld):
    assert Instance.from_id(ROBOT).cls == "robot" and Instance.from_id(FISH).cls == "fish"
    pictures = [draw(ROBOT), draw(FISH), draw(ROBOT, "beach", 1), draw(FISH, "snow", 2)]
    report = api.personalize(toyworld, pictures, steps=0, quiet=True).report
    assert report["picture_groups"] == [[0, 2], [1, 3]]


@pytest.mark.filterwarnings("always:the encoder takes the pictures:UserWarning")
def test_the_pictures_are_named(calls, tmp_path, monkeypatch, capsys):
    files = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for file in files:
        Image.fromarray(draw(ROBOT)).save(file)
    fake = api.personalize

    def personalize(pipeline, images, **options):
        made = fake(pipeline, images, **options)
        return api.Personalized(made.concept, made.report | {"picture_groups": groups})

    monkeypatch.setattr(api, "personalize", personalize)
    groups = [[0, 2], [1]]
    main(["personalize", *map(str, files), "--out", str(tmp_path / "out")])
    names = f"({files[0]} and {files[2]}; {files[1]})"
    assert f"warning: the encoder takes the pictures for 2 different things {names}" in capsys.readouterr().err
    groups = [[0, 1, 2]]
    main(["personalize", *map(str, files), "--out", str(tmp_path / "out")])
    assert "different things" not in capsys.readouterr().err
