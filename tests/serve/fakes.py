"""A small random model that is served: letters as tokens, and a database whose revisions are made up."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from retro_jax.batch import Neighbour
from retro_jax.errors import UserError
from retro_jax.evaluate.token_mixture import num_classes
from retro_jax.generate.text_generator import TextGenerator
from retro_jax.report.views import NeighbourSource, SourceDocument
from retro_jax.serve.traces import TokenLibrary
from tests.model.tiny import TINY, make_model

PAD, BOS, EOS = 0, 1, 2
HOSTILE = "</script><img src=x onerror=alert(1)>\"'&\x00\x1b[2J\u202egnol\u2066<!--"
LETTERS = "abcdefghijklmnopqrstuvwxyz "
CONFIG = dataclasses.replace(
    TINY,
    num_layers=2,
    cca_layers=(2,),
    encoder_num_layers=1,
    positions="rotary",
    chunk_length=8,
    neighbour_length=16,
)


class Letters:
    """A tokeniser of small letters and spaces."""

    bos_id, eos_id, pad_id, vocab_size = BOS, EOS, PAD, CONFIG.vocab_size
    special_ids = frozenset((PAD, BOS, EOS))

    def encode(self, text: str) -> np.ndarray:
        text.encode()
        return np.array([3 + LETTERS.index(c) if c in LETTERS else 29 for c in text], np.int32)

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode()

    def decode_bytes(self, ids) -> bytes:
        return "".join(LETTERS[int(i) - 3] for i in ids if i > 2).encode()


@dataclasses.dataclass
class FakeDatabase:
    """A revision whose neighbours depend on the chunk and on its number."""

    revision: int
    excluded: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        return f"hash of {self.revision}"

    def find(self, chunks, k):
        first = chunks.astype(np.int64) @ np.arange(1, chunks.shape[1] + 1) + 1000 * self.revision
        first += 77 * len(self.excluded)
        if ((chunks[:, 0] == BOS) & (chunks[:, 1:] == 28).all(axis=1)).any():  # a prompt of z
            raise UserError("this chunk cannot be searched for: expected another one")
        return first[:, None] + np.arange(k), np.ones((len(chunks), k), np.float32)

    def values(self, ids):
        rows = [np.random.default_rng(int(i)).integers(3, 30, 16) for i in ids.ravel()]
        return np.array(rows, np.int32).reshape(*ids.shape, 16)

    def neighbour(self, chunk, score):
        return Neighbour("d", "fake", chunk % 7, score, self.revision, "text", "more")

    def without(self, documents):
        if "fake/none" in documents:
            raise UserError("/home/me/W/chunks holds no document 'none': expected another")
        return FakeDatabase(self.revision, tuple(documents))

    def votes(self):
        """After each letter the next one, but for revision 7, which has no memory."""
        return (lambda ending: (1, (ending[-1:] + 1) % 30)) if self.revision != 7 else None

    def library(self):
        return FakeLibrary(self)


class FakeLibrary(TokenLibrary):
    """Documents with hostile names."""

    def __init__(self, database):
        super().__init__(Letters())
        self.database = database

    def sources(self, ids, scores):
        document = SourceDocument(f"d {HOSTILE}", "fake", lambda: np.zeros(0, np.int32))
        revision = self.database.revision
        return [
            NeighbourSource(document, 1, 7, float(score), revision=revision) for score in scores
        ]


class FakeDatabases:
    """Revisions from `first` to `last`."""

    def __init__(self) -> None:
        self.first, self.last, self.current = 0, 0, FakeDatabase(0)

    def newest(self) -> FakeDatabase:
        return self.current

    def at(self, revision: int) -> FakeDatabase:
        if not self.first <= revision <= self.last:
            raise UserError(f"revision {revision} is gone: expected {self.first} to {self.last}")
        return FakeDatabase(revision)

    def warm_up(self) -> None:
        self.warm = True

    def refresh(self) -> bool:
        changed = self.last != self.current.revision
        if changed:
            self.current = FakeDatabase(self.last)
        return changed


@functools.cache
def make_generator() -> TextGenerator:
    """A generator with windows of four chunks; its databases are those of whoever asks next."""
    weights: Callable[..., np.ndarray] = lambda *_: np.r_[0, np.full(num_classes() - 1, 0.5)]  # noqa: E731
    # As a checkpoint is restored: programs compile again where arrays without a place follow.
    graphdef, params = nnx.split(make_model(CONFIG))
    model = nnx.merge(graphdef, jax.device_put(params, jax.devices()[0]))
    databases = FakeDatabases()
    return TextGenerator(
        model, Letters(), chunks=4, databases=databases, name="letters", weights=weights
    )
