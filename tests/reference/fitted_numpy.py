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
      shared: one softmax over neighbours and text (DecoderForm.shared_softmax).
      distance: from neighbours to what reads them (DecoderForm.neighbour_distance).
    """

    config: BaseConfig
    tensors: Tensors
    gates: dict[int, np.ndarray]
    one_layer: int
    sink: int
    pad: int
    chunk_length: int
    shared: bool = False
    distance: int = 0

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
                    read[t] = self._read(p, h[: t + 1], row, encoded[chunk], neighbours[chunk])
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
        h: np.ndarray,  # [t + 1, D]
        row: int,
        encoded: Sequence[Sequence[np.ndarray]],
        neighbours: np.ndarray,
    ) -> np.ndarray:
        """CCA of layer p at the last token of h, the `row`-th of those that read these neighbours.

        With `shared` it is the difference from the layer's own attention.
        """
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
            present.append(np.concatenate([there[:1] & (not self.shared), there]))
        x = base_numpy.norm(config, layer, "attention_norm", h)
        plain, own_key, own_value = base_numpy.heads(config, layer, x[None])
        query = base_numpy.turned(config, plain[:, -1:], length + self.distance + row)[0, 0]
        own_query, own_key = (base_numpy.turned(config, each, 0)[0] for each in (plain, own_key))
        key, value, mask = np.concatenate(keys), np.concatenate(values), np.concatenate(present)
        if not mask.any():
            return np.zeros_like(h[-1])
        mixed = np.empty_like(query)
        for head in range(config.num_heads):
            group = head // (config.num_heads // config.num_kv_heads)
            scores = key[:, group] @ query[head] / math.sqrt(config.head_dim)
            weights, gate = np.where(mask, np.exp(scores - scores.max()), 0), self.gates[p][head]
            mixed[head] = weights @ value[:, group] / weights.sum() * gate
            if self.shared:
                own = own_key[:, group] @ own_query[-1, head] / math.sqrt(config.head_dim)
                own_weights, gated = np.exp(own - scores.max()), weights * gate
                total = own_weights.sum() + np.abs(gated).sum()
                every = own_weights @ own_value[0, :, group] + gated @ value[:, group]
                alone = own_weights @ own_value[0, :, group] / own_weights.sum()
                mixed[head] = every / total - alone
        return np.tensordot(mixed, layer["output"], 2)
