"""`--scale`: files of pictures enlarged pixel by pixel, and nothing else of a run."""

import json

import numpy as np
import pytest
from cli_helpers import fails
from PIL import Image

from datencoder_jax.cli import main
from datencoder_jax.data.reading import enlarge, fit_square

pytest_plugins = ("cli_fixtures",)


def read(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_every_pixel_becomes_a_square():
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    large = enlarge(image, 3)
    assert large.shape == (12, 18, 3) and (enlarge(image, 1) == image).all()
    assert all((large[3 * y : 3 * y + 3, 3 * x : 3 * x + 3] == image[y, x]).all() for y in range(4) for x in range(6))
    assert (fit_square(enlarge(image[:, :4], 8), 4) == image[:, :4]).all()


@pytest.mark.parametrize("command", ["personalize", "generate"])
def test_files_of_pictures_are_enlarged(command, calls, tmp_path, picture):
    given = [str(picture)] if command == "personalize" else []
    argv = [command, *given, "--prompt", "a S* robot" if given else "a robot", "--num", "1", "--resolution", "32"]
    plain, large = tmp_path / "plain", tmp_path / "large"
    assert main([*argv, "--out", str(plain)]) == main([*argv, "--scale", "5", "--out", str(large)]) == 0
    reports = [json.loads((out / "report.json").read_text()) for out in (plain, large)]
    assert [report["scale"] for report in reports] == [1, 5] and reports[0]["pictures"] == reports[1]["pictures"]
    for name in (*reports[0]["pictures"], *reports[0].get("input_pictures", ())):
        assert (read(large / name) == enlarge(read(plain / name), 5)).all(), name
    assert (read(large / "samples.png") == read(plain / "samples.png")).all()
    assert "scale" not in calls["generate"][1]


def test_pictures_that_would_be_too_large_are_refused(calls, capsys, tmp_path, picture):
    size = ["--resolution", "1024", "--scale", "9", "--out", tmp_path / "o"]
    fails(capsys, "9216 pixels a side is too large; lower --scale", "generate", "--prompt", "a fish", *size)
    fails(capsys, "too large; lower --scale", "personalize", picture, *size)
    fails(capsys, "--scale", "generate", "--prompt", "a fish", "--scale", "0", "--out", tmp_path / "o")
    assert not {"generate", "personalize"} & calls.keys() and not (tmp_path / "o").exists()
