"""What each command does. All that can be checked of the input is checked before a model is loaded.

jax is imported inside the functions, after those checks, so that a mistake is told at once.
"""

from __future__ import annotations

import json
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

from datencoder_jax.checkpoints.hub import TOYWORLD
from datencoder_jax.data.reading import fit_square, read_image
from datencoder_jax.data.sheets import labelled_sheet
from datencoder_jax.data.writing import check_writable, no_empty_folder, picture_name, write_files
from datencoder_jax.errors import UserError
from datencoder_jax.prompts import check_prompts

if TYPE_CHECKING:
    from datencoder_jax.pipeline import Pipeline
    from datencoder_jax.typing import Concept

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers", "numpy", "pillow")


def personalize(args: Namespace) -> None:
    """`datencoder personalize`: a concept file, pictures, a sheet and a report from one or several pictures."""
    started = time.perf_counter()
    if not args.token or re.search(r"\s", args.token):
        raise UserError(f"The token {args.token!r} must be one word without spaces, such as S*.")
    _check_texts(args.prompts or [args.token], args.token)
    if args.model != TOYWORLD and args.encoder is None:
        raise UserError(
            f"There is no tuning-encoder for {args.model}: name the folder of one with --encoder, or use the embedded "
            f"model with --model {TOYWORLD}."
        )
    images = [read_image(path) for path in args.images]
    args.out = check_writable(args.out)

    device = _announce_device()
    from datencoder_jax import api
    from datencoder_jax.checkpoints.concept_file import save_concept

    pipeline = api.load(args.model, encoder=args.encoder)
    _announce_model(pipeline)
    prompts = args.prompts or [prompt.replace("S*", args.token) for prompt in pipeline.prompts]
    tuned = api.personalize(pipeline, images, steps=args.steps, token=args.token, blend=args.blend, seed=args.seed)
    words = [{"word": str(word), "cosine": float(cosine)} for word, cosine in tuned.report["nearest_words"]]
    _say("nearest words: " + ", ".join(f"{entry['word']} {entry['cosine']:.2f}" for entry in words))

    inputs = [fit_square(image, pipeline.resolution) for image in images]
    names = [f"input{'' if index == 0 else f'_{index + 1}'}.png" for index in range(len(inputs))]
    earlier = _listed_pictures(args.out, "pictures", "input_pictures")
    with no_empty_folder(args.out):
        # Written before the sampling, so that it is not lost should that fail.
        save_concept(args.out / "concept.safetensors", tuned.concept)
    (args.out / "report.json").unlink(missing_ok=True)  # an earlier run's report tells of another concept
    made = api.generate(pipeline, prompts, concept=tuned.concept, num=args.num, seed=args.seed)
    report = {
        "command": "personalize",
        "inputs": [str(path) for path in args.images],
        "input_pictures": names,
        "token": args.token,
        "blend": tuned.concept.blend,
        "steps": args.steps,
        "nearest_word": tuned.concept.nearest_word,
        "nearest_words": words,
        "losses": tuned.report["losses"],
    } | _common_report(args, pipeline, prompts, [tuned.report, made.report], device, started)
    _write(args.out, report, dict(zip(names, inputs, strict=True)), prompts, made.images, earlier)


def generate(args: Namespace) -> None:
    """`datencoder generate`: pictures, a sheet and a report for prompts, with a concept or without."""
    started = time.perf_counter()
    _check_texts(args.prompts, None)
    _check_unicode(args.negative)
    args.out = check_writable(args.out)
    concept = _read_concept(args.concept) if args.concept else None
    if concept is not None:
        check_prompts(args.prompts, [concept.token])
    elif args.blend is not None:
        raise UserError("--blend weighs a concept's path against the plain model's, so it needs --concept FILE.")

    device = _announce_device()
    from datencoder_jax import api

    if args.model is None and concept is not None:
        try:
            pipeline = api.load(concept.base)
        except UserError as error:
            raise UserError(
                f"{args.concept} was made for the base model {concept.base}, which cannot be loaded "
                f"({str(error).rstrip('.')}); say where it is with --model."
            ) from error
    else:
        pipeline = api.load(args.model or TOYWORLD)
    _announce_model(pipeline)
    if concept is not None:
        concept = _read_concept(args.concept, pipeline)
    made = api.generate(
        pipeline,
        args.prompts,
        concept=concept,
        num=args.num,
        seed=args.seed,
        sampler=args.sampler,
        sampling_steps=args.sampling_steps,
        guidance=args.guidance,
        blend=args.blend,
        negative=args.negative,
    )
    report: dict[str, Any] = {"command": "generate"}
    if concept is not None:
        report |= {"concept": args.concept, "token": concept.token, "nearest_word": concept.nearest_word}
        report["blend"] = concept.blend if args.blend is None else args.blend
    report |= {"sampler": args.sampler, "sampling_steps": args.sampling_steps, "guidance": made.report["guidance"]}
    report |= {"negative": args.negative}
    report |= _common_report(args, pipeline, args.prompts, [made.report], device, started)
    # Input pictures of an earlier run stay: they belong to the concept beside them.
    _write(args.out, report, {}, args.prompts, made.images, _listed_pictures(args.out, "pictures"))


