"""The content of a prepared workdir, as a table."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.artefacts.manifest import MANIFEST_FILE, Manifest, is_purged
from data_pipelines.chunk_database.database import CHUNK_LENGTH
from data_pipelines.corpora import SPLITS
from data_pipelines.leakage.near_documents import read_withdrawn
from data_pipelines.retriever import revisions
from data_pipelines.retriever.filled_slots import share_filled
from retro_jax.errors import UserError
from retro_jax.report.views import Table

_NOTHING = "-"
_QUANTILES = {"0.05": "5 %", "0.5": "median", "0.95": "95 %"}
_MEASURES = ("documents", "chunks", "tokens", "bytes")


def table(directory: pathlib.Path) -> Table:
    """A row for each fact, a column for each split.

    Args:
      directory: W; stages that have not been run are left out.

    Raises:
      UserError: there is nothing in it yet, or something is damaged.
    """
    chunks = _manifests(directory, "chunks")
    if not any(chunks.values()):
        raise UserError(f"{directory} holds no chunk database: expected what launch.prepare makes")
    newest = revisions.latest(directory)
    folder = revisions.folder_of(directory, newest)
    if newest:  # the training split is the retrieval database, as it is now
        chunks["train"] = _manifest(folder / revisions.KIND, revisions.KIND)
    rows = _chunk_rows(list(chunks.values()))
    rows += _leakage_rows(directory)
    rows += _key_rows(directory)
    rows += _revision_rows(directory)
    rows += _neighbour_rows(list(_manifests(folder, "neighbours").values()))
    return Table(["", *SPLITS], rows)


def _manifests(directory: pathlib.Path, kind: str) -> dict[str, Manifest | None]:
    """The manifest of each split; None where it has not been made."""
    return {split: _manifest(directory / kind / split, kind) for split in SPLITS}


def _manifest(folder: pathlib.Path, kind: str) -> Manifest | None:
    """A finished directory's manifest; None for one that is not there or not finished."""
    if is_purged(folder):
        return Manifest.read(folder)
    return Manifest.open(folder, kind) if (folder / MANIFEST_FILE).is_file() else None


def _chunk_rows(splits: Sequence[Manifest | None]) -> list[list[str]]:
    """Documents, chunks, tokens and bytes by corpus, and the share of padding."""
    rows = []
    tables = [m.fact("corpora") if m else {} for m in splits]
    for corpus in sorted({name for corpora in tables for name in corpora}):
        for measure in _MEASURES:
            counts = [corpora.get(corpus, {}).get(measure) for corpora in tables]
            rows.append([f"{corpus}: {measure}", *map(_count, counts)])
        rates = [c[corpus]["bytes"] / c[corpus]["tokens"] if corpus in c else None for c in tables]
        rows.append([f"{corpus}: bytes a token", *(_share(rate, "{:.2f}") for rate in rates)])
    return [*rows, ["padding", *map(_share, map(_padding, splits))]]


def _padding(manifest: Manifest | None) -> float | None:
    """The share of all positions that no document has; None where nobody counted."""
    if manifest is None or "padding" in manifest.facts:
        return None if manifest is None else manifest.fact("padding")
    corpora = manifest.fact("corpora").values()  # of a revision: what is removed is not in them
    tokens, chunks = (sum(facts[name] for facts in corpora) for name in ("tokens", "chunks"))
    return 1 - tokens / (chunks * CHUNK_LENGTH) if chunks else 0.0


