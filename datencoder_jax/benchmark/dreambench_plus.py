"""The pictures of a run as the scripts of DreamBench++ read them (Peng et al. 2024, arXiv 2406.16855).

    dreambench_plus/ROW/src_image/SUBJECT/3_0.jpg     the photograph, once for each picture drawn from it
    dreambench_plus/ROW/text/SUBJECT/3_0.txt          the prompt with the class word
    dreambench_plus/ROW/tgt_image/SUBJECT/3_0.jpg     picture 0 of prompt 3
    dreambench_plus/ROW/negative_prompt.txt           empty

as in the "Generate Images" of github.com/yuangpeng/dreambench_plus; `eval_clip_and_dino.py --dir` takes a ROW. Seeds
count on: with 4 pictures of a prompt, the second seed's are 4 to 7. Its ratings by language models go by the names and
the 9 prompts of its own data, which `--suite` reads too.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from datencoder_jax.benchmark.making import open_suite
from datencoder_jax.benchmark.suites import Setup
from datencoder_jax.benchmark.units import Unit, read_made
from datencoder_jax.checkpoints.atomic import atomic_write

NAME = "dreambench_plus"
_QUALITY = 95


def write_tree(folder: Path, setup: Setup, units: Sequence[Unit]) -> None:
    """Writes what has been drawn and is not there yet."""
    suite = open_suite(setup)
    names = [subject.name.replace(".", "_") for subject in suite.subjects]  # its scripts cut names at the first dot
    names = [name if names.count(name) == 1 else f"{name}-{k}" for k, name in enumerate(names)]
    for unit in units:
        if not unit.file.exists():
            continue
        root = folder / NAME / unit.row.slug
        name = names[unit.subject]
        last = (
            root / "tgt_image" / name / f"{len(suite.prompts(unit.subject)) - 1}_{setup.num * (unit.seed + 1) - 1}.jpg"
        )
        if last.exists() and last.stat().st_mtime >= unit.file.stat().st_mtime:
            continue
        given, texts = suite.given(unit.subject)[0], suite.prompts(unit.subject, suite.subjects[unit.subject].word)
        _text(root / "negative_prompt.txt", "")
        for prompt, (text, pictures) in enumerate(zip(texts, read_made(unit).pictures, strict=True)):
            for k, picture in enumerate(pictures, start=unit.seed * setup.num):
                _jpeg(root / "src_image" / name / f"{prompt}_{k}.jpg", given)
                _text(root / "text" / name / f"{prompt}_{k}.txt", text)
                _jpeg(root / "tgt_image" / name / f"{prompt}_{k}.jpg", picture)


def _jpeg(path: Path, picture: np.ndarray) -> None:
    with atomic_write(path, flushed=True) as temporary:
        Image.fromarray(picture).save(temporary, format="JPEG", quality=_QUALITY)


def _text(path: Path, text: str) -> None:
    with atomic_write(path, flushed=True) as temporary:
        temporary.write_text(text, "utf-8")
