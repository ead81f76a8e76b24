"""The description of one architecture."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from retro_jax.retrofit.config import BaseConfig
from retro_jax.retrofit.fields import Fields
from retro_jax.retrofit.layout import FileTensor

SPECIAL_IDS = {"bos_id": "bos_token_id", "eos_ids": "eos_token_id", "pad_id": "pad_token_id"}
ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "relu": "relu",
}


@dataclasses.dataclass(frozen=True)
class GgufNames:
    """How GGUF files have this architecture.

    Attributes:
      architecture: general.architecture.
      traits: BaseConfig fields that GGUF's metadata do not state.
      permuted: rotary pairs of queries and keys are neighbours, (2i, 2i + 1), in the file.
      fused: queries, keys and values are one tensor, in this order.
    """

    architecture: str
    traits: Mapping[str, Any]
    permuted: bool = False
    fused: bool = False


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One architecture of Hugging Face's transformers.

    Attributes:
      name: the class in config.json. model_type: the same family there. other_types: what model_type
        may be besides.
      prefix: of the tensors' names, absent in folders written from the model without its head.
      read_config: the values of BaseConfig, other than `architecture`, from config.json.
      write_config: config.json from a BaseConfig.
      tensors: the file's tensors of a BaseConfig.
      ignored: a pattern of tensors that carry no weights (masks, frequencies).
      gguf: the same in GGUF files.
    """

    name: str
    model_type: str
    prefix: str
    read_config: Callable[[Fields], dict[str, Any]]
    write_config: Callable[[BaseConfig], dict[str, Any]]
    tensors: Callable[[BaseConfig], list[FileTensor]]
    ignored: str
    gguf: GgufNames
    other_types: tuple[str, ...] = ()


def written_ids(config: BaseConfig) -> dict[str, Any]:
    """The special ids as config.json states them."""
    eos: Any = list(config.eos_ids) if len(config.eos_ids) > 1 else None
    eos = config.eos_ids[0] if len(config.eos_ids) == 1 else eos
    return {"bos_token_id": config.bos_id, "eos_token_id": eos, "pad_token_id": config.pad_id}
