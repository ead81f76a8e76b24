"""Sets of n-grams compared: exactly, and by MinHash to find what is worth comparing.

    words or tokens --13 in a row--> grams --hashed--> [grams] uint64
    --rensa's R-MinHash--> [permutations] --`rows` of them a band--> [bands] uint64

Two sets are candidates where one of their bands is equal. At a similarity s a band of r rows is equal
with probability s^r, and so none of b bands is with (1 - s^r)^b: `plan_bands` takes the longest bands,
which give the fewest candidates, that miss less than one pair in a million at the threshold. What is
found is then compared exactly, so that nothing is taken for similar that is not.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from retro_jax.errors import UserError

GRAM = 13
# Scripts that write no space between words: Thai and Lao, Tibetan, Burmese, Khmer, kana and bopomofo,
# Han. Each of their characters is a word.
_UNSPACED = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3031-\u318f\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
_UNSPACED_RUN = re.compile(f"[{_UNSPACED}]+")
_WORD = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")
MISSED = 1e-6  # of the pairs at the threshold, at most
_SEED = 0
_STEP = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it keeps every bit of what it multiplies


def plan_bands(threshold: float, permutations: int) -> tuple[int, int] | None:
    """Bands, and rows of each; None if so few permutations miss too many pairs at the threshold."""
    for rows in range(permutations, 0, -1):
        bands = permutations // rows
        if (1 - threshold**rows) ** bands <= MISSED:
            return bands, rows
    return None


def import_rensa():
    """Rensa, or a UserError where it is not installed."""
    try:
        import rensa
    except ImportError:
        raise UserError(
            "LeakageConfig.threshold needs the package rensa: expected it installed"
            " (pip install retro-jax[data]), or LeakageConfig.threshold = None"
        ) from None
    return rensa


def words_of(text: str) -> list[str]:
    """The words between whitespace; in a text mostly of scripts without spaces, their characters."""
    if text.isascii() or 2 * len(_UNSPACED_RUN.sub("", text)) > len(text):
        return text.split()
    return _WORD.findall(text)


def grams(words: Sequence[str]) -> set[str]:
    """The 13-grams of some words; fewer words are one gram, none have none."""
    if not words:
        return set()
    return {" ".join(words[i : i + GRAM]) for i in range(max(1, len(words) - GRAM + 1))}


def jaccard(one: set[str], other: set[str]) -> float:
    """What two sets share of what either has; 0 for two empty ones."""
    common = len(one & other)
    return common / (len(one) + len(other) - common) if common else 0.0


def word_numbers(words: Sequence[str]) -> np.ndarray:
    """[n] uint64: equal for equal words, on every machine."""
    number = {}
    for word in dict.fromkeys(words):
        digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
        number[word] = int.from_bytes(digest, "little")
    return np.fromiter((number[word] for word in words), np.uint64, len(words))


def token_numbers(tokens: np.ndarray) -> np.ndarray:
    """[...] uint64: tokens spread over all numbers."""
    return _mixed(tokens.astype(np.uint64) + _STEP)


def gram_hashes(numbers: np.ndarray) -> np.ndarray:
    """[..., n] uint64 numbers of words -> [..., n - 12] of their grams, in order; [..., 1] of fewer."""
    if not numbers.shape[-1]:
        return numbers
    length = min(GRAM, numbers.shape[-1])
    count = numbers.shape[-1] - length + 1
    total = np.zeros((*numbers.shape[:-1], count), np.uint64)
    for offset in range(length):
        total = total * _STEP + numbers[..., offset : offset + count]
    return _mixed(total)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Spreads every bit over all others: the finaliser of SplitMix64."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


@dataclasses.dataclass(frozen=True)
class Sketch:
    """How sets become bands.

    Attributes:
      bands, rows: as of `plan_bands`.
    """

    bands: int
    rows: int

    @classmethod
    def of(cls, threshold: float, permutations: int) -> "Sketch":
        """The sketch for a threshold that so many permutations are enough for."""
        plan = plan_bands(threshold, permutations)
        assert plan is not None
        return cls(*plan)

    def __call__(self, sets: Iterable[np.ndarray]) -> np.ndarray:
        """Hashes [grams] uint64 of each of n sets -> [n, bands] uint64; sets must not be empty."""
        parts = list(sets)
        if not parts:
            return np.zeros((0, self.bands), np.uint64)
        ends = np.cumsum([0, *map(len, parts)]).astype(np.uint64)
        matrix = import_rensa().RMinHash.digest_matrix_from_flat_token_hashes(
            np.concatenate(parts), ends, self.bands * self.rows, _SEED
        )
        minima = np.array(matrix.to_rows(), np.int64).astype(np.uint64)
        keys = np.zeros((len(parts), self.bands), np.uint64)
        for row in range(self.rows):
            keys = _mixed(keys * _STEP + minima[:, row :: self.rows])
        return keys


class BandTable:
    """The bands of many sets, to be asked for those that share one with another set.

    Attributes:
      keys: [bands, n] uint64, each row ascending.
      owners: [bands, n] uint32, the number of each key's set.
    """

    def __init__(self, keys: np.ndarray, owners: np.ndarray) -> None:
        """Takes the arrays of another table."""
        self.keys, self.owners = keys, owners

    @classmethod
    def of(cls, bands: np.ndarray) -> "BandTable":
        """The table of sets with bands [n, bands]."""
        order = np.argsort(bands.T, axis=1, kind="stable")
        return cls(np.take_along_axis(bands.T, order, axis=1), order.astype(np.uint32))

    def candidates(self, bands: np.ndarray) -> np.ndarray:
        """[pairs, 2] int64: (row of `bands` [q, bands], number of a set here), ascending, each once."""
        codes = np.zeros(0, np.int64)
        many = max(1, self.keys.shape[1])
        for band_keys, owners, band in zip(self.keys, self.owners, bands.T):
            first, last = (
                np.searchsorted(band_keys, band),
                np.searchsorted(band_keys, band, "right"),
            )
            counts = last - first
            rows = np.repeat(np.arange(len(band)), counts)
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            pairs = rows * many + owners[np.repeat(first, counts) + within]
            codes = np.union1d(codes, pairs)
        return np.stack([codes // many, codes % many], axis=1)
