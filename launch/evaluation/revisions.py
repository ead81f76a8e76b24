"""Figures of one model on several revisions of the retrieval database."""

from collections.abc import Mapping
from typing import Any

from data_pipelines.retriever.revisions import open_database
from launch.evaluation.results import Work
from launch.evaluation.scores import sum_scores
from retro_jax.evaluate.revisions import revision_figures
from retro_jax.report.evaluation_tables import losses_of
from retro_jax.report.result_files import revisions_file
from retro_jax.storage import files


def write_revisions(
    works: Mapping[int, Work], found: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """Writes SPLIT-revisions.json: figures of each revision, the sizes of its database, the models."""
    scored, databases = {}, []
    for revision, work in works.items():
        scored[revision] = sum_scores(
            work.folder, found[revision], split=work.split, text=work.text, lengths=work.lengths
        )
        database = open_database(work.data, revision)
        documents = database.num_documents - len(database.removed)
        databases.append(
            {
                "revision": revision,
                "manifest": database.manifest.hash,
                "documents": documents,
                "chunks": database.live_chunks,
            }
        )
    last = works[max(works)]
    contents = {
        "models": {name: result["model"] for name, result in found[max(found)].items()},
        "nll": losses_of(found[max(found)]),
        "databases": databases,
        "rows": revision_figures(scored),
    }
    files.write_atomically(revisions_file(last.folder, last.split.name), files.to_json(contents))
    return contents
