"""Tables of models trained with several seeds, out of what launch.evaluate wrote in their workdirs."""

import pathlib
from collections.abc import Sequence
from typing import Any

from retro_jax.evaluate.scored_text import ScoredText, documents_file, read_scored_text
from retro_jax.evaluate.seeds import ablation_figures, seed_figures
from retro_jax.report.evaluation_tables import markdown
from retro_jax.report.result_files import EVALUATION, overlap_files, read_results
from retro_jax.report.seed_tables import ablation_table, seed_table
from retro_jax.report.tables import section
from retro_jax.storage import files


def results_text(
    workdir: pathlib.Path, homes: Sequence[pathlib.Path], names: Sequence[str], split: str
) -> str:
    """All figures of a workdir as Markdown: those of its evaluation, then of seeds and ablations.

    Args:
      workdir: with W/evaluation. homes, names, split: as for `seed_parts`.
    """
    folder = workdir / EVALUATION
    results = read_results(folder, split)
    path = overlap_files(folder, split).json
    text = markdown(results, files.read_json(path) if path.is_file() else None)
    return "\n".join([text, *seed_parts(workdir, homes, names, split)])


def seed_parts(
    workdir: pathlib.Path, homes: Sequence[pathlib.Path], names: Sequence[str], split: str
) -> list[str]:
    """The tables of seeds and ablations as Markdown; both are written to JSON files too.

    Each file has the "figures", and the "sources" of the models: the hashes of the losses behind them.

    Args:
      workdir: where seeds.json and ablations.json go. homes: the workdir of each seed's models.
      names: of ablations, each in a workdir HOME/ablations/NAME. split: that was scored.
    """
    parts = []
    whole = [_sums(home, split) for home in homes] if names or len(homes) > 1 else []
    sources: dict[str, Any] = {"whole": [each.source for each in whole]}
    if len(homes) > 1:
        rows = seed_figures(whole)
        _write(workdir / "seeds.json", rows, sources)
        parts.append(section(seed_table(rows)) + "\n")
    if names:
        found = {}
        for name in names:
            ablated = [_sums(home / "ablations" / name, split) for home in homes]
            found[name] = ablation_figures(ablated, whole)
            sources[name] = [each.source for each in ablated]
        _write(workdir / "ablations.json", found, sources)
        parts.append(section(ablation_table(found)) + "\n")
    return parts


def _write(path: pathlib.Path, figures: Any, sources: dict[str, Any]) -> None:
    """Writes figures with what they were made from."""
    files.write_atomically(path, files.to_json({"sources": sources, "figures": figures}))


def _sums(home: pathlib.Path, split: str) -> ScoredText:
    """What launch.evaluate summed by document in a workdir."""
    return read_scored_text(documents_file(home / EVALUATION, split))
