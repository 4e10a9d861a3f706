"""Bad folders of photographs, and bad results of earlier runs, of `datencoder evaluate`."""

import json
from pathlib import Path
from typing import Any

from corpus import files
from corpus.case import Kind
from corpus.files import content, encoded, nothing, picture
from datencoder_jax.benchmark.albums import SUBJECT, read_albums
from datencoder_jax.benchmark.joining import read_joined
from datencoder_jax.benchmark.rates import read_rates
from datencoder_jax.benchmark.report.results import read_results
from datencoder_jax.benchmark.units import read_settings
from datencoder_jax.data.reading import read_image

KIND = Kind(
    "Photographs and results",
    "The folder of `datencoder evaluate --suite` and the files of `--rates`, `--join` and `--out`.",
    lambda folder: read_subjects(Path(folder)),
)


def read_subjects(folder: Path) -> None:
    """The subjects of a folder, with the picture of each that methods see."""
    for album in read_albums(folder, "thing", (f"a photo of a {SUBJECT}",)):
        read_image(album.files[0])


def folder(*makers: files.Maker) -> files.Maker:
    """A folder of photographs that these write."""

    def make(where: Path) -> Path:
        Path("photos").mkdir()
        for each in makers:
            each(where)
        return Path("photos")

    return make


def subjects(value: Any, prompts: Any = None) -> files.Maker:
    """A folder whose subjects are described by JSON."""
    text = value if isinstance(value, str | bytes) else json.dumps(value)
    lists = json.dumps({"objects": [f"a {SUBJECT}"]} if prompts is None else prompts)
    return folder(CAT, content("photos/subjects.json", text), content("photos/prompts.json", lists))


CAT = content("photos/cat/00.png", encoded(None, "PNG"))
_CAPTION = content("photos/captions/animal/00.txt", "kitten\na photo of a kitten\n")

for _name, _make in {
    "no folder": nothing("photos"),
    "a file": content("photos", "text"),
    "an empty folder": files.folder("photos"),
    "a folder of texts": folder(content("photos/a.txt", "a cat")),
    "a folder of files of Macs": folder(picture("photos/._00.png", format="PNG")),
    "a damaged photograph": folder(content("photos/cat/00.png", "damaged")),
    "an empty photograph": folder(content("photos/cat/00.png", b"")),
    "a link to nothing": folder(files.folder("photos/cat"), files.link("photos/cat/00.png", "gone.png")),
    "subjects that are no JSON": subjects("{"),
    "subjects that are a list": subjects([1]),
    "subjects that are not UTF-8": subjects(b'{"caf\xe9": {}}'),
    "subjects nested 100,000 deep": subjects("[" * 100_000),
    "a subject that is a number": subjects({"cat": 3}),
    "a subject that is null": subjects({"cat": None}),
    "a subject that is not there": subjects({"dog": {}}),
    "a subject in the folder above": subjects({"../cat": {}}),
    "a subject with a line break in its name": subjects({"c\nat": {}}),
    "a subject with a name of 300 letters": subjects({"n" * 300: {}}),
    "a subject with a zero byte in its name": subjects({"c\0at": {}}),
    "a subject without a name": subjects({"": {}}),
    "files of a subject that are a number": subjects({"cat": {"files": 3}}),
    "files of a subject that are numbers": subjects({"cat": {"files": [3]}}),
    "files of a subject that are not there": subjects({"cat": {"files": ["01.png"]}}),
    "a file of a subject with a name of 300 letters": subjects({"cat": {"files": ["n" * 300]}}),
    "a file of a subject that is no picture": subjects({"cat": {"files": ["../prompts.json"]}}),
    "a kind of subject without prompts": subjects({"cat": {"kind": "pets"}}),
    "prompts that are a number": subjects({"cat": {}}, {"objects": 3}),
    "prompts that are numbers": subjects({"cat": {}}, {"objects": [3]}),
    "prompts that are a text": subjects({"cat": {}}, {"objects": "a cat"}),
    "prompts that name no subject": subjects({"cat": {}}, {"objects": ["a cat"]}),
    "a class of a subject that is a number": subjects({"cat": {"class": 3}}),
    "a class of a subject that is a list": subjects({"cat": {"class": ["cat"]}}),
    "captions that are not UTF-8": folder(
        files.folder("photos/images"), content("photos/captions/animal/00.txt", b"kitten\na kitten\x92s hat\n")
    ),
    "captions that are empty": folder(files.folder("photos/images"), content("photos/captions/animal/00.txt", "")),
    "captions without their picture": folder(files.folder("photos/images"), _CAPTION),
    "a list of DreamBench that is empty": folder(content("photos/prompts_and_classes.txt", "")),
    "a list of DreamBench that is not UTF-8": folder(content("photos/prompts_and_classes.txt", b"\xff")),
}.items():
    KIND.refused(_name, _make)
for _name, _make in {
    "a folder of folders": folder(CAT),
    "a folder of pictures": folder(picture("photos/cat.png")),
    "a file of a Mac beside a photograph": folder(content("photos/cat/._00.png", b"\0\5\x16\7"), CAT),
    "subjects with the byte order mark of Windows": subjects(b'\xef\xbb\xbf{"cat": {"class": "cat"}}'),
    "captions of DreamBench++": folder(content("photos/images/animal/00.jpg", encoded()), _CAPTION),
}.items():
    KIND.used(_name, _make)

_BAD = {
    "that are not there": None,
    "that are empty": "",
    "that are no JSON": "{",
    "that are a list": "[]",
    "that are a number": "3",
    "that are null": "null",
    "that are not UTF-8": b"\xff\xfe",
    "that are nested 100,000 deep": "[" * 100_000,
    "of another format": '{"format": "other", "version": 1}',
    "of a format that is a list": '{"format": []}',
}
for _what, _file, _run in (
    ("learning rates", "rates.json", read_rates),
    ("results to join", "metrics.json", lambda path: read_joined([path])),
    ("results to report", "metrics.json", lambda path: read_results(Path(path).parent)),
    ("settings of an earlier run", "settings.json", lambda path: read_settings(Path(path).parent)),
):
    for _how, _text in _BAD.items():
        _make = nothing(Path("run", _file)) if _text is None else content(f"run/{_file}", _text)
        KIND.refused(f"{_what} {_how}", _make, _run)
