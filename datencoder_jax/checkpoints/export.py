"""A concept as the files that other programs load.

diffusers   concept.safetensors, pipeline.py          both paths
            pytorch_lora_weights.safetensors,         the soft path alone
            learned_embeds.safetensors
kohya       <name>.safetensors                        LoRA for ComfyUI, Forge, A1111
embedding   <name>_emb.safetensors                    token vectors for the same
card        README.md, samples.png                    model card
"""

import base64
import datetime
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from datencoder_jax.checkpoints import embedding_files, lora_files
from datencoder_jax.checkpoints.atomic import save_tensors, write_all
from datencoder_jax.checkpoints.concept_file import save_concept
from datencoder_jax.checkpoints.embedding_files import diffusers_token, embedding_tensors
from datencoder_jax.checkpoints.lora_files import diffusers_metadata, diffusers_tensors, kohya_tensors
from datencoder_jax.checkpoints.model_card import MARK, base_name, model_card
from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.checkpoints.weights import open_tensors
from datencoder_jax.errors import UserError
from datencoder_jax.models.edits import as_low_rank
from datencoder_jax.typing import AnyArray, Concept, Gated, LowRank, Residual

KINDS = ("diffusers", "kohya", "embedding", "card")

_PIPELINE = Path(__file__).parent.parent / "assets" / "diffusers" / "pipeline.py"
_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
_CONCEPT = "concept.safetensors"
_TAKEN = ("concept", "learned_embeds", "pytorch_lora_weights")
_PT = {"format": "pt", "made_by": "datencoder"}


class Target(NamedTuple):
    """What other programs need to know of the base model.

    Attributes:
        widths: the width of each text encoder's token vectors.
        resolution: side of its pictures in pixels.
        prediction: "epsilon" or "v_prediction".
        weights: the UNet's, by name; only those that a concept takes something out of are read.
    """

    widths: tuple[int, ...]
    resolution: int
    prediction: str = "epsilon"
    weights: Mapping[str, AnyArray] = MappingProxyType({})


class _Family(NamedTuple):
    architecture: str
    version: str


