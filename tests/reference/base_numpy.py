"""The forward pass of a base model in NumPy, from its canonical tensors (retro_jax/retrofit/canonical.py).

Written from the architectures' papers, apart from the project's decoder, which is compared with it.
Its own outputs agree with those of Hugging Face's transformers (tests/data/base_models).
"""

import math
from collections.abc import Mapping

import numpy as np

from retro_jax.retrofit.config import BaseConfig

Tensors = Mapping[str, np.ndarray]


def logits(config: BaseConfig, tensors: Tensors, tokens: np.ndarray) -> np.ndarray:
    """[B, N] token ids -> [B, N, V] logits, in the dtype of the tensors."""
    h = tensors["embedding"][tokens]
    if config.positions == "learned":
        h = h + tensors["positions"][: tokens.shape[1]]
    for i in range(config.num_layers):
        layer = {
            name.removeprefix(f"layers.{i}."): value
            for name, value in tensors.items()
            if name.startswith(f"layers.{i}.")
        }
        attended = attention(config, layer, norm(config, layer, "attention_norm", h))
        if config.parallel_residual:
            h = h + attended + feed_forward(config, layer, norm(config, layer, "mlp_norm", h))
        else:
            h = h + attended
            h = h + feed_forward(config, layer, norm(config, layer, "mlp_norm", h))
    h = norm(config, tensors, "norm", h)
    return h @ tensors["embedding" if config.tie_embeddings else "read_out"].T


def norm(config: BaseConfig, tensors: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    """RMSNorm or LayerNorm over the last axis."""
    if config.norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + config.norm_epsilon)
    y = y * tensors[f"{name}.scale"]
    return y + tensors[f"{name}.bias"] if config.norm == "layer" else y


def attention(config: BaseConfig, layer: Tensors, x: np.ndarray) -> np.ndarray:
    """Causal self-attention; query head h reads key head h // (heads / groups)."""
    length, group = x.shape[1], config.num_heads // config.num_kv_heads
    query, key, value = heads(config, layer, x)
    query, key = turned(config, query, 0), turned(config, key, 0)
    mixed = np.empty_like(query)
    causal = np.tril(np.ones((length, length), bool))
    for head in range(config.num_heads):
        keys, values = key[:, :, head // group], value[:, :, head // group]
        scores = query[:, :, head] @ keys.swapaxes(1, 2) / math.sqrt(config.head_dim)
        scores = np.where(causal, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed[:, :, head] = weights / weights.sum(-1, keepdims=True) @ values
    y = np.tensordot(mixed, layer["output"], 2)
    return y + layer["output_bias"] if config.out_bias else y


def heads(config: BaseConfig, layer: Tensors, x: np.ndarray) -> list[np.ndarray]:
    """Queries, keys and values of normed activations, before positions."""
    found = []
    for name in ("query", "key", "value"):
        y = np.tensordot(x, layer[name], 1)
        y = y + layer[f"{name}_bias"] if config.qkv_bias else y
        if config.qk_norm and name != "value":
            y = y / np.sqrt(np.square(y).mean(-1, keepdims=True) + config.norm_epsilon)
            y = y * layer[f"{name}_norm"]
        found.append(y)
    return found


def turned(config: BaseConfig, x: np.ndarray, first: int) -> np.ndarray:
    """Rotary positions from `first` on: turns pairs (i, i + r / 2) of [B, N, heads, K]."""
    if config.positions != "rotary":
        return x
    half = config.rotary_dim // 2
    angles = np.arange(first, first + x.shape[1])[:, None] * _frequencies(config)
    cos, sin = (f(angles)[:, None, :].astype(x.dtype) for f in (np.cos, np.sin))
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)


def _frequencies(config: BaseConfig) -> np.ndarray:
    """Radians per position of each pair."""
    scaling, found = config.rope_scaling, []
    for i in range(config.rotary_dim // 2):
        frequency = config.rotary_base ** (-2 * i / config.rotary_dim)
        if scaling is not None and scaling.kind == "linear":
            frequency /= scaling.factor
        elif scaling is not None and scaling.kind == "factors":
            frequency /= scaling.factors[i]
        elif scaling is not None:
            wavelength = 2 * math.pi / frequency
            if wavelength > scaling.original_context / scaling.low_factor:
                frequency /= scaling.factor
            elif wavelength >= scaling.original_context / scaling.high_factor:
                smooth = scaling.original_context / wavelength - scaling.low_factor
                smooth /= scaling.high_factor - scaling.low_factor
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        found.append(frequency)
    return np.array(found)


def feed_forward(config: BaseConfig, layer: Tensors, x: np.ndarray) -> np.ndarray:
    """Gated or plain."""
    up = x @ layer["up"]
    if config.mlp_bias:
        up = up + layer["up_bias"]
    if config.feed_forward == "gated":
        gate = x @ layer["gate"]
        if config.mlp_bias:
            gate = gate + layer["gate_bias"]
        wide = _activation(config, gate) * up
    else:
        wide = _activation(config, up)
    y = wide @ layer["down"]
    return y + layer["down_bias"] if config.mlp_bias else y


def _activation(config: BaseConfig, x: np.ndarray) -> np.ndarray:
    """The configuration's non-linearity."""
    if config.activation == "silu":
        return x / (1 + np.exp(-x))
    if config.activation == "relu":
        return np.maximum(x, 0)
    if config.activation == "gelu_new":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    erf = np.vectorize(math.erf, otypes=[x.dtype])
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))
