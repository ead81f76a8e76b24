"""Two corpora before and after an update: documents are added, removed, replaced and withdrawn."""

import json
import pathlib
import random

from data_pipelines import workdir
from data_pipelines.documents.documents import split_of

SPLITS = ("train", "validation", "test")
SHARES = {"validation": 0.15, "test": 0.15}
_WORDS = [
    "lobster",
    "crust",
    "def",
    "return",
    "pale",
    "gulls",
    "harbour",
    "boats",
    "lay",
    "0.5",
    "x,",
]
CORPORA = ("code", "prose")


def document(corpus: str, number: int, split: str | None = None) -> tuple[str, str]:
    """Id and text of a document, of a split if one is wanted."""
    rng = random.Random(f"{corpus} {number}")
    tries = (f"{corpus}-{number}-{i}" for i in range(1000))
    name = next(n for n in tries if split in (None, split_of(n, **SHARES)))
    return name, f"{number} {corpus} " + " ".join(rng.choices(_WORDS, k=20 + number % 60))


OLD = {corpus: dict(document(corpus, i) for i in range(22)) for corpus in CORPORA}
NEW = {corpus: dict(document(corpus, i, "train") for i in range(30, 36)) for corpus in CORPORA}
_HELD_OUT = next(n for n in OLD["prose"] if split_of(n, **SHARES) == "test")
OLD["code"][document("code", 40, "train")[0]] = OLD["prose"][_HELD_OUT]  # which is withdrawn
_TRAIN = [n for n in OLD["code"] if split_of(n, **SHARES) == "train"]
REMOVED, REPLACED = _TRAIN[2:5], _TRAIN[6]
NEW_TEXT = document("code", 50)[1]


def settings(folder: pathlib.Path, corpora: dict[str, dict[str, str]]) -> workdir.PrepareConfig:
    """Writes corpora as JSON lines, and returns the settings that read them."""
    configs = []
    for name, documents in corpora.items():
        path = folder / f"{name}.jsonl"
        lines = [json.dumps({"name": n, "text": text}) + "\n" for n, text in documents.items()]
        path.write_text("".join(lines))
        configs.append(workdir.CorpusConfig(name, "jsonl", str(path), id_field="name"))
    return workdir.PrepareConfig(
        workdir.DocumentsConfig(configs, **SHARES, shard_bytes=1500),
        tokenizer=workdir.TokenizerConfig(base=str(folder / "base")),
        keys=workdir.KeysConfig(str(folder / "bert")),
        index=workdir.IndexConfig(kind="exact"),
        neighbours=workdir.NeighboursConfig(train=3, validation=5, test=5, recall_queries=20),
    )
