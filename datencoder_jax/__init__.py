"""Personalized text-to-image diffusion from one picture, in JAX: `load`, `personalize`, `generate`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datencoder_jax.api import generate, load, personalize

    __version__: str

__all__ = ["generate", "load", "personalize"]


def __getattr__(name: str) -> Any:
    """Imports the API when it is first used, so that a help text does not wait for JAX."""
    if name in __all__:
        from datencoder_jax import api

        return getattr(api, name)
    if name == "__version__":
        from importlib import metadata

        return metadata.version("datencoder_jax")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
