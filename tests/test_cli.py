"""The command line: options, their defaults, mistakes in them and other ends. The models are fakes here."""

import errno
import inspect
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from checkpoint_helpers import concept
from cli_helpers import fails
from PIL import Image

from datencoder_jax import api
from datencoder_jax.checkpoints.concept_file import load_concept, save_concept
from datencoder_jax.checkpoints.export import KINDS
from datencoder_jax.cli import build_parser, main
from datencoder_jax.commands import options
from datencoder_jax.commands.examples import EXAMPLES
from datencoder_jax.data.reading import fit_square, read_image
from datencoder_jax.data.writing import picture_name
from datencoder_jax.diffusion.samplers import SAMPLERS
from datencoder_jax.errors import UserError
from datencoder_jax.methods import METHODS

pytest_plugins = ("cli_fixtures",)


def test_personalize_passes_options_on_and_writes_everything(tmp_path, capsys, picture, calls):
    out = tmp_path / "new" / "out"
    options = ["--model", "some/model", "--encoder", "enc", "--steps", "3", "--token", "<it>", "--num", "2"]
    prompts = ["--prompt", "a <it>", "a sketch of <it>", "--prompt", "<it>!"]
    argv = ["personalize", picture, picture, *options, *prompts, "--seed", "7", "--blend", "0.4", "--out", str(out)]
    assert main(argv) == 0
    assert calls["load"] == ("some/model", {"encoder": "enc"})
    images, given = calls["personalize"]
    assert len(images) == 2 and given == {"method": "datencoder", "steps": 3, "token": "<it>", "blend": 0.4, "seed": 7}
    assert calls["ahead"]["quiet"] == [True, True]
    assert calls["ahead"]["personalize"][1] == given  # so that what compiles ahead is what is run
    texts, given = calls["generate"]
    assert calls["ahead"]["generate"][1].keys() == given.keys()
    assert texts == ["a <it>", "a sketch of <it>", "<it>!"] and given["num"] == 2 and given["seed"] == 7
    assert given["concept"].token == "<it>"

    names = [picture_name(row, text, k) for row, text in enumerate(texts) for k in range(2)]
    assert names[2] == "02_a-sketch-of-it_0.png"
    extra = {"concept.safetensors", "input.png", "input_2.png", "samples.png", "report.json"}
    assert {path.name for path in out.iterdir()} == extra | set(names)
    assert load_concept(out / "concept.safetensors").blend == 0.4
    np.testing.assert_array_equal(read_image(out / "input.png"), fit_square(read_image(picture), 32))
    assert (read_image(out / names[1]) == 1).all()
    report = json.loads((out / "report.json").read_text())
    assert report["nearest_words"] == [{"word": "robot", "cosine": 0.5}] and report["losses"] == [1.0, None]
    seconds = report["seconds"]
    assert {name: seconds[name] for name in ("load", "compile", "predict", "tune", "sample")} == {
        "load": 1.0,
        "compile": 4.0,
        "predict": 0.1,
        "tune": 3.0,
        "sample": 4.0,
    }
    assert report["seed"] == 7 and report["steps"] == 3 and report["pictures"] == names
    assert report["input_pictures"] == ["input.png", "input_2.png"]
    assert report["peak_memory_bytes"]["host"] > 1e6 and {"jax", "flax", "datencoder_jax"} <= report["versions"].keys()
    assert capsys.readouterr().out.splitlines()[0].startswith("device: ")


def test_default_prompts_are_the_models(tmp_path, picture, calls):
    assert main(["personalize", picture, "--out", str(tmp_path / "a")]) == 0
    assert calls["generate"][0] == ["a S*", "S* and S*"]
    assert main(["personalize", picture, "--token", "X", "--out", str(tmp_path / "b")]) == 0
    assert calls["generate"][0] == ["a X", "X and X"]


