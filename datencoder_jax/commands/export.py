"""`datencoder export`: a concept as the files that diffusers, ComfyUI, Forge and A1111 load."""

from __future__ import annotations

import io
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from datencoder_jax.checkpoints.export import (
    Target,
    check_name,
    choose_kinds,
    export_concept,
    exported_names,
    mentions_samples,
    possible_kinds,
)
from datencoder_jax.checkpoints.export import check_replaceable as check_exportable
from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.commands.output_folder import CONCEPT, check_replaceable, lock_folder, read_report
from datencoder_jax.commands.shared import listed_exports, load, load_base_of, read_concept, say
from datencoder_jax.data.reading import read_image
from datencoder_jax.data.writing import check_writable
from datencoder_jax.errors import UserError

if TYPE_CHECKING:
    from datencoder_jax.pipeline import Pipeline
    from datencoder_jax.typing import Concept

_WAIT = 10.0  # seconds
_SIDE = 256  # what user interfaces show, and small beside the LoRA that holds it


def run(args: Namespace) -> None:
    """Exports a concept file."""
    check_name(args.name)
    args.out = check_writable(args.out)
    concept = read_concept(args.concept)
    kinds = choose_kinds(args.to, possible_kinds(concept), f"the concept in {args.concept}")
    _check_folder(args, kinds, concept)
    sheet = _sheet(args)
    small = _thumbnail(args) if sheet else None
    pipeline = load(args, args.base) if args.base else load_base_of(args, args.concept, concept, "--base")
    concept = read_concept(args.concept, pipeline)
    # Others that export to this folder, such as one of LoRAs, are done in a moment.
    with lock_folder(args.out, wait=_WAIT):
        _check_folder(args, kinds, concept)
        before = {path.name for path in args.out.glob("*")}
        files = export_concept(
            args.out,
            concept,
            target_of(pipeline),
            name=args.name,
            kinds=kinds,
            sheet=sheet,
            thumbnail=small,
            overwrite=args.overwrite,
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


def _check_folder(args: Namespace, kinds: Sequence[str], concept: Concept) -> None:
    """Raises `UserError` where exporting would replace what no earlier export has written there."""
    if args.overwrite:
        return
    count, source = len(concept.placeholders), Path(expand_user(args.concept))
    check_exportable(args.out, kinds, args.name, count)
    if "diffusers" in kinds:
        _check_concept(args.out, source)
    if _same_file(args.out / CONCEPT, source):
        foreign = {"samples.png"} if args.samples is not None and read_report(args.out) else set()
    elif read_report(args.out):  # of another concept, whose pictures and exported files are its own
        foreign = {"samples.png", *listed_exports(args.out)}
    else:
        foreign = set() if mentions_samples(args.out) else {"samples.png"}
    names = set(exported_names(kinds, args.name, count))
    if (
        "card" in kinds
        and _sheet_path(args) is not None
        and not _same_file(args.out / "samples.png", _sheet_path(args))
    ):
        names.add("samples.png")
    check_replaceable(args.out, "export", names & foreign, lambda _: False, overwrite=False)


def _same_file(path: Path, other: Path | None) -> bool:
    return other is not None and path.is_file() and other.is_file() and path.samefile(other)


def _check_concept(out: Path, source: Path) -> None:
    """Raises `UserError` where exporting would replace the only file of another concept: what a run has made."""
    there = out / CONCEPT
    if not there.is_file() or _same_file(there, source):
        return
    if (out / "report.json").exists() or not (out / "pipeline.py").exists():
        raise UserError(f"{there} is another concept and would be replaced; choose another --out, or add --overwrite.")


def _sheet_path(args: Namespace) -> Path | None:
    """The sheet of samples for the card: the one given, or the one beside the concept file."""
    path = args.samples or Path(expand_user(args.concept)).with_name("samples.png")
    return None if args.samples is None and not path.is_file() else path


def _sheet(args: Namespace) -> bytes | None:
    path = _sheet_path(args)
    return None if path is None else png(read_image(path))


def _thumbnail(args: Namespace) -> bytes | None:
    """Of the first picture of the first prompt, if it is beside the concept file."""
    pictures = sorted(Path(expand_user(args.concept)).parent.glob("01_*_0.png"))
    return thumbnail(read_image(pictures[0])) if pictures else None
