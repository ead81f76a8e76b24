"""Names and order of the conditions that a text is scored under."""

from collections.abc import Iterable

CONDITION_NAMES = {
    "baseline": "baseline",
    "knn": "kNN-LM",
    "off": "RETRO[OFF]",
    "on": "RETRO[ON]",
    "random": "random neighbours",
    "oracle": "oracle",
    "context": "neighbours in context",
    "context+random": "random ones in context",
    "tokens": "RETRO[ON] + tokens",
    "context+tokens": "in context + tokens",
    "baseline+tokens": "baseline + tokens",
    "on+knn": "RETRO[ON] + kNN-LM",
    "knn+tokens": "kNN-LM + tokens",
    "on+knn+tokens": "RETRO[ON] + kNN-LM + tokens",
}
# The condition whose model is mixed with the token memory.
MIXED_WITH_TOKENS = {
    "tokens": "on",
    "context+tokens": "context",
    "baseline+tokens": "baseline",
    "knn+tokens": "knn",
    "on+knn+tokens": "on+knn",
}
# Conditions that vary RETRO[ON], by the first part of their names: the meaning of the second.
SWEPT_NAMES = {
    "k": "k = {:g}",
    "context": "in context, k = {:g}",
    "database": "{:.4g} of the database",
    "ngrams": "13-grams at most {:.0%}",
}
SHOWN_OVERLAP = 0.5  # the share of shared tokens whose figures are shown beside those of all chunks


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
    conditions = [
        name
        for name in names
        if ("_" in name and name.partition("_")[0] == kind) or (not kind and "_" not in name)
    ]
    return sorted(conditions, key=condition_order)
