"""Reads --slices and --slice_paths: texts that evaluation prepares beside the splits of W."""

from collections.abc import Sequence

from absl import flags

from data_pipelines.corpora import SPLITS
from data_pipelines.evaluation.texts import TEXTS, SliceConfig, evaluation_text


def wanted_slices(
    values: Sequence[str], paths: Sequence[str], max_documents: int | None, skip_bad: bool
) -> list[SliceConfig]:
    """The texts of --slices and --slice_paths; subsets of one slice together.

    Args:
      values: NAME, or NAME:SUBSET of a text with subsets. paths: NAME=PATH. max_documents: of each corpus.
      skip_bad: whether bad documents are counted and left out.

    Raises:
      flags.Error: a value that cannot be read or is a split, a text whole and in part, or two paths of one.
    """
    subsets: dict[str, list[str]] = {}
    for value in values:
        name, colon, subset = value.partition(":")
        cut = colon and not (subset and evaluation_text(name).subsets)
        if not name.replace("_", "").replace(".", "").isalnum() or cut:
            whole = " or ".join(f"{text.name}:" for text in TEXTS.values() if text.subsets)
            raise flags.Error(f"--slices={value}: expected a name, or {whole} and a subset of it")
        if name in SPLITS:
            raise flags.Error(f"--slices={value}: expected another name than a split's, or --split")
        if bool(subsets.get(name, subset)) != bool(subset):
            raise flags.Error(f"--slices={name} and a subset of it: expected one or the other")
        subsets.setdefault(name, []).extend([subset] if subset else [])
    places = _paths(paths, list(subsets))
    return [
        SliceConfig(name, places.get(name), tuple(sorted(set(parts))), max_documents, skip_bad)
        for name, parts in subsets.items()
    ]


def _paths(values: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """--slice_paths by slice."""
    paths: dict[str, str] = {}
    for value in values:
        name, _, path = value.partition("=")
        if name not in names or not path:
            choices = ", ".join(names) or "one of --slices"
            raise flags.Error(f"--slice_paths={value}: expected NAME=PATH, NAME being {choices}")
        if paths.get(name, path) != path:
            raise flags.Error(f"--slice_paths={value}: {name} is {paths[name]}, expected one path")
        paths[name] = path
    return paths
