"""Slices: texts that evaluation prepares by itself, beside the splits of the prepared data."""

from collections.abc import Sequence

from absl import flags

from data_pipelines.evaluation.texts import SliceConfig

SLICES = flags.DEFINE_list(
    "slices",
    [],
    "Score these texts instead of a split: wikitext103, wikitext103_detokenised, pile or pile:github, "
    "curation, lambada, or any name for JSON lines with a text field each.",
)
PATHS = flags.DEFINE_list(
    "slice_paths", [], "Where slices are read, as in pile=/data/val.jsonl.zst; needed once."
)

BERT = flags.DEFINE_string(
    "bert_folder", None, "The BERT that made the database's keys, where it is no packaged one."
)


def wanted_slices(max_documents: int | None) -> list[SliceConfig]:
    """What --slices and --slice_paths ask for; subsets of one slice together.

    Raises:
      flags.Error: a value that cannot be read, or a path of no slice.
    """
    subsets: dict[str, list[str]] = {}
    for value in SLICES.value:
        name, colon, subset = value.partition(":")
        if not name.replace("_", "").replace(".", "").isalnum() or (colon and name != "pile"):
            raise flags.Error(f"--slices={value}: expected a name, or pile: and a subset of it")
        subsets.setdefault(name, []).extend([subset] if subset else [])
    paths = _paths(PATHS.value, list(subsets))
    return [
        SliceConfig(name, paths.get(name), tuple(sorted(set(some))), max_documents)
        for name, some in subsets.items()
    ]


def _paths(values: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """--slice_paths by slice."""
    paths = {}
    for value in values:
        name, _, path = value.partition("=")
        if name not in names or not path:
            known = ", ".join(names) or "one of --slices"
            raise flags.Error(f"--slice_paths={value}: expected NAME=PATH, NAME being {known}")
        paths[name] = path
    return paths
