"""`datencoder generate`: pictures, a sheet and a report for prompts, with concepts or without."""

from __future__ import annotations

import math
import time
import warnings
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from datencoder_jax.checkpoints.hub import TOYWORLD
from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.commands.output_folder import check_replaceable, lock_folder, read_report
from datencoder_jax.commands.shared import (
    announce_device,
    check_scale,
    check_texts,
    common_report,
    given,
    listed_exports,
    listed_pictures,
    load,
    load_base_of,
    picture_names,
    read_concept,
    write_run,
)
from datencoder_jax.data.writing import check_writable
from datencoder_jax.errors import UserError
from datencoder_jax.prompts import check_unicode

COMMAND = "generate"


def run(args: Namespace) -> None:
    """Draws and writes."""
    started = time.perf_counter()
    check_texts(args.prompts)
    check_unicode(args.negative)
    args.out = check_writable(args.out)
    with lock_folder(args.out):
        _check_folder(args)
        _generate(args, started)


def _check_folder(args: Namespace) -> None:
    """Raises `UserError` where the run would replace what no earlier one of `generate` has written there."""
    listed, own = listed_pictures(args.out, "pictures"), set()
    names = {"report.json", "samples.png", *picture_names(args.prompts, args.num)}
    if read_report(args.out).get("command") == COMMAND:
        own = {"report.json", "samples.png", *listed}
    check_replaceable(args.out, COMMAND, names | listed, own.__contains__, overwrite=args.overwrite)


def _generate(args: Namespace, started: float) -> None:
    files = [_with_weight(values, "--concept") for values in args.concept]
    loras = [_with_weight(values, "--lora") for values in args.lora]
    embeddings = [_with_token(values) for values in args.embedding]
    for file, token in loras + embeddings:
        check_unicode(str(token))
        if not expand_user(file).exists():
            raise UserError(f"There is no file {file}.")
    concepts = [read_concept(file) for file, _ in files]
    if concepts and not embeddings:
        check_texts(args.prompts, [token for concept in concepts for token in concept.placeholders])
    if not concepts and not embeddings and any("S*" in prompt for prompt in args.prompts):
        warnings.warn("S* stands for nothing in particular without --concept FILE", stacklevel=1)
    if not concepts and args.blend is not None:
        raise UserError("--blend weighs a concept's path against the plain model's, so it needs --concept FILE.")
    if not concepts and args.gate is not None:
        raise UserError("--gate is of concepts of perfusion, so it needs --concept FILE.")

    device = announce_device()
    from datencoder_jax import api

    if args.model is None and concepts:
        pipeline = load_base_of(args, files[0][0], concepts[0])
    else:
        pipeline = load(args, args.model or TOYWORLD)
    check_scale(args, pipeline)
    if args.negative and (pipeline.guidance if args.guidance is None else args.guidance) <= 1:
        warnings.warn("--negative has no effect: at or below 1 --guidance is none", stacklevel=1)
    for file, weight in loras:
        pipeline = api.with_lora(pipeline, file, weight)
    parts = [read_concept(file, pipeline) for file, _ in files]
    parts += [api.import_embedding(pipeline, file, token) for file, token in embeddings]
    weights = [weight for _, weight in files] + [1.0] * len(embeddings)
    made = api.generate(
        pipeline,
        args.prompts,
        concept=parts or None,
        weights=weights or None,
        negative=args.negative,
        **given(args, "num", "seed", "resolution", "sampler", "sampling_steps", "guidance", "blend", "gate"),
        **given(args, "deterministic"),
    )
    names = [file for file, _ in files + embeddings]
    told = [
        {"file": str(file), "token": part.token, "nearest_word": part.nearest_word, "weight": weight}
        for file, part, weight in zip(names, parts, weights, strict=True)
    ]
    report: dict[str, Any] = {"command": COMMAND, "concepts": told, "blend": made.report["blend"]}
    report |= {"loras": [{"file": str(file), "weight": weight} for file, weight in loras]}
    report |= {"sampler": args.sampler, "sampling_steps": args.sampling_steps, "guidance": made.report["guidance"]}
    report |= {"negative": args.negative} | given(args, "gate")
    report |= common_report(args, pipeline, args.prompts, [made.report], device, started)
    # Input pictures and exported files of an earlier run stay: they belong to the concept beside them.
    kept = {"input_pictures": listed_pictures(args.out, "input_pictures"), "exported": listed_exports(args.out)}
    report |= {key: sorted(names) for key, names in kept.items() if names}
    write_run(args.out, report, {}, args.prompts, made.images, listed_pictures(args.out, "pictures"), args.scale)


def _with_weight(values: Sequence[str], option: str) -> tuple[str, float]:
    """A file and its weight, 1 where none is given."""
    if len(values) > 2:
        raise UserError(f"{option} takes a file and a weight, not {' '.join(values)!r}; repeat it for several files.")
    try:
        weight = float(values[1]) if len(values) == 2 else 1.0
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"{values[1]!r} is no weight, such as 0.7; repeat {option} for several files.")
    return values[0], weight


def _with_token(values: Sequence[str]) -> tuple[str, str | None]:
    """A file and the placeholder of its embedding, None where none is given."""
    if len(values) > 2:
        raise UserError(f"--embedding takes a file and a token, not {' '.join(values)!r}; repeat it for several files.")
    return values[0], values[1] if len(values) == 2 else None
