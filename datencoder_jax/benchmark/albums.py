"""Photographs of subjects, and the prompts asked of each, as folders hold them.

prompts.json, subjects.json, NAME/*.jpg       {kind: [templates with {subject}]}; {name: {class, kind, files}}
prompts_and_classes.txt, NAME/*.jpg           DreamBench, github.com/google/dreambooth, folder `dataset`
images/KIND/00.jpg, captions/KIND/00.txt      DreamBench++, github.com/yuangpeng/dreambench_plus: a picture of each
NAME/*.jpg, or *.jpg                          a folder of pictures for each subject, or one picture of each
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from datencoder_jax.errors import UserError

SUBJECT = "{subject}"
"""What stands for the subject in templates."""

_ENDINGS = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_LIST = "prompts_and_classes.txt"
_LIVE = ("cat", "dog")
"""The classes of DreamBench that its second list of prompts is for."""


class Album(NamedTuple):
    """A subject.

    Attributes:
        name: what tables and files call it.
        word: its class.
        files: pictures of it; methods see the first.
        templates: prompts with `SUBJECT` in them.
    """

    name: str
    word: str
    files: tuple[Path, ...]
    templates: tuple[str, ...]


def read_albums(folder: Path, word: str, prompts: Sequence[str] | None) -> list[Album]:
    """The subjects in a folder of any of the layouts, by name.

    Args:
        word: the class of subjects that the folder tells none of.
        prompts: templates of those it has none for; None where it has to have its own.

    Raises:
        UserError: there is no such folder, it holds no pictures, or what describes them is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    if (folder / "dataset" / _LIST).exists():
        folder = folder / "dataset"
    if (folder / _LIST).exists():
        albums = _dreambench(folder)
    elif (folder / "captions").is_dir() and (folder / "images").is_dir():
        albums = _dreambench_plus(folder)
    else:
        albums = _described(folder, word, prompts)
    if not albums:
        raise UserError(
            f"{folder} holds no pictures of subjects; name a folder of pictures, or of folders of pictures."
        )
    for album in albums:
        # What a table cannot say, or a file not be called.
        if not album.name.isprintable() or Path(album.name).name != album.name:
            raise UserError(f"the name {album.name!r} in {folder} is no plain name of a folder; rename it.")
        if not all(isinstance(text, str) for text in (album.word, *album.templates)):
            raise UserError(f"the class and the prompts of {album.name} in {folder} must be texts.")
        if wrong := [template for template in album.templates if SUBJECT not in template]:
            raise UserError(f"the prompt {wrong[0]!r} for {album.name} in {folder} names no {SUBJECT}; write it in.")
        if not album.files:
            raise UserError(f"{folder} holds no picture of {album.name}.")
    if len({len(album.templates) for album in albums}) > 1:
        raise UserError(f"the lists of prompts in {folder} differ in length; make them equal, for a table of both.")
    return albums


def pictures_in(folder: Path) -> tuple[Path, ...]:
    """The files of a folder that are pictures by their names, in order; names that start with a dot are none.

    Macs write such names beside others ("._00.png"), with what Windows' file systems cannot keep in a file.
    """
    named = (file for file in folder.iterdir() if file.suffix.lower() in _ENDINGS and not file.name.startswith("."))
    return tuple(sorted(file for file in named if file.is_file()))


def _is_shown(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _text(path: Path) -> str:
    """A text as it is, in UTF-8, without the mark that Windows' editors put before it.

    Raises:
        FileNotFoundError: there is none.
        UserError: it cannot be read, or is in another encoding.
    """
    try:
        return path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start + 1}); save it anew in that encoding.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}.") from error


def _described(folder: Path, word: str, prompts: Sequence[str] | None) -> list[Album]:
    """The first and the last layout, each file of the former as far as it is there."""
    lists, about = _json(folder / "prompts.json"), _json(folder / "subjects.json")
    if prompts is None and not (lists and about):
        raise UserError(
            f"{folder} is no copy of DreamBench: it has neither {_LIST} nor prompts.json and subjects.json; for other "
            "pictures, name their folder with --suite."
        )
    plain = tuple(prompts or ())
    names = list(about) or [path.name for path in sorted(folder.iterdir()) if _is_shown(path) and pictures_in(path)]
    if not names:
        return [Album(file.name, word, (file,), plain) for file in pictures_in(folder)]
    albums = []
    try:
        for name in names:
            own, place = about.get(name, {}), folder / name
            listed = tuple(place / file for file in own.get("files", ()))
            if missing := [file for file in (listed or [place]) if not os.path.exists(file)]:
                raise UserError(f"{folder / 'subjects.json'} names {missing[0]}, which is not there.")
            kind = own.get("kind") or next(iter(lists), None)
            albums.append(
                Album(
                    name,
                    own.get("class", word),
                    listed or pictures_in(place),
                    tuple(lists[kind]) if lists else plain,
                )
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"subjects.json or prompts.json in {folder} is not as expected ({error!r}).") from error
    return albums


def _json(path: Path) -> dict:
    try:
        content = json.loads(_text(path))
        if not isinstance(content, dict):
            raise ValueError("it is not an object")
        return content
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}).") from error


def listed(folder: Path) -> list[str]:
    """The subjects that a copy of DreamBench should have, by its own list; none where it has no such list."""
    for path in (folder / _LIST, folder / "dataset" / _LIST):
        if path.exists():
            return [name for name, _ in _classes(path)]
    return []


def _classes(path: Path) -> list[tuple[str, str]]:
    return re.findall(r"^([\w-]+),([\w -]+)$", _text(path), re.MULTILINE)


def _dreambench(folder: Path) -> list[Album]:
    path = folder / _LIST
    text, classes = _text(path), _classes(path)
    lists = [re.findall(r"^'(.*)'\.format", part, re.MULTILINE) for part in text.split("prompt_list")[1:]]
    if len(lists) != 2 or not classes:
        raise UserError(f"{path} is not DreamBench's: it holds {len(lists)} lists of prompts instead of 2.")
    templates = [tuple(prompt.replace("{0} {1}", SUBJECT) for prompt in prompts) for prompts in lists]
    return [
        Album(name, word, pictures_in(folder / name), templates[word in _LIVE])
        for name, word in classes
        if (folder / name).is_dir()
    ]


def _dreambench_plus(folder: Path) -> list[Album]:
    """Named as its scripts name them: "live_subject_animal_00_kitten"."""
    albums = []
    for captions in sorted((folder / "captions").glob("[!.]*/[!.]*.txt")):
        lines = [line.strip() for line in _text(captions).strip().splitlines()]
        if len(lines) < 2:
            raise UserError(f"{captions} is not DreamBench++'s: it holds no subject with prompts below it.")
        subject, *texts = lines
        kind = captions.parent.name
        name = f"{'live_subject_' if kind in ('animal', 'human') else ''}{kind}_{captions.stem}_{subject.lower()}"
        picture = folder / "images" / kind / f"{captions.stem}.jpg"
        word = rf"(?<!\w){re.escape(subject)}(?!\w)"  # "man" is not in "a romantic photo"
        templates = tuple(re.sub(word, SUBJECT, text, count=1, flags=re.IGNORECASE) for text in texts)
        templates = tuple(text if SUBJECT in text else f"a {SUBJECT}, {text}" for text in templates)
        albums.append(Album(name.replace(" ", "_"), subject, (picture,), templates))
    return albums
