"""What is loaded before anything is made: base models with their encoders, LoRA and embedding files of others."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from datencoder_jax import tuning
from datencoder_jax.checkpoints.concept_file import load_concept
from datencoder_jax.checkpoints.embedding_files import read_embedding
from datencoder_jax.checkpoints.encoder_folder import read_encoder
from datencoder_jax.checkpoints.hub import TOYWORLD, resolve_base
from datencoder_jax.checkpoints.kernels import open_kernels
from datencoder_jax.checkpoints.lora_files import layer_shapes, merged, read_lora, scaled, summed
from datencoder_jax.checkpoints.lora_names import TEXT_ENCODER, TEXT_ENCODER_2, split
from datencoder_jax.encoder.domain_encoder import DomainConfig
from datencoder_jax.encoder.features import tapped_layers
from datencoder_jax.errors import UserError
from datencoder_jax.memory import PRESETS, choose, for_xl
from datencoder_jax.models.module import Model
from datencoder_jax.pipeline import Pipeline, attention_shapes, read_pipeline, with_vision
from datencoder_jax.printable import is_printable
from datencoder_jax.runtime.target import Target, current_target
from datencoder_jax.typing import AnyArray, Concept, LowRank

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""How weights may be stored."""

_LARGE = 1e9
"""Bytes of weights from which on a model is one of Stable Diffusion's size."""


def load(
    model: str | Path = TOYWORLD,
    *,
    encoder: str | Path | None = None,
    vision: str | Path | None = None,
    dtype: str = "auto",
    compute_dtype: str = "auto",
    memory: int | None = None,
    prediction_type: str | None = None,
) -> Pipeline:
    """A base model with its tuning-encoder.

    Args:
        model: "toyworld" (the embedded model), a diffusers folder, a `.safetensors` checkpoint, or a Hugging Face
            repository.
        encoder: folder of a pretrained tuning-encoder, or of E4T's encoder of a domain; by default the embedded
            tuning-encoder for "toyworld", none for others.
        vision: the CLIP vision tower that the encoder looks through, where the model itself has none: a Hugging Face
            or OpenCLIP folder or file, or a repository.
        dtype: how the frozen weights are stored: "float32", "bfloat16" or "float16". "auto" is bfloat16, and float32
            for a small model on a CPU.
        compute_dtype: the type of computations, "float32", "bfloat16" or "float16". "auto" is the type of the weights
            on accelerators and float32 on CPUs; bfloat16 makes a CPU compute as an accelerator does, slowly.
        memory: GB of the device's memory to get along with, one of `memory.PRESETS`; by default what suits the device.
        prediction_type: "epsilon" or "v_prediction", for a single-file checkpoint, few of which say.

    Raises:
        UserError: the model or encoder is missing, damaged, or they do not belong together.
    """
    start = time.perf_counter()
    for name, value in (("dtype", dtype), ("compute_dtype", compute_dtype)):
        if value not in DTYPES:
            raise UserError(f"{name} {value!r} is not known; choose one of: {', '.join(DTYPES)}")
    if memory not in (None, *PRESETS):
        raise UserError(f"there is no setting for {memory} GB of memory; choose one of: {', '.join(map(str, PRESETS))}")
    path = resolve_base(model)
    large, target = _bytes(path) > _LARGE, current_target()
    settings = choose(large, target) if memory is None else PRESETS[memory]
    dtype = stored_dtype(large, target) if dtype == "auto" else dtype
    compute = target.compute_dtype(dtype) if compute_dtype == "auto" else compute_dtype
    with on_host() if settings.in_parts else nullcontext():
        pipeline = read_pipeline(path, str(model), dtype=dtype, compute_dtype=compute, prediction_type=prediction_type)
        if vision is not None:
            pipeline = with_vision(pipeline, vision, dtype=dtype, compute_dtype=compute)
    if memory is None and pipeline.base.text_2 is not None:
        settings = for_xl(settings)
    pipeline = replace(pipeline, memory=settings)
    if encoder is None and str(model) == TOYWORLD:
        encoder = path.with_name(f"{TOYWORLD}_encoder")
    if encoder is not None:
        pipeline = with_encoder(pipeline, encoder)
    if settings.in_parts:
        pipeline = replace(pipeline, base=jax.device_get(pipeline.base))
    return replace(pipeline, timings={"load": time.perf_counter() - start})


