"""`datencoder export`: a concept as the files that diffusers, ComfyUI, Forge and A1111 load."""

from __future__ import annotations

import io
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from datencoder_jax.checkpoints.export import Target, check_name, export_concept
from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.commands.shared import load, load_base_of, read_concept, say
from datencoder_jax.data.reading import read_image
from datencoder_jax.data.writing import check_writable

if TYPE_CHECKING:
    from datencoder_jax.pipeline import Pipeline


def run(args: Namespace) -> None:
    """Exports a concept file."""
    check_name(args.name)
    args.out = check_writable(args.out)
    concept = read_concept(args.concept)
    sheet = _sheet(args)
    pipeline = load(args, args.base) if args.base else load_base_of(args, args.concept, concept, "--base")
    concept = read_concept(args.concept, pipeline)
    files = export_concept(args.out, concept, target_of(pipeline), name=args.name, kinds=args.to, sheet=sheet)
    say(f"exported {', '.join(sorted(files))} to {args.out}")


def target_of(pipeline: Pipeline) -> Target:
    """What other programs need to know of the base model."""
    return Target(pipeline.base.widths, pipeline.resolution, pipeline.base.schedule.prediction_type)


def png(picture: np.ndarray | Image.Image) -> bytes:
    """The content of a PNG file of a uint8 picture `[H, W, 3]`."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    with io.BytesIO() as file:
        image.save(file, "PNG")
        return file.getvalue()


def _sheet(args: Namespace) -> bytes | None:
    """The sheet of samples for the card: the one given, or the one beside the concept file."""
    path = args.samples or Path(expand_user(args.concept)).with_name("samples.png")
    if args.samples is None and not path.is_file():
        return None
    return png(read_image(path))
