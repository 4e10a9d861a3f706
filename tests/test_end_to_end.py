"""The whole path on the embedded model, as a newcomer walks it."""

import json
from pathlib import Path

import numpy as np
import pytest

from datencoder_jax import api
from datencoder_jax.checkpoints.concept_file import load_concept
from datencoder_jax.cli import main
from datencoder_jax.data.reading import fit_square, read_image
from datencoder_jax.toyworld.render import render
from datencoder_jax.toyworld.world import SPLITS, Context, Instance

EXAMPLES = Path(__file__).parent.parent / "examples"
IDS = {"creature": 1100028, "robot": 1100041, "teapot": 1100072, "house": 1100049, "car": 1100050, "fish": 1100027}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    assert main(["personalize", str(EXAMPLES / "robot.png"), "--num", "2", "--steps", "3", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("name", IDS)
def test_examples_are_held_out_inhabitants(name):
    assert IDS[name] in SPLITS["test"]
    drawn = render(Instance.from_id(IDS[name]), Context("studio"), 7, 32)
    np.testing.assert_array_equal(fit_square(read_image(EXAMPLES / f"{name}.png"), 32), drawn)


def test_personalize_writes_everything(folder):
    report = json.loads((folder / "report.json").read_text())
    assert len(report["losses"]) == 3 and np.isfinite(report["losses"]).all()
    assert {"load", "compile", "predict", "tune", "sample"} <= set(report["seconds"])
    assert report["seed"] == 0 and report["nearest_words"]
    pictures = sorted(folder.glob("0*.png"))
    assert len(pictures) == 2 * 4
    assert {read_image(picture).shape for picture in pictures} == {(32, 32, 3)}
    assert read_image(folder / "samples.png").shape[1] > 300
    np.testing.assert_array_equal(
        read_image(folder / "input.png"), render(Instance.from_id(1100041), Context("studio"), 7, 32)
    )


def test_generate_draws_the_saved_concept_again(folder, tmp_path):
    pipeline = api.load()
    concept = load_concept(folder / "concept.safetensors", pipeline.fingerprint)
    prompt = "a photo of a S* on the beach"
    out = tmp_path / "again"
    file = str(folder / "concept.safetensors")
    assert main(["generate", "--concept", file, "--prompt", prompt, "--num", "2", "--out", str(out)]) == 0
    pictures = [read_image(path) for path in sorted(out.glob("0*.png"))]
    first = [read_image(path) for path in sorted(folder.glob("01_*.png"))]
    np.testing.assert_array_equal(np.stack(pictures), np.stack(first))
    in_python = api.generate(pipeline, [prompt], concept=concept, num=2, quiet=True).images[0]
    np.testing.assert_array_equal(np.stack(pictures), in_python)


def test_the_concept_belongs_to_its_base_model(folder, capsys):
    assert main(["info", str(folder / "concept.safetensors")]) == 0
    assert "toyworld" in capsys.readouterr().out
