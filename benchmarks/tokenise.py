"""Tokens per second from documents to chunks, on the standard library's source files.

    python benchmarks/tokenise.py [--vocab_size=8000] [--processes=1]

Prints wall and processor seconds of every stage. On 2 cores that others used too (CPython 3.11,
sentencepiece 0.2.3) 2.76 M tokens took 2.4 s of processor time, 2.7 s in all: a million per second.
"""

import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

from absl import app, flags

from data_pipelines.artefacts.manifest import Manifest
from data_pipelines.artefacts.runner import InProcess, LocalProcesses
from data_pipelines.chunk_database.database import prepare_chunks
from data_pipelines.chunk_database.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from data_pipelines.corpora import CorpusConfig
from data_pipelines.documents.documents import DocumentsConfig, prepare_documents, read_documents

_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 8000, "Tokens of the vocabulary.")
_PROCESSES = flags.DEFINE_integer("processes", 1, "Processes that make chunk shards.")


def _timed(name: str, function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """Runs a stage and prints its time."""
    wall, processor = time.perf_counter(), time.process_time()
    result = function(*args, **keywords)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    print(f"{name:22} {wall:7.2f} s  (processor {processor:.2f} s)")
    return result, wall, processor


def main(_: list[str]) -> None:
    """Runs the stages in a temporary folder."""
    corpora = (CorpusConfig("code", "stdlib"),)
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        config = DocumentsConfig(corpora, validation=0, test=0, shard_bytes=4 << 20)
        _timed("documents", prepare_documents, work / "documents", config)
        train = work / "documents" / "train"
        settings = TokenizerConfig(vocab_size=_VOCAB_SIZE.value)
        _timed("train the tokeniser", train_tokenizer, work / "tokenizer", train, settings)
        documents = Manifest.open(train, "documents")
        texts = [document.text for document in read_documents(train, documents)]
        tokenizer = Tokenizer.open(work / "tokenizer")
        ids, wall, _ = _timed("encode_batch alone", tokenizer.encode_batch, texts)
        print(f"    {sum(map(len, ids)) / wall:,.0f} tokens/s")
        stage = (work / "chunks", train, work / "tokenizer")
        count = _PROCESSES.value
        runner = LocalProcesses(count) if count > 1 else InProcess()
        manifest, wall, _ = _timed("tokenise and chunk", prepare_chunks, *stage, runner=runner)
        tokens = manifest.fact("tokens")
        print(f"    {tokens:,} tokens, {tokens / wall:,.0f} tokens/s")


if __name__ == "__main__":
    app.run(main)
