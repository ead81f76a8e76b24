"""A small random model that is served: letters as tokens, and a database whose revisions are made up."""

import dataclasses
import functools

import numpy as np

from retro_jax.batch import Neighbour
from retro_jax.errors import UserError
from retro_jax.generate.text_generator import TextGenerator
from tests.model.tiny import TINY, make_model

PAD, BOS, EOS = 0, 1, 2
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

    @property
    def digest(self) -> str:
        return f"hash of {self.revision}"

    def find(self, chunks, k):
        first = chunks.astype(np.int64) @ np.arange(1, chunks.shape[1] + 1) + 1000 * self.revision
        if ((chunks[:, 0] == BOS) & (chunks[:, 1:] == 28).all(axis=1)).any():  # a prompt of z
            raise UserError("this chunk cannot be searched for: expected another one")
        return first[:, None] + np.arange(k), np.ones((len(chunks), k), np.float32)

    def values(self, ids):
        rows = [np.random.default_rng(int(i)).integers(3, 30, 16) for i in ids.ravel()]
        return np.array(rows, np.int32).reshape(*ids.shape, 16)

    def neighbour(self, chunk, score):
        return Neighbour("d", "fake", chunk % 7, score, self.revision, "text", "more")


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
    model = make_model(CONFIG)
    return TextGenerator(model, Letters(), chunks=4, databases=FakeDatabases(), name="letters")
