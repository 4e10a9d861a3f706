"""Suites of photographs: DreamBench as DreamBooth measures on it, and any folder of pictures.

DreamBooth (Ruiz et al. 2022, arXiv 2208.12242, section 4.1): 30 subjects, 25 prompts each, 4 pictures of each prompt;
CLIP-I and DINO are means over all pairs of a drawn picture and a photograph of the subject, CLIP-T over drawn pictures
and their prompts. Methods see the first photograph alone.

A prompt's `{subject}`, which DreamBooth fills with a rare token and the class word, is the placeholder alone, in the
same text for all methods. It stands for what each method puts in its place: token and class word ("sks backpack") where
both stay words, a modifier of its own and the class word, or one vector, predicted or inverted. CLIP-T reads the class
word in its place.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from datencoder_jax.benchmark.albums import SUBJECT, listed, read_albums
from datencoder_jax.benchmark.suites import DREAMBENCH, TOKEN, Reference, Score, Setup, Subject, digest
from datencoder_jax.data.reading import read_image
from datencoder_jax.evaluation.picture_scores import Scorer, load_clip, load_dino, own_clip, scorers
from datencoder_jax.pipeline import Pipeline

_MEAN = "mean over a subject's prompts and pictures"


class Photographs:
    """`suites.Suite`, of the subjects in a folder."""

    groups: Mapping[str, Sequence[int]] = {}
    about: str = (
        f"{TOKEN} stands for the whole of {SUBJECT}: for rare token and class word in methods that start at words, for "
        "one vector in others"
    )

    def __init__(self, setup: Setup, pipeline: Pipeline):
        self.setup, self.pipeline = setup, pipeline
        if setup.suite == DREAMBENCH:
            folder, own = Path(setup.data or setup.suite), None
        else:
            folder, own = Path(setup.suite), [prompt.replace(TOKEN, SUBJECT) for prompt in pipeline.prompts]
        albums = read_albums(folder, setup.word, own)
        self.albums, names = albums[: setup.instances], {album.name for album in albums}
        self._absent = [name for name in listed(folder) if name not in names]
        self.subjects = [Subject(album.name, album.word) for album in self.albums]

    def given(self, subject: int) -> list[np.ndarray]:
        """See `suites.Suite`: the first photograph."""
        return [_read(self.albums[subject].files[0])]

    def digests(self, subject: int) -> dict[str, str]:
        """See `suites.Suite`: of all photographs, which scores compare with, and of its templates."""
        return self._digests[subject]

    @cached_property
    def _digests(self) -> list[dict[str, str]]:
        return [
            {"references": digest(self.photographs(k)), "prompts": digest([np.array(album.templates)])}
            for k, album in enumerate(self.albums)
        ]

    def prompts(self, subject: int, name: str = TOKEN) -> list[str]:
        """See `suites.Suite`."""
        return [template.replace(SUBJECT, name) for template in self.albums[subject].templates]

    @cached_property
    def scorers(self) -> dict[str, Scorer]:
        """The scores that can be had, that of identity first."""
        setup = self.setup
        clip = own_clip(self.pipeline) if setup.clip is None else load_clip(setup.clip)
        found = scorers(clip, None if setup.dino is None else load_dino(setup.dino))
        return {name: found[name] for name in ("dino", "clip_i", "clip_t") if name in found}

    @property
    def scores(self) -> dict[str, Score]:
        """See `suites.Suite`."""
        return self._scores

    @cached_property
    def _scores(self) -> dict[str, Score]:
        return {name: Score(each.label, "cosine", f"{each.about}; {_MEAN}") for name, each in self.scorers.items()}

    @property
    def axes(self) -> dict[str, str]:
        """See `suites.Suite`."""
        axes = {"identity": next((name for name in ("dino", "clip_i") if name in self.scorers), None)}
        axes["prompt"] = "clip_t" if "clip_t" in self.scorers else None
        return {axis: name for axis, name in axes.items() if name is not None}

    @property
    def missing(self) -> list[str]:
        """See `suites.Suite`."""
        sentences = []
        if self._absent:
            sentences.append(f"Not there, and so not measured: {', '.join(self._absent)}")
        if "dino" not in self.scorers:
            sentences.append("DINO is left out: name its weights with --dino, such as facebook/dino-vits16")
        if absent := [
            label for name, label in (("clip_i", "CLIP-I"), ("clip_t", "CLIP-T")) if name not in self.scorers
        ]:
            sentences.append(
                f"{' and '.join(absent)} is left out: {self.setup.clip or self.pipeline.name} does not have what it "
                "takes; name the whole of CLIP with --clip, such as openai/clip-vit-base-patch32"
            )
        return sentences

    def score(self, who: Sequence[int], pictures: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
        """See `suites.Suite`."""
        cells: dict[str, list[np.ndarray]] = {name: [] for name in self.scorers}
        for subject, drawn in zip(who, pictures, strict=True):
            shape = drawn.shape[:2]
            texts = np.repeat(self.prompts(subject, self.subjects[subject].word), shape[1]).tolist()
            flat, photographs = drawn.reshape(-1, *drawn.shape[2:]), self.photographs(subject)
            for name, scorer in self.scorers.items():
                cells[name].append(scorer(flat, references=photographs, prompts=texts).reshape(shape))
        return {name: np.stack(values) for name, values in cells.items()}

    def photographs(self, subject: int) -> list[np.ndarray]:
        """All photographs of a subject, uint8 `[H, W, 3]`."""
        return [_read(file) for file in self.albums[subject].files]

    def references(self) -> list[Reference]:
        """See `suites.Suite`: what photographs of a subject score against its other ones."""
        values: dict[str, np.ndarray] = {}
        for name, scorer in self.scorers.items():
            if name == "clip_t":
                continue
            each = np.full(len(self.subjects), np.nan)
            for k in range(len(self.subjects)):
                real = self.photographs(k)
                if len(real) > 1:
                    others = [[*real[:i], *real[i + 1 :]] for i in range(len(real))]
                    each[k] = np.mean([scorer([real[i]], references=others[i])[0] for i in range(len(real))])
            values[name] = each
        return [Reference("a photograph and the others", values, {})] if values else []


@lru_cache(maxsize=64)
def _read(file: Path) -> np.ndarray:
    return read_image(file)