def test_generate_passes_options_on(tmp_path, concept_file, calls):
    options = ["--sampler", "dpm++2m", "--sampling-steps", "9", "--guidance", "2.5", "--negative", "blur"]
    argv = ["generate", "--concept", concept_file, "--prompt", "a S*", *options, "--num", "1", "--seed", "3"]
    assert main([*argv, "--blend", "1", "--out", str(tmp_path / "o")]) == 0
    assert calls["load"] == ("toyworld", {})
    texts, given = calls["generate"]
    given = dict(given)
    (found,) = given.pop("concept")
    assert found.token == "S*" and texts == ["a S*"]
    assert given == {
        "num": 1,
        "seed": 3,
        "sampler": "dpm++2m",
        "sampling_steps": 9,
        "guidance": 2.5,
        "blend": 1.0,
        "negative": "blur",
        "weights": [1.0],
    }
    assert {p.name for p in (tmp_path / "o").iterdir()} == {"01_a-s_0.png", "samples.png", "report.json"}
    assert json.loads((tmp_path / "o" / "report.json").read_text())["blend"] == 1.0
    assert main(["generate", "--prompt", "a robot", "--model", "m", "--out", str(tmp_path)]) == 0
    assert calls["load"][0] == "m" and calls["generate"][1]["concept"] is None


@pytest.mark.filterwarnings("always:--negative has no effect:UserWarning")
def test_a_negative_prompt_without_guidance_is_said(tmp_path, capsys, calls):
    argv = ["generate", "--prompt", "a robot", "--num", "1", "--out", str(tmp_path / "o"), "--guidance"]
    sentence = "--negative has no effect: at or below 1 --guidance is none"
    for scale, negative in (("0", "blur"), ("1", "blur"), ("1.5", "blur"), ("0", "")):
        assert main([*argv, scale, "--negative", negative]) == 0
        assert (sentence in capsys.readouterr().err) == (float(scale) <= 1 and bool(negative))


def test_defaults_are_the_apis():
    """The fakes hide the real signatures; here the options are compared with those."""
    ours = vars(build_parser().parse_args(["personalize", "a.png", "--out", "o"]))
    theirs = inspect.signature(api.personalize).parameters
    names = ("method", "steps", "token", "word", "rank", "blend", "seed", "resolution", "learning_rates")
    assert {n: ours[n] for n in names} == {n: theirs[n].default for n in names}
    assert tuple(METHODS) == options._METHODS and tuple(SAMPLERS) == options._SAMPLERS and options._KINDS == KINDS
    ours = vars(build_parser().parse_args(["generate", "--prompt", "a", "--out", "o"]))
    names = ("num", "seed", "sampler", "sampling_steps", "guidance", "blend", "negative", "resolution")
    theirs = inspect.signature(api.generate).parameters
    assert {n: ours[n] for n in names} == {n: theirs[n].default for n in names}


def test_the_help_names_every_method_and_its_steps():
    lines = EXAMPLES["personalize"].split("The methods", 1)[1].splitlines()[1 : len(METHODS) + 1]
    assert {line.split()[0]: int(line.split()[-1]) for line in lines} == {n: m.steps for n, m in METHODS.items()}
    assert all(len(line) <= 110 for line in lines)


def test_prior_preservation_is_passed_on(tmp_path, capsys, picture, calls):
    argv = ["personalize", picture, "--method", "dreambooth", "--out", str(tmp_path / "o")]
    for given, wanted in (
        (["--prior"], api.PriorOptions()),
        (["--prior", "0.5", "--prior-pictures", "7"], api.PriorOptions(7, 0.5)),
        ([], None),
    ):
        assert main([*argv, *given]) == 0
        assert calls["personalize"][1].get("prior") == wanted
    fails(capsys, "needs it", *argv, "--prior-pictures", "3")
    fails(capsys, "weight above 0", *argv, "--prior", "0")


def test_several_placeholders_are_for_the_method_that_takes_them(tmp_path, capsys, picture, calls):
    argv = ["personalize", picture, "--token", "A* B*", "--word", "cat dog", "--out", str(tmp_path / "o")]
    fails(capsys, "must be one word", *argv, "--method", "lora")
    assert not calls
    fails(capsys, "does not contain", *argv, "--method", "disendiff", "--prompt", "a dog")
    fails(capsys, "must be one word", *argv, "--method", "disendiff", "--token", "A*  B*")
    assert main([*argv, "--method", "disendiff"]) == 0
    assert calls["personalize"][1]["token"] == "A* B*" and calls["personalize"][1]["word"] == "cat dog"
    assert calls["generate"][0] == ["a A* and a B*", "A* and a B* and A* and a B*"]


