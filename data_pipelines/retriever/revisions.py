"""A retrieval database that grows and shrinks: revisions, each on top of the one before.

    W/chunks/train  W/keys/train  W/index            revision 0, what `prepare` made first
    W/revisions/00001/chunks/train  keys  index          what revision 1 adds, nothing where it only removes
    W/revisions/00001/database                           published last: which documents are removed, the sums
    W/revisions/00001/neighbours/SPLIT                   the tables against revision 1

Files of earlier revisions are never written to, so a run continues with the revision it began with,
and removing the newest folder goes back. Chunks of revision 0 keep their ids, and the chunks of later
revisions follow; documents are numbered in the same way. Removed documents keep their numbers.

A compaction is a revision too: it has every chunk of the revision before that was not removed, in one
database, and is read without those before. Later revisions add to it.
"""

import dataclasses
import itertools
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.artefacts.manifest import (
    MANIFEST_FILE,
    STAGE_FILE,
    Manifest,
    Path,
    is_purged,
)
from data_pipelines.artefacts.sharded_rows import ShardedRows
from data_pipelines.chunk_database.database import KIND as CHUNKS_KIND
from data_pipelines.chunk_database.database import ChunkDatabase, DocumentRecord
from data_pipelines.retriever.index import Index, RoutedShards
from data_pipelines.retriever.index_shard import IndexShard
from data_pipelines.retriever.keys import KIND as KEYS_KIND
from data_pipelines.retriever.keys import Keys
from retro_jax.errors import UserError
from retro_jax.storage import files

KIND = "database"
FOLDER = "revisions"
REMOVED_FILE = "removed.npy"
KEYS = "keys/train"
QUERY_KEYS = "keys/queries"  # of the training split, where queries have another prefix
COMPACTION_FILE = "compaction.npy"  # in a revision's folder, until that compaction is published
REMOVAL_FILE = "removal.npy"  # there, until that --append is published: numbers of what it removes


def folder_of(workdir: Path, revision: int) -> pathlib.Path:
    """The folder of a revision: W itself for revision 0."""
    folder = pathlib.Path(workdir)
    return folder / FOLDER / f"{revision:05d}" if revision else folder


def latest(workdir: Path) -> int:
    """The newest published revision."""
    revision = 0
    while (folder_of(workdir, revision + 1) / KIND / MANIFEST_FILE).is_file():
        revision += 1
    return revision


def base_of(workdir: Path, revision: int) -> int:
    """The revision with which reading one begins: the newest compaction up to it, or 0."""
    for r in range(revision, 0, -1):
        if compacted(Manifest.read(folder_of(workdir, r) / KIND)):
            return r
    return 0


def compacted(database: Manifest) -> bool:
    """Whether a database is a compaction of the revision before."""
    return bool(database.facts.get("compacted", False))


def purged(workdir: Path, revision: int) -> bool:
    """Whether what a revision is read from was deleted."""
    base = folder_of(workdir, base_of(workdir, revision))
    return is_purged(base / CHUNKS_KIND / "train")


def readable(workdir: Path, revision: int) -> int:
    """A revision, or its compaction if it was purged: batches are the same.

    Raises:
      UserError: it was purged, and was compacted together with later ones.
    """
    if not purged(workdir, revision):
        return revision
    following = revision + 1
    is_next = following <= latest(workdir) and base_of(workdir, following) == following
    if not is_next or purged(workdir, following):
        raise UserError(
            f"revision {revision} of {workdir} was purged: expected a run of revision"
            f" {base_of(workdir, latest(workdir)) - 1} or later"
        )
    return following


def is_begun(folder: pathlib.Path) -> bool:
    """Whether --append or --compact has made anything of a revision that the next run resumes.

    An --append that was refused, or killed before any split was claimed, has read its corpora and
    decided nothing yet.
    """
    splits = [path for path in (folder / "documents").glob("*") if not path.name.startswith(".")]
    claims = [path / name for path in splits for name in (STAGE_FILE, MANIFEST_FILE)]
    return any(path.is_file() for path in [*claims, folder / COMPACTION_FILE])


def clear_unfinished(workdir: Path, *, appending: bool = False) -> None:
    """Removes what a killed removal or a refused --append left of the next revision.

    What --append or --compact began stays, and the next run resumes.

    Args:
      workdir: W. appending: whether documents come now; what was read of them before stays.
    """
    folder = folder_of(workdir, latest(workdir) + 1)
    was_read = appending and (folder / "documents").is_dir()
    if folder.is_dir() and not was_read and not is_begun(folder):
        shutil.rmtree(folder)


def checked(workdir: Path, revision: int) -> int:
    """A revision that is there.

    Raises:
      UserError: it is gone, or never was.
    """
    newest = latest(workdir)
    if not 0 <= revision <= newest:
        have = f"the revisions 0 to {newest}" if newest else "revision 0 alone"
        raise UserError(f"revision {revision}: {workdir} has {have}")
    return revision


