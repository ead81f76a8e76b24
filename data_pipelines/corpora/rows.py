"""Documents in rows of named fields, as JSON lines and Parquet have them."""

from collections.abc import Mapping
from typing import Any

from data_pipelines.corpora.config import CorpusConfig
from data_pipelines.corpora.document import Reading, Record, lookup


def record_of(
    fields: Mapping[str, Any], name: str, place: str, config: CorpusConfig, reading: Reading
) -> Record | None:
    """The document of a row.

    Args:
      fields: the row.
      name: its id where the corpus has no field for it.
      place: the file and the row, for messages.
      config: which field is what.
      reading: what is done with bad documents.

    Returns:
      The document; None for a bad one.
    """
    text = lookup(fields, config.text_field)
    if not isinstance(text, str):
        reading.bad(f"{place} has no text in {config.text_field!r}: expected a string")
        return None
    if config.id_field:
        value = lookup(fields, config.id_field)
        if not isinstance(value, str | int):
            reading.bad(
                f"{place} has no id in {config.id_field!r}: expected a string or an integer"
            )
            return None
        name = str(value)
    label = None
    if config.label_path:
        label = lookup(fields, config.label_path)
        if not (isinstance(label, str) and label.strip()):
            reading.bad(f"{place} has no label in {config.label_path!r}: expected a string")
            return None
    return Record(name, text, label)
