"""A language model mixed with the votes of a token memory.

The memory gives each token the share of votes that it has after the longest ending of the text that
occurs in the database. The mixture is

    p(token) = (1 - w) p_model(token) + w share(token)

where w depends on facts known before the token: the length of the ending, how far its votes agree,
and how many there are. Without a match w is 0. The weights are tuned on the validation split by
expectation-maximisation, which has one optimum, as the loss is convex in each weight.
"""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from retro_jax.errors import UserError
from retro_jax.storage import files

_logger = logging.getLogger(__name__)

# The least length of each class of lengths, and the least agreement of each class of agreements.
LENGTHS = (1, 2, 3, 4, 5, 6, 8, 11, 16, 24, 32)
AGREEMENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
VOTES = (1, 2, 4)
_MIXED = "tokens"  # the condition of RETRO[ON] with the memory
_PRIOR = 20.0  # tokens of a class that speak for the model alone, before any is seen
_STEPS = 200


@dataclasses.dataclass(frozen=True)
class Votes:
    """The votes of a token memory on each token of a text.

    Attributes:
      lengths: [n] tokens of the longest ending that occurs; 0 for none.
      counts: [n] votes. agreements: [n] the share of the token with most votes.
      shares: [n] the share of the token that follows in the text.
    """

    lengths: np.ndarray
    counts: np.ndarray
    agreements: np.ndarray
    shares: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def classes(self) -> np.ndarray:
        """[n] which weight a token has; 0 for the one without votes."""
        length = np.searchsorted(LENGTHS, self.lengths, side="right")
        agreement = np.searchsorted(AGREEMENTS, self.agreements, side="right") - 1
        count = np.searchsorted(VOTES, self.counts, side="right") - 1
        inner = (length - 1) * len(AGREEMENTS) * len(VOTES) + agreement * len(VOTES) + count
        return np.where((self.counts > 0) & (length > 0), inner + 1, 0)


def num_classes() -> int:
    """Weights of a mixture."""
    return 1 + len(LENGTHS) * len(AGREEMENTS) * len(VOTES)


def tune_weights(model_nll: np.ndarray, votes: Votes) -> np.ndarray:
    """The weights [classes] float64 of least loss on a text, pulled towards 0 where it is short.

    Args:
      model_nll: [n] nats of the model alone. votes: on the same tokens.
    """
    model, classes = np.exp(-model_nll.astype(np.float64)), votes.classes()
    counts = np.bincount(classes, minlength=num_classes())
    weights = np.full(num_classes(), 0.5)
    weights[0] = 0
    for _ in range(_STEPS):
        w = weights[classes]
        memory = w * votes.shares
        with np.errstate(invalid="ignore", divide="ignore"):
            owed = np.nan_to_num(memory / (memory + (1 - w) * model))
        weights = np.bincount(classes, owed, minlength=num_classes()) / (counts + _PRIOR)
    return weights


def mixed_nll(model_nll: np.ndarray, votes: Votes, weights: np.ndarray) -> np.ndarray:
    """[n] float64 nats of the mixture.

    Raises:
      UserError: the weights are not those of this version's classes.
    """
    if weights.shape != (num_classes(),):
        raise UserError(
            f"a token mixture has {weights.size} weights: expected {num_classes()}; tune them again"
        )
    w = weights[votes.classes()]
    with np.errstate(divide="ignore"):
        model = np.log1p(-w) - model_nll.astype(np.float64)
        memory = np.log(w) + np.log(votes.shares)
    return -np.logaddexp(model, memory)


def tuned_weights(
    folder: pathlib.Path,
    model: Mapping[str, Any],
    database: str | None = None,
    neighbours: int | None = None,
) -> np.ndarray:
    """The weights of the mixture of a model and its neighbours, of an earlier evaluation.

    Of several those of the same database are taken, then those of as many neighbours, then the newest.
    Where none is of the database, a warning says so.

    Args:
      folder: W/evaluation. model: the run's identity, as results record it.
      database: the hash of the token memory's database. neighbours: of a chunk. None for any.

    Raises:
      UserError: there is none of this checkpoint.
    """
    matches = []
    for path in files.matching(folder, "*.json"):
        result = files.read_json(path)
        of_all = result.get(_MIXED)  # where the file has all conditions
        for entry in (result, of_all if isinstance(of_all, dict) else {}):
            if (entry.get("condition"), entry.get("model")) != (_MIXED, model):
                continue
            same = database in (None, entry["manifests"].get("token_memory"))
            as_many = neighbours in (None, entry["settings"]["neighbours"])
            matches.append(((same, as_many, path.stat().st_mtime_ns, path.name), path, entry))
    if not matches:
        raise UserError(
            f"{folder} has no token mixture of this checkpoint: expected launch.evaluate"
            " --retrieval=tokens before"
        )
    (same, *_), path, entry = max(matches, key=lambda match: match[0])
    if not same:
        _warn_once(f"{path}: the mixture was tuned with another revision of the database")
    return np.array(entry["tokens"]["weights"])


@functools.cache
def _warn_once(message: str) -> None:
    """Warns; of the requests of a server the first one only."""
    _logger.warning(message)


def summary(model_nll: np.ndarray, votes: Votes, weights: np.ndarray) -> list[dict[str, Any]]:
    """One row for each class of lengths: its tokens, mean weight, and nats before and after."""
    after, rows = mixed_nll(model_nll, votes, weights), []
    lengths = np.where(votes.counts > 0, np.searchsorted(LENGTHS, votes.lengths, side="right"), 0)
    every: Sequence[int] = (0, *LENGTHS)
    for number, least in enumerate(every):
        inside = lengths == number
        if inside.any():
            rows.append(
                {
                    "length": int(least),
                    "tokens": int(inside.sum()),
                    "weight": float(weights[votes.classes()[inside]].mean()),
                    "model_nll": float(model_nll[inside].mean()),
                    "mixed_nll": float(after[inside].mean()),
                }
            )
    return rows
