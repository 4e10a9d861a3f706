"""`datencoder personalize`: a concept file, pictures, a sheet and a report from one or several pictures."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datencoder_jax.checkpoints.export import check_name, choose_kinds, export_concept, exported_names
from datencoder_jax.checkpoints.export import check_replaceable as check_exportable
from datencoder_jax.checkpoints.hub import TOYWORLD
from datencoder_jax.commands.export import png, target_of, thumbnail
from datencoder_jax.commands.output_folder import CONCEPT, check_replaceable, lock_folder, read_report
from datencoder_jax.commands.shared import (
    ONLY_TOYS,
    announce_device,
    check_scale,
    check_texts,
    common_report,
    given,
    listed_exports,
    listed_pictures,
    load,
    picture_names,
    read_concept,
    say,
    write_run,
)
from datencoder_jax.data.reading import fit_square, read_image
from datencoder_jax.data.writing import check_writable, reserve_room, write_files
from datencoder_jax.errors import UserError
from datencoder_jax.methods import METHODS
from datencoder_jax.prompts import check_unicode, put_words
from datencoder_jax.typing import Concept, LearningRates

if TYPE_CHECKING:
    from datencoder_jax.pipeline import Pipeline


COMMAND = "personalize"
_TEXTS, _ENTRY = 1 << 16, 400  # bytes of a concept's file that its texts, and an array's name and shape, take at most
_DIGEST = "input_digest"
_TOY = 64
"""Pixels along a side; pictures of the embedded model's own have half as many, however much they are enlarged."""


def run(args: Namespace) -> None:
    """Personalizes, draws and writes."""
    started = time.perf_counter()
    tokens, own = _check_options(args)
    kinds = None if args.export is None else choose_kinds(args.export, METHODS[args.method].exports, args.method)
    images = [read_image(path) for path in args.images]
    if args.model == TOYWORLD and not all(map(_coarse, images)):
        warnings.warn(ONLY_TOYS, stacklevel=1)
    args.out = check_writable(args.out)
    with lock_folder(args.out):
        if kinds is not None and not args.overwrite:
            check_exportable(args.out, kinds, args.name, len(tokens))
        _check_folder(args, images, tokens, kinds, args.prompts or [])
        _personalize(args, images, tokens, own, kinds, started)


def _check_options(args: Namespace) -> tuple[list[str], dict[str, str] | None]:
    """The placeholders and the method's own options; raises `UserError` for options that do not fit together."""
    method, tokens = METHODS[args.method], args.token.split()
    if not tokens or (" ".join(tokens) != args.token if method.several else tokens != [args.token]):
        raise UserError(f"The token {args.token!r} must be one word without spaces, such as S*.")
    if files := [prompt for prompt in args.prompts or () if os.path.isfile(prompt)]:
        raise UserError(f"{files[0]} is a file and no prompt; name pictures before --prompt.")
    check_texts(args.prompts or tokens, tokens)
    if args.method == "datencoder" and args.model != TOYWORLD and args.encoder is None:
        raise UserError(
            f"There is no tuning-encoder for {args.model}: name the folder of one with --encoder, choose a method that "
            f"needs none with --method (such as lora), or use the embedded model with --model {TOYWORLD}."
        )
    if args.method == "e4t" and args.encoder is None:
        raise UserError(
            "e4t starts from an encoder of the picture's domain; name the folder of one with --encoder "
            "(datencoder pretrain --config configs/toyworld_e4t.py makes one)."
        )
    if method.encoder is None and args.encoder is not None:
        raise UserError(f"{args.method} starts from no encoder; leave --encoder out, or choose --method datencoder.")
    own = _own_options(args.options) if args.options else None
    method.with_options(args.method, own)  # what is wrong with these is told before anything is loaded
    check_unicode(args.word or "")
    check_unicode(args.model)  # the concept's file names it
    check_name(args.name)
    if args.prior is None and args.prior_pictures is not None:
        raise UserError("--prior-pictures says how many pictures --prior is to draw, and needs it.")
    return tokens, own


