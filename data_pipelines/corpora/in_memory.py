"""A corpus that the caller has in memory: strings, pairs of id and text, or the rows of a table."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from data_pipelines.corpora.config import CorpusConfig
from retro_jax.errors import UserError
from retro_jax.storage import files


@dataclasses.dataclass(frozen=True)
class TextCorpus:
    """A named corpus of texts in memory.

    A manifest records the SHA-256 of the texts: prepared again with others, W is refused.

    Attributes:
      name: what the corpus is called in every artefact and report.
      documents: all of them strings, or all of them pairs (id, text). Without ids, a document is known
        by its text, so equal texts are one document.
      split: put every document into this split, instead of by a hash of its id.
    """

    name: str
    documents: tuple[str | tuple[str, str], ...] = dataclasses.field(repr=False)
    split: str | None = None

    @classmethod
    def of(
        cls,
        name: str,
        rows: Any,
        *,
        text: str = "text",
        id: str | None = None,
        split: str | None = None,
    ) -> "TextCorpus":
        """A corpus of any rows.

        Args:
          name: of the corpus.
          rows: a table of pandas or Arrow, a Dataset of Hugging Face, or an iterable of mappings; or
            of strings or pairs, as `documents` is.
          text: the column, or key, with the text. id: that with the id; None for a hash of the text.
          split: put every document into this split.

        Raises:
          UserError: no such column, or a row without a string there; it names the row, from 0.
        """
        documents: list[Any] = []
        for number, row in enumerate(_rows(rows, [text] if id is None else [text, id], name)):
            if not isinstance(row, Mapping):
                documents.append(row)
                continue
            for field in (text, *([] if id is None else [id])):
                value = row.get(field)
                if not (isinstance(value, str) or (field == id and isinstance(value, int))):
                    raise UserError(
                        f"row {number} of {name!r} has {value!a} in {field!r}: expected a string"
                    )
            documents.append(row[text] if id is None else (str(row[id]), row[text]))
        return cls(name, tuple(documents), split)

    def __post_init__(self) -> None:
        object.__setattr__(self, "documents", tuple(self.documents))
        self._config("")  # checks name and split
        expected = "strings alone, or pairs (id, text) alone"
        if not self.documents:
            raise UserError(f"TextCorpus.documents of {self.name!r} is empty: expected {expected}")
        for number, document in enumerate(self.documents):
            if not (_is_pair(document) if self.has_ids else isinstance(document, str)):
                raise UserError(
                    f"TextCorpus.documents[{number}] of {self.name!r} is a"
                    f" {type(document).__name__}: expected {expected}"
                )

    @property
    def has_ids(self) -> bool:
        """Whether its documents are pairs of id and text."""
        return not isinstance(self.documents[0], str)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of its texts and ids, in their order."""
        digest = hashlib.sha256()
        for line in self._lines():
            digest.update(line)
        return digest.hexdigest()

    @property
    def settings(self) -> dict[str, Any]:
        """What a manifest records."""
        fields = {"name": self.name, "kind": "in memory", "split": self.split}
        return fields | {"documents": len(self.documents), "sha256": self.digest}

    def write(self, folder: pathlib.Path) -> CorpusConfig:
        """The same corpus as a file in `folder`, which every worker can read."""
        path = folder / f"{self.name}-{self.digest}.jsonl"
        if not path.is_file():
            with files.writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            with files.temporary_name(path) as temporary:
                files.write_hashed(temporary, lambda file: file.writelines(self._lines()))
                temporary.rename(path)
        return self._config(str(path))

    def _config(self, path: str) -> CorpusConfig:
        """The corpus of a file that contains these documents."""
        field = "id" if self.documents and self.has_ids else None
        return CorpusConfig(self.name, "jsonl", path, id_field=field, split=self.split)

    def _lines(self) -> Iterator[bytes]:
        """A JSON object per document."""
        for document in self.documents:
            if isinstance(document, str):
                fields = {"text": document}
            else:
                fields = dict(zip(("id", "text"), document))
            yield json.dumps(fields).encode() + b"\n"


def _rows(rows: Any, columns: list[str], name: str) -> Iterator[Any]:
    """The rows of a table as mappings, or of an iterable as they are."""
    names = getattr(rows, "column_names", None)  # of Arrow and of Hugging Face's datasets
    if names is None and hasattr(rows, "columns") and hasattr(rows, "itertuples"):
        names = list(rows.columns)  # of pandas
    if names is None or callable(names):
        if isinstance(rows, str | bytes) or not isinstance(rows, Iterable):
            raise UserError(f"the rows of {name!r} are a {type(rows).__name__}: expected a table")
        yield from rows
        return
    for column in columns:
        if column not in names:
            raise UserError(
                f"the table of {name!r} has no column {column!a}: expected one of {list(names)!a}"
            )
    if hasattr(rows, "to_pylist"):
        yield from rows.select(columns).to_pylist()
    elif hasattr(rows, "itertuples"):
        for values in zip(*(rows[column].tolist() for column in columns)):
            yield dict(zip(columns, values, strict=True))
    else:
        yield from rows.select_columns(columns)


def written(
    corpora: Iterable[CorpusConfig | TextCorpus], folder: pathlib.Path
) -> list[CorpusConfig]:
    """Corpora that can be read from files: those in memory are written into `folder`."""
    return [c.write(folder) if isinstance(c, TextCorpus) else c for c in corpora]


def _is_pair(document: Any) -> bool:
    """Whether a document is (id, text)."""
    pair = isinstance(document, tuple) and len(document) == 2
    return pair and all(isinstance(part, str) for part in document)
