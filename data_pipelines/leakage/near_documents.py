"""Leakage control: training documents that nearly are a held-out document are withdrawn (section 2.2).

    held-out documents --MinHash--> bands, in memory: some 300 bytes a document
    training documents, a shard at a time --MinHash--> candidates --exact--> withdrawn-00000.jsonl, ...

Documents are compared by the Jaccard similarity of their sets of 13-grams of words between white space.
Nothing is rewritten: the documents stay where they are, and the chunk stage leaves the withdrawn ones
out.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.artefacts import mapped_arrays
from data_pipelines.artefacts.manifest import Manifest, Path, shard_name
from data_pipelines.artefacts.runner import InProcess, Runner, run_counted, silent
from data_pipelines.artefacts.sharded_rows import header_of
from data_pipelines.artefacts.stage import Stage
from data_pipelines.corpora import Document
from data_pipelines.documents.documents import read_shard
from data_pipelines.leakage import minhash
from retro_jax.config import require
from retro_jax.storage import files

KIND = "leakage"
WITHDRAWN = "withdrawn"
_TABLE, _TEXTS = f"{files.TEMPORARY}held-out", f"{files.TEMPORARY}texts"
_BATCH = 256  # documents sketched at once
_RANGE = 1 << 22  # hashes of texts that are sorted at once


@dataclasses.dataclass(frozen=True)
class LeakageConfig:
    """Which training documents are withdrawn.

    Attributes:
      threshold: 13-gram Jaccard similarity to a validation or test document from which a training
        document is withdrawn; None withdraws and compares nothing.
      permutations: permutations of MinHash; more of them find candidates by longer, fewer bands.
    """

    threshold: float | None = 0.8
    permutations: int = 128

    def __post_init__(self) -> None:
        require(self.permutations > 0, self, "permutations", "a positive number")
        if self.threshold is not None:
            object.__setattr__(self, "threshold", float(self.threshold))
            require(0 < self.threshold <= 1, self, "threshold", "above 0 and at most 1, or None")
            enough = minhash.plan_bands(self.threshold, self.permutations) is not None
            rule = f"more, to miss less than {minhash.MISSED:g} at threshold {self.threshold:g}"
            require(enough, self, "permutations", rule)

    @property
    def sketch(self) -> minhash.Sketch:
        """How documents become bands."""
        assert self.threshold is not None
        return minhash.Sketch.of(self.threshold, self.permutations)


def prepare_leakage(
    directory: Path,
    documents_directory: Path,
    held_out: Mapping[str, Path],
    config: LeakageConfig,
    *,
    runner: Runner = InProcess(),
) -> Manifest:
    """Finds the training documents that are to be withdrawn, or what is missing of them.

    Args:
      directory: where it goes.
      documents_directory: of the training split's documents.
      held_out: name of each other split -> the directory of its documents.
      config: with a threshold.
      runner: where shards are made; the bytes do not depend on it.

    Returns:
      The manifest. Facts: documents; withdrawn; equal, those of them whose text is a held-out one's;
      duplicates, training documents of a text that another one has; held_out, documents compared with;
      shards, the documents of each that stay; pairs, how many were withdrawn of which corpus for which;
      missed, the probability that a document at the threshold was overlooked.
    """
    training = Manifest.open(documents_directory, "documents")
    parents = {"documents": (training, documents_directory)}
    parents |= {name: (Manifest.open(path, "documents"), path) for name, path in held_out.items()}
    version = minhash.import_rensa().RMinHash.ALGORITHM_VERSION
    settings = dataclasses.asdict(config) | {
        "gram": minhash.GRAM,
        "unit": "word",
        "sketch": f"R-MinHash {version}",
    }
    stage = Stage(directory, KIND, settings, parents)
    if stage.done:
        return stage.manifest()
    names = [shard_name(WITHDRAWN, i, ".jsonl") for i in range(len(training.shards))]
    missing = [i for i, name in enumerate(names) if stage.missing([name])]
    places = tuple((name, files.absolute(path)) for name, path in held_out.items())
    if not mapped_arrays.there(stage.directory / _TABLE, 3):
        _write_table(stage.directory / _TABLE, places, config.sketch)
    work = LeakageShard(
        files.absolute(directory), files.absolute(documents_directory), places, config
    )
    sizes = [shard["documents"] for shard in training.fact("shards")]
    run_counted(runner, work, missing, sizes, what=KIND, unit="document")
    return stage.finish(_facts(stage, names, sizes, config), names)


@dataclasses.dataclass(frozen=True)
class LeakageShard:
    """Looks for near-copies of held-out documents in one shard of training documents.

    Attributes:
      directory, documents_directory, held_out, config: as for `prepare_leakage`.
    """

    directory: str
    documents_directory: str
    held_out: tuple[tuple[str, str], ...]
    config: LeakageConfig

    def __call__(self, index: int, report: Callable[[int], object] = silent) -> int:
        """Writes shard `index`; returns how many documents are withdrawn."""
        stage = Stage.attach(self.directory)
        held_out = HeldOut(stage.directory / _TABLE, self.held_out)
        shard = Manifest.read(self.documents_directory).shards[index]
        lines: list[bytes] = []
        texts: list[int] = []
        counts: Counter[tuple[str, str, str]] = Counter()
        equal = 0
        path = pathlib.Path(self.documents_directory) / shard.name
        for first, batch in _batches(read_shard(path)):
            texts += [_text_hash(document.text) for document in batch]
            for position, match in self._matches(held_out, batch):
                document, other = batch[position], match.document
                equal += document.text == other.text
                counts[document.corpus, match.split, other.corpus] += 1
                lines.append(_line(first + position, document, match))
            report(len(batch))
        _write_texts(stage.directory, index, texts)
        pairs = [[*names, count] for names, count in sorted(counts.items())]
        facts = {"withdrawn": len(lines), "equal": equal, "pairs": pairs, "texts": len(texts)}
        name = shard_name(WITHDRAWN, index, ".jsonl")
        stage.write_file(name, lambda file: file.writelines(lines), facts)
        return len(lines)

    def _matches(
        self, held_out: "HeldOut", batch: Sequence[Document]
    ) -> Iterator[tuple[int, "Match"]]:
        """Places of the documents that are withdrawn, each with its nearest held-out document."""
        words = [minhash.words_of(document.text) for document in batch]
        places, bands = sketch_words(words, self.config.sketch)
        pairs = held_out.table.candidates(bands)
        for row in np.unique(pairs[:, 0]).tolist():
            grams = minhash.grams(words[places[row]])
            # The first of several that are equally near.
            best = max(
                (held_out.match(number, grams) for number in pairs[pairs[:, 0] == row, 1].tolist()),
                key=lambda match: match.similarity,
            )
            assert self.config.threshold is not None
            if best.similarity >= self.config.threshold:
                yield places[row], best


@dataclasses.dataclass(frozen=True)
class Match:
    """A held-out document, its split, and how similar a training document is to it."""

    split: str
    document: Document
    similarity: float


class HeldOut:
    """The held-out documents: their bands in memory, their texts on the disk.

    Attributes:
      table: bands of each.
    """

    def __init__(self, path: pathlib.Path, held_out: Sequence[tuple[str, str]]) -> None:
        """Reads what `prepare_leakage` wrote."""
        keys, owners, places = mapped_arrays.mapped(path, 3)
        self.table = minhash.BandTable(keys, owners)
        splits = [
            (name, pathlib.Path(folder), [shard.name for shard in Manifest.read(folder).shards])
            for name, folder in held_out
        ]
        # No method of its own, which would keep this object, and its open files, until the next collection.
        self._read = functools.lru_cache(maxsize=64)(functools.partial(_held_out, splits, places))

    def match(self, number: int, own: set[str]) -> Match:
        """Compares some grams with those of a document."""
        split, document, theirs = self._read(number)
        return Match(split, document, minhash.jaccard(own, theirs))


def _held_out(
    splits: Sequence[tuple[str, pathlib.Path, Sequence[str]]], places: np.ndarray, number: int
) -> tuple[str, Document, set[str]]:
    """Split, document and grams of a held-out document."""
    split, shard, offset = places[number].tolist()
    name, folder, shards = splits[split]
    with open(folder / shards[shard], "rb") as file:
        file.seek(offset)
        document = Document(**json.loads(file.readline()))
    return name, document, minhash.grams(minhash.words_of(document.text))


def sketch_words(
    words: Sequence[Sequence[str]], sketch: minhash.Sketch
) -> tuple[list[int], np.ndarray]:
    """The places of those texts that have words, and their bands."""
    places = [row for row, values in enumerate(words) if values]
    numbers = (minhash.word_numbers(words[row]) for row in places)
    return places, sketch(minhash.gram_hashes(values) for values in numbers)


def kept_documents(
    documents_directory: Path, index: int, leakage_directory: Path | None
) -> Iterator[Document]:
    """The documents of a shard, without those that are withdrawn."""
    for line in kept_lines(documents_directory, index, leakage_directory):
        yield Document(**json.loads(line))


def kept_lines(
    documents_directory: Path, index: int, leakage_directory: Path | None
) -> Iterator[bytes]:
    """The lines of a documents shard, without those that are withdrawn."""
    shard = Manifest.read(documents_directory).shards[index]
    gone: set[int] = set()
    if leakage_directory is not None:
        gone = {line["line"] for line in read_withdrawn(leakage_directory, index)}
    with open(pathlib.Path(documents_directory) / shard.name, "rb") as file:
        for number, line in enumerate(file):
            if number not in gone:
                yield line


def kept_counts(documents: Manifest, leakage: Manifest | None) -> list[int]:
    """How many documents of each shard there are, without those that are withdrawn."""
    if leakage is not None:
        return leakage.fact("shards")
    return [shard["documents"] for shard in documents.fact("shards")]


def read_withdrawn(directory: Path, index: int) -> Iterator[dict[str, Any]]:
    """The lines about one shard: line (in it), id, corpus, similarity, and held_out: split, corpus, id."""
    with open(pathlib.Path(directory) / shard_name(WITHDRAWN, index, ".jsonl"), "rb") as file:
        for line in file:
            yield json.loads(line)


def _line(number: int, document: Document, match: Match) -> bytes:
    """What the report says of a withdrawn document."""
    other = match.document
    fields = {
        "line": number,
        "id": document.id,
        "corpus": document.corpus,
        "similarity": match.similarity,
        "equal": document.text == other.text,
        "held_out": {"split": match.split, "corpus": other.corpus, "id": other.id},
    }
    return json.dumps(fields, ensure_ascii=False).encode() + b"\n"


def _write_table(
    path: pathlib.Path, held_out: Sequence[tuple[str, str]], sketch: minhash.Sketch
) -> None:
    """Writes the bands of all held-out documents, and the place of each; of equal texts the first."""
    bands = [np.zeros((0, sketch.bands), np.uint64)]
    places: list[tuple[int, int, int]] = []
    hashes: set[int] = set()
    for split, (_, folder) in enumerate(held_out):
        for shard, entry in enumerate(Manifest.open(folder, "documents").shards):
            lines = _lines(pathlib.Path(folder) / entry.name)
            for _, batch in _batches(lines):
                new = [(offset, text) for offset, text in batch if _is_new(hashes, text)]
                words = [minhash.words_of(text) for _, text in new]
                rows, band_keys = sketch_words(words, sketch)
                places += [(split, shard, new[row][0]) for row in rows]
                bands.append(band_keys)
    table = minhash.BandTable.of(np.concatenate(bands))
    places_array = np.array(places, np.int64).reshape(-1, 3)
    mapped_arrays.write(path, (table.keys, table.owners, places_array))


def _is_new(hashes: set[int], text: str) -> bool:
    """Whether a text has not been seen; from now on it has."""
    number = _text_hash(text)
    if number in hashes:
        return False
    hashes.add(number)
    return True


def _lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Where each document of a shard begins, and its text."""
    offset = 0
    with open(path, "rb") as file:
        for line in file:
            yield offset, json.loads(line)["text"]
            offset += len(line)


