"""Texts that models are compared on: WikiText-103, the Pile, summaries, LAMBADA, and any JSON lines.

A slice is prepared as one split of documents is, beside W's own, with W's tokeniser and retrieval
database:

    W/slices/NAME/source.json   size and hash of the file that it was read from
    W/slices/NAME/documents     what is scored, sorted as W's documents are
    W/slices/NAME/measures      [documents, 4] int64: denominators, and where in the text scoring begins
    W/slices/NAME/chunks, W/slices/NAME/neighbours
"""

import dataclasses
import hashlib
import json
import logging
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from data_pipelines.artefacts.manifest import Manifest, Path, shard_name
from data_pipelines.artefacts.stage import Stage
from data_pipelines.corpora import CorpusConfig, Reading
from data_pipelines.corpora.document import Record, check_unicode
from data_pipelines.corpora.document import short_label as pile_subset
from data_pipelines.corpora.json_lines import read_json_objects
from data_pipelines.corpora.parquet import read_parquet_objects
from data_pipelines.corpora.sources import find_files, open_file
from data_pipelines.corpora.wikitext import read_articles
from data_pipelines.documents.documents import KIND, stable_hash
from data_pipelines.documents.external_sort import SORT_BYTES, Entry, Runs, RunWriter, read_lines
from data_pipelines.evaluation.detokenise import detokenise
from data_pipelines.evaluation.text_files import files_to_score
from retro_jax.errors import UserError
from retro_jax.report.views import PublishedFigures
from retro_jax.storage import files

_logger = logging.getLogger(__name__)
MEASURES = "measures"
SOURCE_FILE = "source.json"
MEASURE_NAMES = ("bytes", "words", "lines", "scored_from")
_SHARD_BYTES = 64 << 20
_LOOK = 256  # documents between looks at a shard's size
_SPILL = ".spill"
_READ = 1 << 20  # bytes of a source that are hashed at once


@dataclasses.dataclass(frozen=True)
class SliceConfig:
    """Which texts a slice is made of.

    Attributes:
      name: of the slice: one of TEXTS, else any name for JSON lines with a text field.
      path: the file or folder; None for a slice that was prepared before.
      subsets: of the Pile: these only. () for all.
      max_documents: of each corpus, the first so many in the order of a hash of their ids.
      skip_bad_documents: count documents that cannot be read, and go on.
    """

    name: str
    path: str | None = None
    subsets: tuple[str, ...] = ()
    max_documents: int | None = None
    skip_bad_documents: bool = False

    @property
    def key(self) -> str:
        """The name of its directory, and of the split in results."""
        suffix = [] if self.max_documents is None else [f"first{self.max_documents}"]
        return "-".join([self.name, *self.subsets, *suffix])

    @property
    def settings(self) -> dict[str, Any]:
        """The settings in a manifest: the path may be gone after reading; facts count bad documents."""
        return {name: getattr(self, name) for name in ("name", "subsets", "max_documents")}


@dataclasses.dataclass(frozen=True)
class Text:
    """A document of a slice.

    Attributes:
      id, corpus, text: as every document has.
      bytes, words, lines: denominators, of what is scored, in the text's original form.
      scored_from: bytes of the text before what is scored: an article before its summary.
    """

    id: str
    corpus: str
    text: str
    bytes: int
    words: int
    lines: int
    scored_from: int = 0


