"""How `launch.prepare` keeps held-out text out of the training split, and its report of it.

W/leakage/withdrawn-00000.jsonl ...   each withdrawn document, for which held-out one, how similar
W/duplicates/found-00000.npy ...      held-out chunks that remain in the training split
W/leakage.json                        the sums of both, and the withdrawn documents, nearest first
"""

import pathlib
from typing import Any

from data_pipelines.artefacts.manifest import MANIFEST_FILE, Manifest
from data_pipelines.chunk_database.near_duplicates import KIND as DUPLICATES
from data_pipelines.chunk_database.near_duplicates import prepare_duplicates
from data_pipelines.corpora import SPLITS
from data_pipelines.documents.documents import read_documents, read_shard
from data_pipelines.leakage import minhash
from data_pipelines.leakage.near_documents import KIND, prepare_leakage, read_withdrawn
from data_pipelines.retriever.sampling import sample_ids
from data_pipelines.workdir.preparation import Preparation
from retro_jax.errors import UserError
from retro_jax.storage import files

HELD_OUT = tuple(split for split in SPLITS if split != "train")
REPORT = "leakage.json"
_LISTED = 10_000  # documents in the report; all of them are in W/leakage


def withdraw(p: Preparation, place: pathlib.Path) -> Manifest | None:
    """Finds what is withdrawn of the training documents of W or of a revision; None if not asked for.

    Args:
      p: W and every setting.
      place: W, or the folder of the revision.
    """
    if p.config.leakage.threshold is None:
        return None
    documents = p.directory / "documents"
    held_out = {split: documents / split for split in HELD_OUT}
    training = place / "documents" / "train"
    return prepare_leakage(place / KIND, training, held_out, p.config.leakage, runner=p.runner)


def refuse_late(directory: pathlib.Path) -> None:
    """Raises if W's training documents are cut into chunks already, without having been compared."""
    chunks = directory / "chunks" / "train"
    if (directory / KIND / MANIFEST_FILE).is_file() or not (chunks / MANIFEST_FILE).is_file():
        return
    if KIND not in Manifest.read(chunks).parents:
        raise UserError(
            f"{chunks} was made of documents that were not compared with held-out ones: expected"
            " LeakageConfig.threshold = None, or another directory"
        )


def directory_of(p: Preparation, place: pathlib.Path) -> pathlib.Path | None:
    """The directory of the list of withdrawn documents; None without a threshold."""
    return None if p.config.leakage.threshold is None else place / KIND


def count(p: Preparation, place: pathlib.Path) -> Manifest:
    """Counts the near-duplicate chunks of W's training split, or of what a revision adds to it."""
    chunks = p.directory / "chunks"
    held_out = {split: chunks / split for split in HELD_OUT}
    training = place / "chunks" / "train"
    return prepare_duplicates(
        place / DUPLICATES, training, held_out, p.config.leakage, runner=p.runner
    )


def count_added(p: Preparation, place: pathlib.Path) -> None:
    """Counts those of a revision and prints them, if leakage is looked for."""
    if p.config.leakage.threshold is not None:
        p.report(told_of_chunks(count(p, place)))


def told(manifest: Manifest) -> str:
    """What was withdrawn, in a line."""
    threshold, facts = manifest.settings["threshold"], manifest.facts
    pairs = [
        f"{pair['documents']:,} of {pair['corpus']} near {pair['split']} {pair['held_out_corpus']}"
        for pair in facts["pairs"]
    ]
    why = f" ({'; '.join(pairs)}; {facts['equal']:,} equal)" if pairs else ""
    return (
        f"{facts['withdrawn']:,} of {facts['documents']:,} training documents withdrawn, 13-gram"
        f" similarity from {threshold:g}{why}; {facts['duplicates']:,} are equal to others of the split"
    )


def told_of_chunks(manifest: Manifest) -> str:
    """How many chunks are near-duplicates, in a line."""
    shares = [
        f"{side['near']:,} of {side['chunks']:,} {split} chunks ({side['equal']:,} equal)"
        for split, side in manifest.fact("held_out").items()
    ]
    near, every = manifest.fact("near"), manifest.fact("chunks")
    return (
        f"{' and '.join(shares)} have a near-duplicate among training chunks: {near:,} of {every:,}"
    )


def write_report(directory: pathlib.Path) -> None:
    """Writes W/leakage.json of what is there: sums, and the withdrawn documents, nearest first."""
    report: dict[str, Any] = {}
    if (directory / KIND / MANIFEST_FILE).is_file():
        manifest = Manifest.read(directory / KIND)
        report |= {"settings": manifest.settings, "documents": dict(manifest.facts)}
        del report["documents"]["shards"]
        lines = [
            {name: value for name, value in line.items() if name != "line"}
            for i in range(len(manifest.shards))
            for line in read_withdrawn(directory / KIND, i)
        ]
        lines.sort(key=lambda line: (-line["similarity"], line["corpus"], line["id"]))
        report["withdrawn"] = lines[:_LISTED]
    if (directory / DUPLICATES / MANIFEST_FILE).is_file():
        report["chunks"] = Manifest.read(directory / DUPLICATES).facts
    data = files.to_json(report)
    path = directory / REPORT
    if not path.is_file() or path.read_bytes() != data:
        files.write_atomically(path, data)


def check(directory: pathlib.Path, place: pathlib.Path, sample: int, seed: int) -> str:
    """Compares some withdrawn documents again with the held-out ones that they are withdrawn for.

    Args:
      directory: W.
      place: the list, of W or of a revision.
      sample: how many at most.
      seed: which ones.

    Raises:
      UserError: the similarity that is stated is not that of the texts.
    """
    manifest = Manifest.read(place)
    numbers = set(sample_ids(manifest.fact("withdrawn"), sample, seed).tolist())
    every = ((i, line) for i in range(len(manifest.shards)) for line in read_withdrawn(place, i))
    lines = [pair for number, pair in enumerate(every) if number in numbers]
    sources = {tuple(line["held_out"].values()) for _, line in lines}
    texts = {}
    for split in HELD_OUT:
        folder = directory / "documents" / split
        for document in read_documents(folder, Manifest.read(folder)):
            if (split, document.corpus, document.id) in sources:
                texts[split, document.corpus, document.id] = document.text
    training = place.parent / "documents" / "train"
    shards = Manifest.read(training).shards
    for shard in sorted({i for i, _ in lines}):
        of_shard = {line["line"]: line for i, line in lines if i == shard}
        for number, document in enumerate(read_shard(training / shards[shard].name)):
            if number in of_shard:
                other = texts.get(tuple(of_shard[number]["held_out"].values()), "")
                _check_line(place, of_shard[number], document.text, other)
    return f"{len(lines)} withdrawn documents compared, equal"


def _check_line(path: pathlib.Path, line: dict[str, Any], text: str, other: str) -> None:
    """Raises unless two texts are as similar as a line says."""
    similarity = minhash.jaccard(*(minhash.grams(minhash.words_of(each)) for each in (text, other)))
    if similarity != line["similarity"]:
        raise UserError(
            f"{path}: the document {line['id']!r} is said to be {line['similarity']:g} similar to"
            f" {line['held_out']['id']!r}: expected {similarity:g}"
        )