def _batches(items: Iterator[Any]) -> Iterator[tuple[int, list[Any]]]:
    """Items in lists, each with the number of its first."""
    batch: list[Any] = []
    first = 0
    for item in items:
        batch.append(item)
        if len(batch) == _BATCH:
            yield first, batch
            first, batch = first + len(batch), []
    if batch:
        yield first, batch


def _text_hash(text: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _write_texts(folder: pathlib.Path, index: int, texts: Sequence[int]) -> None:
    """Keeps the hashes of a shard's texts, ascending, until duplicates are counted."""
    files.write_arrays(folder / f"{_TEXTS}-{index:05d}.npy", [np.sort(np.array(texts, np.uint64))])


def _count_duplicates(folder: pathlib.Path, shards: int) -> int:
    """How many texts are those of another document, in memory that does not grow with them."""
    paths = [folder / f"{_TEXTS}-{i:05d}.npy" for i in range(shards)]
    total = sum(header_of(path).shape[0] for path in paths)
    ranges = 1 + total // _RANGE
    edges = np.array([(1 << 64) * i // ranges for i in range(1, ranges)], np.uint64)
    # One file is open at a time: there may be more of them than a process may open.
    cuts = []
    for path in paths:
        values = np.load(path)
        cuts.append([0, *np.searchsorted(values, edges).tolist(), len(values)])
    distinct = 0
    for i in range(ranges):
        part = [_between(path, *cut[i : i + 2]) for path, cut in zip(paths, cuts)]
        distinct += len(np.unique(np.concatenate(part)))
    return total - distinct


def _between(path: pathlib.Path, first: int, last: int) -> np.ndarray:
    """Some values of a file."""
    return np.array(np.load(path, mmap_mode="r")[first:last])


def _facts(
    stage: Stage, names: Sequence[str], sizes: Sequence[int], config: LeakageConfig
) -> dict[str, Any]:
    """What the manifest states, from the shards' facts."""
    shards = [stage.shard_facts(name) for name in names]
    pairs: Counter[tuple[str, str, str]] = Counter()
    for shard in shards:
        for corpus, split, other, count in shard["pairs"]:
            pairs[corpus, split, other] += count
    keys = ("corpus", "split", "held_out_corpus")
    _, owners, _ = mapped_arrays.mapped(stage.directory / _TABLE, 3)
    sketch, threshold = config.sketch, config.threshold
    assert threshold is not None
    return {
        "documents": sum(sizes),
        "withdrawn": sum(shard["withdrawn"] for shard in shards),
        "equal": sum(shard["equal"] for shard in shards),
        "duplicates": _count_duplicates(stage.directory, len(names)) if names else 0,
        "held_out": owners.shape[1],
        "shards": [size - shard["withdrawn"] for size, shard in zip(sizes, shards, strict=True)],
        "pairs": [
            dict(zip(keys, names_of)) | {"documents": n} for names_of, n in sorted(pairs.items())
        ],
        "missed": (1 - threshold**sketch.rows) ** sketch.bands,
    }