def stored_dtype(large: bool, target: Target) -> str:
    """How weights are stored where nothing else is asked for; arguments as for `memory.choose`."""
    return "float32" if target.platform == "cpu" and not large else "bfloat16"


def with_encoder(pipeline: Pipeline, folder: str | Path) -> Pipeline:
    """The pipeline with the encoder in a folder, of either kind: a tuning-encoder, or E4T's of one domain.

    Raises:
        UserError: it is missing, damaged, or does not belong to this model.
    """
    if pipeline.base.vision is None:
        raise UserError(
            f"{pipeline.name} has no vision tower (image_encoder), which a tuning-encoder looks through; name one with "
            "--vision, or leave the encoder out"
        )
    found = read_encoder(Path(folder), pipeline.fingerprint, pipeline.vision_fingerprint)
    if pipeline.memory.in_parts:
        found = jax.device_get(found)
    tower = pipeline.base.eyes.config
    if (found.config.vision_width, found.config.vision_taps) != (
        tower.hidden_size,
        len(tapped_layers(tower.num_hidden_layers)),
    ):
        raise UserError(
            f"the encoder in {folder} looks through a vision tower of width {found.config.vision_width}, and this one "
            f"has {tower.hidden_size} in {tower.num_hidden_layers} layers; name the tower it was trained with"
        )
    shapes = attention_shapes(pipeline.base.unet)
    if isinstance(found.config, DomainConfig):
        if not {path: tuple(shape) for path, *shape in found.config.shared}.items() <= shapes.items():
            raise UserError(f"the E4T encoder in {folder} does not fit this model's attention projections")
        return replace(pipeline, domain=found)
    if {path: (inputs, outputs) for path, inputs, outputs in found.config.inventory} not in (shapes, {}):
        raise UserError(f"the tuning-encoder in {folder} does not fill this model's attention projections")
    return replace(pipeline, encoder=found)


def load_concept_for(pipeline: Pipeline, path: str | Path) -> Concept:
    """The concept in a file, which has to be one of this base model.

    Raises:
        UserError: as `checkpoints.concept_file.load_concept`, or the model was loaded to predict something else than
            when the concept was made.
    """
    width = int(pipeline.base.table.shape[1])
    shapes = attention_shapes(pipeline.base.unet)
    concept = load_concept(path, pipeline.fingerprint, shapes, base=pipeline.name, width=width)
    prediction_type = concept.metadata.get("prediction_type")
    if prediction_type and prediction_type != pipeline.base.schedule.prediction_type:
        raise UserError(
            f"{path} was made with the model predicting {prediction_type}; add --prediction-type {prediction_type}."
        )
    return concept


