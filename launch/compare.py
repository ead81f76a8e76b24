"""Compares two trained models on the same text, document by document, and says how sure it is.

    python -m launch.compare --workdir=W --other=V
    python -m launch.compare --workdir=W --other=V --condition=on --other_condition=baseline

Reads what launch.evaluate wrote of both; the text and the tokeniser must be the same. Prints bits per
byte of both, their difference with a 95% interval, and the p-value of a paired test: how often a
difference as large would come about if for each document it were chance which model is which. Writes
W/evaluation/SPLIT-CONDITION-against-V-CONDITION.json and .md; launch.report shows it with W's results.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import flags

from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.evaluation.splits import open_split
from launch.common import app
from launch.common.flags import DATA, SPLIT, data_directory
from retro_jax.errors import UserError
from retro_jax.evaluate.bootstrap import intervals, paired_test, resampled_sums
from retro_jax.evaluate.conditions import condition_name
from retro_jax.report.tables import comparisons, markdown_table
from retro_jax.storage import files
from retro_jax.storage.files import read_array

OTHER = flags.DEFINE_string("other", None, "The workdir of the other model; may be the same.")
CONDITION = flags.DEFINE_string("condition", "on", "Condition of the first model.")
OTHER_CONDITION = flags.DEFINE_string("other_condition", None, "Of the other; the same by default.")

_FOLDER = "evaluation"
_SAMPLES = 10_000


def main() -> None:
    """Prints the comparison, and writes it beside the first model's results."""
    first = pathlib.Path(app.required(app.WORKDIR, "the directory of the first model"))
    second = pathlib.Path(app.required(OTHER, "the directory of the other model"))
    names = (CONDITION.value, OTHER_CONDITION.value or CONDITION.value)
    data = data_directory(DATA.value or first)
    found = [_read(place, name) for place, name in zip((first, second), names, strict=True)]
    result = compare(data, [found[0], found[1]]) | {"other": second.name}
    stem = first / _FOLDER / f"{SPLIT.value}-{names[0]}-against-{second.name}-{names[1]}"
    files.write_atomically(stem.with_name(f"{stem.name}.json"), files.to_json(result))
    view = comparisons([result])
    text = f"# {view.title}\n\n{markdown_table(view.header, view.rows)}\n\n{view.caption}\n"
    files.write_atomically(stem.with_name(f"{stem.name}.md"), text.encode())
    print(
        _shown(
            result,
            [
                f"{place} {condition_name(n)}"
                for place, n in zip((first, second), names, strict=True)
            ],
        )
    )


def _read(workdir: pathlib.Path, condition: str) -> tuple[dict[str, Any], np.ndarray]:
    """A condition's result and its array."""
    path = workdir / _FOLDER / f"{SPLIT.value}.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: expected the result of launch.evaluate")
    results = files.read_json(path)
    if condition not in results:
        raise UserError(f"{path} has no condition {condition!r}: expected {', '.join(results)}")
    return results[condition], read_array(path.parent / results[condition]["nll"])


def compare(data: pathlib.Path, found: list[tuple[dict[str, Any], np.ndarray]]) -> dict[str, Any]:
    """Bits per byte of two results, the difference, its interval and the p-value.

    Args:
      data: of the prepared data. found: results and arrays [n, 64] of the two.

    Raises:
      UserError: they are not of the same text.
    """
    (first, nll), (second, other) = found
    texts = [
        (result["manifests"]["chunks"], result["settings"]["max_documents"])
        for result in (first, second)
    ]
    if texts[0] != texts[1] or nll.shape != other.shape:
        raise UserError("the two results are of other texts: expected one split, data and number")
    split = open_split(data, first["settings"]["split"], neighbours=0, max_documents=texts[0][1])
    if split.database.manifest.hash != texts[0][0]:
        raise UserError(f"{data} holds other chunks than were scored: expected --data")
    text = split.text_mask(Tokenizer.open(data / "tokenizer").byte_lengths)
    records = split.records()
    numbers, owner = np.unique(split.database.documents(split.ids), return_inverse=True)
    bits = [
        np.bincount(owner, np.where(text, n.astype(np.float64), 0).sum(axis=1)) / math.log(2)
        for n in (nll, other)
    ]
    size = np.array([records[number].bytes for number in numbers.tolist()], np.float64)
    columns = np.stack([size, *bits], axis=1)
    total, drawn = columns.sum(axis=0), resampled_sums(columns, samples=_SAMPLES, seed=0)
    values, sampled = total[1:] / total[0], drawn[:, 1:] / drawn[:, :1]
    (interval,) = intervals(values[:1] - values[1:], sampled[:, :1] - sampled[:, 1:])
    return {
        "models": [result["model"] for result, _ in found],
        "conditions": [result["condition"] for result, _ in found],
        "documents": len(numbers),
        "bytes": int(size.sum()),
        "bits_per_byte": values.tolist(),
        "difference": json.loads(json.dumps(vars(interval))),
        "better_documents": int((bits[0] < bits[1]).sum()),
        "p_value": paired_test(bits[0] - bits[1], samples=_SAMPLES, seed=0),
    }


def read_comparisons(folder: pathlib.Path, split: str, results: Mapping[str, Any]) -> list[Any]:
    """What this program left in W/evaluation of a split's results, and not of older ones."""
    found = []
    for path in sorted(folder.glob(f"{split}-*-against-*.json")):
        each = files.read_json(path)
        condition = each["conditions"][0]
        own = path.name.startswith(f"{split}-{condition}-against-") and "other" in each
        if own and results.get(condition, {}).get("model") == each["models"][0]:
            found.append(each)
    return found


def _shown(result: dict[str, Any], names: list[str]) -> str:
    """The comparison in a few lines."""
    value, low, high = (result["difference"][name] for name in ("value", "low", "high"))
    lines = [
        f"{name}: {figure:.4f} bits per byte"
        for name, figure in zip(names, result["bits_per_byte"], strict=True)
    ]
    lines.append(f"difference: {value:+.4f} [{low:+.4f}, {high:+.4f}], p = {result['p_value']:.4f}")
    better = f"{result['better_documents']:,} of {result['documents']:,} documents"
    return "\n".join([*lines, f"(the first is better on {better}, {result['bytes']:,} bytes)"])


if __name__ == "__main__":
    app.run(main)
