"""The neighbour tables of revisions, each made from those of the revision before."""

from data_pipelines.artefacts.manifest import MANIFEST_FILE
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.corpora import SPLITS
from data_pipelines.retriever import revisions
from data_pipelines.retriever.bm25 import KIND as BM25
from data_pipelines.retriever.bm25 import prepare_bm25
from data_pipelines.retriever.compacted import compact_table
from data_pipelines.retriever.filled_slots import describe, share_filled, warn_of_few
from data_pipelines.retriever.neighbour_table import NeighbourTable
from data_pipelines.retriever.retriever import Ranking, Retriever
from data_pipelines.workdir.preparation import Preparation, prepare_table, queries_of
from retro_jax.errors import UserError


def check_ranking(p: Preparation) -> None:
    """Raises unless neighbours are to be found as those of W's tables were."""
    ranking, setting = Ranking.of(p.directory), p.config.neighbours.ranking
    if ranking.settings != setting.settings:
        raise UserError(
            f"NeighboursConfig.retriever is {setting}: expected {ranking}, by which {p.directory}'s tables"
            " were made"
        )


def make_tables(p: Preparation, revision: int) -> None:
    """Makes what is missing of the tables of all revisions up to one, each from the one before.

    A compaction begins anew: it has the tables of the revision before with other ids.
    """
    first = revisions.base_of(p.directory, revision)
    for r in range(max(1, first), revision + 1):
        folder = revisions.folder_of(p.directory, r)
        places = {split: folder / "neighbours" / split for split in SPLITS}
        if r < revision and all((path / MANIFEST_FILE).is_file() for path in places.values()):
            continue
        if p.config.neighbours.ranking.by_terms:
            database = revisions.open_database(p.directory, r)
            prepare_bm25(folder / BM25, database, p.config.bm25, runner=p.runner)
        if r == first and all((path / MANIFEST_FILE).is_file() for path in places.values()):
            continue  # what they were made from may be purged
        retriever = Retriever.open(p.directory, revision=r)
        before = revisions.open_database(p.directory, r - 1)
        for split, place in places.items():
            own = ChunkDatabase.open(p.directory / "chunks" / split) if split != "train" else before
            base = NeighbourTable.of(p.directory, split, own, before)
            if r == first:
                queries = queries_of(p.directory, split, retriever)
                manifest = compact_table(place, queries, retriever, base, before, runner=p.runner)
            else:
                manifest = prepare_table(p, split, retriever, base)
            p.report(
                f"revision {r}, neighbours/{split}: {manifest.fact('chunks'):,} chunks,"
                f" {describe(manifest)}"
            )
            warn_of_few(f"{place}", share_filled(manifest))