def find(workdir: Path, digest: str) -> int:
    """The revision whose database has this hash; a UserError if there is none."""
    for revision in range(1, latest(workdir) + 1):
        if Manifest.read(folder_of(workdir, revision) / KIND).hash == digest:
            return revision
    raise UserError(
        f"{pathlib.Path(workdir) / FOLDER} holds no database {digest[:12]}: expected the revision that"
        " was read before"
    )


def open_database(
    workdir: Path, revision: int | None = None, *, verify: bool = False
) -> ChunkDatabase:
    """Opens the retrieval database of a workdir.

    Args:
      workdir: where `prepare` put it.
      revision: which one; None for the newest.
      verify: hash every file again.

    Raises:
      UserError: something is missing, damaged, or does not belong to the rest.
    """
    folder = pathlib.Path(workdir)
    revision = latest(folder) if revision is None else checked(folder, revision)
    first = base_of(folder, revision)
    base = ChunkDatabase.open(folder_of(folder, first) / "chunks" / "train", verify=verify)
    if not revision:
        return base
    parts, previous = [base], base.manifest
    if first:
        path = folder_of(folder, first) / KIND
        previous = Manifest.open(path, KIND, verify=verify)
        _check_parent(previous, "chunks", path, base.manifest, base.directory)
    for r in range(first + 1, revision + 1):
        path = folder_of(folder, r)
        manifest = Manifest.open(path / KIND, KIND, verify=verify)
        if manifest.parents["previous"] != previous.hash:
            raise UserError(
                f"{path / KIND} and {folder_of(folder, r - 1)} do not belong together: expected the"
                f" revision that it was made on"
            )
        if "chunks" in manifest.parents:
            part = ChunkDatabase.open(path / "chunks" / "train", verify=verify)
            _check_parent(manifest, "chunks", path / KIND, part.manifest, part.directory)
            parts.append(part)
        previous = manifest
    return JoinedDatabase(folder_of(folder, revision) / KIND, previous, parts)


class JoinedDatabase(ChunkDatabase):
    """The chunk databases of several revisions as one.

    Attributes:
      parts: of revision 0 and of each that added something.
    """

    def __init__(self, directory: Path, manifest: Manifest, parts: Sequence[ChunkDatabase]) -> None:
        """Use `open_database`."""
        self.directory, self.manifest, self.parts = pathlib.Path(directory), manifest, tuple(parts)
        first = parts[0]
        self.pad_id, self.bos_id, self.eos_id = first.pad_id, first.bos_id, first.eos_id
        self.vocab_size = first.vocab_size
        self._chunks = ShardedRows.joined([part._chunks for part in parts])
        self._owners = ShardedRows.joined([part._owners for part in parts])
        self._bounds = self._chunks.bounds
        self._part_chunks = np.cumsum([0, *map(len, parts)])
        self._part_documents = np.cumsum([0, *(part.num_documents for part in parts)])
        bounds = self._bounds.tolist()
        self.shards = [range(a, b) for a, b in itertools.pairwise(bounds)]
        self.corpora = _ranges(manifest.fact("corpora"))
        self.removed = np.load(self.directory / REMOVED_FILE)

    def __reduce__(self) -> tuple[Callable[..., ChunkDatabase], tuple[Any, ...]]:
        """Pickles by its places."""
        return JoinedDatabase, (files.absolute(self.directory), self.manifest, self.parts)

    def documents(self, ids: np.ndarray) -> np.ndarray:
        """[...] int64: the document numbers of chunks `ids` [...]; -1 for -1."""
        ids = np.asarray(ids, np.int64)
        part = np.searchsorted(self._part_chunks, ids, side="right") - 1
        return super().documents(ids) + np.where(ids < 0, 0, self._part_documents[part])

    def record(self, d: int) -> DocumentRecord:
        """What is known of document number d, removed or not."""
        if not 0 <= d < self.num_documents:
            raise IndexError(f"document {d} of {self.num_documents}")
        part = int(np.searchsorted(self._part_documents, d, side="right")) - 1
        record = self.parts[part].record(d - int(self._part_documents[part]))
        return _shifted(record, int(self._part_chunks[part]))

    def records(self) -> Iterator[DocumentRecord]:
        """All documents, in order, removed ones too."""
        for part, first in zip(self.parts, self._part_chunks.tolist()):
            for record in part.records():
                yield _shifted(record, first)


def open_keys(
    database: ChunkDatabase, workdir: Path, *, place: str = KEYS, verify: bool = False
) -> Keys:
    """Opens the keys of a retrieval database, of all its revisions; or, by QUERY_KEYS, as queries.

    Raises:
      UserError: none there, damaged, those of another database, or made differently from each other.
    """
    if not isinstance(database, JoinedDatabase):
        return Keys.open(pathlib.Path(workdir) / place, database, verify=verify)
    parts = [Keys.open(beside(part, place), part, verify=verify) for part in database.parts]
    return JoinedKeys(database, parts)


