"""Build rate, size and look-up time of a token memory, on real tokens repeated with edits.

    python -m benchmarks.token_memory [--memory_tokens=100000000] [--memory_output=token_memory.json]

The text is the standard library, tokenised, and copied until there are enough tokens. In each copy one
token in twenty is replaced by another of the text, so endings of every length occur. A look-up's query
is 32 tokens of a further copy, edited in the same way. Prints tokens per second of the build, bytes a
token, the most memory of the process, and the microseconds of look-ups.
"""

import json
import pathlib
import resource
import tempfile
import time
from typing import Any

import numpy as np
from absl import app, flags

from data_pipelines.artefacts.manifest import Manifest, shard_name
from data_pipelines.artefacts.stage import Stage
from data_pipelines.chunk_database.database import CHUNK_LENGTH, ChunkDatabase
from data_pipelines.chunk_database.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from data_pipelines.corpora import CorpusConfig
from data_pipelines.documents.documents import DocumentsConfig, prepare_documents, read_documents
from data_pipelines.token_memory.build import TokenMemoryConfig, prepare_token_memory
from data_pipelines.token_memory.memory import LONGEST, TokenMemory
from retro_jax.storage import files

_TOKENS = flags.DEFINE_integer("memory_tokens", 100_000_000, "Tokens of the database.")
_PART = flags.DEFINE_integer("memory_part_tokens", 1 << 27, "Tokens of a part at most.")
_QUERIES = flags.DEFINE_integer("memory_queries", 5000, "Look-ups.")
_OUTPUT = flags.DEFINE_string("memory_output", None, "Where the figures go as JSON.")
_EDITED = 0.05
_DOCUMENT = 32  # chunks of a document
_SHARD = 1 << 19  # chunks of a file


def real_tokens(folder: pathlib.Path) -> np.ndarray:
    """The standard library's source as the tokens of a vocabulary of 8,000."""
    config = DocumentsConfig((CorpusConfig("code", "stdlib"),), validation=0, test=0)
    prepare_documents(folder / "documents", config)
    train = folder / "documents" / "train"
    train_tokenizer(folder / "tokenizer", train, TokenizerConfig(vocab_size=8000))
    documents = read_documents(train, Manifest.open(train, "documents"))
    tokenizer = Tokenizer.open(folder / "tokenizer")
    ids = tokenizer.encode_batch([document.text for document in documents])
    return np.concatenate([np.array(each, np.uint16) for each in ids])


def edited(tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A copy in which some tokens are others of the same text."""
    copy = tokens.copy()
    places = np.flatnonzero(rng.random(len(copy)) < _EDITED)
    copy[places] = tokens[rng.integers(0, len(tokens), len(places))]
    return copy


def write_chunks(folder: pathlib.Path, tokens: np.ndarray, count: int) -> ChunkDatabase:
    """A chunk database of so many tokens: edited copies, cut into documents of equal length."""
    vocabulary = {"vocab_size": 8000, "pad_id": 0, "bos_id": 1, "eos_id": 2}
    stage = Stage(folder, "chunks", {"chunk_length": CHUNK_LENGTH, **vocabulary})
    rng, shards, done = np.random.default_rng(0), [], 0
    rest = np.zeros(0, np.uint16)
    while done < count // CHUNK_LENGTH:
        rows = min(_SHARD, count // CHUNK_LENGTH - done)
        while len(rest) < rows * CHUNK_LENGTH:
            rest = np.concatenate([rest, edited(tokens, rng)])
        part, rest = rest[: rows * CHUNK_LENGTH], rest[rows * CHUNK_LENGTH :]
        stage.write_array(shard_name("chunks", len(shards)), part.reshape(rows, CHUNK_LENGTH))
        owners = (np.arange(done, done + rows) // _DOCUMENT).astype(np.int32)
        stage.write_array(shard_name("documents", len(shards)), owners)
        shards.append(rows)
        done += rows
    facts = {"documents": -(-done // _DOCUMENT), "chunks": done, "shards": shards}
    stage.finish({**facts, "corpora": {"made": {"ranges": [[0, done]]}}})
    return ChunkDatabase.open(folder)


def look_ups(memory: TokenMemory, tokens: np.ndarray, count: int) -> dict[str, float]:
    """Microseconds of look-ups, the first hundred left out, and the endings' mean length."""
    rng = np.random.default_rng(1)
    text = edited(tokens, rng).astype(np.int64)
    times, lengths = [], []
    for at in rng.integers(LONGEST, len(text), count + 100):
        query = text[at - LONGEST : at]
        begin = time.perf_counter()
        match = memory.match(query)
        times.append(1e6 * (time.perf_counter() - begin))
        lengths.append(match.length)
    median, most = np.quantile(times[100:], (0.5, 0.99))
    mean = float(np.mean(times[100:]))
    return {
        "median_us": float(median),
        "mean_us": mean,
        "p99_us": float(most),
        "mean_length": float(np.mean(lengths)),
    }


def measure(folder: pathlib.Path, count: int, part: int, queries: int) -> dict[str, Any]:
    """All figures of one size."""
    tokens = real_tokens(folder)
    database = write_chunks(folder / "chunks", tokens, count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, processor = time.perf_counter(), time.process_time()
    manifest = prepare_token_memory(folder / "memory", database, TokenMemoryConfig(part))
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    memory = TokenMemory.open([folder / "memory"], database)
    total, size = manifest.fact("tokens"), sum(shard.size for shard in manifest.shards)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "tokens": total,
        "parts": len(manifest.fact("parts")),
        "tokens_per_second": total / wall,
        "tokens_per_processor_second": total / processor,
        "bytes_per_token": size / total,
        "memory_mb": most / 1024,
        "memory_mb_before": before / 1024,
        **look_ups(memory, tokens, queries),
    }


def main(_: list[str]) -> None:
    """Prints the figures of one size."""
    with tempfile.TemporaryDirectory() as folder:
        found = measure(pathlib.Path(folder), _TOKENS.value, _PART.value, _QUERIES.value)
    for name, value in found.items():
        print(f"{name:28} {value:,.1f}")
    if _OUTPUT.value:
        files.write_atomically(pathlib.Path(_OUTPUT.value), json.dumps(found, indent=1).encode())


if __name__ == "__main__":
    app.run(main)
