"""The paper's figures of a text with ours beside them, as one table."""

from collections.abc import Mapping
from typing import Any

from retro_jax.evaluate.conditions import condition_name, condition_order
from retro_jax.report import published
from retro_jax.report.views import TableView, shown

# WikiText-103, perplexity by word: method and database, validation, test.
WIKITEXT103 = (
    ("baseline transformer", 21.53, 22.96),
    ("kNN-LM, Wikipedia", 18.52, 19.54),
    ("RETRO, Wikipedia", 18.46, 18.97),
    ("RETRO, C4", 12.87, 10.23),
    ("RETRO, MassiveText (all)", 3.21, 3.92),
)
WIKITEXT103_WORDS = {"validation": 217_646, "test": 245_569}
# The Pile, bits per byte: baseline of 7B and RETRO of 7.5B parameters.
PILE = {
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
}
# LAMBADA, accuracy of the last word, by size: baseline and RETRO.
LAMBADA = {"172m": (0.42, 0.52), "425m": (0.51, 0.60), "1.5b": (0.61, 0.67), "7.5b": (0.69, 0.73)}
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
    whole = [name for name, size in published.WIKITEXT103_WORDS.items() if size == words]
    rows = [[name, f"{v:.2f}", f"{t:.2f}"] for name, v, t in published.WIKITEXT103]
    here = whole[0] if whole else "a part"
    header = ["perplexity by word", *published.WIKITEXT103_WORDS]
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
    held = sorted({c for r in results.values() for c in r["corpora"]} & set(published.PILE))
    if not held:
        return None
    rows = [
        [
            corpus,
            *(f"{value:.3f}" for value in published.PILE[corpus]),
            *(f"{results[name]['corpora'][corpus]['bits_per_byte']:.3f}" for name in names),
        ]
        for corpus in held
    ]
    ours = [f"ours: {condition_name(name)}" for name in names]
    header = ["bits per byte", "paper: baseline 7B", "paper: RETRO 7.5B", *ours]
    return TableView("Beside the paper: the Pile", _OTHERS, header, rows)


def _lambada(results: Mapping[str, Any]) -> TableView:
    """Accuracy of the last word."""
    rows = [[f"paper: {s}", f"{b:.2f}", f"{r:.2f}"] for s, (b, r) in published.LAMBADA.items()]
    hits = {n: r["last_word_accuracy"] for n, r in results.items() if "last_word_accuracy" in r}
    ours = [hits.get(name) for name in ("baseline", "on")]
    rows.append(["ours", *("" if value is None else shown(value, "") for value in ours)])
    header = ["accuracy of the last word", "baseline", "RETRO[ON]"]
    return TableView("Beside the paper: LAMBADA", _OTHERS, header, rows)
