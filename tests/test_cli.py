"""The command line: options, help, errors and files. The models are fakes here, since only the skin is tested."""

import errno
import inspect
import json
import os
import subprocess
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from checkpoint_helpers import PATH, concept, nothing_left
from PIL import Image

from datencoder_jax import api, cli, pipeline
from datencoder_jax.checkpoints.concept_file import load_concept, save_concept
from datencoder_jax.checkpoints.export import KINDS
from datencoder_jax.cli import build_parser, main
from datencoder_jax.data.reading import fit_square, read_image
from datencoder_jax.data.writing import check_writable, picture_name, write_files
from datencoder_jax.diffusion.samplers import SAMPLERS
from datencoder_jax.errors import UserError
from datencoder_jax.methods import METHODS
from datencoder_jax.toyworld.render import render
from datencoder_jax.toyworld.world import SPLITS, Context, Instance


@pytest.fixture
def calls(monkeypatch):
    """Fakes in place of the three calls of the API; what they were called with."""
    made = {}

    def load(model, **options):
        made["load"] = (model, options)
        base = Namespace(table=np.zeros((5, 12)), unet=None)
        own = {"base": base, "prompts": ("a S*", "S* and S*"), "timings": {"load": 1.0}}
        return Namespace(name=str(model), fingerprint="f" * 32, resolution=32, **own)

    def personalize(pipeline, images, **options):
        made["personalize"] = (images, options)
        report = {"nearest_words": [("robot", np.float32(0.5))], "losses": [1.0, float("nan")], "steps": 12}
        report |= {name: options[name] for name in ("steps",) if name in options}
        blend = options.get("blend", 0.3)
        seconds = {"compile": 2.0, "predict": 0.1, "tune": 3.0}
        return api.Personalized(concept(token=options["token"], blend=blend), report | {"seconds": seconds})

    def generate(pipeline, prompts, **options):
        made["generate"] = (list(prompts), options)
        images = np.zeros((len(prompts), options["num"], 32, 32, 3), np.uint8)
        images += np.arange(options["num"], dtype=np.uint8)[:, None, None, None]
        return api.Generated(
            images, {"seconds": {"compile": 1.5, "sample": 4.0}, "guidance": 2.0, "blend": options.get("blend", 1.0)}
        )

    for function in (load, personalize, generate):
        monkeypatch.setattr(api, function.__name__, function)
    monkeypatch.setattr(pipeline, "attention_shapes", lambda unet: {PATH: (8, 6)})
    return made


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "robot.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    return str(path)


@pytest.fixture
def concept_file(tmp_path):
    save_concept(tmp_path / "concept.safetensors", concept())
    return str(tmp_path / "concept.safetensors")


