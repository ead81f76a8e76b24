"""A corpus that the caller has in memory: strings, or pairs of id and text."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator
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


def written(
    corpora: Iterable[CorpusConfig | TextCorpus], folder: pathlib.Path
) -> list[CorpusConfig]:
    """Corpora that can be read from files: those in memory are written into `folder`."""
    return [c.write(folder) if isinstance(c, TextCorpus) else c for c in corpora]


def _is_pair(document: Any) -> bool:
    """Whether a document is (id, text)."""
    pair = isinstance(document, tuple) and len(document) == 2
    return pair and all(isinstance(part, str) for part in document)