def prepare_texts(directory: Path, config: SliceConfig) -> Manifest:
    """Writes DIRECTORY/documents and DIRECTORY/measures, unless they are there.

    Returns:
      The manifest of the documents, as `prepare_documents` would have made it.

    Raises:
      UserError: no path for a slice that is not there yet, a bad or empty file, an unknown subset, or
        another file than the slice was read from.
    """
    folder = pathlib.Path(directory)
    source = check_source(folder, config)
    done = Stage(folder / KIND, KIND, config.settings, claim=False)
    if done.done:
        return _told(config, done.manifest())
    if config.path is None:
        raise UserError(
            f"the slice {config.key} is not prepared: expected --slice_paths={config.name}=PATH"
        )
    runs, reading = _fill(folder / _SPILL, config)
    files.write_atomically(folder / SOURCE_FILE, files.to_json(source))
    done.claim()
    measures: list[list[int]] = []
    shards: list[dict[str, Any]] = []
    for corpus in runs.corpora:
        lines: list[bytes] = []
        for number, line in enumerate(_sorted_lines(runs, corpus, config.max_documents)):
            text = Text(**json.loads(line))
            measures.append([getattr(text, name) for name in MEASURE_NAMES])
            lines.append(_document_line(text))
            if number % _LOOK == 0 and sum(map(len, lines)) >= _SHARD_BYTES:
                shards.append(_write_shard(done, len(shards), corpus, lines))
                lines = []
        if lines:
            shards.append(_write_shard(done, len(shards), corpus, lines))
    stage = Stage(folder / MEASURES, MEASURES, {"names": MEASURE_NAMES})
    if not stage.done:
        name = shard_name(MEASURES, 0)
        stage.write_array(name, np.array(measures, np.int64))
        stage.finish({"documents": len(measures)}, [name])
    shutil.rmtree(folder / _SPILL, ignore_errors=True)
    facts = {
        "documents": len(measures),
        "bytes": sum(shard["bytes"] for shard in shards),
        "shards": shards,
        "reading": reading,
    }
    names = [shard_name(KIND, i, ".jsonl") for i in range(len(shards))]
    return _told(config, done.finish(facts, names))


def _told(config: SliceConfig, documents: Manifest) -> Manifest:
    """Warns of documents that were left out, each time that the others are scored."""
    for counts in documents.facts.get("reading", {}).values():
        _logger.warning(
            "the slice %s is without %d bad documents: %s",
            *(config.key, counts["bad"], counts["first_bad"]),
        )
    return documents


def check_source(directory: Path, config: SliceConfig) -> dict[str, Any]:
    """Refuses a path that does not have what a slice was read from.

    Slices that were prepared before sources were recorded, and those without a path, are not compared.

    Args:
      directory: of the slice. config: which text.

    Returns:
      What is recorded of the path: its last part, its number of files, their size and SHA-256.

    Raises:
      UserError: there is no such path, or it has other content; it names both.
    """
    if config.path is None:
        return {}
    source = _source(config.path)
    path = pathlib.Path(directory) / SOURCE_FILE
    recorded = files.read_json(path) if path.is_file() else source
    if any(recorded[name] != source[name] for name in ("size", "sha256")):
        raise UserError(
            f"{config.path} has {_described(source)}, but the slice {config.key} was read from"
            f" {recorded['name']!r} of {_described(recorded)} ({path}): expected that, or another name"
        )
    return source


def _described(source: Mapping[str, Any]) -> str:
    """Size and hash of a source."""
    return f"{source['size']:,} bytes with SHA-256 {source['sha256'][:12]}"


def _source(path: str) -> dict[str, Any]:
    """What identifies a file, or all files of a folder."""
    corpus = CorpusConfig("slice", "text", path, include=("*",))
    lines, digests = [], []
    for file in find_files(path, corpus):
        digest = hashlib.sha256()
        with open_file(file) as opened:
            while block := opened.read(_READ):
                digest.update(block)
        digests.append(digest.hexdigest())
        lines.append((file.name, file.size, digests[-1]))
    several = hashlib.sha256(files.to_json(sorted(lines))).hexdigest()
    return {
        "name": pathlib.PurePosixPath(path).name,
        "files": len(lines),
        "size": sum(size for _, size, _ in lines),
        "sha256": digests[0] if len(digests) == 1 else several,
    }


def read_measures(directory: Path) -> np.ndarray:
    """[documents, 4] int64 of a prepared slice, in the order of MEASURE_NAMES."""
    folder = pathlib.Path(directory) / MEASURES
    Manifest.open(folder, MEASURES)
    return np.load(folder / shard_name(MEASURES, 0))


def read_texts(config: SliceConfig, reading: Reading) -> Iterator[Text]:
    """The documents of a slice's file, in the file's order."""
    return evaluation_text(config.name).read(config, reading)


