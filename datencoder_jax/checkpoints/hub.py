"""From what a person calls a base model to a folder on this machine."""

import re
from pathlib import Path

from datencoder_jax.checkpoints.paths import expand_user
from datencoder_jax.errors import UserError

TOYWORLD = "toyworld"
"""The name of the embedded model."""

DEFAULTS = "datencoder.json"
"""The file of a base model that holds what is best done with it, such as the scale of guidance; it may be missing."""

_ASSETS = Path(__file__).parent.parent / "assets"
_REPO = re.compile(r"^[\w.-]+/[\w.-]+$")
_MOVED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
_WEIGHTS = ("unet", "vae", "text_encoder", "image_encoder")
_OTHERS = ("tokenizer", "scheduler", "feature_extractor")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
"""Endings of weights that are refused: reading them can run code."""


def resolve_base(name: str | Path) -> Path:
    """The folder of the base model `name`.

    Args:
        name: "toyworld" (the embedded model), a folder, or a Hugging Face repository "owner/name". A repository is
            downloaded once to the Hugging Face cache: one set of safetensors, in half precision where it offers that.

    Raises:
        UserError: there is no such folder or repository, it cannot be reached, or it has pickled weights only.
    """
    if str(name) == TOYWORLD:
        return _ASSETS / TOYWORLD
    path = expand_user(name)
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(
            f"{path} is a file; a base model is a folder in diffusers format, which diffusers' "
            "StableDiffusionPipeline.from_single_file(...).save_pretrained(...) makes of a single checkpoint."
        )
    repo = str(name)
    if repo.startswith("runwayml/"):
        instead = _MOVED.get(repo, "stable-diffusion-v1-5/stable-diffusion-v1-5")
        raise UserError(f"The repository {repo} is gone from Hugging Face; use {instead}.")
    if not _REPO.match(repo) or repo.startswith((".", "/")):
        raise UserError(f"There is no folder {name}.")
    return _download(repo)


def _download(repo: str) -> Path:
    import huggingface_hub  # half a second to import, and needed here only
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        siblings = huggingface_hub.HfApi().model_info(repo, timeout=20).siblings or []
        files = [sibling.rfilename for sibling in siblings]
    except (GatedRepoError, RepositoryNotFoundError) as error:
        # The hub answers for a private repository as for none; GatedRepoError is a kind of the other.
        raise UserError(
            f"{repo} is neither a folder here nor a repository on Hugging Face that may be read "
            "(a gated or private one needs `hf auth login`)."
        ) from error
    except Exception as error:  # the client's transport has its own exceptions, none of them documented
        return _cached(repo, error)
    wanted = choose_files(files, repo)
    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=wanted))
    except Exception as error:
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


def choose_files(files: list[str], repo: str) -> list[str]:
    """What to download of a repository's `files`: settings, the tokenizer, and one set of safetensors per part.

    Raises:
        UserError: the repository is not in diffusers format, or a part has pickled weights only.
    """
    if "model_index.json" not in files:
        raise UserError(f"{repo} is not in diffusers format: it has no model_index.json.")
    wanted = ["model_index.json", *(f for f in files if f == DEFAULTS)]
    wanted += [f for f in files if f.startswith(_folders(_OTHERS)) and f.endswith((".json", ".txt"))]
    for part in _WEIGHTS:
        inside = [f for f in files if f.startswith(f"{part}/")]
        weights = [f for f in inside if ".safetensors" in f]
        half = [f for f in weights if ".fp16" in f]
        plain = [f for f in weights if ".fp16" not in f and ".non_ema" not in f]
        if inside and not weights and any(f.endswith(PICKLES) for f in inside):
            raise UserError(f"{repo} has only pickled weights, which can run code when read; {conversion_hint(repo)}.")
        wanted += half or plain or weights
        wanted += [f for f in inside if f == f"{part}/config.json"]
    return wanted


def conversion_hint(source: str) -> str:
    """How to turn the pickled pipeline `source` into safetensors, in one line."""
    return (
        'convert them once with: python -c "from diffusers import StableDiffusionPipeline as P; '
        f"P.from_pretrained('{source}').save_pretrained('converted')\""
    )


def _folders(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name}/" for name in names)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