def _personalize(
    args: Namespace,
    images: list[np.ndarray],
    tokens: list[str],
    own: dict[str, str] | None,
    kinds: Sequence[str] | None,
    started: float,
) -> None:
    device = announce_device()
    from datencoder_jax import api
    from datencoder_jax.compile_ahead import compiling_ahead

    pipeline = load(args, args.model)
    check_scale(args, pipeline)
    prompts = args.prompts or [prompt.replace("S*", " and a ".join(tokens)) for prompt in pipeline.prompts]
    _check_folder(args, images, tokens, kinds, prompts)
    options = given(args, "method", "steps", "token", "word", "rank", "blend", "seed", "resolution", "deterministic")
    if args.prior is not None:
        options["prior"] = api.PriorOptions(args.prior_pictures or api.PriorOptions.pictures, args.prior)
    if own:
        options["options"] = own
    if args.learning_rates is not None:
        options["learning_rates"] = LearningRates(*args.learning_rates)
    drawing = given(args, "num", "seed", "resolution", "sampler", "sampling_steps", "guidance", "deterministic")

    room = 0

    def run_without_weights(pipeline: Pipeline) -> None:
        nonlocal room
        concept = api.personalize(pipeline, images, **options, quiet=True).concept
        room = _most_bytes(concept)
        api.generate(pipeline, prompts, concept=concept, **drawing, quiet=True)

    with compiling_ahead(pipeline, run_without_weights) as seconds:
        with reserve_room(args.out, room):
            tuned = api.personalize(pipeline, images, **options)
        if args.model != TOYWORLD or all(map(_coarse, images)):  # of photographs the embedded encoder cannot tell
            _warn_of_different_things(args.images, tuned.report.get("picture_groups"))
        concept = _with_digest(tuned.concept, images)
        words = [{"word": str(word), "cosine": float(cosine)} for word, cosine in tuned.report["nearest_words"]]
        if words:
            say("nearest words: " + ", ".join(f"{entry['word']} {entry['cosine']:.2f}" for entry in words))
        # Written before the sampling, so that it is not lost should that fail.
        _write_concept(args, concept)
        made = api.generate(pipeline, prompts, concept=concept, **drawing)
    inputs = [fit_square(image, args.resolution or pipeline.resolution) for image in images]
    names = _input_names(images)
    stages = [tuned.report, made.report, {"seconds": {"compile": seconds}}]
    report = {
        "command": COMMAND,
        "inputs": [str(path) for path in args.images],
        "input_pictures": names,
        "method": args.method,
        "token": args.token,
        "blend": concept.blend,
        "steps": tuned.report["steps"],
        "nearest_word": concept.nearest_word,
        "nearest_words": words,
        "losses": tuned.report["losses"],
        "exported": [],
    } | common_report(args, pipeline, prompts, stages, device, started)
    sheet = write_run(args.out, report, dict(zip(names, inputs, strict=True)), prompts, made.images, set(), args.scale)
    if kinds is not None:
        scores = _scores(pipeline, concept, inputs, prompts, made.images, drawing) if "card" in kinds else None
        files = export_concept(
            args.out,
            concept,
            target_of(pipeline),
            name=args.name,
            kinds=kinds,
            sheet=png(sheet),
            thumbnail=thumbnail(made.images[0, 0]),
            scores=scores,
            overwrite=args.overwrite,
        )
        write_files(args.out, {"report.json": report | {"exported": sorted(files)}})
        say(f"exported {', '.join(sorted(files))}")


def _warn_of_different_things(files: Sequence[Any], groups: list[list[int]] | None) -> None:
    """Warns where the encoder takes the pictures in `files` for more than one thing; `groups` as `api` reports them."""
    if groups is None or len(groups) < 2:
        return
    things = "; ".join(" and ".join(str(files[index]) for index in group) for group in groups)
    warnings.warn(
        f"the encoder takes the pictures for {len(groups)} different things ({things}), which the concept will mix; "
        "give pictures of one thing, in one style",
        stacklevel=2,
    )


def _input_names(images: Sequence[np.ndarray]) -> list[str]:
    return [f"input{'' if index == 0 else f'_{index + 1}'}.png" for index in range(len(images))]


def _check_folder(
    args: Namespace,
    images: Sequence[np.ndarray],
    tokens: Sequence[str],
    kinds: Sequence[str] | None,
    prompts: Sequence[str],
) -> None:
    """Raises `UserError` where the run would replace what no earlier one of `personalize` has written there."""
    report = read_report(args.out)
    names = {"report.json", "samples.png", CONCEPT, *_input_names(images), *picture_names(prompts, args.num)}
    names |= listed_pictures(args.out, "pictures", "input_pictures") | listed_exports(args.out)
    if kinds is not None:
        names |= set(exported_names(kinds, args.name, len(tokens)))
    own: set[str] = set()
    if report.get("command") == COMMAND:
        own = {"report.json", "samples.png", CONCEPT, *listed_pictures(args.out, "pictures", "input_pictures")}
        own |= listed_exports(args.out)
    elif not (args.out / "report.json").exists() and _is_of_same_request(args, images):
        own = {CONCEPT}  # an interrupted run has left it
    check_replaceable(args.out, COMMAND, names, own.__contains__, overwrite=args.overwrite)


def _with_digest(concept: Concept, images: Sequence[np.ndarray]) -> Concept:
    """The concept with a digest of the pictures it was learnt from, by which a later run knows it again."""
    return replace(concept, metadata=concept.metadata | {_DIGEST: _digest(images)})