def _fill(folder: pathlib.Path, config: SliceConfig) -> tuple[Runs, dict[str, Any]]:
    """The documents by corpus, sorted on disk; what was left out, where anything was."""
    subsets: set[str] = set()
    shutil.rmtree(folder, ignore_errors=True)
    writer = RunWriter(folder, folder, SORT_BYTES)
    reading = Reading(config.skip_bad_documents)
    for text in read_texts(config, reading):
        subsets.add(text.corpus)
        if config.subsets and text.corpus not in config.subsets:
            continue
        line = json.dumps(dataclasses.asdict(text), ensure_ascii=False).encode() + b"\n"
        order = stable_hash(text.id, "order")
        writer.add(Entry(text.corpus, order, None, "test", text.bytes, line))
    writer.flush()
    if reading.counts["empty"]:
        _logger.warning("%s: %d documents without text", config.path, reading.counts["empty"])
    unknown = sorted(set(config.subsets) - subsets)
    if unknown or not writer.runs:
        names = ", ".join(sorted(subsets)) or "nothing"
        subject = f"subset {unknown[0]!r}" if unknown else "documents"
        bad = f"; {reading.counts['bad']} are bad: {reading.first_bad}" if reading.first_bad else ""
        raise UserError(f"{config.path} has no {subject}: it holds {names}{bad}")
    left_out = {"bad": reading.counts["bad"], "first_bad": reading.first_bad}
    return Runs([folder]), {config.name: left_out} if reading.first_bad else {}


def _sorted_lines(runs: Runs, corpus: str, most: int | None) -> Iterator[bytes]:
    """The lines of a corpus in order, or the first of them."""
    limit = sys.maxsize if most is None else most
    for rows, _ in runs.sorted(corpus):
        for start in range(0, min(limit, len(rows)), _LOOK):
            yield from read_lines(runs.stems, rows[:limit][start : start + _LOOK])
        limit -= min(limit, len(rows))


def _document_line(text: Text) -> bytes:
    """A line of a documents shard."""
    fields = {"id": text.id, "corpus": text.corpus, "text": text.text}
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _write_shard(stage: Stage, number: int, corpus: str, lines: list[bytes]) -> dict[str, Any]:
    """Writes a shard of one corpus; what the manifest says of it."""

    def write(file: BinaryIO) -> None:
        file.writelines(lines)

    name = shard_name(KIND, number, ".jsonl")
    if stage.missing([name]):
        stage.write_file(name, write)
    return {"corpus": corpus, "documents": len(lines), "bytes": sum(map(len, lines))}


def _of_text(name: str, corpus: str, text: str) -> Text:
    """A document that is scored whole."""
    counts = (len(text.encode()), len(text.split()), text.count("\n"))
    return Text(name, corpus, text, *counts)


