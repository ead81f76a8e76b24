"""Compares two trained models on the same text, document by document, and says how sure it is.

    python -m launch.compare --workdir=W --other=V
    python -m launch.compare --workdir=W --other=V --condition=on --other_condition=baseline

Reads the results of launch.evaluate for both; the text and the tokeniser must be the same. Prints bits
per byte of both, their difference with a 95% interval, and the p-value of a paired test. The p-value is
the chance of a difference as large if each document's two scores were swapped at random. Writes
W/evaluation/SPLIT-CONDITION-against-V-CONDITION.json and .md; launch.report shows it with W's results.
"""

import pathlib
from typing import Any

from absl import flags

from launch.common import app, workdirs
from launch.common.flags import DATA, SPLIT
from launch.evaluation.scores import compare_results
from retro_jax.errors import UserError
from retro_jax.evaluate.conditions import condition_name
from retro_jax.report.evaluation_tables import comparisons
from retro_jax.report.result_files import EVALUATION, read_results
from retro_jax.report.tables import as_markdown, interval
from retro_jax.storage import files
from retro_jax.train.bucket_workdir import brought

WITHOUT_SETTINGS = True
OTHER = flags.DEFINE_string(
    "other", None, "The workdir of the other model; may be the same, or in a bucket."
)
CONDITION = flags.DEFINE_string("condition", "on", "Condition of the first model.")
OTHER_CONDITION = flags.DEFINE_string("other_condition", None, "Of the other; the same by default.")


def main() -> None:
    """Prints the comparison, and writes it beside the first model's results."""
    places = (app.WORKDIR.value, app.required(OTHER, "the workdir of the other model"))
    first, data = workdirs.open_to_read(DATA)
    second, other = brought(places[1]), pathlib.PurePosixPath(places[1]).name
    names = (CONDITION.value, OTHER_CONDITION.value or CONDITION.value)
    pairs = [_read(folder, name) for folder, name in zip((first, second), names, strict=True)]
    result = compare_results(data, pairs) | {"other": other}
    stem = first / EVALUATION / f"{SPLIT.value}-{names[0]}-against-{other}-{names[1]}"
    files.write_atomically(stem.with_name(f"{stem.name}.json"), files.to_json(result))
    view = comparisons([result])
    text = f"# {view.title}\n\n{as_markdown(view)}\n\n{view.caption}\n"
    files.write_atomically(stem.with_name(f"{stem.name}.md"), text.encode())
    shown = [f"{at} {condition_name(name)}" for at, name in zip(places, names, strict=True)]
    print(_shown(result, shown))


def _read(workdir: pathlib.Path, condition: str) -> tuple[pathlib.Path, dict[str, Any]]:
    """The folder of a workdir's results, and one of them."""
    folder = workdir / EVALUATION
    results = read_results(folder, SPLIT.value)
    if condition not in results:
        path = folder / f"{SPLIT.value}.json"
        raise UserError(f"{path} has no condition {condition!r}: expected {', '.join(results)}")
    return folder, results[condition]


def _shown(result: dict[str, Any], names: list[str]) -> str:
    """The comparison in a few lines."""
    lines = [
        f"{name}: {figure:.4f} bits per byte"
        for name, figure in zip(names, result["bits_per_byte"], strict=True)
    ]
    difference = interval(result["difference"], "+")
    lines.append(f"difference: {difference}, p = {result['p_value']:.4f}")
    better = f"{result['better_documents']:,} of {result['documents']:,} documents"
    return "\n".join([*lines, f"(the first is better on {better}, {result['bytes']:,} bytes)"])


if __name__ == "__main__":
    app.run(main)