@pytest.mark.parametrize(
    ("method", "kinds", "possible"),
    [
        ("textual_inversion", ["kohya"], "diffusers, embedding, card"),
        ("perfusion", ["embedding", "diffusers"], "embedding, card"),
        ("infusion", ["embedding"], "card"),
    ],
)
def test_what_cannot_be_exported_is_told_before_tuning(tmp_path, capsys, picture, calls, method, kinds, possible):
    argv = ["personalize", picture, "--method", method, "--out", tmp_path / "o", "--export", *kinds]
    message = fails(capsys, f"files for {kinds[-1]} can hold", *argv)
    assert method in message and message.endswith(f"exported as: {possible}.")
    assert not calls and not (tmp_path / "o").exists()


def test_bad_pictures_are_told_before_a_model_is_loaded(tmp_path, capsys, picture, calls):
    text = tmp_path / "text.png"
    text.write_text("no picture")
    cut = tmp_path / "cut.png"
    cut.write_bytes(Path(picture).read_bytes()[:900])
    dot = tmp_path / "dot.png"
    Image.new("RGB", (1, 1)).save(dot)
    out = tmp_path / "out"
    for path, match in (
        (text, "not a picture"),
        (cut, "cut short"),
        (dot, "only 1x1"),
        (tmp_path / "none.png", "There is no file"),
        (tmp_path, "is a folder"),
    ):
        fails(capsys, match, "personalize", picture, path, "--out", out)
    assert not calls and not out.exists()


def test_bad_prompts_are_told_before_a_model_is_loaded(tmp_path, capsys, picture, concept_file, calls):
    out = ["--out", tmp_path / "out"]
    without = fails(capsys, "does not contain", "personalize", picture, "--prompt", "a S*", "a dog", *out)
    assert "'a dog'" in without and "'S*'" in without
    fails(capsys, "empty", "personalize", picture, "--prompt", "", *out)
    fails(capsys, "expected at least one argument", "personalize", picture, *out, "--prompt")
    fails(capsys, "'S*'", "generate", "--concept", concept_file, "--prompt", "a dog", *out)
    fails(capsys, "empty", "generate", "--prompt", "  ", *out)
    fails(capsys, "not valid Unicode", "generate", "--prompt", "\udcff", *out)
    fails(capsys, "--prompt", "generate", *out)
    fails(capsys, "must be one word", "personalize", picture, "--token", "my dog", *out)
    fails(capsys, "must be one word", "personalize", picture, "--token", "", *out)
    assert not calls and not (tmp_path / "out").exists()


