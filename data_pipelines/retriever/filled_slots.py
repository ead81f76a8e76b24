"""How full a neighbour table is: said beside its recall, which is of the neighbours that there are.

A chunk never has a neighbour of its own document, so a database of one document fills no slot of its
own table, and a small one few.
"""

import logging

import numpy as np

from data_pipelines.artefacts.manifest import Manifest

FEW = 0.5  # of the slots: fewer are warned of
_logger = logging.getLogger(__name__)


def share_filled(manifest: Manifest) -> float | None:
    """The share of a table's slots that have a neighbour, of chunks with text; None without any."""
    slots = manifest.facts.get("filled")
    return sum(slots) / len(slots) if slots and manifest.facts.get("queries") else None


def describe(manifest: Manifest) -> str:
    """A table in a few words: "4 a chunk, 100.0% of slots filled, recall 0.998"."""
    measured, share = manifest.fact("recall"), share_filled(manifest)
    if not manifest.fact("queries"):
        return f"{measured['k']} a chunk, no chunks"
    filled = "" if share is None else f", {share:.1%} of slots filled"
    return f"{measured['k']} a chunk{filled}, {recall_text(measured['recall'])}"


def recall_text(value: float | None) -> str:
    """A recall as text; it is None where there is no neighbour that could have been found."""
    return "recall unknown (no neighbour exists)" if value is None else f"recall {value:.3f}"


def warn_of_few(what: str, share: float | None) -> None:
    """A warning, where few of the slots of `what` have a neighbour."""
    if share is not None and share < FEW:
        _logger.warning(
            "%s: only %.1f%% of the neighbour slots are filled: retrieval has little to read. A"
            " chunk has no neighbour of its own document: expected a database of more documents"
            " than neighbours a chunk",
            *(what, 100 * share),
        )


def share_of_ids(ids: np.ndarray) -> float | None:
    """The share of slots [n, k] that have a neighbour, where -1 is none; None for no slot."""
    return float((ids >= 0).mean()) if ids.size else None
