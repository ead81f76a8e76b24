"""Gated CCA beside a base model's attention, in NumPy and token by token (DecoderForm.gated_cca).

Built on base_numpy.py, apart from the project's decoder, which is compared with it.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from retro_jax.retrofit.config import BaseConfig
from tests.reference import base_numpy
from tests.reference.base_numpy import Tensors


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A base model with gates.

    Attributes:
      config, tensors: the base's, with canonical names.
      gates: layer, from 1 -> the gates of its heads.
      one_layer: the layer whose input is the encoding for all; 0 for each its own.
      sink, pad: token ids. chunk_length: M.
    """

    config: BaseConfig
    tensors: Tensors
    gates: dict[int, np.ndarray]
    one_layer: int
    sink: int
    pad: int
    chunk_length: int

    def logits(self, tokens: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
        """Tokens [N] and neighbours [C, K, R] -> [N, V]."""
        encoded = [
            [self.inputs(np.concatenate([[self.sink], near])) for near in of_chunk]
            for of_chunk in neighbours
        ]
        h = self._embed(tokens)
        for p in range(1, self.config.num_layers + 1):
            read = np.zeros_like(h)
            if p in self.gates:
                for t in range(self.chunk_length - 1, len(tokens)):
                    chunk = (t + 1) // self.chunk_length - 1
                    row = t - (self.chunk_length - 1) - chunk * self.chunk_length
                    read[t] = self._read(p, h[t], row, encoded[chunk], neighbours[chunk])
            h = self._layer(p, h) + read if not self._sequential else self._after(p, h, read)
        h = base_numpy.norm(self.config, self.tensors, "norm", h)
        return h @ self.tensors["embedding" if self.config.tie_embeddings else "read_out"].T

    def inputs(self, tokens: np.ndarray) -> list[np.ndarray]:
        """What each layer reads, from layer 1, of a text alone: [N, D] each."""
        h, found = self._embed(tokens), []
        for p in range(1, self.config.num_layers + 1):
            found.append(h)
            h = self._layer(p, h)
        return found

    @property
    def _sequential(self) -> bool:
        return not self.config.parallel_residual

    def _tensors_of(self, p: int) -> Tensors:
        prefix = f"layers.{p - 1}."
        return {n.removeprefix(prefix): v for n, v in self.tensors.items() if n.startswith(prefix)}

    def _embed(self, tokens: np.ndarray) -> np.ndarray:
        h = self.tensors["embedding"][tokens]
        if self.config.positions == "learned":
            h = h + self.tensors["positions"][: len(tokens)]
        return h

    def _attend(self, p: int, h: np.ndarray) -> np.ndarray:
        layer = self._tensors_of(p)
        x = base_numpy.norm(self.config, layer, "attention_norm", h)
        return base_numpy.attention(self.config, layer, x[None])[0]

    def _widen(self, p: int, h: np.ndarray) -> np.ndarray:
        layer = self._tensors_of(p)
        x = base_numpy.norm(self.config, layer, "mlp_norm", h)
        return base_numpy.feed_forward(self.config, layer, x)

    def _layer(self, p: int, h: np.ndarray) -> np.ndarray:
        if self._sequential:
            return self._after(p, h, np.zeros_like(h))
        return h + self._attend(p, h) + self._widen(p, h)

    def _after(self, p: int, h: np.ndarray, read: np.ndarray) -> np.ndarray:
        h = h + self._attend(p, h) + read
        return h + self._widen(p, h)

    def _read(
        self,
        p: int,
        h: np.ndarray,
        row: int,
        encoded: Sequence[Sequence[np.ndarray]],
        neighbours: np.ndarray,
    ) -> np.ndarray:
        """CCA of layer p at one token, the `row`-th of those that read these neighbours."""
        config, layer = self.config, self._tensors_of(p)
        source = (self.one_layer or p) - 1
        length = neighbours.shape[1] + 1
        keys, values, present = [], [], []
        for states, near in zip(encoded, neighbours, strict=True):
            x = base_numpy.norm(config, layer, "attention_norm", states[source])
            _, key, value = base_numpy.heads(config, layer, x[None])
            keys.append(base_numpy.turned(config, key, 0)[0])
            values.append(value[0])
            there = near != self.pad
            present.append(np.concatenate([there[:1], there]))
        x = base_numpy.norm(config, layer, "attention_norm", h)
        query, _, _ = base_numpy.heads(config, layer, x[None, None])
        query = base_numpy.turned(config, query, length + row)[0, 0]
        key, value, mask = np.concatenate(keys), np.concatenate(values), np.concatenate(present)
        if not mask.any():
            return np.zeros_like(h)
        mixed = np.empty_like(query)
        for head in range(config.num_heads):
            group = head // (config.num_heads // config.num_kv_heads)
            scores = key[:, group] @ query[head] / math.sqrt(config.head_dim)
            weights = np.where(mask, np.exp(scores - scores.max()), 0)
            mixed[head] = weights @ value[:, group] / weights.sum() * self.gates[p][head]
        return np.tensordot(mixed, layer["output"], 2)
