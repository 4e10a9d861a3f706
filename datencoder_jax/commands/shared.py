"""What the commands share: checks of the input, what they say, their report and how their files are written."""

from __future__ import annotations

import logging
import os
import platform
import re
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from datencoder_jax.commands.output_folder import REPORT, read_json_object
from datencoder_jax.data.reading import enlarge
from datencoder_jax.data.sheets import labelled_sheet
from datencoder_jax.data.writing import picture_name, write_files
from datencoder_jax.errors import UserError
from datencoder_jax.prompts import check_prompts, check_unicode

if TYPE_CHECKING:
    from datencoder_jax.pipeline import Pipeline
    from datencoder_jax.typing import Concept

PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers", "numpy", "pillow")
"""Those whose versions are told."""

_DTYPES = {"auto": "auto", "bf16": "bfloat16", "f16": "float16", "f32": "float32"}


LARGEST_SIDE = 8192
"""Pixels along a side of the largest picture that is written enlarged."""


ONLY_TOYS = (
    "the embedded model knows only pictures of its own world; for photographs name another one with --model and, as "
    "it has no encoder, --method lora"
)
"""What is said where it is given others."""


def given(args: Namespace, *names: str) -> dict[str, Any]:
    """Those of the named options that were given: the others have the API's defaults."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def load(args: Namespace, model: str) -> Pipeline:
    """The base model with what the options say of it, announced."""
    from datencoder_jax import api

    options = given(args, *(name for name in ("encoder", "vision", "memory", "prediction_type") if name in args))
    if args.dtype != "auto":
        options["dtype"] = _DTYPES[args.dtype]
    if args.compute != "auto":
        options["compute_dtype"] = _DTYPES[args.compute]
    pipeline = api.load(model, **options)
    say(f"model: {pipeline.name}, {pipeline.resolution} px, loaded in {pipeline.timings.get('load', 0.0):.1f} s")
    return pipeline


def read_concept(file: str, pipeline: Pipeline | None = None) -> Concept:
    """The concept in `file`, checked against a base model where one is given."""
    from datencoder_jax.checkpoints.concept_file import load_concept

    if pipeline is None:
        return load_concept(file)
    from datencoder_jax.loading import load_concept_for

    return load_concept_for(pipeline, file)


def load_base_of(args: Namespace, file: str, concept: Concept, option: str = "--model") -> Pipeline:
    """The base model that the concept in `file` was made for."""
    # Few checkpoints of one file say what they predict; the concept does.
    args.prediction_type = args.prediction_type or concept.metadata.get("prediction_type")
    try:
        return load(args, concept.base)
    except UserError as error:
        raise UserError(
            f"{file} was made for the base model {concept.base}, which cannot be loaded "
            f"({str(error).rstrip('.')}); say where it is with {option}."
        ) from error


def check_texts(prompts: Sequence[str], tokens: Sequence[str] = ()) -> None:
    """Raises `UserError` for prompts that are empty, not Unicode, or without any of the placeholders."""
    check_prompts(prompts, tokens)
    for text in prompts:
        check_unicode(text)


def device_name() -> str:
    """What the work is done on: "NVIDIA H200 (gpu)", "2 x ... (tpu)" or "cpu (8 cores)".

    It warns where that is a CPU though there is a GPU.

    Raises:
        UserError: JAX has no device.
    """
    import jax

    from datencoder_jax.runtime.availability import explain_no_device, explain_unused_gpu

    xla_bridge = logging.getLogger("jax._src.xla_bridge")
    level = xla_bridge.level
    xla_bridge.setLevel(logging.ERROR)  # JAX's own warning of an unused GPU names no way out
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX_PLATFORMS names one that is not there
        raise UserError(explain_no_device(error)) from error
    finally:
        xla_bridge.setLevel(level)
    if sentence := explain_unused_gpu(devices[0].platform):
        logging.warning(sentence)
    if devices[0].platform == "cpu":
        return f"cpu ({os.cpu_count()} cores)"
    count = f"{len(devices)} x " if len(devices) > 1 else ""
    return f"{count}{devices[0].device_kind} ({devices[0].platform})"


def announce_device() -> str:
    """Says what the work is done on, and returns it."""
    name = device_name()
    say(f"device: {name}")
    return name


def check_scale(args: Namespace, pipeline: Pipeline) -> None:
    """Raises `UserError` where `--scale` would make pictures too large to write."""
    if args.scale == 1:
        return
    side = (args.resolution or pipeline.resolution) * args.scale
    if side > LARGEST_SIDE:
        raise UserError(f"A picture of {side} pixels a side is too large; lower --scale or --resolution.")


def common_report(
    args: Namespace, pipeline: Pipeline, prompts: Sequence[str], reports: list[dict], device: str, started: float
) -> dict[str, Any]:
    """What the report of every run that draws holds: the model, the seconds of each stage, memory, versions."""
    seconds = dict(pipeline.timings)
    for report in reports:
        for stage, duration in report["seconds"].items():
            seconds[stage] = seconds.get(stage, 0.0) + duration
    seconds["total"] = time.perf_counter() - started
    return {
        "model": pipeline.name,
        "fingerprint": pipeline.fingerprint,
        "prompts": list(prompts),
        "num": args.num,
        "seed": args.seed,
        "deterministic": bool(args.deterministic),
        "scale": args.scale,
        "seconds": seconds,
        "peak_memory_bytes": _peak_memory(),
        "device": device,
        "versions": {name: metadata.version(name) for name in ("datencoder_jax", *PACKAGES)}
        | {"python": platform.python_version()},
    }


def _peak_memory() -> dict[str, int | None]:
    """The most memory this process held so far: of the machine and, where it tells, of the accelerator."""
    import jax

    try:
        import resource
    except ImportError:  # Windows
        host = None
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    stats = jax.local_devices()[0].memory_stats() or {}
    return {"host": host, "device": stats.get("peak_bytes_in_use")}


def listed_pictures(out: Path, *keys: str) -> set[str]:
    """Names of pictures that the report of an earlier run in `out` lists under `keys`; nothing but such names."""
    return {name for name in _listed(out, keys) if re.fullmatch(r"(\d+_[a-z0-9-]+_\d+|input(_\d+)?)\.png", name)}


def listed_exports(out: Path) -> set[str]:
    """Names of exported files that the report of an earlier run in `out` lists; nothing but such names."""
    from datencoder_jax.checkpoints.export import exported_files

    return exported_files(out, _listed(out, ["exported"]))


def _listed(out: Path, keys: Sequence[str]) -> list[str]:
    """The names that `report.json` in `out` has under `keys`; whatever they are."""
    report = read_json_object(out / REPORT)
    try:
        return [str(name) for key in keys for name in report.get(key, ())]
    except TypeError:  # it is not one of ours
        return []


def picture_names(prompts: Sequence[str], num: int) -> list[str]:
    """The files of `num` pictures of each prompt."""
    return [picture_name(row, prompt, column) for row, prompt in enumerate(prompts) for column in range(num)]


def write_run(
    out: Path,
    report: dict[str, Any],
    inputs: dict[str, np.ndarray],
    prompts: Sequence[str],
    images: np.ndarray,
    earlier: set[str],
    scale: int = 1,
) -> Image.Image:
    """Writes a run's files, then removes those of the `earlier` run's that are none of its own.

    The files of single pictures, `inputs` too, are enlarged `scale` times without smoothing.

    Returns:
        The sheet of samples.
    """
    pictures = {
        picture_name(row, prompt, column): enlarge(image, scale)
        for row, prompt in enumerate(prompts)
        for column, image in enumerate(images[row])
    }
    sheet = labelled_sheet(list(inputs.values()), prompts, images)
    inputs = {name: enlarge(image, scale) for name, image in inputs.items()}
    report |= {"pictures": list(pictures)}
    # The report gets its name last: where it is, everything is.
    write_files(out, {"report.json": report} | inputs | pictures | {"samples.png": sheet})
    for name in earlier - pictures.keys() - inputs.keys():
        with suppress(OSError):  # the run has succeeded, and its report does not list the file
            (out / name).unlink(missing_ok=True)
    say(f"wrote {count_things(len(pictures), 'picture')}, samples.png and report.json to {out}")
    return sheet


def count_things(count: int, noun: str) -> str:
    """Such as "1 picture" or "2 pictures"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def say(line: str) -> None:
    """Prints a line at once."""
    print(line, flush=True)
