"""The command line on a real, tiny base model: methods without encoder, export, several concepts, others' files."""

import json

import numpy as np
import pytest
from export_helpers import tiny_concept
from PIL import Image
from tiny import pictures, write_tiny_base

from datencoder_jax.checkpoints.concept_file import load_concept, save_concept
from datencoder_jax.cli import main
from datencoder_jax.data.reading import read_image
from datencoder_jax.pipeline import read_pipeline

FAST = ["--num", "1", "--sampling-steps", "2"]
EXPORTED = {
    "README.md",
    "concept.safetensors",
    "learned_embeds.safetensors",
    "pipeline.py",
    "pytorch_lora_weights.safetensors",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def picture(base):
    path = base.parent / "picture.png"
    Image.fromarray(pictures(1)[0]).save(path)
    return path


@pytest.fixture(scope="module")
def concepts(base):
    """Two concept files of the base model, with the placeholders S* and R*."""
    pipeline = read_pipeline(base, str(base))
    files = []
    for token in ("S*", "R*"):
        files.append(base.parent / f"{token[0]}.safetensors")
        save_concept(files[-1], tiny_concept(pipeline, token=token, base=str(base), nearest_word="robot", blend=0.5))
    return files


def run(*argv):
    assert main([str(a) for a in argv]) == 0


def fails(capsys, match, *argv):
    assert main([str(a) for a in argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and match in error, error


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_personalize_without_an_encoder_and_export(base, picture, tmp_path):
    out = tmp_path / "out"
    options = ["--method", "lora", "--word", "robot", "--rank", "3", "--steps", "2", "--learning-rates", "0", "1e-2"]
    run("personalize", picture, "--model", base, *options, *FAST, "--prompt", "a S*", "--export", "--out", out)
    kohya = {"my_concept.safetensors", "my_concept_emb.safetensors"}
    assert names(out) == EXPORTED | kohya | {"01_a-s_0.png", "input.png", "report.json", "samples.png"}
    concept = load_concept(out / "concept.safetensors")
    assert concept.blend == 1.0 and concept.metadata["method"] == "lora" and concept.metadata["rank"] == "3"
    report = json.loads((out / "report.json").read_text())
    assert report["method"] == "lora" and report["steps"] == 2 and len(report["losses"]) == 2
    assert "samples.png" in (out / "README.md").read_text()


def test_at_another_resolution(base, picture, tmp_path):
    options = ["--method", "textual_inversion", "--word", "robot", "--steps", "1", "--resolution", "32"]
    run("personalize", picture, "--model", base, *options, *FAST, "--prompt", "a S*", "--out", tmp_path)
    for name in ("input.png", "01_a-s_0.png"):
        assert read_image(tmp_path / name).shape == (32, 32, 3)


def test_the_card_has_scores_where_there_is_a_hard_path(picture, tmp_path):
    """The embedded model has both towers, so what leaving out the hard path costs can be measured."""
    out = tmp_path / "out"
    run("personalize", picture, "--steps", "0", *FAST, "--prompt", "a S*", "--export", "card", "--out", out)
    card = (out / "README.md").read_text()
    assert "| dual path |" in card and "| soft path |" in card


def test_without_an_encoder_both_ways_out_are_named(base, picture, tmp_path, capsys):
    argv = ["personalize", picture, "--model", base, "--out", tmp_path / "o"]
    fails(capsys, "--encoder", *argv)
    fails(capsys, "--method", *argv)
    assert not (tmp_path / "o").exists()


def test_export(base, concepts, tmp_path, capsys):
    out = tmp_path / "all"
    run("export", concepts[0], "--name", "my-cat", "--out", out)  # the concept knows its base model
    assert names(out) == EXPORTED | {"my-cat.safetensors", "my-cat_emb.safetensors"}
    sheet = tmp_path / "sheet.png"
    Image.fromarray(pictures(1)[0]).save(sheet)
    run("export", concepts[0], "--base", base, "--to", "kohya", "card", "--samples", sheet, "--out", tmp_path / "few")
    assert names(tmp_path / "few") == {"README.md", "samples.png", "my_concept.safetensors"}
    assert "replaced" not in capsys.readouterr().out
    run("export", concepts[0], "--base", base, "--name", "my-cat", "--out", out)
    assert "(replaced README.md, concept.safetensors, " in capsys.readouterr().out
    run("export", concepts[1], "--base", base, "--name", "my-cat", "--out", out)  # what was exported can be again
    for made in ("report.json", "x.txt"):  # where a run has made its concept, there may be no other copy
        there = tmp_path / made / "concept.safetensors"
        there.parent.mkdir()
        (there.parent / made).touch()
        there.write_bytes(concepts[1].read_bytes())
        fails(capsys, "is another concept and would be replaced", "export", concepts[0], "--out", there.parent)
        run("export", there, "--base", base, "--out", there.parent)
    fails(capsys, "cannot name", "export", concepts[0], "--name", "a/b", "--out", tmp_path / "x")
    fails(capsys, "belongs to another base model", "export", concepts[0], "--base", "toyworld", "--out", tmp_path / "x")
    fails(capsys, "invalid choice", "export", concepts[0], "--to", "onnx", "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_several_concepts_and_an_embedding(base, concepts, tmp_path, capsys):
    run("export", concepts[0], "--to", "embedding", "--name", "thing", "--out", tmp_path)
    embedding = tmp_path / "thing_emb.safetensors"
    first, second = concepts
    argv = ["generate", "--concept", first, "0.5", "--concept", second, "--embedding", embedding, "T*", *FAST]
    run(*argv, "--prompt", "a S* with a R* and a T*", "--sampler", "euler-a", "--out", tmp_path / "o")
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    told = [(part["token"], part["weight"]) for part in report["concepts"]]
    assert told == [("S*", 0.5), ("R*", 1.0), ("T*", 1.0)] and report["blend"] == 0.5
    pixels = read_image(tmp_path / "o" / report["pictures"][0])
    run(*argv, "--prompt", "a S* with a R* and a T*", "--sampler", "euler-a", "--seed", "1", "--out", tmp_path / "p")
    assert not np.array_equal(pixels, read_image(tmp_path / "p" / report["pictures"][0]))

    prompt = ["--prompt", "a S*", "--out", tmp_path / "x"]
    fails(capsys, "share the placeholder", "generate", "--concept", first, "--concept", first, *prompt)
    fails(capsys, "in none of the prompts", "generate", "--concept", first, "--concept", second, *prompt)
    fails(capsys, "is no weight", "generate", "--concept", first, "heavy", *prompt)
    fails(capsys, "a file and a weight", "generate", "--concept", first, "1", second, *prompt)
    fails(capsys, "a file and a token", "generate", "--embedding", embedding, "T*", "U*", *prompt)
    assert not (tmp_path / "x").exists()
    fails(capsys, "is no weight", "generate", "--lora", embedding, "nan", *prompt)
    fails(capsys, "There is no file", "generate", "--lora", "nowhere.safetensors", *prompt)
    fails(capsys, "without spaces", "generate", "--model", base, "--embedding", embedding, " ", *prompt)
    assert not (tmp_path / "x").exists()


def test_a_concept_knows_what_its_model_predicts(base, concepts, tmp_path, capsys):
    """As of a checkpoint of one file, which does not say."""
    pipeline = read_pipeline(base, str(base))
    file = tmp_path / "c.safetensors"
    save_concept(file, tiny_concept(pipeline, base=str(base), metadata={"prediction_type": "v_prediction"}))
    argv = ["generate", "--concept", file, *FAST, "--prompt", "a S*", "--out"]
    fails(capsys, "--prediction-type v_prediction", *argv, tmp_path / "x", "--model", base)
    run(*argv, tmp_path / "o")
    run(*argv, tmp_path / "p", "--model", base, "--prediction-type", "v_prediction")
    np.testing.assert_array_equal(*(read_image(tmp_path / name / "01_a-s_0.png") for name in "op"))


def test_no_lora_of_a_method_without_offsets(base, picture, tmp_path, capsys):
    argv = ["personalize", picture, "--model", base, "--method", "textual_inversion", "--export", "kohya"]
    fails(capsys, "nothing that files for kohya can hold", *argv, "--out", tmp_path / "x")