_FAMILIES = {
    ((768,), "epsilon"): _Family("stable-diffusion-v1", "sd_v1"),
    ((768,), "v_prediction"): _Family("stable-diffusion-v1", "sd_v1_v"),
    ((1024,), "epsilon"): _Family("stable-diffusion-v2-512", "sd_v2"),
    ((1024,), "v_prediction"): _Family("stable-diffusion-v2-768-v", "sd_v2_v"),
    ((768, 1280), "epsilon"): _Family("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    ((768, 1280), "v_prediction"): _Family("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
}


def export_concept(
    folder: str | Path,
    concept: Concept,
    target: Target,
    *,
    name: str,
    kinds: Collection[str] = KINDS,
    sheet: bytes | None = None,
    thumbnail: bytes | None = None,
    scores: Mapping[str, Mapping[str, float]] | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Writes a concept's files into `folder`, all of them or none; other files there stay.

    Args:
        folder: where to; made if it is missing.
        target: of the concept's base model.
        name: what the files for user interfaces are called, and the words that prompts there contain.
        kinds: which of `KINDS` to write. Of a concept without weight offsets there are no LoRA files.
        sheet: a PNG of samples, for the card.
        thumbnail: a small PNG or JPEG, which goes into the LoRA file for user interfaces.
        scores: of the concept for the card: numbers by their names, by path ("dual path", "soft path").
        overwrite: replace files of somebody else too.

    Returns:
        The names of the files written.

    Raises:
        UserError: an unknown kind, a bad name, nothing to write, a file of somebody else would be replaced, or the
            folder cannot be written.
    """
    writers = _writers(concept, target, name, set(kinds), thumbnail)
    if "card" in kinds:
        files = [*writers, *(["samples.png"] if sheet else [])]
        card = model_card(concept, name=name, files=files, encoders=len(target.widths), scores=scores)
        writers["README.md"] = partial(_write_text, text=card)
        if sheet:
            writers["samples.png"] = partial(_write_bytes, content=sheet)
    if not overwrite:
        _check_ours(folder, writers)
    if not writers:
        raise UserError(f"{concept.token} has no weight offsets, so there is no LoRA to write; export its embedding.")
    write_all(folder, writers)
    return list(writers)


def choose_kinds(asked: Sequence[str] | None, possible: Sequence[str], what: str) -> tuple[str, ...]:
    """The kinds asked for, or all possible ones where none is named.

    Args:
        what: whose they are, for an error.

    Raises:
        UserError: something is asked for that is not possible.
    """
    lacking = [kind for kind in asked or () if kind not in possible]
    if lacking:
        raise UserError(
            f"What {what} has learnt is nothing that files for {', '.join(lacking)} can hold; "
            f"it can be exported as: {', '.join(possible)}."
        )
    return tuple(asked or possible)


def possible_kinds(concept: Concept) -> tuple[str, ...]:
    """What other programs can have of a concept, of `KINDS`."""
    # Beside residuals the vectors are those of the class word, of which nothing was learnt.
    if concept.reader is not None or any(isinstance(edit, Residual) for edit in concept.offsets.values()):
        return ("card",)
    if any(isinstance(edit, Gated) for edit in concept.offsets.values()):
        return ("embedding", "card")
    return KINDS if concept.offsets else tuple(kind for kind in KINDS if kind != "kohya")


def check_name(name: str) -> None:
    """Raises `UserError` for a name that the exported files cannot have."""
    if not _NAME.fullmatch(name) or name in _TAKEN:
        raise UserError(f"{name!r} cannot name the exported files; use letters, digits, - and _, such as my-cat.")


def check_replaceable(folder: str | Path, kinds: Collection[str], name: str, placeholders: int = 1) -> None:
    """Raises `UserError` where exporting `kinds` as `name` into `folder` would replace a file that is not of ours.

    Args:
        placeholders: how many the concept has.
    """
    _check_ours(folder, exported_names(kinds, name, placeholders))


def exported_names(kinds: Collection[str], name: str, placeholders: int = 1) -> list[str]:
    """The files that exporting `kinds` as `name` writes, but for the concept's own and the sheet of samples.

    Args:
        placeholders: how many the concept has.
    """
    vectors = (embedding_files.DIFFUSERS_FILE, f"{name}_emb.safetensors")
    for_diffusers, for_others = (embedding_files.numbered(file, placeholders) for file in vectors)
    files = {
        "diffusers": ("pipeline.py", lora_files.DIFFUSERS_FILE, *for_diffusers),
        "kohya": (f"{name}.safetensors",),
        "embedding": for_others,
        "card": ("README.md",),
    }
    return [file for kind in kinds for file in files[kind]]


def mentions_samples(folder: str | Path) -> bool:
    """Whether a model card that `export_concept` wrote in `folder` shows the sheet of samples beside it."""
    lines = _lines(expand_user(folder) / "README.md")
    return MARK in lines and any("samples.png" in line for line in lines)


def exported_files(folder: str | Path, names: Collection[str]) -> set[str]:
    """Those of `names` that `export_concept` may have written in `folder`, and that no run writes without it.

    Others are left out: paths, names it gives to no file, and files of somebody else.
    """
    fixed = {"README.md", "pipeline.py", lora_files.DIFFUSERS_FILE, embedding_files.DIFFUSERS_FILE}
    found = set()
    for name in names:
        stem, _, kind = name.rpartition(".")
        if name not in fixed and not (kind == "safetensors" and _NAME.fullmatch(stem) and stem not in _TAKEN):
            continue
        with suppress(UserError):
            _check_ours(folder, [name])
            found.add(name)
    return found


def _check_ours(folder: str | Path, names: Iterable[str]) -> None:
    """Raises `UserError` if there is one of these exported files in `folder` that `export_concept` did not write."""
    start = _lines(_PIPELINE)[0]
    for path in (expand_user(folder) / name for name in names):
        if path.name == "README.md":
            ours = MARK in _lines(path, [MARK])
        elif path.name == "pipeline.py":
            ours = _lines(path, [start])[:1] == [start]
        elif path.suffix == ".safetensors" and path.name != _CONCEPT and path.is_file():
            ours = _PT.items() <= _metadata(path).items()
        else:
            continue
        if not ours:
            raise UserError(
                f"{path} was not made by datencoder and would be replaced; choose another --out or --name, other kinds "
                "with --to (or --export), or add --overwrite."
            )


def _metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself; nothing where it is none."""
    try:
        with open_tensors(path) as file:
            return file.metadata() or {}
    except UserError:
        return {}


def _lines(path: Path, missing: Sequence[str] = ()) -> Sequence[str]:
    """The lines of a file, or `missing` where there is none."""
    try:
        return path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else missing
    except OSError as error:
        raise UserError(f"Cannot read {path}: {(error.strerror or str(error)).lower()}.") from error


_Writer = Callable[[Path], object]


def _writers(
    concept: Concept, target: Target, name: str, kinds: set[str], thumbnail: bytes | None
) -> dict[str, _Writer]:
    """What writes each file but those of the card, given the path to write at."""
    unknown = sorted(kinds - set(KINDS))
    if unknown or not kinds:
        raise UserError(f"{', '.join(unknown) or 'Nothing'} cannot be exported; choose among {', '.join(KINDS)}.")
    check_name(name)
    if concept.reader is not None and kinds - {"card"}:
        raise UserError(
            f"the embedding of {concept.token} is predicted anew at every step, which no other program can; draw with "
            "datencoder generate instead"
        )
    writers: dict[str, _Writer] = {}
    offsets = as_low_rank(concept.offsets, target.weights) if kinds & {"diffusers", "kohya"} else {}

    def tensors(file: str, arrays, metadata: dict[str, str]):
        writers[file] = partial(save_tensors, arrays=arrays, metadata=metadata)

    if "diffusers" in kinds:
        writers[_CONCEPT] = partial(save_concept, concept=concept)
        if offsets:
            tensors(lora_files.DIFFUSERS_FILE, diffusers_tensors(offsets), _PT | diffusers_metadata(offsets))
        for file, token, vectors in embedding_files.each(concept, embedding_files.DIFFUSERS_FILE):
            tensors(file, embedding_tensors(vectors, target.widths, diffusers_token(token, len(vectors))), _PT)
        writers["pipeline.py"] = partial(_write_text, text=_pipeline_code(target))
    if "kohya" in kinds and offsets:
        metadata = _PT | _training_metadata(concept, offsets, target, name) | _model_spec(concept, target, name, "lora")
        if thumbnail:
            metadata["modelspec.thumbnail"] = _data_uri(thumbnail)
        tensors(f"{name}.safetensors", kohya_tensors(offsets), metadata)
    if "embedding" in kinds:
        for file, _, vectors in embedding_files.each(concept, f"{name}_emb.safetensors"):
            metadata = _PT | _model_spec(concept, target, name, "textual-inversion", file.removesuffix(".safetensors"))
            tensors(file, embedding_tensors(vectors, target.widths, embedding_files.PARAMS), metadata)
    return writers


def _pipeline_code(target: Target) -> str:
    """The pipeline for diffusers, made of the plain one for the base model."""
    code = _PIPELINE.read_text("utf-8")
    return code if len(target.widths) == 1 else code.replace("StableDiffusionPipeline", "StableDiffusionXLPipeline")


def _training_metadata(concept: Concept, offsets: Mapping[str, LowRank], target: Target, name: str) -> dict[str, str]:
    """kohya's own keys, by which A1111 and Forge tell what a LoRA is for."""
    ranks = sorted({offset.down.shape[1] for offset in offsets.values()})
    rank = str(ranks[0]) if len(ranks) == 1 else "Dynamic"
    return {
        "ss_output_name": name,
        "ss_sd_model_name": base_name(concept.base),
        "ss_base_model_version": _family(target).version,
        "ss_v2": str(target.widths == (1024,)),
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_resolution": f"({target.resolution}, {target.resolution})",
    }


def _model_spec(concept: Concept, target: Target, name: str, adapter: str, word: str = "") -> dict[str, str]:
    """The keys of Stability AI's ModelSpec 1.0.1."""
    files = embedding_files.each(concept, f"{name}_emb.safetensors")
    word = word or " and ".join(file.removesuffix(".safetensors") for file, *_ in files)
    values = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{_family(target).architecture}/{adapter}",
        "implementation": "diffusers",
        "title": name if adapter == "lora" else word,
        "resolution": f"{target.resolution}x{target.resolution}",
        "description": f"A personalized concept near to {concept.nearest_word!r}: its soft path.",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "usage_hint": f"Load the LoRA and the embedding {word} together and write {word} where the concept belongs.",
        "trigger_phrase": word,
        "tags": "personalization",
        "prediction_type": "v" if target.prediction == "v_prediction" else "epsilon",
    }
    return {f"modelspec.{key}": value for key, value in values.items()}


def _family(target: Target) -> _Family:
    return _FAMILIES.get((target.widths, target.prediction), _Family("custom", "unknown"))


def _data_uri(picture: bytes) -> str:
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, "utf-8", errors="backslashreplace")


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)