class JoinedKeys(Keys):
    """The keys of several revisions as one."""

    def __init__(self, database: JoinedDatabase, parts: Sequence[Keys]) -> None:
        """Use `open_keys`."""
        first = parts[0]
        for part in parts[1:]:
            if part.manifest.settings != first.manifest.settings:
                raise UserError(
                    f"{part.directory} and {first.directory} do not belong together: expected keys of"
                    " the same model, prefixes and precision"
                )
        self.database, self.parts = database, tuple(parts)
        self.directory, self.dimension = database.directory, first.dimension
        sums = {
            name: sum(part.manifest.fact(name) for part in parts) for name in ("keys", "chunks")
        }
        facts = sums | {"dimension": self.dimension}
        self.manifest = _joined(KEYS_KIND, database, [part.manifest for part in parts], facts)
        self._shards = ShardedRows.joined([part._shards for part in parts])

    def __reduce__(self) -> tuple[Callable[..., Keys], tuple[Any, ...]]:
        """Pickles by its places."""
        return JoinedKeys, (self.database, self.parts)


def open_index(keys: Keys, workdir: Path, *, verify: bool = False) -> Index:
    """Opens the index over the keys of a retrieval database: its shards are those of all revisions.

    Raises:
      UserError: none there, damaged, or one over other keys.
    """
    if not isinstance(keys, JoinedKeys):
        return Index.open(pathlib.Path(workdir) / "index", keys, verify=verify)
    shards: list[IndexShard] = []
    routed: list[RoutedShards] = []
    manifests, first = [], 0
    for part in keys.parts:
        index = Index.open(beside(part.database, "index"), part, verify=verify)
        chunks = range(first, first + len(part))
        routed += [dataclasses.replace(group, first=len(shards)) for group in index.routed]
        shards += [shard.moved(keys, chunks) for shard in index.shards]
        manifests.append(index.manifest)
        first += len(part)
    count = sum(manifest.fact("keys") for manifest in manifests)
    plan = max(manifests, key=lambda manifest: manifest.fact("keys")).fact("plan")
    manifest = _joined("index", keys.database, manifests, {"keys": count, "plan": plan})
    return Index(keys.directory, manifest, shards, routed)


def numbers_of(database: ChunkDatabase, names: Iterable[tuple[str, str]]) -> list[int]:
    """The numbers of documents, by corpus and id; those that were removed before are left out.

    Raises:
      UserError: the database never had such a document.
    """
    targets, numbers = set(names), []
    rest = set(targets)
    for number, record in enumerate(database.records()):
        name = (record.corpus, record.id)
        if name in targets:
            rest.discard(name)
            if not database.is_removed(np.array(number)):
                numbers.append(number)
    if rest:
        corpus, missing = min(rest)
        cut = f"{missing}\r"  # as a list's line was read
        if any((record.corpus, record.id) == (corpus, cut) for record in database.records()):
            raise UserError(
                f"{database.directory} holds no document {missing!r} of the corpus {corpus!r} but"
                f" {cut!r}: expected its name as a flag's value, as ends of lines are cut"
            )
        raise UserError(
            f"{database.directory} holds no document {missing!r} of the corpus {corpus!r}: expected one"
            f" of its {database.num_documents - len(database.removed)} documents"
        )
    return sorted(numbers)


def _ranges(corpora: Mapping[str, Mapping[str, Any]]) -> dict[str, list[range]]:
    """The ranges of chunk ids of each corpus."""
    return {name: [range(a, b) for a, b in corpora[name]["ranges"]] for name in sorted(corpora)}


def _joined(
    kind: str, database: ChunkDatabase, parts: Sequence[Manifest], facts: Mapping[str, Any]
) -> Manifest:
    """The identity of the parts together; it is on no disk, but depends on nothing else."""
    parents = {f"part-{i}": part.hash for i, part in enumerate(parts)}
    parents[CHUNKS_KIND] = database.manifest.hash
    first, revision = parts[0], database.manifest.revision
    return Manifest(first.format_version, kind, first.settings, (), parents, dict(facts), revision)


def beside(part: ChunkDatabase, name: str) -> pathlib.Path:
    """Another directory of a part's revision, beside chunks/train."""
    return part.directory.parent.parent / name


def _check_parent(
    manifest: Manifest, role: str, path: Path, parent: Manifest, directory: Path
) -> None:
    """Raises unless a directory was made from another."""
    if manifest.parents.get(role) != parent.hash:
        raise UserError(
            f"{path} and {directory} do not belong together: expected {role}"
            f" {manifest.parents.get(role, 'none')[:12]}, found {parent.hash[:12]}"
        )


def _shifted(record: DocumentRecord, first: int) -> DocumentRecord:
    """A part's record in the numbering of the whole."""
    return dataclasses.replace(record, first_chunk=record.first_chunk + first)
