"""Personalized text-to-image diffusion from one picture, in JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datencoder_jax.api import generate, load, personalize

__all__ = ["generate", "load", "personalize"]


def __getattr__(name: str) -> Any:
    """Imports the API when it is first used, so that a help text does not wait for JAX."""
    if name in __all__:
        from datencoder_jax import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
