"""The paper's figures of a text with ours beside them, as one table."""

from collections.abc import Mapping
from typing import Any

from retro_jax.evaluate.conditions import condition_name, condition_order
from retro_jax.report.tables import interval
from retro_jax.report.views import PublishedFigures, Table

# Ablations, bits per byte of C4 at 247M parameters, by the names of experiments/ablations: the ablated
# model, and the one that it is to be compared with. The paper's own default has embeddings apart, and
# CCA in one layer of the middle is its nearest to a small model with CCA in one layer.
ABLATIONS = {
    "chunk_only": (0.950, 0.822),
    "continuation_only": (0.895, 0.822),
    "no_query_conditioning": (0.829, 0.822),
    "no_cca_positions": (0.826, 0.822),
    "own_embeddings": (0.822, 0.823),
    "one_neighbour": (0.858, 0.822),
    "cca_first_layer": (0.827, 0.823),
    "cca_last_layer": (0.831, 0.823),
    "cca_every_layer": (0.860, 0.823),
}


def ablation_loss(name: str) -> float:
    """Bits per byte that an ablation loses in the paper; 0 of one that it does not have."""
    ablated, whole = ABLATIONS.get(name, (0.0, 0.0))
    return ablated - whole


_OTHERS = (
    "The paper's models have up to 7.5B parameters and training data of their own: the rows stand in one "
    "table, not in one competition."
)


def beside_paper(results: Mapping[str, Any], published: PublishedFigures | None) -> Table | None:
    """The table of a text that the paper has figures of; None for others.

    Args:
      results: by condition, of launch.evaluate. published: the paper's figures of the text.
    """
    layouts = {"sets": _by_set, "corpora": _by_corpus, "sizes": _by_size}
    return layouts[published.layout](results, published) if published else None


def _view(published: PublishedFigures, caption: str, header: Any, rows: Any) -> Table:
    """The table under its title."""
    return Table(header, rows, f"Beside the paper: {published.title}", caption)


def _by_set(results: Mapping[str, Any], published: PublishedFigures) -> Table:
    """Columns are whole sets; our figures are in the column of their number of words."""
    count = next(iter(results.values()))["all"]
    words = count["words"] + count["lines"]
    whole = [name for name, size in published.words.items() if size == words]
    rows = [[name, *(f"{value:.2f}" for value in row)] for name, row in published.rows.items()]
    heading = whole[0] if whole else "a part"
    header = [published.label, *published.columns]
    if not whole:
        header, rows = [*header, heading], [[*row, ""] for row in rows]
    for name in sorted(results, key=condition_order):
        value = results[name]["all"][published.figure]
        cells = [f"{value:.2f}" if column == heading else "" for column in header[1:]]
        rows.append([f"ours: {condition_name(name)}", *cells])
    caption = f"Words, line ends counted: {words:,}, " + (
        f"the whole {whole[0]} set. " if whole else "a part of a set. "
    )
    return _view(published, caption + _OTHERS, header, rows)


def _by_corpus(results: Mapping[str, Any], published: PublishedFigures) -> Table | None:
    """Rows are corpora; ours are further columns."""
    names = sorted(results, key=condition_order)
    scored_corpora = {corpus for result in results.values() for corpus in result["corpora"]}
    corpora = sorted(scored_corpora & set(published.rows))
    if not corpora:
        return None
    rows = [
        [
            corpus,
            *(f"{value:.3f}" for value in published.rows[corpus]),
            *(f"{results[name]['corpora'][corpus][published.figure]:.3f}" for name in names),
        ]
        for corpus in corpora
    ]
    ours = [f"ours: {condition_name(name)}" for name in names]
    papers = [f"paper: {column}" for column in published.columns]
    return _view(published, _OTHERS, [published.label, *papers, *ours], rows)


def _by_size(results: Mapping[str, Any], published: PublishedFigures) -> Table:
    """Rows are sizes of models, columns conditions; ours are the last row."""
    rows = [
        [f"paper: {size}", *(f"{value:.2f}" for value in row)]
        for size, row in published.rows.items()
    ]
    ours = [results.get(name, {}).get(published.figure) for name in published.columns]
    rows.append(["ours", *("" if value is None else interval(value) for value in ours)])
    return _view(
        published, _OTHERS, [published.label, *map(condition_name, published.columns)], rows
    )
