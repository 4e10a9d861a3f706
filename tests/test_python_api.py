"""What a user of the Python API may pass and gets to see: images, concepts and rates, and representations."""

import inspect
import io
import pydoc
from importlib import metadata, resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import pictures

import datencoder_jax
from datencoder_jax import api
from datencoder_jax.checkpoints.concept_file import save_concept
from datencoder_jax.data.reading import to_images
from datencoder_jax.errors import UserError
from datencoder_jax.typing import LearningRates

DRAWING = {"num": 1, "sampling_steps": 2, "quiet": True}


@pytest.fixture(scope="module")
def result(pipeline):
    return api.personalize(pipeline, pictures(1), steps=0, quiet=True)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(pictures(1)[0]).save(path)
    return path


def test_images_may_be_paths_pil_images_or_arrays_one_or_several(file):
    expected = pictures(1)[0]
    image = Image.open(file)
    for one in (expected, image, file, str(file)):
        for given in (one, [one], (one, one)):
            for array in to_images(given):
                np.testing.assert_array_equal(array, expected)
    assert len(to_images(np.stack([expected, expected]))) == 2
    assert to_images([]) == []


def test_a_pil_image_is_read_as_its_file_is(tmp_path):
    """Upright, and on white where it is transparent."""
    pixels = np.zeros((12, 9, 4), np.uint8)
    pixels[3:, :, :] = (200, 10, 10, 128)
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as reopened:
        [array] = to_images(reopened)
    assert array.shape == (9, 12, 3)
    np.testing.assert_array_equal(array, to_images(tmp_path / "turned.png")[0])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (3, "paths, PIL images or uint8 arrays .* not int"),
        ([3], "paths, PIL images or uint8 arrays"),
        (np.zeros((8, 8, 3)), "paths, PIL images or uint8 arrays"),
        ("nowhere.png", "There is no file nowhere.png"),
        (Image.new("RGB", (2, 2)), "only 2x2 pixels"),
        ([], "no picture"),
    ],
)
def test_other_images_are_one_sentence(pipeline, images, message):
    with pytest.raises(UserError, match=message) as info:
        api.personalize(pipeline, images, steps=0, quiet=True)
    assert "\n" not in str(info.value)


def test_learning_rates_may_be_any_pair(pipeline):
    assert api._learning_rates((1e-3, 0)) == LearningRates(1e-3, 0.0) == api._learning_rates([1e-3, 0])
    for wrong in (1e-3, (1e-3,), (1, 2, 3), "ab", ("a", "b")):
        with pytest.raises(UserError, match="must be two numbers, of the embedding and of the offsets"):
            api.personalize(pipeline, pictures(1), steps=0, learning_rates=wrong, quiet=True)


def test_a_concept_may_be_a_result_or_a_path(pipeline, result, tmp_path):
    path = tmp_path / "concept.safetensors"
    save_concept(path, result.concept)
    expected = api.generate(pipeline, ["a S*"], concept=result.concept, **DRAWING).images
    for concept in (result, path, str(path), [result], (path,)):
        np.testing.assert_array_equal(api.generate(pipeline, ["a S*"], concept=concept, **DRAWING).images, expected)
    for wrong in (3, [None]):
        with pytest.raises(UserError, match="a concept must be"):
            api.generate(pipeline, ["a S*"], concept=wrong, **DRAWING)


def test_representations_are_short(pipeline, result):
    drawn = api.generate(pipeline, ["a fish", "a robot"], **DRAWING)
    for value in (pipeline, result, result.concept, drawn):
        text = repr(value)
        assert text.startswith(type(value).__name__) and len(text) < 300 and text.count("\n") < 4
    assert "'S*'" in repr(result) and "1 of each of 2 prompts" in repr(drawn)


def test_a_notebook_shows_the_pictures(pipeline):
    drawn = api.generate(pipeline, ["a fish", "a robot"], **DRAWING | {"num": 3})
    with Image.open(io.BytesIO(drawn._repr_png_())) as sheet:
        assert sheet.width > 3 * 128 and sheet.height > 2 * 128


def test_the_package_shows_its_calls():
    names = {"load", "personalize", "generate", "__version__"}
    assert names <= set(dir(datencoder_jax))
    assert datencoder_jax.__version__ == metadata.version("datencoder_jax")
    text = pydoc.render_doc(datencoder_jax, renderer=pydoc.plaintext)
    for name in ("load", "personalize", "generate"):
        assert f"{name}(" in text and inspect.getdoc(getattr(datencoder_jax, name)).splitlines()[0] in text
    assert Path(str(resources.files(datencoder_jax) / "py.typed")).is_file()