def test_warnings_are_a_line(tmp_path, capsys, calls, monkeypatch):
    def load(model, **_):
        warnings.warn("the prompt is cut after 'dog'", stacklevel=1)
        raise UserError("There is no folder x.")

    monkeypatch.setattr(api, "load", load)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["generate", "--prompt", "a dog", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "warning: the prompt is cut after 'dog'\nerror: There is no folder x.\n"


@pytest.mark.parametrize(
    "option, value",
    [
        ("--steps", "-1"),
        ("--steps", "x"),
        ("--steps", "1.5"),
        ("--num", "0"),
        ("--seed", "-1"),
        ("--seed", "9" * 20),
        ("--blend", "1.1"),
        ("--blend", "nan"),
        ("--blend", "-0.1"),
        ("--foo", "1"),
        ("--step", "1"),
    ],
)
def test_bad_values(tmp_path, capsys, picture, calls, option, value):
    fails(capsys, option, "personalize", picture, option, value, "--out", tmp_path / "out")


def test_misuse(tmp_path, capsys, concept_file, calls):
    out = ["--out", tmp_path / "out"]
    fails(capsys, "COMMAND")
    fails(capsys, "invalid choice: 'persnalize'", "persnalize")
    fails(capsys, "IMAGE", "personalize", *out)
    fails(capsys, "--out", "generate", "--prompt", "a")
    fails(capsys, "ddim", "generate", "--prompt", "a", "--sampler", "heun", *out)
    fails(capsys, "--guidance", "generate", "--prompt", "a", "--guidance", "inf", *out)
    fails(capsys, "needs --concept", "generate", "--prompt", "a", "--blend", "0.5", *out)


def test_unknown_models(tmp_path, capsys, picture):
    out = ["--out", tmp_path / "out"]
    assert main(["generate", "--prompt", "a", "--model", "nowhere", *map(str, out)]) == 2
    assert capsys.readouterr().err == "error: There is no folder nowhere.\n"
    useless = ["personalize", picture, "--method", "lora", "--encoder", "enc", *out]
    fails(capsys, "lora starts from no encoder; leave --encoder out", *useless)
    assert "--encoder" in fails(capsys, "no tuning-encoder", "personalize", picture, "--model", "nowhere", *out)
    save_concept(tmp_path / "c.safetensors", concept(base="gone"))
    fails(
        capsys, "There is no folder gone", "generate", "--concept", tmp_path / "c.safetensors", "--prompt", "S*", *out
    )
    assert not (tmp_path / "out").exists()


def test_bad_concepts(tmp_path, capsys, picture, calls):
    out = ["--prompt", "a S*", "--out", tmp_path / "out"]
    fails(capsys, "no", "generate", "--concept", tmp_path / "none.safetensors", *out)
    fails(capsys, "robot.png", "generate", "--concept", picture, *out)
    save_concept(tmp_path / "c.safetensors", concept(fingerprint="0" * 32))
    fails(capsys, "another base model", "generate", "--concept", tmp_path / "c.safetensors", *out)
    fails(capsys, "robot.png", "info", picture)
    assert "generate" not in calls and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error, status, text",
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 2, "memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), 2, "--num"),
        (OSError(errno.EACCES, "Permission denied", "weights"), 2, "error: weights: Permission denied."),
        (OSError(errno.EIO, "Input/output error", "weights"), 1, "error: weights: Input/output error."),
    ],
)
def test_other_ends(tmp_path, capsys, calls, monkeypatch, error, status, text):
    def generate(*_, **__):
        raise error

    monkeypatch.setattr(api, "generate", generate)
    assert main(["generate", "--prompt", "a", "--out", str(tmp_path / "out")]) == status
    stderr = capsys.readouterr().err.strip()
    assert text in stderr and len(stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_mistake_of_ours_keeps_its_trace(tmp_path, calls, monkeypatch):
    def load(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(api, "load", load)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["generate", "--prompt", "a", "--out", str(tmp_path)])


def test_what_the_embedded_model_cannot_know_is_said(tmp_path, capsys, calls):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels.repeat(8, 0).repeat(8, 1)).save(tmp_path / "toy.png")
    Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    options = ["--prompt", "a S*", "--out", str(tmp_path / "out")]
    argv = ["personalize", str(tmp_path / "photo.png"), *options]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(argv) == 0
    said = capsys.readouterr().err
    assert said.startswith("warning: the embedded model knows only pictures of its own world; ") and "--model" in said
    assert main([*argv, "--model", "some/model", "--encoder", "enc"]) == 0
    assert main(["personalize", str(tmp_path / "toy.png"), *options]) == 0
    assert "own world" not in capsys.readouterr().err


def test_a_placeholder_without_a_concept_is_said(tmp_path, capsys, calls):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["generate", "--prompt", "a S*", "--out", str(tmp_path / "out")]) == 0
    assert "warning: S* stands for nothing in particular without --concept FILE" in capsys.readouterr().err
    assert main(["generate", "--prompt", "a house", "--out", str(tmp_path / "out")]) == 0
    assert "S*" not in capsys.readouterr().err


def test_mistakes_are_told_before_anything_is_loaded(tmp_path, capsys, picture, calls):
    out = ["--out", tmp_path / "out"]
    fails(capsys, "is a file and no prompt; name pictures before", "personalize", picture, "--prompt", picture, *out)
    fails(capsys, "takes no option 'speed'", "personalize", picture, "--option", "speed=1", *out)
    fails(
        capsys,
        f"There is no file {tmp_path / 'gone'}",
        "generate",
        "--concept",
        tmp_path / "gone",
        "--prompt",
        "a S*",
        *out,
    )
    assert "load" not in calls
    assert main(["personalize", picture, "--prompt", "a S* " + "and so on " * 500, *map(str, out)]) == 0


def test_a_model_whose_name_is_no_unicode_is_told_before_the_work(tmp_path, capsys, picture, calls):
    """Its concept could not be written: the file names the model in UTF-8."""
    argv = ["personalize", picture, "--method", "lora", "--out", tmp_path / "o"]
    fails(capsys, "is not valid Unicode", *argv, "--model", "a\udcff")
    assert not calls