def toyworld(args: Namespace) -> None:
    """`datencoder toyworld`: a PNG of one inhabitant of the embedded world."""
    from datencoder_jax.toyworld.captions import prompt_for
    from datencoder_jax.toyworld.render import render
    from datencoder_jax.toyworld.world import CLASSES, SPLITS, Context, Draws, Instance

    if args.out.suffix.lower() != ".png":
        raise UserError(f"{args.out} must end in .png: the picture is written as PNG.")
    if args.size % 2:
        raise UserError(f"--size must be even, and {args.size} is not.")
    if args.size * args.scale > 8192:
        raise UserError(f"A picture of {args.size * args.scale} pixels a side is too large; lower --size or --scale.")
    if args.instance is not None:
        instance = Instance.from_id(args.instance)
        if args.class_name not in (None, instance.cls):
            raise UserError(
                f"Instance {args.instance} is a {instance.cls}, not a {args.class_name}: its number leaves "
                f"{CLASSES.index(args.class_name)} when divided by {len(CLASSES)} if it is one; leave --class out."
            )
    else:
        draws, ids = Draws(args.seed, 0x9C), SPLITS["test"]
        index = CLASSES.index(args.class_name) if args.class_name else CLASSES.index(draws.choice(CLASSES))
        instance = Instance.from_id(draws.choice([i for i in ids if i % len(CLASSES) == index]))
    context = Context(args.scene, args.style, args.accessory)
    picture = render(instance, context, args.seed, args.size)
    write_files(args.out.parent, {args.out.name: picture.repeat(args.scale, 0).repeat(args.scale, 1)})
    pattern = (
        instance.main if instance.pattern == "plain" else f"{instance.main} with {instance.second} {instance.pattern}"
    )
    _say(f"instance {instance.id}: a {instance.cls}, {pattern}; {prompt_for(context, instance.cls)}")
    _say(f"wrote {args.out}")


def info(args: Namespace) -> None:
    """`datencoder info`: versions, devices and cache folders, or what a concept file holds."""
    rows = _machine() if args.file is None else _describe(args.file)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        _say(f"{name:<{width}}  {value}")


def _machine() -> list[tuple[str, str]]:
    import huggingface_hub.constants

    from datencoder_jax.checkpoints.hub import resolve_base
    from datencoder_jax.compilation import cache_folder

    cache = cache_folder()
    rows = [("datencoder", metadata.version("datencoder_jax")), ("python", platform.python_version())]
    rows += [(name, metadata.version(name)) for name in _PACKAGES]
    rows += [("device", _device_name())]
    embedded = resolve_base(TOYWORLD)
    rows += [("embedded model", str(embedded) if embedded.is_dir() else "not installed")]
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR") or (str(cache / "compiled") if cache else "not kept")
    rows += [("compiled programs", compiled)]
    return [*rows, ("downloaded models", huggingface_hub.constants.HF_HUB_CACHE)]


