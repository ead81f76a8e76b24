"""The architectures of base models. Another one is a file here, a row below, and its test data."""

from retro_jax.retrofit.architectures.architecture import Architecture, GgufNames
from retro_jax.retrofit.architectures.gpt2 import GPT2
from retro_jax.retrofit.architectures.gpt_neox import GPT_NEOX
from retro_jax.retrofit.architectures.llama import LLAMA, QWEN2, QWEN3

ARCHITECTURES = {each.name: each for each in (LLAMA, QWEN2, QWEN3, GPT2, GPT_NEOX)}

__all__ = ["ARCHITECTURES", "Architecture", "GgufNames"]