def _objects(
    config: SliceConfig, reading: Reading, *fields: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Ids and objects of JSON lines, each with these fields of text."""
    include = (*CorpusConfig("slice", "jsonl", config.path).included, "*.json.gz", "*.parquet")
    corpus = CorpusConfig("slice", "jsonl", config.path, include, text_field=fields[0])
    for file in files_to_score(corpus):
        read = read_parquet_objects if file.suffix == ".parquet" else read_json_objects
        for record, values in read(corpus, file, reading):
            values[fields[0]] = record.text  # as it was decoded
            lacking = [field for field in fields if not isinstance(values.get(field), str)]
            if lacking:
                reading.bad(f"{record.place} has no text in {lacking[0]!r}: expected a string")
            elif not _is_unicode(record, [values[field] for field in fields[1:]], reading):
                continue
            elif values[fields[-1]].strip():  # what is scored
                yield record.id, values
            else:
                reading.counts["empty"] += 1


def _is_unicode(record: Record, more: Sequence[str], reading: Reading) -> bool:
    """Whether a document and its other fields can be written as UTF-8."""
    records = (dataclasses.replace(record, text=text) for text in (record.text, *more))
    return all(check_unicode(one, record.place, reading) for one in records)


def _plain(config: SliceConfig, reading: Reading) -> Iterator[Text]:
    """JSON lines with a text each, as C4's."""
    for name, record in _objects(config, reading, "text"):
        yield _of_text(name, config.name.replace(".", "_"), record["text"])


def _wikitext(config: SliceConfig, reading: Reading) -> Iterator[Text]:
    """Articles of a wiki.*.tokens file as they are."""
    corpus = CorpusConfig("wikitext", "wikitext", config.path)
    for file in files_to_score(corpus):
        for record in read_articles(corpus, file, reading):
            if record.text.strip():
                yield _of_text(record.id, config.name, record.text)


def _detokenised(config: SliceConfig, reading: Reading) -> Iterator[Text]:
    """The same articles as prose, with the words and line ends of the original."""
    for text in _wikitext(config, reading):
        prose = detokenise(text.text)
        yield dataclasses.replace(text, text=prose, bytes=len(prose.encode()))


def _pile(config: SliceConfig, reading: Reading) -> Iterator[Text]:
    """The Pile's JSON lines, a corpus for each of its sets."""
    for name, record in _objects(config, reading, "text"):
        meta = record.get("meta")
        subset = meta.get("pile_set_name") if isinstance(meta, dict) else None
        if not isinstance(subset, str):
            reading.bad(f"{name} has no meta.pile_set_name: expected the Pile's JSON lines")
            continue
        yield _of_text(name, pile_subset(subset), record["text"])


def _summaries(config: SliceConfig, reading: Reading) -> Iterator[Text]:
    """Articles with their summaries, of which the summary is scored."""
    for name, record in _objects(config, reading, "article", "summary"):
        before, summary = f"{record['article']}\n\nTL;DR:\n\n", record["summary"]
        whole = _of_text(name, config.name, summary)
        start = len(before.encode())
        yield dataclasses.replace(whole, text=before + summary, scored_from=start)


def _lambada(config: SliceConfig, reading: Reading) -> Iterator[Text]:
    """Passages of which the last word is scored."""
    for name, record in _objects(config, reading, "text"):
        text = record["text"].rstrip()
        before, _, word = text.rpartition(" ")
        start = len(before.encode()) + 1 if before else 0
        yield Text(name, config.name, text, len(word.encode()), 1, 0, start)


@dataclasses.dataclass(frozen=True)
class EvaluationText:
    """A text that models are compared on: what launch.evaluate and its tables need to know of it.

    Attributes:
      name: of the slice. read: gives the documents of its file.
      measure: a further figure of results: "last_word_accuracy", the share of documents of which every
        scored token is the model's most likely one; None for none.
      published: the paper's figures. subsets: whether the slice NAME:CORPUS is one of its corpora.
    """

    name: str
    read: Callable[[SliceConfig, Reading], Iterator[Text]]
    measure: str | None = None
    published: PublishedFigures | None = None
    subsets: bool = False


def evaluation_text(name: str) -> EvaluationText:
    """The row of a slice, or of a split by its key; one without figures where TEXTS has none."""
    name = name.partition("-")[0]
    return TEXTS.get(name) or EvaluationText(name, _plain)


_WIKITEXT103 = PublishedFigures(
    title="WikiText-103",
    label="perplexity by word",
    figure="word_perplexity",
    layout="sets",
    columns=("validation", "test"),
    rows={
        "baseline transformer": (21.53, 22.96),
        "kNN-LM, Wikipedia": (18.52, 19.54),
        "RETRO, Wikipedia": (18.46, 18.97),
        "RETRO, C4": (12.87, 10.23),
        "RETRO, MassiveText (all)": (3.21, 3.92),
    },
    words={"validation": 217_646, "test": 245_569},
)
_PILE = PublishedFigures(
    title="the Pile",
    label="bits per byte",
    figure="bits_per_byte",
    layout="corpora",
    columns=("baseline 7B", "RETRO 7.5B"),
    rows={
        "arxiv": (0.742, 0.714),
        "books3": (0.792, 0.653),
        "dm_mathematics": (1.177, 1.164),
        "freelaw": (0.576, 0.499),
        "github": (0.420, 0.199),
        "gutenberg": (0.803, 0.400),
        "hackernews": (0.971, 0.860),
        "pile_cc": (0.771, 0.626),
        "pubmed_central": (0.588, 0.419),
        "stackexchange": (0.714, 0.624),
        "ubuntu_irc": (1.200, 1.178),
        "uspto": (0.603, 0.583),
    },
)
_LAMBADA = PublishedFigures(
    title="LAMBADA",
    label="accuracy of the last word",
    figure="last_word_accuracy",
    layout="sizes",
    columns=("baseline", "on"),
    rows={
        "172m": (0.42, 0.52),
        "425m": (0.51, 0.60),
        "1.5b": (0.61, 0.67),
        "7.5b": (0.69, 0.73),
    },
)

_ROWS = (
    EvaluationText("wikitext103", _wikitext, published=_WIKITEXT103),
    EvaluationText("wikitext103_detokenised", _detokenised, published=_WIKITEXT103),
    EvaluationText("pile", _pile, published=_PILE, subsets=True),
    EvaluationText("curation", _summaries),
    EvaluationText("lambada", _lambada, measure="last_word_accuracy", published=_LAMBADA),
)
TEXTS = {text.name: text for text in _ROWS}