def _digest(images: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for image in images:
        digest.update(str(image.shape).encode() + image.tobytes())
    return digest.hexdigest()[:16]


def _is_of_same_request(args: Namespace, images: Sequence[np.ndarray]) -> bool:
    """Whether the concept in the output folder was learnt from these pictures in the way that the options say."""
    try:
        concept = read_concept(str(args.out / CONCEPT))
    except UserError:  # there is none, or it cannot be read
        return False
    wanted = {_DIGEST: _digest(images)} | given(args, "method", "steps", "seed")
    return concept.token == args.token and all(
        concept.metadata.get(name) == str(value) for name, value in wanted.items()
    )


def _most_bytes(concept: Concept) -> int:
    """Bytes that the file of a concept with such arrays takes at most, whatever is in them."""
    import jax

    leaves = jax.tree.leaves((concept.embeddings, concept.offsets, concept.gate, concept.reader))
    return _TEXTS + sum(4 * np.size(leaf) + _ENTRY for leaf in leaves)


def _save_concept(path: Path, concept: Concept) -> None:
    """Writes a concept's file, or to another place where this one cannot be written: much work is in it.

    Raises:
        UserError: it cannot be written here; the sentence says where it is.
    """
    from datencoder_jax.checkpoints.concept_file import save_concept

    try:
        save_concept(path, concept)
    except UserError as error:
        elsewhere = _save_elsewhere(path.name, concept)
        if elsewhere is None:
            raise
        raise UserError(f"{str(error).rstrip('.')}; the concept is in {elsewhere}.") from error


def _save_elsewhere(name: str, concept: Concept) -> Path | None:
    """Writes a concept to a new folder among the temporary ones, or in the home; None where neither can be written."""
    from datencoder_jax.checkpoints.concept_file import save_concept

    for choose_place in (tempfile.gettempdir, Path.home):
        with suppress(UserError, OSError, RuntimeError):  # no such place, or it cannot be written either
            folder = Path(tempfile.mkdtemp(prefix="datencoder-", dir=choose_place()))
            try:
                save_concept(folder / name, concept)
            except UserError:
                folder.rmdir()
                raise
            return folder / name
    return None


def _write_concept(args: Namespace, concept: Concept) -> None:
    """The concept's file; an earlier run's report, exports and pictures, which tell of another concept, go."""
    earlier = listed_pictures(args.out, "pictures", "input_pictures") | listed_exports(args.out)
    _save_concept(args.out / CONCEPT, concept)
    given_files = [os.path.realpath(path) for path in args.images]
    for name in earlier | {"samples.png"}:
        if os.path.realpath(args.out / name) not in given_files:
            with suppress(OSError):
                (args.out / name).unlink(missing_ok=True)
    (args.out / "report.json").unlink(missing_ok=True)


def _coarse(image: np.ndarray) -> bool:
    """Whether a picture has no more than `_TOY` pixels a side, each perhaps shown as a square of several."""
    height, width = image.shape[:2]
    return any(
        height % k == width % k == 0 and (image == image[::k, ::k].repeat(k, 0).repeat(k, 1)).all()
        for k in range(-(-max(height, width) // _TOY), max(height, width) // 16 + 1)
    )


def _own_options(texts: Sequence[str]) -> dict[str, str]:
    """Options of a method's own by name, from texts such as "lock=off"."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or name in found:
            raise UserError(f"--option takes KEY=VALUE, each KEY once, not {text!r}.")
        found[name] = value
    return found


def _scores(
    pipeline: Pipeline,
    concept: Concept,
    inputs: list[np.ndarray],
    prompts: Sequence[str],
    images: np.ndarray,
    drawing: dict[str, Any],
) -> dict[str, dict[str, float]] | None:
    """For the card: what other programs lose, who leave the hard path out; None where nothing can measure it."""
    from datencoder_jax import api
    from datencoder_jax.evaluation.clip_scores import can_score, image_similarity, text_similarity

    if concept.blend == 1.0 or not can_score(pipeline):
        return None
    soft = api.generate(pipeline, prompts, concept=concept, blend=1.0, **drawing).images
    texts = [put_words(prompt, concept.words) for prompt in prompts]
    rows = [text for text in texts for _ in range(images.shape[1])]

    def score(pictures: np.ndarray) -> dict[str, float]:
        flat = pictures.reshape(-1, *pictures.shape[2:])
        return {
            "CLIP, prompt": float(text_similarity(pipeline, flat, rows).mean()),
            "CLIP, input picture": float(image_similarity(pipeline, flat, np.stack(inputs)).mean()),
        }

    return {"dual path": score(images), "soft path": score(soft)}
