"""Existing language models: `from retro_jax.retrofit import open_base`."""

from retro_jax.retrofit.base_model import BaseModel, context_length, open_base
from retro_jax.retrofit.config import BaseConfig, RopeScaling

__all__ = ["BaseConfig", "BaseModel", "RopeScaling", "context_length", "open_base"]
