"""A small corpus, and the stages up to its chunk database, for whoever tests what comes after."""

import pathlib
import random

from data_pipelines.chunk_database.database import prepare_chunks
from data_pipelines.chunk_database.tokenizer import TokenizerConfig, train_tokenizer
from data_pipelines.corpora import SPLITS, CorpusConfig
from data_pipelines.documents.documents import DocumentsConfig, prepare_documents

_TEXT = "the lobster = is a blue crustacean of\tthe Atlantic \u2581 def f(x):\n    return ½ 日本 \0"
TOKENIZER = TokenizerConfig(vocab_size=320, character_coverage=1.0)


def write_texts(folder: pathlib.Path, count: int, seed: int = 0) -> None:
    """Text files of 1 to 400 words, numbered, the first two of them equal."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for i in range(count):
        words = rng.choices(_TEXT.split(" "), k=int(400 * rng.random() ** 3))
        text = " ".join([f"{seed}.{i}", *words])
        name = "text-000.txt" if i == 1 else f"text-{i:03d}.txt"
        data = (folder / name).read_bytes() if i == 1 else text.encode()
        (folder / f"text-{i:03d}.txt").write_bytes(data)


def documents_config(*folders: pathlib.Path, **settings) -> DocumentsConfig:
    """One corpus a folder, named as the folder is, in shards of a few documents."""
    corpora = [CorpusConfig(folder.name, "text", str(folder)) for folder in folders]
    defaults = {"validation": 0.1, "test": 0.1, "shard_bytes": 8000, "sort_bytes": 20_000}
    return DocumentsConfig(corpora, **(defaults | settings))


def prepare(workdir: pathlib.Path, config: DocumentsConfig) -> None:
    """Documents, tokeniser and the chunk database of every split, in their places in a workdir."""
    prepare_documents(workdir / "documents", config)
    train_tokenizer(workdir / "tokenizer", workdir / "documents" / "train", TOKENIZER)
    for split in SPLITS:
        documents = workdir / "documents" / split
        prepare_chunks(workdir / "chunks" / split, documents, workdir / "tokenizer")


def tree(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file below a folder, by relative name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