def on_host():
    """Arrays are made in the machine's memory, where JAX may use it beside the accelerator."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS names the accelerator alone
        return nullcontext()


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def with_lora(pipeline: Pipeline, path: str | Path, weight: float = 1.0) -> Pipeline:
    """The pipeline with a LoRA of another program (diffusers, PEFT, kohya) in its weights, the text encoders' included.

    Both paths are drawn with them, concepts of the pipeline stay its concepts, and several LoRAs add up. The weights
    keep their type. In half precision the model's weights, as precise as its files have them, and the changes of all
    LoRAs are summed in float32, and the sum is rounded once.

    Args:
        path: a safetensors file, or a folder that diffusers or PEFT saved one in.
        weight: of the change; 0 is none.

    Raises:
        UserError: there is no such file, it is for another model, or the weights do not fit into their type.
    """
    if not math.isfinite(weight):
        raise UserError(f"the weight of {path} must be a finite number, not {weight}")
    base = pipeline.base
    networks = {"": base.unet, TEXT_ENCODER: base.text}
    if base.text_2 is not None:
        networks[TEXT_ENCODER_2] = base.text_2
    params = {f"{prefix}{name}": value for prefix, model in networks.items() for name, value in model.params.items()}
    changes = read_lora(path, layer_shapes(params), base=pipeline.name)
    loras = dict(pipeline.loras)
    with ExitStack() as stack:
        originals = {prefix: stack.enter_context(_originals(pipeline, prefix, networks[prefix])) for prefix in networks}
        for layer, change in changes.items():
            kernel, change = params[f"{layer}.weight"], scaled(change, weight)
            result = _changed(kernel, pipeline.loras.get(layer), change, _original(originals, layer))
            if not np.isfinite(result).all():
                raise UserError(
                    f"with {path} at weight {weight:g}, {layer} holds values too large for {result.dtype}; use a "
                    "smaller weight or another dtype"
                )
            params[f"{layer}.weight"] = _like(kernel, result)
            loras[layer] = summed(loras.get(layer), change)
    unet, text, *text_2 = (
        model.with_params({name: params[f"{prefix}{name}"] for name in model.params})
        for prefix, model in networks.items()
    )
    base = replace(base, unet=unet, text=text, text_2=text_2[0] if text_2 else None)
    return replace(pipeline, base=base, loras=loras)


@contextmanager
def _originals(pipeline: Pipeline, prefix: str, model: Model) -> Iterator[Mapping[str, np.ndarray]]:
    """The weights of a network in the files it was rounded from; none where it was not, or they are gone."""
    with ExitStack() as stack:
        kernels: Mapping[str, np.ndarray] = {}
        if pipeline.source is not None:
            with suppress(UserError):
                kernels = stack.enter_context(open_kernels(pipeline.source, prefix.rstrip(".") or "unet", model))
        yield kernels


def _original(originals: Mapping[str, Mapping[str, np.ndarray]], layer: str) -> np.ndarray | None:
    """The layer's weights in the files; None where they are not there."""
    network, module = split(layer)
    kernels = originals["" if network == "unet" else f"{network}."]
    try:
        return kernels.get(f"{module}.weight")
    except UserError:  # the file has changed since
        return None


def _changed(kernel: AnyArray, before: LowRank | None, change: LowRank, original: np.ndarray | None) -> np.ndarray:
    """A layer's weights with one more change, rounded once where `kernel` is what `original` and `before` round to."""
    if original is not None:
        now = original.astype(kernel.dtype) if before is None else merged(original, before, kernel.dtype)
        if np.array_equal(now, np.asarray(kernel)):
            return merged(original, summed(before, change), kernel.dtype)
    return merged(kernel, change, kernel.dtype)


def _like(wanted: AnyArray, array: np.ndarray) -> Any:
    """The array where `wanted` is, so that programs compiled for the one run with the other."""
    if isinstance(wanted, jax.Array):
        return jax.device_put(array, wanted.sharding if wanted.committed else None)
    return array


def import_embedding(pipeline: Pipeline, path: str | Path, token: str | None = None) -> Concept:
    """Token vectors of another program, as a concept without weight offsets for `generate`.

    Args:
        token: the placeholder; by default the one the file names.

    Raises:
        UserError: there is no such file, it is not for this model, or it names no token and none is given.
    """
    named, vectors = read_embedding(path, pipeline.base.widths)
    token = token or named
    if not token:
        raise UserError(f"{path} names no token; say which placeholder it is to have")
    if not is_printable(token):
        raise UserError(f"{path} names a token that cannot be printed, {token!r}; say which placeholder it is to have")
    if token.split() != [token]:
        raise UserError(f"the placeholder {token!r} must be one word without spaces")
    nearest = nearest_words(pipeline, jnp.asarray(vectors))
    word = nearest[0][0] if nearest else token  # without words the plain model reads the token itself
    return Concept(vectors, {}, token, 1.0, pipeline.name, pipeline.fingerprint, word)


def nearest_words(pipeline: Pipeline, embeddings: jax.Array, k: int = 5) -> list[tuple[str, float]]:
    """The `k` whole words nearest to the first of `[n, d]` embeddings, with their cosines; fewer if there are fewer."""
    ids, cosines = (np.asarray(x)[0] for x in tuning.nearest_word_ids(pipeline.base, embeddings, k))
    return [(pipeline.tokenizer.word(int(i)), float(c)) for i, c in zip(ids, cosines, strict=True) if np.isfinite(c)]
