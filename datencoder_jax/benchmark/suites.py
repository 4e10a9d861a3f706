"""What a suite of subjects and prompts is, and what a run of it is set to."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

TOKEN = "S*"
"""The placeholder, in the prompts of every suite and method."""

TOYWORLD, DREAMBENCH = "toyworld", "dreambench"
PRODUCT = "product"
"""The score of a subject's mean identity times its mean prompt score."""


@dataclass(frozen=True)
class Setup:
    """What every unit of a run shares.

    Attributes:
        suite: "toyworld", "dreambench", or a folder of pictures.
        data: the folder of "dreambench".
        split, instances: which of the embedded world's individuals; of photographs the first `instances` subjects.
        word: class of subjects in a folder that names none.
        model, encoder, vision, dtype, compute_dtype, memory, prediction_type: as for `api.load`.
        num: pictures per prompt.
        sampler, sampling_steps, guidance, resolution: as for `api.generate`.
        draws: samples per tuning step; None for what the memory allows.
        clip, dino: towers that score photographs; they change no picture.
    """

    suite: str
    data: str | None = None
    split: str = "test"
    instances: int | None = None
    word: str = "thing"
    model: str = TOYWORLD
    encoder: str | None = None
    vision: str | None = None
    dtype: str = "auto"
    compute_dtype: str = "auto"
    memory: int | None = None
    prediction_type: str | None = None
    num: int = 1
    sampler: str = "ddim"
    sampling_steps: int = 25
    guidance: float | None = None
    resolution: int | None = None
    draws: int | None = None
    clip: str | None = None
    dino: str | None = None

    @property
    def unscored(self) -> "Setup":
        """The same without the towers that score."""
        return replace(self, clip=None, dino=None)

    def content(self) -> dict[str, Any]:
        """The settings that decide what a trial's images are; "auto" computation is what runs always had."""
        left_out = {"clip", "dino"} | ({"compute_dtype"} if self.compute_dtype == "auto" else set())
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in left_out}


class Subject(NamedTuple):
    """Something to personalize: its name, and the word for its class."""

    name: str
    word: str


class Score(NamedTuple):
    """What a score is, for reports.

    Attributes:
        label: what a reader calls it.
        unit: "cosine", "share", or "".
        about: the exact model, prompt text and averaging.
        better: "higher" or "lower".
    """

    label: str
    unit: str
    about: str
    better: str = "higher"


class Reference(NamedTuple):
    """A row that no method made: a ceiling or a floor.

    Attributes:
        label: what tables call it.
        values: by score, one for each subject; NaN for none.
        by_prompt: by score, one for each prompt.
        pictures: uint8 `[subjects, prompts, H, W, 3]`, to show; None for none.
    """

    label: str
    values: Mapping[str, np.ndarray]
    by_prompt: Mapping[str, np.ndarray]
    pictures: np.ndarray | None = None


class Suite(Protocol):
    """Subjects, prompts and scores."""

    @property
    def subjects(self) -> Sequence[Subject]:
        """In the order of every table."""
        ...

    @property
    def scores(self) -> Mapping[str, Score]:
        """By name, in the order of the table."""
        ...

    @property
    def axes(self) -> Mapping[str, str]:
        """The scores of "identity" and "prompt", as far as there are; their product is a score too."""
        ...

    @property
    def groups(self) -> Mapping[str, Sequence[int]]:
        """Indices of subjects that the table is repeated for, by name."""
        ...

    @property
    def about(self) -> str:
        """How prompts name the subject."""
        ...

    @property
    def missing(self) -> Sequence[str]:
        """Sentences about scores that could not be had."""
        ...

    def given(self, subject: int) -> list[np.ndarray]:
        """The pictures that methods see of a subject, uint8 `[H, W, 3]`."""
        ...

    def digests(self, subject: int) -> dict[str, str]:
        """Of what else decides a subject's pictures ("prompts") and scores ("references"), where its name does not.

        Raises:
            UserError: one of its pictures cannot be read.
        """
        ...

    def prompts(self, subject: int, name: str = TOKEN) -> list[str]:
        """What is drawn of a subject, called `name` in them; the same number for all."""
        ...

    def score(self, who: Sequence[int], pictures: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
        """Scores of pictures uint8 `[prompts, num, H, W, 3]` of subjects `who`: `[n, prompts, num]` by name."""
        ...

    def references(self) -> list[Reference]:
        """The rows that no method made."""
        ...


def digest(pictures: Iterable[np.ndarray]) -> str:
    """A short name of the content of pictures, or of other arrays."""
    found = hashlib.sha256()
    for picture in pictures:
        found.update(repr(picture.shape).encode() + picture.tobytes())
    return found.hexdigest()[:16]


def means(who: Sequence[int], cells: np.ndarray, subjects: int) -> np.ndarray:
    """Of each subject, the mean of all its cells `[n, ...]`: `[subjects]`, NaN for those that have none."""
    flat = np.asarray(cells, np.float64).reshape(len(cells), -1).mean(axis=1)
    sums, counts = np.bincount(who, flat, subjects), np.bincount(who, minlength=subjects)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
