"""kNN-LM (Khandelwal et al., arXiv 1911.00172): retrieval by token, to compare retrieval by chunk with.

A datastore has, for every token of the training text, the model's final activation before it (key)
and the token (value). Each predicted token looks up its k nearest keys, and

    p(token) = weight * p_knn(token) + (1 - weight) * p_model(token)
    p_knn(token) = sum of softmax(-distance / temperature) over the neighbours whose value is the token
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from retro_jax.batch import ChunkText, RetroBatch
from retro_jax.config import require
from retro_jax.evaluate.score import WindowConfig, batches

States = Callable[[RetroBatch], jax.Array | np.ndarray]  # final activations [B, N, D] of a batch


@dataclasses.dataclass(frozen=True)
class KnnConfig:
    """How the neighbours become a distribution.

    Attributes:
      neighbours: k. weight: of p_knn, from 0 to 1. temperature: of the squared distances, over their
        median in the datastore's tuning text, so that it does not depend on the model's width.
    """

    neighbours: int = 64
    weight: float = 0.25
    temperature: float = 0.1

    def __post_init__(self) -> None:
        require(self.neighbours > 0, self, "neighbours", "a positive integer")
        require(0 <= self.weight < 1, self, "weight", "a share from 0 to 1")
        require(self.temperature > 0, self, "temperature", "a positive number")


def activations(
    states: States,
    text: ChunkText,
    config: WindowConfig,
    *,
    rows: Sequence[int] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The activation that predicts each token, in windows as they are scored.

    Args:
      states: of a batch, [B, N, D].
      text: the chunks. config: their windows. rows: of each batch that states is given, as for
        score_chunks.

    Yields:
      Positions [m] in the flattened text.ids x chunk of the tokens predicted, and [m, D] float32;
      each token that has a prediction once, as score_chunks scores it.
    """
    tokens = text.chunks(text.ids)
    length = tokens.shape[1]
    # The last position of a chunk predicts the first token of the next, if both are in one document.
    follows = text.documents[1:] == text.documents[:-1]
    after = np.where(np.append(follows, False), np.append(tokens[1:, 0], text.pad_id), text.pad_id)
    predicts = np.concatenate([tokens[:, 1:], after[:, None]], axis=1).ravel() != text.pad_id
    for part, batch in batches(text, config, rows):
        batch_states = np.asarray(states(batch), np.float32)
        for (start, begin, end), row in zip(part, batch_states, strict=False):
            places = np.arange(begin * length, end * length)
            places = places[predicts[places]]
            yield places + 1, row[places - start * length]


def batched(
    found: Iterator[tuple[np.ndarray, np.ndarray]], size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same pairs of places and activations, at least `size` rows at a time but for the last."""
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for pair in found:
        parts.append(pair)
        if sum(len(places) for places, _ in parts) >= size:
            yield np.concatenate([p for p, _ in parts]), np.concatenate([s for _, s in parts])
            parts = []
    if parts:
        yield np.concatenate([p for p, _ in parts]), np.concatenate([s for _, s in parts])


def knn_nll(
    distances: np.ndarray, values: np.ndarray, targets: np.ndarray, temperature: float
) -> np.ndarray:
    """-log p_knn(target) [n] float64, infinite where no neighbour has it.

    Args:
      distances: [n, k], infinite for no neighbour. values: [n, k] tokens of the neighbours. targets: [n]. temperature: in the
        distances' own unit.
    """
    logits = -distances.astype(np.float64) / temperature
    most = logits.max(axis=1, keepdims=True)
    logits -= np.where(np.isfinite(most), most, 0)  # there may be no neighbour at all
    weights = np.exp(logits)
    total = weights.sum(axis=1)
    with np.errstate(divide="ignore"):
        hit = np.where(values == targets[:, None], weights, 0).sum(axis=1)
        return -np.log(hit / np.where(total > 0, total, 1))


def mixed_nll(model_nll: np.ndarray, knn: np.ndarray, weight: float) -> np.ndarray:
    """-log of weight * p_knn + (1 - weight) * p_model, from the two [n] nlls."""
    if not weight:
        return model_nll
    return -np.logaddexp(np.log(weight) - knn, np.log1p(-weight) - model_nll)


@dataclasses.dataclass(frozen=True)
class Found:
    """Tokens of a text and their search results: model_nll [n], targets [n], distances [n, k] and
    the neighbours' values [n, k]."""

    model_nll: np.ndarray
    targets: np.ndarray
    distances: np.ndarray
    values: np.ndarray

    def nll(self, config: KnnConfig, unit: float) -> np.ndarray:
        """[n] of the mixture; `unit` is the unit of distances."""
        k = config.neighbours
        order = np.argsort(self.distances, axis=1, kind="stable")[:, :k]
        distances = np.take_along_axis(self.distances, order, axis=1)
        values = np.take_along_axis(self.values, order, axis=1)
        knn = knn_nll(distances, values, self.targets, config.temperature * unit)
        return mixed_nll(self.model_nll, knn, config.weight)


def tune(
    found: Found,
    unit: float,
    *,
    neighbours: int,
    weights: Sequence[float] = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    temperatures: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
) -> KnnConfig:
    """The weight and temperature of the least mean loss on a text, which is not the one reported."""
    configs = [KnnConfig(neighbours, w, t) for w, t in itertools.product(weights, temperatures)]
    return min(configs, key=lambda config: float(found.nll(config, unit).mean()))