def _describe(file: str) -> list[tuple[str, str]]:
    concept = _read_concept(file)
    vectors = np.asarray(concept.embeddings)
    # The Frobenius norm of down @ up, without the product.
    norms = {
        path: float(np.sqrt(max(0.0, np.vdot(np.asarray(o.down).T @ o.down, np.asarray(o.up) @ np.asarray(o.up).T))))
        for path, o in concept.offsets.items()
    }
    numbers = vectors.size + sum(o.down.size + o.up.size for o in concept.offsets.values())
    rows = [
        ("token", concept.token),
        ("nearest word", concept.nearest_word),
        ("base model", f"{concept.base} (fingerprint {concept.fingerprint[:8]})"),
        ("blend", f"{concept.blend:g}"),
        (
            "token vectors",
            f"{vectors.shape[0]} of {vectors.shape[1]}, norm "
            + ", ".join(f"{norm:.3g}" for norm in np.linalg.norm(vectors, axis=1)),
        ),
        ("weight offsets", f"{len(norms)} projections"),
    ]
    if norms:
        ranks = sorted({int(o.down.shape[1]) for o in concept.offsets.values()})
        largest = max(norms, key=lambda path: norms[path])
        rows[-1] = ("weight offsets", f"{len(norms)} projections of rank {', '.join(map(str, ranks))}")
        rows += [
            (
                "offset norms",
                f"{np.mean(list(norms.values())):.3g} on average, at most {norms[largest]:.3g} ({largest})",
            )
        ]
    rows += [("size", f"{numbers:,} numbers, {Path(file).expanduser().stat().st_size / 1e6:.2f} MB")]
    return rows + sorted(concept.metadata.items())


def _read_concept(file: str, pipeline: Pipeline | None = None) -> Concept:
    """The concept in `file`, checked against a base model where one is given."""
    from datencoder_jax.checkpoints.concept_file import load_concept

    if pipeline is None:
        return load_concept(file)
    from datencoder_jax.pipeline import attention_shapes

    width = int(pipeline.base.table.shape[1])
    return load_concept(
        file, pipeline.fingerprint, attention_shapes(pipeline.base.unet), base=pipeline.name, width=width
    )


def _check_texts(prompts: Sequence[str], token: str | None) -> None:
    check_prompts(prompts, [token] if token else ())
    for text in prompts:
        _check_unicode(text)


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"The prompt {text!r} is not valid Unicode.") from error


def _device_name() -> str:
    """What the work is done on: "NVIDIA H200 (gpu)", "2 x ... (tpu)" or "cpu (8 cores)"."""
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:  # JAX_PLATFORMS names one that is not there
        raise UserError(f"No device can be used: {str(error).strip().splitlines()[0].rstrip('.')}.") from error
    if devices[0].platform == "cpu":
        return f"cpu ({os.cpu_count()} cores)"
    count = f"{len(devices)} x " if len(devices) > 1 else ""
    return f"{count}{devices[0].device_kind} ({devices[0].platform})"


def _announce_device() -> str:
    name = _device_name()
    _say(f"device: {name}")
    return name


def _announce_model(pipeline: Pipeline) -> None:
    _say(f"model: {pipeline.name}, {pipeline.resolution} px, loaded in {pipeline.timings.get('load', 0.0):.1f} s")


def _common_report(
    args: Namespace, pipeline: Pipeline, prompts: Sequence[str], reports: list[dict], device: str, started: float
) -> dict[str, Any]:
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
        "seconds": seconds,
        "peak_memory_bytes": _peak_memory(),
        "device": device,
        "versions": {name: metadata.version(name) for name in ("datencoder_jax", *_PACKAGES)}
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


def _listed_pictures(out: Path, *keys: str) -> set[str]:
    """Names of pictures that the report of an earlier run in `out` lists under `keys`; nothing but such names."""
    try:
        report = json.loads((out / "report.json").read_text("utf-8"))
        names = [name for key in keys for name in report.get(key, ())]
        return {name for name in names if re.fullmatch(r"(\d+_[a-z0-9-]+_\d+|input(_\d+)?)\.png", name)}
    except (OSError, ValueError, TypeError, AttributeError):  # there is none, or it is not one of ours
        return set()


def _write(
    out: Path,
    report: dict[str, Any],
    inputs: dict[str, np.ndarray],
    prompts: Sequence[str],
    images: np.ndarray,
    earlier: set[str],
) -> None:
    """Writes a run's files, then removes those of the `earlier` run's pictures that are none of its own."""
    pictures = {
        picture_name(row, prompt, column): image
        for row, prompt in enumerate(prompts)
        for column, image in enumerate(images[row])
    }
    sheet = labelled_sheet(list(inputs.values()), prompts, images)
    report |= {"pictures": list(pictures)}
    # The report gets its name last: where it is, everything is.
    write_files(out, {"report.json": report} | inputs | pictures | {"samples.png": sheet})
    for name in earlier - pictures.keys() - inputs.keys():
        with suppress(OSError):  # the run has succeeded, and its report does not list the picture
            (out / name).unlink(missing_ok=True)
    _say(f"wrote {len(pictures)} pictures, samples.png and report.json to {out}")


def _say(line: str) -> None:
    print(line, flush=True)
