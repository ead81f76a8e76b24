"""Builds a token memory: sorted endings of all documents of a chunk database.

The tokens of consecutive chunks, without padding, are written backwards, so that what precedes a
token is what follows it in the file. A suffix array of that text sorts all endings:

    documents      bos a b eos | bos a c eos
    backwards      eos c a bos | eos b a bos              text-00000.npy, big-endian
    sorted places  of "a bos", "b a bos", "bos", ...      order-00000.npy

The endings that share the last L tokens with a text are then neighbours in the order, and the token
before each of them in the file is the one that followed it in its document.

    starts-00000.npy    which token each chunk begins with, counted forwards from the part's first

An artefact has several parts where a database is too large for one suffix array.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from data_pipelines.artefacts.manifest import Manifest, Path, shard_name
from data_pipelines.artefacts.runner import InProcess, Runner, run_counted, silent
from data_pipelines.artefacts.stage import Stage
from data_pipelines.chunk_database.database import ChunkDatabase
from retro_jax.config import require
from retro_jax.errors import UserError
from retro_jax.storage import files

KIND = "token_memory"
TEXT, ORDER, STARTS = "text", "order", "starts"
_BLOCK = 1 << 14  # chunks read at once
_MOST_BYTES = 1 << 31  # of a text that 32-bit places can sort


@dataclasses.dataclass(frozen=True)
class TokenMemoryConfig:
    """How a token memory is built.

    Attributes:
      part_tokens: tokens of a part at most, but for a longer document. Building a part takes about 25
        bytes of memory a token, and a look-up searches each part.
    """

    part_tokens: int = 1 << 27

    def __post_init__(self) -> None:
        require(self.part_tokens > 0, self, "part_tokens", "a positive number")


def import_pydivsufsort() -> Any:
    """The library, or a UserError where it is not installed."""
    try:
        import pydivsufsort
    except ImportError:
        raise UserError(
            "a token memory needs the package pydivsufsort: expected it installed"
            " (pip install retro-jax[data])"
        ) from None
    return pydivsufsort


def prepare_token_memory(
    directory: Path,
    database: ChunkDatabase,
    config: TokenMemoryConfig = TokenMemoryConfig(),
    *,
    runner: Runner = InProcess(),
) -> Manifest:
    """Builds the token memory of one chunk database, or the parts that are missing of it.

    Args:
      directory: where it goes.
      database: one chunk database on disk, not several revisions joined: each has its own memory.
      config: the size of parts.
      runner: where parts are made; the bytes do not depend on it.

    Returns:
      The manifest. Facts: tokens (in all), parts (the first chunk of each) and token_bytes.

    Raises:
      UserError: the library is missing, or the directory is another artefact's.
    """
    import_pydivsufsort()
    parents = {"database": (database.manifest, database.directory)}
    stage = Stage(directory, KIND, config, parents)
    if stage.done:
        return stage.manifest()
    parts = _parts(database, config.part_tokens)
    width = token_width(database)
    work = _BuildPart(files.absolute(directory), database, parts, width)
    missing = [i for i in range(len(parts)) if stage.missing(part_names(i))]
    sizes = [len(part) for part in parts]
    run_counted(runner, work, missing, sizes, what="token memory", unit="chunk")
    names = [name for i in range(len(parts)) for name in part_names(i)]
    facts = {
        "parts": [[part.start, part.stop] for part in parts],
        "tokens": sum(stage.shard_facts(part_names(i)[0]) for i in range(len(parts))),
        "token_bytes": width,
    }
    return stage.finish(facts, names)


def part_names(index: int) -> list[str]:
    """The files of part `index`: its text, the order of its endings, the starts of its chunks."""
    return [shard_name(prefix, index) for prefix in (TEXT, ORDER, STARTS)]


def token_width(database: ChunkDatabase) -> int:
    """Bytes of a token in the text: 2, or 4 where the vocabulary needs them."""
    return 2 if max(database.vocab_size, database.pad_id + 1) <= 1 << 16 else 4


def _parts(database: ChunkDatabase, most: int) -> list[range]:
    """Ranges of chunks that end where documents end, each of at most `most` positions if it can."""
    count = len(database)
    ends: list[np.ndarray] = [np.zeros(0, np.int64)]
    for first in range(0, count, _BLOCK):
        ids = np.arange(first, min(first + _BLOCK + 1, count))
        documents = database.documents(ids)
        ends.append(ids[1:][documents[1:] != documents[:-1]])
    borders = np.append(np.concatenate(ends), count) if count else np.zeros(0, np.int64)
    chunks = max(1, most // 64)
    cuts = [0]
    while cuts[-1] < count:
        limit = int(np.searchsorted(borders, cuts[-1] + chunks, side="right")) - 1
        fitting = int(borders[limit]) if limit >= 0 else 0
        following = int(borders[np.searchsorted(borders, cuts[-1], side="right")])
        cuts.append(max(fitting, following))
    return [range(a, b) for a, b in itertools.pairwise(cuts)]


@dataclasses.dataclass(frozen=True)
class _BuildPart:
    """Writes the files of one part: a pure function of the database."""

    directory: str
    database: ChunkDatabase
    parts: list[range]
    width: int

    def __call__(self, index: int, report: Callable[[int], object] = silent) -> int:
        """Builds part `index`; returns its chunks."""
        part, stage = self.parts[index], Stage.attach(self.directory)
        tokens, starts = _tokens_of(self.database, part, report)
        text = tokens[::-1].astype(f">u{self.width}")
        if text.nbytes >= _MOST_BYTES:
            raise UserError(
                f"{self.database.directory}: a part of the token memory has {text.nbytes:,} bytes:"
                f" expected fewer than {_MOST_BYTES:,}; lower TokenMemoryConfig.part_tokens"
            )
        places = import_pydivsufsort().divsufsort(text.view(np.uint8))
        order = (places[places % self.width == 0] // self.width).astype(np.int32)
        text_name, order_name, starts_name = part_names(index)
        stage.write_array(starts_name, starts)
        stage.write_array(order_name, order)
        stage.write_array(text_name, text, facts=len(text))
        return len(part)


def _tokens_of(
    database: ChunkDatabase, part: range, report: Callable[[int], object]
) -> tuple[np.ndarray, np.ndarray]:
    """A part's tokens [n] without padding, and where each of its chunks begins [chunks + 1]."""
    tokens, lengths = [np.zeros(0, np.int32)], [np.zeros(1, np.int64)]
    for first in range(part.start, part.stop, _BLOCK):
        rows = database.chunks(np.arange(first, min(first + _BLOCK, part.stop)))
        real = rows != database.pad_id
        tokens.append(rows[real])
        lengths.append(real.sum(axis=1))
        report(len(rows))
    return np.concatenate(tokens), np.cumsum(np.concatenate(lengths))