def fails(capsys, match, *argv):
    """The command ends with status 2 and one sentence that contains `match`."""
    assert main([str(a) for a in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and match in lines[0], lines
    return lines[0]


def test_personalize_passes_options_on_and_writes_everything(tmp_path, capsys, picture, calls):
    out = tmp_path / "new" / "out"
    options = ["--model", "some/model", "--encoder", "enc", "--steps", "3", "--token", "<it>", "--num", "2"]
    prompts = ["--prompt", "a <it>", "a sketch of <it>", "--prompt", "<it>!"]
    argv = ["personalize", picture, picture, *options, *prompts, "--seed", "7", "--blend", "0.4", "--out", str(out)]
    assert main(argv) == 0
    assert calls["load"] == ("some/model", {"encoder": "enc"})
    images, given = calls["personalize"]
    assert len(images) == 2 and given == {"method": "datencoder", "steps": 3, "token": "<it>", "blend": 0.4, "seed": 7}
    texts, given = calls["generate"]
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
        "compile": 3.5,
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


def test_defaults_are_the_apis():
    """The fakes hide the real signatures; here the options are compared with those."""
    ours = vars(build_parser().parse_args(["personalize", "a.png", "--out", "o"]))
    theirs = inspect.signature(api.personalize).parameters
    names = ("method", "steps", "token", "word", "rank", "blend", "seed", "resolution", "learning_rates")
    assert {n: ours[n] for n in names} == {n: theirs[n].default for n in names}
    assert tuple(METHODS) == cli._METHODS and tuple(SAMPLERS) == cli._SAMPLERS and cli._KINDS == KINDS
    assert ", ".join(str(method.steps) for method in METHODS.values()).replace(", 1000", " and 1000") == cli._STEPS
    ours = vars(build_parser().parse_args(["generate", "--prompt", "a", "--out", "o"]))
    names = ("num", "seed", "sampler", "sampling_steps", "guidance", "blend", "negative", "resolution")
    theirs = inspect.signature(api.generate).parameters
    assert {n: ours[n] for n in names} == {n: theirs[n].default for n in names}


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


def test_output_that_cannot_be_written_is_told_first(tmp_path, capsys, picture, calls):
    argv = ["personalize", picture, "--out"]
    fails(capsys, "is a file", *argv, picture)
    fails(capsys, "is a file", *argv, Path(picture) / "deep" / "er")
    fails(capsys, "Cannot write", *argv, "/proc/nowhere")
    fails(capsys, "is a file", "generate", "--prompt", "a", "--out", picture)
    fails(capsys, "Cannot write", "toyworld", "--out", Path(picture) / "a.png")
    fails(capsys, "folder", "toyworld", "--out", full_of_something(tmp_path / "folder.png"))
    assert not calls


def full_of_something(folder):
    folder.mkdir()
    (folder / "something").touch()
    return folder


@pytest.fixture
def full_disk(monkeypatch):
    """No PNG named `samples.png` can be written any more."""
    real = Image.Image.save

    def save(self, path, *args, **kwargs):
        real(self, path, *args, **kwargs)
        if str(path).endswith("samples.png"):
            Path(path).write_bytes(Path(path).read_bytes()[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, capsys, picture, calls, full_disk):
    out = tmp_path / "a" / "b"
    assert main(["generate", "--prompt", "a", "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"error: Cannot write {out / 'samples.png'}: no space left on device.\n"
    assert not (tmp_path / "a").exists()
    fails(capsys, "no space left", "personalize", picture, "--out", out)
    assert [path.name for path in out.iterdir()] == ["concept.safetensors"]  # whole: the tuning is not lost
    load_concept(out / "concept.safetensors")


def test_a_failure_leaves_earlier_results_alone(tmp_path, full_disk):
    write_files(tmp_path, {"report.json": {"run": 1}})
    with pytest.raises(UserError, match="no space"):
        write_files(tmp_path, {"report.json": {"run": 2}, "samples.png": np.zeros((8, 8, 3), np.uint8)})
    assert json.loads((tmp_path / "report.json").read_text()) == {"run": 1}
    assert nothing_left(tmp_path)


def test_files_get_their_names_only_when_all_are_on_the_disk(tmp_path, monkeypatch):
    names = ["report.json", "a.json", "b.json", "c.json"]
    write_files(tmp_path, dict.fromkeys(names[:3], 1))
    flushed, real = [], os.fsync

    def fsync(descriptor):
        flushed.append(descriptor)
        if len(flushed) == 3:
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match=r"Cannot write .*b\.json: input/output error\."):
        write_files(tmp_path, dict.fromkeys(names, 2))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(names[:3], "1\n")
    (tmp_path / "c.json").mkdir()
    with pytest.raises(UserError, match=r"c\.json: a folder is in the way"):
        write_files(tmp_path, dict.fromkeys(names, 2))
    assert (tmp_path / "a.json").read_text() == "1\n" and nothing_left(tmp_path)


def test_a_home_that_is_not_there(tmp_path, capsys, picture, calls):
    fails(capsys, "home folder", "personalize", picture, "--out", "~nosuchuser/out")
    fails(capsys, "home folder", "toyworld", "--out", "~nosuchuser/a.png")
    assert not calls


def test_a_failing_rerun_leaves_no_report_of_another_concept(tmp_path, picture, calls, monkeypatch):
    def generate(*_, **__):
        raise UserError("There is a hole.")

    argv = ["personalize", picture, "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    monkeypatch.setattr(api, "generate", generate)
    assert main([*argv, "--blend", "0.9"]) == 2
    assert load_concept(tmp_path / "out" / "concept.safetensors").blend == 0.9
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_rerun_removes_the_pictures_of_the_one_before(tmp_path, picture, calls):
    out = tmp_path / "out"
    argv = ["personalize", picture, "--prompt", "a S*", "--out", str(out)]
    assert main([*argv, "--num", "3"]) == 0 and main(["personalize", picture, picture, *argv[2:]]) == 0
    theirs = {"holiday.png", "02_a-s_0.png", "01_a-s_0 copy.png"}
    for name in theirs:
        (out / name).touch()
    (tmp_path / "01_outside_0.png").touch()
    report = json.loads((out / "report.json").read_text())
    assert "input_2.png" in report["input_pictures"] and "01_a-s_3.png" in report["pictures"]
    report["pictures"] += ["holiday.png", "../01_outside_0.png"]
    (out / "report.json").write_text(json.dumps(report))
    kept = {"concept.safetensors", "input.png", "samples.png", "report.json"} | theirs
    assert main([*argv, "--num", "2"]) == 0
    assert {path.name for path in out.iterdir()} == kept | {"01_a-s_0.png", "01_a-s_1.png"}
    assert (tmp_path / "01_outside_0.png").exists()
    assert main(["generate", "--prompt", "a robot", "--num", "1", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == kept | {"01_a-robot_0.png"}
    for text in ("[]", "no JSON", '{"pictures": 3}', '{"pictures": [3]}'):
        (out / "report.json").write_text(text)
        assert main(["generate", "--prompt", "a", "--num", "1", "--out", str(out)]) == 0
    assert (out / "01_a-robot_0.png").exists()


def test_a_full_disk_shows_before_the_work(tmp_path, monkeypatch):
    class Full:
        def __init__(self, **_):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("datencoder_jax.data.writing.tempfile.TemporaryFile", Full)
    with pytest.raises(UserError, match=r"Cannot write to .*out: no space left on device\."):
        check_writable(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error, status, text",
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 2, "memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), 2, "--num"),
        (OSError(errno.EIO, "Input/output error", "weights"), 2, "error: weights: Input/output error."),
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


def test_toyworld_draws_what_was_asked_for(tmp_path, capsys):
    id = SPLITS["test"][5]
    argv = ["toyworld", "--instance", str(id), "--scene", "beach", "--style", "sketch", "--accessory", "hat"]
    assert main([*argv, "--seed", "4", "--out", str(tmp_path / "a.png")]) == 0
    drawn = read_image(tmp_path / "a.png")
    expected = render(Instance.from_id(id), Context("beach", "sketch", "hat"), 4)
    assert drawn.shape == (256, 256, 3)
    np.testing.assert_array_equal(fit_square(drawn, 32), expected)
    assert f"instance {id}" in capsys.readouterr().out


def test_toyworld_chooses_among_the_unseen(tmp_path, capsys):
    def ids(*argv):
        assert main(["toyworld", *argv, "--out", str(tmp_path / "a.png")]) == 0
        return int(capsys.readouterr().out.split(":")[0].removeprefix("instance "))

    chosen = [ids("--class", "fish", "--seed", str(seed)) for seed in range(4)]
    assert len(set(chosen)) == 4 and ids("--class", "fish") == chosen[0]
    assert all(id in SPLITS["test"] and Instance.from_id(id).cls == "fish" for id in chosen)
    assert ids() in SPLITS["test"]


def test_toyworld_refuses(tmp_path, capsys):
    out = ["--out", tmp_path / "a.png"]
    fails(capsys, "invalid choice: 'dog'", "toyworld", "--class", "dog", *out)
    fails(capsys, "is a house, not a fish", "toyworld", "--instance", "3", "--class", "fish", *out)
    fails(capsys, "even", "toyworld", "--size", "33", *out)
    fails(capsys, "too large", "toyworld", "--size", "1024", "--scale", "64", *out)
    fails(capsys, "--instance", "toyworld", "--instance", "-1", *out)
    fails(capsys, "must end in .png", "toyworld", "--out", tmp_path / "a.jpg")
    assert not list(tmp_path.iterdir())


def test_info(capsys, concept_file):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("datencoder ", "jax ", "flax ", "device ", "compiled programs", "huggingface"))
    assert main(["info", concept_file]) == 0
    out = capsys.readouterr().out
    base = "toyworld (fingerprint ffffffff)"
    for expected in ("S*", "gömböc", base, "2 of 12", "1 projections of rank 2", "a b.png"):
        assert expected in out
    product = concept().offsets[PATH].down @ concept().offsets[PATH].up
    assert f"{np.linalg.norm(product):.3g} on average" in out


def test_picture_names():
    assert picture_name(0, "A photo of a S* on the Beach!", 3) == "01_a-photo-of-a-s-on-the-beach_3.png"
    assert picture_name(11, "../..", 0) == "12_prompt_0.png"
    assert picture_name(0, "ein Gemälde", 0) == "01_ein-gemalde_0.png"
    assert len(picture_name(0, "word " * 99, 0)) < 64


@pytest.mark.parametrize("command", ["", "personalize", "generate", "toyworld", "info"])
def test_help_has_examples(capsys, command):
    assert main([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert "examples:" in out and f"datencoder {command}" in out


def test_help_comes_at_once_and_as_a_module():
    """No heavy import before a command runs, which is what would make the help slow."""
    code = (
        "import runpy, sys; sys.argv = ['datencoder', '--help']\n"
        "try: runpy.run_module('datencoder_jax', run_name='__main__')\n"
        "finally: print(sorted({'jax', 'flax', 'transformers', 'PIL'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]" and not result.stderr


def test_a_reader_that_leaves_is_no_error():
    code = "import sys; from datencoder_jax.cli import main; sys.exit(main(['--version']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full, a disk that is always full")
def test_output_to_a_full_device():
    code = "import sys; from datencoder_jax.cli import main; sys.exit(main(['--version']))"
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2 and result.stderr == "error: No space left on device.\n"
