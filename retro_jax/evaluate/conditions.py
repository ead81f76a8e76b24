"""Names and order of the conditions that a text is scored under."""

from collections.abc import Iterable, Mapping

CONDITION_NAMES = {
    "baseline": "baseline",
    "knn": "kNN-LM",
    "off": "RETRO[OFF]",
    "on": "RETRO[ON]",
    "random": "random neighbours",
    "oracle": "oracle",
}
# Conditions that vary RETRO[ON], by the first part of their names: what the second part is.
SWEPT_NAMES = {
    "k": "k = {:g}",
    "database": "{:.4g} of the database",
    "ngrams": "13-grams at most {:.0%}",
}
SHOWN_OVERLAP = 0.5  # the share of shared tokens whose figures stand beside those of all chunks


def condition_name(name: str) -> str:
    """A condition as it is shown: "off" is RETRO[OFF], "k_4" is 4 neighbours."""
    kind, _, value = name.partition("_")
    return SWEPT_NAMES[kind].format(float(value)) if value else CONDITION_NAMES[name]


def condition_order(name: str) -> tuple[int, float]:
    """Sorts conditions: as in CONDITION_NAMES, then the swept ones by kind and value."""
    kind, _, value = name.partition("_")
    order = [*CONDITION_NAMES, *SWEPT_NAMES]
    return order.index(kind), float(value or 0)


def swept(names: Iterable[str], kind: str = "") -> list[str]:
    """Those of the names that vary RETRO[ON] in one way, by value; with "" those that do not at all."""
    found = [
        name
        for name in names
        if ("_" in name and name.partition("_")[0] == kind) or (not kind and "_" not in name)
    ]
    return sorted(found, key=condition_order)


def score_rows(
    scores: Mapping[str, Mapping[str, Mapping[str, float]]], figure: str, digits: int
) -> tuple[list[str], list[list[str]], list[int | None]]:
    """A table of one figure: header, a row per corpus (the last is all), and each row's best column."""
    conditions = sorted(scores, key=condition_order)
    corpora = sorted({corpus for by_corpus in scores.values() for corpus in by_corpus if corpus})
    header = ["corpus", *map(condition_name, conditions)]
    pair = "on" in scores and "off" in scores
    header += ["ON vs OFF"] if pair else []
    rows, best = [], []
    for corpus in [*corpora, ""]:
        values = [scores[name][corpus][figure] for name in conditions]
        row = [corpus or "all", *(f"{value:.{digits}f}" for value in values)]
        if pair:
            on, off = scores["on"][corpus][figure], scores["off"][corpus][figure]
            row.append(f"{100 * (on / off - 1):+.2f}%" if off else "")
        rows.append(row)
        best.append(1 + values.index(min(values)) if len(values) > 1 else None)
    return header, rows, best
