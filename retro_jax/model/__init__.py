"""The model: `from retro_jax.model import Retro`."""

from retro_jax.model.retro import Retro

__all__ = ["Retro"]