def _leakage_rows(directory: pathlib.Path) -> list[list[str]]:
    """What was withdrawn of the training split, and which chunks are in two splits."""
    none = [_NOTHING] * (len(SPLITS) - 1)
    rows = []
    places = [revisions.folder_of(directory, r) for r in range(revisions.latest(directory) + 1)]
    documents = {
        place: m for place in places if (m := _manifest(place / "leakage", "leakage")) is not None
    }
    if documents:
        # One that was withdrawn is not in the database, so an update withdraws it again.
        withdrawn = {
            (line["corpus"], line["id"]): line["equal"]
            for place, manifest in documents.items()
            for i in range(len(manifest.shards))
            for line in read_withdrawn(place / "leakage", i)
        }
        threshold = next(iter(documents.values())).settings["threshold"]
        counts = {
            f"withdrawn documents, from {threshold:g}": len(withdrawn),
            "of these equal": sum(withdrawn.values()),
            "documents equal to others of the split": sum(
                m.fact("duplicates") for m in documents.values()
            ),
        }
        rows += [[name, _count(count), *none] for name, count in counts.items()]
    chunks = [m for place in places if (m := _manifest(place / "duplicates", "duplicates"))]
    if chunks:
        held_out = [split for split in SPLITS if split != "train"]
        sides = [_sums([m.facts for m in chunks])]
        sides += [_sums([m.fact("held_out")[split] for m in chunks]) for split in held_out]
        for fact, name in (("near", "near-duplicate chunks"), ("equal", "of these equal tokens")):
            rows.append([name, *(_count(side[fact]) for side in sides)])
    return rows


def _sums(counts: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Chunks with near-duplicates, counted as each revision was made."""
    return {name: sum(count[name] for count in counts) for name in ("near", "equal")}


def _key_rows(directory: pathlib.Path) -> list[list[str]]:
    """The retrieval database, which is made of the training split."""
    none = [_NOTHING] * (len(SPLITS) - 1)
    keys, index = (
        _manifest(directory / path, kind)
        for path, kind in (("keys/train", "keys"), ("index", "index"))
    )
    rows = []
    newest = revisions.latest(directory)
    database = _manifest(revisions.folder_of(directory, newest) / revisions.KIND, revisions.KIND)
    if keys:
        count = database.facts.get("keys") if database else keys.fact("keys")
        rows.append(["keys", _count(count), *none])
    if index:
        rows.append(["index", index.fact("plan")["kind"].replace("_", " "), *none])
    return rows


def _revision_rows(directory: pathlib.Path) -> list[list[str]]:
    """What the newest revision of the retrieval database has more, and less."""
    newest = revisions.latest(directory)
    if not newest:
        return []
    manifest = Manifest.open(
        revisions.folder_of(directory, newest) / revisions.KIND, revisions.KIND
    )
    none = [_NOTHING] * (len(SPLITS) - 1)
    counts = {"revision": newest, "chunk ids of all revisions": manifest.fact("chunks")}
    counts["removed documents"] = manifest.fact("removed")
    return [[name, _count(count), *none] for name, count in counts.items()]


def _neighbour_rows(splits: Sequence[Manifest | None]) -> list[list[str]]:
    """Slots, how many of them are filled, and the recall."""
    if not any(splits):
        return []
    # A split without documents has no shard, and so no slots.
    shares = [share_filled(m) if m else None for m in splits]
    nearest = [m.fact("nearest") if m else {} for m in splits]
    made_by = {m.settings["score"] for m in splits if m}
    score = "distance" if "squared_l2" in made_by else "BM25"
    names = sorted({m.settings.get("retriever", "dense") for m in splits if m})
    same = [m.facts.get("same_corpus") if m else None for m in splits]
    return [
        ["retriever", " ".join(names), *[_NOTHING] * (len(SPLITS) - 1)],
        ["neighbours a chunk", *(_count(m.settings["k"] if m else None) for m in splits)],
        ["slots filled", *map(_share, shares)],
        *(
            [f"nearest: {name} {score}", *(_share(q.get(step), "{:.3f}") for q in nearest)]
            for step, name in _QUANTILES.items()
        ),
        ["of the same corpus", *map(_share, same)],
        ["recall", *(_share(m.fact("recall")["recall"] if m else None) for m in splits)],
    ]


def _count(value: int | None) -> str:
    """A number with separators."""
    return _NOTHING if value is None else f"{value:,}"


def _share(value: float | None, form: str = "{:.1%}") -> str:
    """A share as a percentage, or a number in another form."""
    return _NOTHING if value is None else form.format(value)
