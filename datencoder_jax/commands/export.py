"""`datencoder export`: a concept as the files that diffusers, ComfyUI, Forge and A1111 load."""

from __future__ import annotations

import io
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from datencoder_jax.checkpoints.export import (
    Target,
    check_name,
    check_replaceable,
    choose_kinds,
    export_concept,
    possible_kinds,
)
from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.commands.shared import load, load_base_of, read_concept, say
from datencoder_jax.data.reading import read_image
from datencoder_jax.data.writing import check_writable
from datencoder_jax.errors import UserError

if TYPE_CHECKING:
    from datencoder_jax.pipeline import Pipeline

_SIDE = 256  # what user interfaces show, and small beside the LoRA that holds it


def run(args: Namespace) -> None:
    """Exports a concept file."""
    check_name(args.name)
    args.out = check_writable(args.out)
    concept = read_concept(args.concept)
    kinds = choose_kinds(args.to, possible_kinds(concept), f"the concept in {args.concept}")
    check_replaceable(args.out, kinds, args.name, len(concept.placeholders))
    if "diffusers" in kinds:
        _check_concept(args.out, Path(expand_user(args.concept)))
    sheet = _sheet(args)
    small = _thumbnail(args) if sheet else None
    pipeline = load(args, args.base) if args.base else load_base_of(args, args.concept, concept, "--base")
    concept, before = read_concept(args.concept, pipeline), {path.name for path in args.out.glob("*")}
    files = export_concept(
        args.out, concept, target_of(pipeline), name=args.name, kinds=kinds, sheet=sheet, thumbnail=small
    )
    replaced = sorted(before.intersection(files))
    say(
        f"exported {', '.join(sorted(files))} to {args.out}"
        + (f" (replaced {', '.join(replaced)})" if replaced else "")
    )


def target_of(pipeline: Pipeline) -> Target:
    """What other programs need to know of the base model."""
    base = pipeline.base
    return Target(base.widths, pipeline.resolution, base.schedule.prediction_type, base.unet.params)


def thumbnail(picture: np.ndarray) -> bytes:
    """The content of a JPEG file of a uint8 picture `[H, W, 3]`, shrunk where a side is longer than 256 pixels."""
    image = Image.fromarray(picture)
    image.thumbnail((_SIDE, _SIDE))
    with io.BytesIO() as file:
        image.save(file, "JPEG", quality=85)
        return file.getvalue()


def png(picture: np.ndarray | Image.Image) -> bytes:
    """The content of a PNG file of a uint8 picture `[H, W, 3]`."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    with io.BytesIO() as file:
        image.save(file, "PNG")
        return file.getvalue()


def _check_concept(out: Path, source: Path) -> None:
    """Raises `UserError` where exporting would replace the only file of another concept: what a run has made."""
    there = out / "concept.safetensors"
    if not there.is_file() or there.samefile(source):
        return
    if (out / "report.json").exists() or not (out / "pipeline.py").exists():
        raise UserError(f"{there} is another concept and would be replaced; choose another --out.")


def _sheet(args: Namespace) -> bytes | None:
    """The sheet of samples for the card: the one given, or the one beside the concept file."""
    path = args.samples or Path(expand_user(args.concept)).with_name("samples.png")
    if args.samples is None and not path.is_file():
        return None
    return png(read_image(path))


def _thumbnail(args: Namespace) -> bytes | None:
    """Of the first picture of the first prompt, if it is beside the concept file."""
    pictures = sorted(Path(expand_user(args.concept)).parent.glob("01_*_0.png"))
    return thumbnail(read_image(pictures[0])) if pictures else None
