"""What the conditions of an evaluation read beside the text, checked before anything is scored."""

import pathlib
from collections.abc import Mapping

from data_pipelines.evaluation.database_share import check_shares
from data_pipelines.evaluation.splits import Split, open_split
from retro_jax.errors import UserError


def check_other_texts(
    data: pathlib.Path, split: Split, conditions: Mapping[str, int], revision: int | None = None
) -> None:
    """Refuses conditions without a text that tunes them, and of the database's own documents.

    Args:
      data: of the prepared data. split: that is to be scored.
      conditions: the neighbours of each. revision: of the database; None for the newest.

    Raises:
      UserError: an empty split, or one without the neighbours; or the split is the database itself.
    """
    if any(name.startswith("database_") for name in conditions):
        check_shares(split)
    for what, part in (("--retrieval=tokens", "tokens"), ("--knn", "knn")):
        counts = [k for name, k in conditions.items() if part in name.split("+")]
        if not counts:
            continue
        if split.name == "train":
            does = "would vote" if part == "tokens" else "are the datastore"
            raise UserError(
                f"{what} of the training split itself, whose own documents {does}: expected another split"
            )
        needed = {"validation": f"{what} is tuned on the validation split"}
        if part == "knn":
            needed["train"] = f"{what} looks up the training split"
        for name, use in needed.items():
            try:
                open_split(data, name, neighbours=max(counts), revision=revision)
            except UserError as error:
                raise UserError(f"{use}, but {error}") from error
