"""One experiment trained with several seeds: means, their spread, and intervals over documents and seeds.

Other seeds give other initial values and another order of batches. A resample draws documents and seeds,
both with replacement; every seed is scored on the same documents, and RETRO and baseline of one seed stay
together. With few seeds such intervals are a little narrow, so the spread is stated beside them.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from retro_jax.errors import UserError
from retro_jax.evaluate.bootstrap import intervals, resampled_sums
from retro_jax.evaluate.overlap import OverlapSums
from retro_jax.evaluate.scored_text import ScoredText
from retro_jax.evaluate.uncertainty import SAMPLES, plain

_CONDITIONS = ("baseline", "off", "on", "random", "oracle", "baseline+tokens", "tokens")
_PAIRS = (("on", "off"), ("on", "baseline"), ("oracle", "on"), ("tokens", "baseline+tokens"))
_LIMITS = (0.5, 1.0)  # of r(C)
_NO_OVERLAP = "figures of seeds need those by overlap: expected a neighbour table"
_OTHER_TEXTS = "the seeds' results are of other texts: expected one split and table"
_OF_SEEDS = 1_000  # the seed of the draws of seeds, apart from those of any corpus


@dataclasses.dataclass(frozen=True)
class _Sums:
    """One limit of r(C): chunks and bytes [D], and bits [D, S, C] of S seeds under C conditions."""

    limit: float
    chunks: np.ndarray
    bytes: np.ndarray
    bits: np.ndarray


def seed_figures(
    scored: Sequence[ScoredText],
    conditions: Sequence[str] = _CONDITIONS,
    pairs: Sequence[tuple[str, str]] = _PAIRS,
) -> list[dict[str, Any]]:
    """Figures of each corpus, and of all together.

    Args:
      scored: the sums of one text by each seed's models, S of them, with figures by overlap.
      conditions: those wanted; what a seed has no sums of is left out. pairs: whose differences.

    Returns:
      Rows with "corpus" ("" for all), "at_most" of r(C), "chunks", "bits_per_byte" by condition and
      "differences" by pair, as in "on-off". Each figure has the mean over seeds as its "value",
      "low" and "high" of its 95% interval, and "seeds": the value of each; None where no chunk is.

    Raises:
      UserError: the sums are of different texts, or have no figures by overlap.
    """
    first = scored[0]
    names = [name for name in conditions if all(name in each.nats for each in scored)]
    seeds = len(scored)
    times = resampled_sums(np.eye(seeds), samples=SAMPLES, seed=_OF_SEEDS) / seeds
    rows = []
    for sums in _by_limit(scored, names):
        flat = np.concatenate([sums.bytes[:, None], sums.bits.reshape(len(sums.bytes), -1)], axis=1)
        totals: list[np.ndarray] = []
        draws: list[np.ndarray] = []
        for corpus in [*sorted(set(first.corpora.tolist())), ""]:
            inside = first.corpora == corpus if corpus else np.ones(len(flat), bool)
            if corpus:
                totals.append(flat[inside].sum(axis=0))
                draws.append(resampled_sums(flat[inside], samples=SAMPLES, seed=len(draws)))
                total, drawn = totals[-1], draws[-1]
            else:
                total, drawn = np.sum(totals, axis=0), np.sum(draws, axis=0)
            with np.errstate(divide="ignore", invalid="ignore"):
                values = (total[1:] / total[0]).reshape(seeds, len(names))
                sampled = (drawn[:, 1:] / drawn[:, :1]).reshape(-1, seeds, len(names))
            sampled = np.einsum("bs,bsc->bc", times, sampled)
            about = {"corpus": corpus, "at_most": sums.limit}
            about["chunks"] = int(sums.chunks[inside].sum())
            rows.append(about | _figures(names, pairs, values, sampled))
    return rows


def ablation_figures(ablated: Sequence[ScoredText], whole: Sequence[ScoredText]) -> dict[str, Any]:
    """RETRO[ON] of an ablation beside that of the whole model, over all text.

    Args:
      ablated, whole: the sums of one text by each seed's model, S of each; equal seeds are paired.

    Returns:
      The last row of seed_figures, with the conditions "ablated" and "whole" and their difference.

    Raises:
      UserError: as seed_figures.
    """
    names = ("ablated", "whole")
    both = []
    for pair in zip(ablated, whole, strict=True):
        overlaps = [_overlap(each) for each in pair]
        if not np.array_equal(overlaps[0].bytes[:, -1], overlaps[1].bytes[:, -1]):
            raise UserError(_OTHER_TEXTS)
        nats = {name: each.nats["on"] for name, each in zip(names, pair, strict=True)}
        bits = {name: each.bits["on"] for name, each in zip(names, overlaps, strict=True)}
        overlap = dataclasses.replace(overlaps[1], bits=bits)
        both.append(dataclasses.replace(pair[1], nats=nats, overlap=overlap))
    return seed_figures(both, names, (names,))[-1]


def spread(figure: Mapping[str, Any]) -> float:
    """The standard deviation of a figure over its seeds; 0 of one, or of none."""
    values = [value for value in figure["seeds"] if value is not None]
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _figures(
    names: Sequence[str],
    wanted: Sequence[tuple[str, str]],
    values: np.ndarray,
    sampled: np.ndarray,
) -> dict[str, Any]:
    """Figures of one place: values [S, C] and their resamples [B, C]."""
    pairs = [(a, b) for a, b in wanted if a in names and b in names]
    columns = [(names.index(a), names.index(b)) for a, b in pairs]
    differences = np.stack([values[:, a] - values[:, b] for a, b in columns], axis=1)
    drawn = np.stack([sampled[:, a] - sampled[:, b] for a, b in columns], axis=1)

    def of(each: np.ndarray, draws: np.ndarray) -> list[dict[str, Any]]:
        found = intervals(each.mean(axis=0), draws)
        seeds = [[x if math.isfinite(x) else None for x in column] for column in each.T.tolist()]
        return [plain(one) | {"seeds": own} for one, own in zip(found, seeds, strict=True)]

    return {
        "bits_per_byte": dict(zip(names, of(values, sampled), strict=True)),
        "differences": dict(zip(map("-".join, pairs), of(differences, drawn), strict=True)),
    }


def _overlap(scored: ScoredText) -> OverlapSums:
    """The sums by r(C).

    Raises:
      UserError: there are none.
    """
    if scored.overlap is None:
        raise UserError(_NO_OVERLAP)
    return scored.overlap


def _by_limit(scored: Sequence[ScoredText], names: Sequence[str]) -> list[_Sums]:
    """The sums under each limit of r(C).

    Raises:
      UserError: as above.
    """
    sums = []
    for limit in _LIMITS:
        chunks, sizes, bits = [], [], []
        for each in scored:
            found = _overlap(each)
            at = int(np.argmin(np.abs(found.thresholds - limit)))
            chunks.append(found.chunks[:, at])
            sizes.append(found.bytes[:, at])
            bits.append(np.stack([found.bits[name][:, at] for name in names], axis=1))
        if any(x.shape != sizes[0].shape or (x != sizes[0]).any() for x in sizes):
            raise UserError(_OTHER_TEXTS)
        sums.append(_Sums(limit, chunks[0], sizes[0], np.stack(bits, axis=1)))
    return sums
