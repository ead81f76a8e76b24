"""The paper's figures of a text with ours beside them, as one table."""

from collections.abc import Mapping
from typing import Any

from launch.intervals import shown
from retro_jax.evaluate import paper
from retro_jax.evaluate.report import TableView, condition_name, condition_order

_OTHERS = (
    "The paper's models have up to 7.5B parameters and training data of their own: the rows stand in one "
    "table, not in one competition."
)


def beside_paper(results: Mapping[str, Any]) -> TableView | None:
    """The table of a text that the paper has figures of; None for others.

    Args:
      results: by condition, of launch.evaluate.
    """
    split = next(iter(results.values()))["settings"]["split"]
    kinds = {"wikitext103": _wikitext, "pile": _pile, "lambada": _lambada}
    for start, table in kinds.items():
        if split.startswith(start):
            return table(results)
    return None


def _named(results: Mapping[str, Any]) -> list[str]:
    """The conditions in their order."""
    return sorted(results, key=condition_order)


def _wikitext(results: Mapping[str, Any]) -> TableView:
    """Perplexity by word."""
    count = next(iter(results.values()))["all"]
    words = count["words"] + count["lines"]
    whole = [name for name, size in paper.WIKITEXT103_WORDS.items() if size == words]
    rows = [[name, f"{v:.2f}", f"{t:.2f}"] for name, v, t in paper.WIKITEXT103]
    here = whole[0] if whole else "a part"
    header = ["perplexity by word", *paper.WIKITEXT103_WORDS]
    if not whole:
        header, rows = [*header, here], [[*row, ""] for row in rows]
    for name in _named(results):
        value = results[name]["all"]["word_perplexity"]
        cells = [f"{value:.2f}" if column == here else "" for column in header[1:]]
        rows.append([f"ours: {condition_name(name)}", *cells])
    said = f"Words, line ends counted: {words:,}, " + (
        f"the whole {whole[0]} set. " if whole else "a part of a set. "
    )
    return TableView("Beside the paper: WikiText-103", said + _OTHERS, header, rows)


def _pile(results: Mapping[str, Any]) -> TableView | None:
    """Bits per byte by subset."""
    names = _named(results)
    held = sorted({c for r in results.values() for c in r["corpora"]} & set(paper.PILE))
    if not held:
        return None
    rows = [
        [
            corpus,
            *(f"{value:.3f}" for value in paper.PILE[corpus]),
            *(f"{results[name]['corpora'][corpus]['bits_per_byte']:.3f}" for name in names),
        ]
        for corpus in held
    ]
    ours = [f"ours: {condition_name(name)}" for name in names]
    header = ["bits per byte", "paper: baseline 7B", "paper: RETRO 7.5B", *ours]
    return TableView("Beside the paper: the Pile", _OTHERS, header, rows)


def _lambada(results: Mapping[str, Any]) -> TableView:
    """Accuracy of the last word."""
    rows = [[f"paper: {s}", f"{b:.2f}", f"{r:.2f}"] for s, (b, r) in paper.LAMBADA.items()]
    hits = {n: r["last_word_accuracy"] for n, r in results.items() if "last_word_accuracy" in r}
    ours = [hits.get(name) for name in ("baseline", "on")]
    rows.append(["ours", *("" if value is None else shown(value, "") for value in ours)])
    header = ["accuracy of the last word", "baseline", "RETRO[ON]"]
    return TableView("Beside the paper: LAMBADA", _OTHERS, header, rows)
