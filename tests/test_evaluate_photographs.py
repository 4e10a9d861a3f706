"""`datencoder evaluate` on photographs: the protocol, layouts, scores of all pairs, DreamBench++'s folders."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
from evaluate_helpers import MINI, evaluate, forget, metrics_of, model, row_of  # noqa: F401
from PIL import Image
from test_picture_scores import clip_folder, dino_folder  # noqa: F401

from datencoder_jax.benchmark import making, metrics, photographs
from datencoder_jax.benchmark.albums import read_albums
from datencoder_jax.benchmark.entries import make_rows, parse_entries
from datencoder_jax.benchmark.making import open_suite
from datencoder_jax.benchmark.suites import Setup, Subject
from datencoder_jax.benchmark.units import Unit, _check_subjects, shown_prompts, told_subjects
from datencoder_jax.commands import evaluate as evaluate_command
from datencoder_jax.commands.evaluate import find_cautions
from datencoder_jax.commands.shared import ONLY_TOYS
from datencoder_jax.data.reading import read_image
from datencoder_jax.errors import UserError
from datencoder_jax.evaluation.picture_scores import load_clip, load_dino
from datencoder_jax.methods import METHODS

# Importing torch and its friends warns about Python's own future.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ASKED = ["--suite", "dreambench", "--data", MINI, "--instances", "2", "--num", "2", "--methods", "datencoder@0"]
NAMES = ("backpack", "berry_bowl")


@pytest.fixture(scope="module")
def ran(model, clip_folder, dino_folder, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("photographs")
    assert evaluate(model, out, *ASKED, "--clip", clip_folder, "--dino", dino_folder) == 0
    return out


@pytest.fixture(scope="module")
def drawn(ran):
    """uint8 `[subjects, 25, 2, H, W, 3]`."""
    return np.stack([np.load(ran / "units" / "datencoder" / "0" / f"{name}-0.npz")["pictures"] for name in NAMES])


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_the_protocol_is_that_of_dreambooth(model):  # noqa: F811
    suite = open_suite(Setup("dreambench", data=str(MINI), model=model[1]))
    assert [subject.name for subject in suite.subjects] == [
        *sorted(path.name for path in MINI.iterdir() if path.is_dir())
    ]
    for k, subject in enumerate(suite.subjects):
        assert len(suite.prompts(k)) == 25 and len(suite.given(k)) == 1 and len(suite.photographs(k)) == 2
        np.testing.assert_array_equal(suite.given(k)[0], read_image(MINI / subject.name / "00.jpg"))
        live = subject.word in ("cat", "dog")
        assert ("a S* in a chef outfit" in suite.prompts(k)) == live
        assert (f"a {subject.word} on top of a mirror" in suite.prompts(k, subject.word)) != live


def test_a_class_of_two_words_keeps_the_rare_token_before_it():
    animal, setup = Subject("bear_plushie", "stuffed animal"), Setup("dreambench", data=str(MINI))
    words = {name: making._words(setup, METHODS[name], animal) for name in METHODS if METHODS[name].word is not None}
    rare = dict.fromkeys(("lora", "dreambooth", "custom_diffusion", "para"), "sks stuffed animal")
    alone = dict.fromkeys(("textual_inversion", "perfusion", "infusion"), "stuffed animal")
    assert words == rare | alone | {"disendiff": "animal"}
    assert making._words(Setup("toyworld"), METHODS["lora"], Subject("robot 1", "robot")) == "robot"


def test_likeness_is_the_mean_over_all_pairs(ran, drawn, clip_folder, dino_folder):  # noqa: F811
    content = metrics_of(ran)
    row = row_of(content, "datencoder", 0)
    assert drawn.shape[:3] == (2, 25, 2) and list(row["values"]) == ["dino", "clip_i", "clip_t", "product"]
    eyes = {"dino": load_dino(dino_folder), "clip_i": load_clip(clip_folder).eye}
    for k, name in enumerate(NAMES):
        photographs = [read_image(file) for file in sorted((MINI / name).glob("*.jpg"))]
        for score, eye in eyes.items():
            pairs = [
                float(unit(a) @ unit(b)) for a in eye(list(drawn[k].reshape(-1, 16, 16, 3))) for b in eye(photographs)
            ]
            assert len(pairs) == 25 * 2 * 2
            assert row["values"][score][k] == pytest.approx(np.mean(pairs), abs=1e-5)
            if score == "clip_i":
                real = row_of(content, "a photograph and the others")["values"][score][k]
                assert real == pytest.approx(float(np.prod(eye(photographs), axis=0).sum()), abs=1e-5)


def test_obedience_is_measured_with_the_class_word(ran, drawn, clip_folder):  # noqa: F811
    clip, row = load_clip(clip_folder), row_of(metrics_of(ran), "datencoder", 0)
    templates = json.loads((MINI / "prompts.json").read_text())["object"]
    texts = clip.read([template.replace("{subject}", "bowl") for template in templates])
    seen = clip.eye(list(drawn[1].reshape(-1, 16, 16, 3))).reshape(25, 2, -1)
    assert row["values"]["clip_t"][1] == pytest.approx(np.einsum("pnd,pd->pn", seen, texts).mean(), abs=1e-5)
    assert metrics_of(ran)["axes"] == {"identity": "dino", "prompt": "clip_t"}


def test_scores_are_left_out_where_there_is_no_network(ran, model, capsys):  # noqa: F811
    assert evaluate(model, ran, *ASKED, "--report-only") == 0
    said, content = capsys.readouterr().out, metrics_of(ran)
    assert "DINO is left out" in said and "CLIP-T is left out" in said
    assert list(content["scores"]) == ["clip_i"] and content["axes"] == {"identity": "clip_i"}
    assert content["settings"]["missing"] and "product" not in row_of(content, "datencoder", 0)["values"]


def test_the_folders_of_dreambench_plus(ran, drawn):
    """As its `eval_clip_and_dino.py` pairs files: by what follows the folder, up to the first dot."""
    root = ran / "dreambench_plus" / "datencoder@0"
    assert {path.name for path in root.iterdir()} == {"src_image", "text", "tgt_image", "negative_prompt.txt"}
    keys = {
        part: {str(path.relative_to(root / part)).split(".")[0] for path in (root / part).glob("**/*.*")}
        for part in ("src_image", "text", "tgt_image")
    }
    expected = {f"{name}/{prompt}_{k}" for name in NAMES for prompt in range(25) for k in range(2)}
    assert keys == dict.fromkeys(keys, expected)
    assert (root / "text" / "berry_bowl" / "2_1.txt").read_text() == "a bowl on the beach"
    assert (root / "negative_prompt.txt").read_text() == ""
    back = np.asarray(Image.open(root / "tgt_image" / "berry_bowl" / "2_1.jpg"), np.float32)
    others = [np.abs(back - drawn[1, prompt, k]).mean() for prompt in range(25) for k in range(2)]
    assert int(np.argmin(others)) == 2 * 2 + 1
    given = read_image(MINI / "berry_bowl" / "00.jpg").astype(np.float32)
    assert np.abs(np.asarray(Image.open(root / "src_image" / "berry_bowl" / "2_1.jpg"), np.float32) - given).mean() < 3


# layouts


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16)).save(path)


def test_the_layout_of_dreambench(tmp_path):
    for name in ("backpack_dog", "cat2"):
        for k in (1, 0, 4):
            picture(tmp_path / "dataset" / name / f"0{k}.jpg")
    prompts = ["'a {0} {1} in the snow'.format(unique_token, class_token),", "'a red {0} {1}'.format(unique_token)"]
    lists = "\n".join(
        f"{kind} Prompts\n\nprompt_list = [\n" + "\n".join(prompts[k:] * (k + 1)) + "\n]"
        for k, kind in enumerate(("Object", "Live"))
    )
    text = f"Classes\n\nsubject_name,class\nbackpack_dog,backpack\ncat2,cat\nvase,vase\n\nPrompts\n\n{lists}\n"
    (tmp_path / "dataset" / "prompts_and_classes.txt").write_text(text)
    bag, cat = read_albums(tmp_path, "thing", ["a {subject}"])
    assert (bag.name, bag.word, bag.templates) == (
        "backpack_dog",
        "backpack",
        ("a {subject} in the snow", "a red {subject}"),
    )
    assert [file.name for file in bag.files] == ["00.jpg", "01.jpg", "04.jpg"]
    assert (cat.word, cat.templates) == ("cat", ("a red {subject}", "a red {subject}"))


def test_the_layout_of_dreambench_plus(tmp_path):
    picture(tmp_path / "images" / "animal" / "00.jpg")
    captions = tmp_path / "captions" / "animal" / "00.txt"
    captions.parent.mkdir(parents=True)
    captions.write_text("Maine coon\nA maine coon in the snow.\nwatercolour\n")
    picture(tmp_path / "images" / "human" / "01.jpg")
    (captions.parent.parent / "human").mkdir()
    (captions.parent.parent / "human" / "01.txt").write_text("man\nA romantic photo of a man.\na woman next to a man\n")
    album, man = read_albums(tmp_path, "thing", [])
    assert man.templates == ("A romantic photo of a {subject}.", "a woman next to a {subject}")
    assert album.name == "live_subject_animal_00_maine_coon" and album.word == "Maine coon"
    assert album.templates == ("A {subject} in the snow.", "a {subject}, watercolour")


def test_pictures_and_classes_are_part_of_what_a_folder_was_made_with(model, tmp_path, capsys):  # noqa: F811
    suite, out, about = tmp_path / "toys", tmp_path / "out", tmp_path / "toys" / "subjects.json"
    for name in ("red car", "red-car"):
        picture(suite / name / "1.png")
    about.write_text('{"red car": {"class": "car"}, "red-car": {"class": "car"}}')

    def run(out):
        making.open_suite.cache_clear()  # as in a process of its own
        photographs._read.cache_clear()
        return evaluate(model, out, "--suite", suite, "--num", "1", "--methods", "base")

    assert run(out) == 0
    assert len(list(out.glob("units/base/0/*.npz"))) == 2  # one that blanks for dashes would give the other's name
    about.write_text('{"red car": {"class": "fish"}, "red-car": {"class": "car"}}')
    assert run(out) == 2
    assert "was made when red car was a car" in capsys.readouterr().err
    about.write_text('{"red car": {"class": "car"}, "red-car": {"class": "car"}}')
    Image.new("RGB", (16, 16), "red").save(suite / "red-car" / "0.png")
    assert run(out) == 2
    assert "was made with another picture of red-car" in capsys.readouterr().err
    (suite / "red-car" / "0.png").write_bytes(b"nonsense")
    assert run(tmp_path / "new") == 2
    assert "0.png" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_any_folder_of_pictures(tmp_path):
    for name in ("b/2.png", "b/1.jpg", "a/x.webp", "c/notes.txt"):
        (picture if not name.endswith("txt") else lambda path: path.parent.mkdir())(tmp_path / name)
    a, b = read_albums(tmp_path, "toy", ["a {subject}"])
    assert (a.name, a.word, b.templates) == ("a", "toy", ("a {subject}",))
    assert [file.name for file in b.files] == ["1.jpg", "2.png"]
    assert [album.name for album in read_albums(tmp_path / "b", "toy", ["a {subject}"])] == ["1.jpg", "2.png"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "holds no pictures"),
        ({"subjects.json": '{"a": {"files": ["gone.jpg"]}}'}, "gone.jpg, which is not there"),
        ({"subjects.json": "nonsense"}, "subjects.json is damaged"),
        ({"prompts.json": '{"object": ["a robot"]}'}, "names no {subject}"),
        ({"prompts.json": '{"object": ["{subject}"]}', "subjects.json": '{"a": {"kind": "live"}}'}, "not as expected"),
        ({"prompts_and_classes.txt": "x"}, "is not DreamBench's"),
        ({"subjects.json": '{"a/../a": {}}'}, "is no plain name of a folder"),
        ({"captions/animal/00.txt": "", "images/animal/x": ""}, "holds no subject with prompts"),
    ],
)
def test_folders_that_cannot_be_used(files, said, tmp_path):
    if files:
        picture(tmp_path / "a" / "1.png")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        read_albums(tmp_path, "thing", ["a {subject}"])


def test_names_that_are_no_text_are_told(tmp_path):
    picture(tmp_path / "a\udcff" / "1.png")
    with pytest.raises(UserError, match="is no plain name of a folder; rename it"):
        read_albums(tmp_path, "thing", ["a {subject}"])


PLUS = {"images/live/00.jpg": None, "captions/live/00.txt": "kitten\na kitten in the snow"}


def write_files(folder, files, encoding="utf-8"):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(path) if text is None else path.write_bytes(text.encode(encoding))


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
@pytest.mark.parametrize(
    "files",
    [
        PLUS | {"captions/live/00.txt": "kitten\na kitten’s hat"},
        {"a/1.png": None, "prompts.json": '{"object": ["a {subject}’s hat"]}'},
        {"a/1.png": None, "subjects.json": '{"a": {"class": "cat’s toy"}}'},
        {"dog/1.png": None, "prompts_and_classes.txt": "subject_name,class\ndog,dog’s toy"},
    ],
    ids=lambda files: list(files)[-1],
)
def test_texts_in_another_encoding_are_a_sentence(tmp_path, files, encoding):
    write_files(tmp_path, files, encoding)
    with pytest.raises(UserError, match=r"\.(txt|json) is not UTF-8 text \(byte \d+\); save it anew"):
        read_albums(tmp_path, "thing", ["a {subject}"])


def test_the_mark_of_windows_editors_is_no_part_of_a_text(tmp_path):
    write_files(tmp_path / "plus", PLUS, "utf-8-sig")
    assert read_albums(tmp_path / "plus", "thing", None)[0].word == "kitten"
    write_files(tmp_path / "own", {"a/1.png": None, "subjects.json": '{"a": {"class": "toy"}}'}, "utf-8-sig")
    assert read_albums(tmp_path / "own", "thing", ["a {subject}"])[0].word == "toy"


def test_names_that_start_with_a_dot_are_no_pictures(tmp_path):
    fork = b"\0\5\26\7 what a Mac keeps beside a file"
    write_files(tmp_path / "one", {"a/00.png": None, "a/01.png": None, ".thumbnails/00.png": None})
    write_files(tmp_path / "plus", PLUS)
    write_files(tmp_path / "flat", {"00.png": None})
    for name in (
        "one/a/._00.png",
        "one/._a.png",
        "plus/captions/live/._00.txt",
        "plus/captions/._live",
        "flat/._00.png",
    ):
        (tmp_path / name).write_bytes(fork)
    (tmp_path / "one" / ".thumbnails" / "00.txt").write_text("no caption")
    [album] = read_albums(tmp_path / "one", "toy", ["a {subject}"])
    assert album.name == "a" and [file.name for file in album.files] == ["00.png", "01.png"]
    [album] = read_albums(tmp_path / "plus", "toy", None)
    assert album.name == "live_00_kitten"
    assert [album.name for album in read_albums(tmp_path / "flat", "toy", ["a {subject}"])] == ["00.png"]
    (tmp_path / "flat" / "00.png").unlink()
    with pytest.raises(UserError, match="holds no pictures"):
        read_albums(tmp_path / "flat", "toy", ["a {subject}"])


# what a run is of


@pytest.fixture
def described(tmp_path):
    """A folder of two subjects with two photographs each, and two lists of prompts."""
    folder = tmp_path / "described"
    for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
        picture(folder / name)
    (folder / "prompts.json").write_text('{"object": ["a {subject}"], "live": ["a happy {subject}"]}')
    (folder / "subjects.json").write_text('{"a": {"class": "cup", "kind": "object"}, "b": {"kind": "live"}}')
    return folder


def told(folder, model):  # noqa: F811
    for kept in (making.open_suite, photographs._read):
        kept.cache_clear()
    setup = Setup(str(folder), model=model[1])
    return told_subjects(setup), shown_prompts(setup)


def test_a_run_knows_all_photographs_and_whose_prompts_are_whose(described, model):  # noqa: F811
    before, shown = told(described, model)
    Image.new("RGB", (16, 16), "red").save(described / "b" / "1.png")
    after, _ = told(described, model)
    assert before[0] == after[0] and before[1]["given"] == after[1]["given"]
    assert before[1]["references"] != after[1]["references"]  # so that no scores against others are joined
    (described / "subjects.json").write_text('{"a": {"class": "cup", "kind": "live"}, "b": {"kind": "object"}}')
    swapped, again = told(described, model)
    assert [set(text.split(" / ")) for text in again] == [set(text.split(" / ")) for text in shown]
    assert [now["prompts"] for now in swapped] == [was["prompts"] for was in before][::-1]
    with pytest.raises(UserError, match="made with other prompts of a; choose another --out"):
        _check_subjects(described, after, swapped)


def test_a_corrupt_photograph_is_told_before_anything_is_drawn(described, model, tmp_path, capsys):  # noqa: F811
    (described / "b" / "1.png").write_bytes(b"\x89PNG no more")
    assert evaluate(model, tmp_path / "out", "--suite", described, "--methods", "base") == 2
    assert "1.png" in capsys.readouterr().err and not (tmp_path / "out" / "units").exists()


def test_dreambench_is_dreambench(tmp_path, model):  # noqa: F811
    picture(tmp_path / "dog" / "0.png")
    with pytest.raises(UserError, match="is no copy of DreamBench"):
        open_suite(Setup("dreambench", data=str(tmp_path), model=model[1]))
    lists = "".join(f"prompt_list = [\n'a {{0}} {{1}} {k}'.format(x, y),\n]\n" for k in range(2))
    (tmp_path / "prompts_and_classes.txt").write_text(f"subject_name,class\ndog,dog\nvase,vase\n{lists}")
    open_suite.cache_clear()
    suite = open_suite(Setup("dreambench", data=str(tmp_path), model=model[1]))
    assert [subject.name for subject in suite.subjects] == ["dog"]
    assert any("not measured" in sentence and "vase" in sentence for sentence in suite.missing)


def test_names_that_differ_in_dots_alone_keep_their_pictures(model, tmp_path):  # noqa: F811
    for name in ("dog.1.png", "dog_1.png"):
        picture(tmp_path / "dogs" / name)
    assert evaluate(model, tmp_path / "out", "--suite", tmp_path / "dogs", "--num", "1", "--methods", "base") == 0
    folders = list((tmp_path / "out" / "dreambench_plus" / "base@0" / "tgt_image").iterdir())
    assert len(folders) == 2 and all(len(list(folder.iterdir())) == 4 for folder in folders)
    assert not any("." in folder.name for folder in folders)


def test_results_do_not_go_among_the_pictures(described, model, capsys):  # noqa: F811
    assert evaluate(model, described, "--suite", described, "--methods", "base") == 2
    assert "name another one" in capsys.readouterr().err and not (described / "settings.json").exists()


def test_pictures_that_are_scored_are_let_go(ran):
    row = make_rows(parse_entries(["datencoder@0"]), (0,))[0]
    units, made = [Unit(ran, row, k, name, 0) for k, name in enumerate(NAMES)], []
    seen = [pictures.shape for pictures in metrics._read(units, made)]
    assert seen == [(25, 2, 16, 16, 3)] * 2
    assert all(each.pictures.size == 0 and each.pictures.base is None and each.bytes for each in made)


def test_what_is_warned_of_stands_in_the_report(model, described, tmp_path, monkeypatch, capsys):  # noqa: F811
    setup = Setup(str(described))  # of the embedded model
    assert find_cautions(setup) == [ONLY_TOYS]
    assert find_cautions(replace(setup, model=model[1])) == find_cautions(replace(setup, suite="toyworld")) == []
    monkeypatch.setattr(evaluate_command, "find_cautions", lambda setup: [ONLY_TOYS])
    out = tmp_path / "out"
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert evaluate(model, out, "--suite", described, "--methods", "base", "--report-only") == 0
    assert ONLY_TOYS in capsys.readouterr().err
    assert metrics_of(out)["warnings"] == [ONLY_TOYS]
    for name in ("report.md", "report.html"):
        assert ONLY_TOYS in (out / name).read_text("utf-8")
    assert "There are no intervals and no verdicts" in (out / "report.md").read_text("utf-8")
