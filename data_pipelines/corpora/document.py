"""What every reader gives, and what it does with a document that cannot be read."""

import collections
import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from data_pipelines.corpora.config import CorpusConfig
from retro_jax.errors import UserError

# The Pile's sets whose names are longer than the paper's.
_PILE_LABELS = {
    "Gutenberg (PG-19)": "gutenberg",
    "Wikipedia (en)": "wikipedia",
    "USPTO Backgrounds": "uspto",
}
_SEPARATORS = frozenset(" \t\n_-./\\,:;()[]{}'\"")
_SIGNS = {"+": "plus", "#": "sharp", "&": "and"}


@dataclasses.dataclass(frozen=True)
class Document:
    """One document: an id that is unique within its corpus, its text, and the corpus's name."""

    id: str
    text: str
    corpus: str


@dataclasses.dataclass(frozen=True)
class Record:
    """What a reader finds in a file.

    Attributes:
      id, text: of the document.
      label: where it has one.
      place: the file and line or row; "" where the file is all that can be said.
    """

    id: str
    text: str
    label: str | None = None
    place: str = ""


@dataclasses.dataclass
class Reading:
    """How a corpus is being read, and what has been counted so far.

    Attributes:
      skip_bad: count documents that cannot be read and continue, instead of stopping at the first.
      counts: "documents" given out, "bad" and "empty" ones left out.
      labels: documents of each label, unselected labels included.
      spellings: each label as the corpus spells it.
      first_bad: the fault of the first bad one.
      source: which edition of the corpus was read, where it has one.
    """

    skip_bad: bool = False
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    labels: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    spellings: dict[str, str] = dataclasses.field(default_factory=dict)
    first_bad: str = ""
    source: str = ""

    def label(self, name: str) -> str:
        """Counts a document of a label; returns the label as in a corpus's name.

        Raises:
          UserError: another label of this corpus is written in the same way.
        """
        label = short_label(name)
        self.labels[label] += 1
        self._spell(label, name)
        return label

    def _spell(self, label: str, name: str) -> None:
        """Remembers how a label was spelt; refuses two labels of one short form."""
        first = self.spellings.setdefault(label, name)
        if first != name:
            raise UserError(
                f"the labels {first!r} and {name!r} are both written {label!r}: expected labels"
                " that differ in more than case, spaces and points"
            )

    def bad(self, message: str, count: int = 1) -> None:
        """Stops at a bad document, or counts it, or so many that cannot be read together."""
        if not self.skip_bad:
            raise UserError(f"{message}; skip_bad_documents counts such documents and goes on")
        self.counts["bad"] += count
        self.first_bad = self.first_bad or message

    def decode(self, data: bytes, place: str, offset: int = 0) -> str | None:
        """UTF-8 bytes as text, newlines as they are; None for a bad document.

        Args:
          data: the document's bytes.
          place: the file they are from.
          offset: where in the file they begin.
        """
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            byte = data[error.start]
            self.bad(
                f"{place} has byte 0x{byte:02x} at offset {offset + error.start}: expected UTF-8"
            )
            return None

    def add(self, other: "Reading") -> None:
        """Adds what was counted in another part of the corpus, one that is read later."""
        self.counts.update(other.counts)
        self.labels.update(other.labels)
        for label, name in other.spellings.items():
            self._spell(label, name)
        self.first_bad = self.first_bad or other.first_bad
        self.source = self.source or other.source


def content_id(text: str) -> str:
    """The id of a document that has none of its own: 128 bits of a hash of its text.

    Raises:
      UnicodeEncodeError: the text has a lone surrogate.
    """
    return hashlib.blake2b(text.encode(), digest_size=16, person=b"id").hexdigest()


def lookup(fields: Mapping[str, Any], name: str) -> Any:
    """A field by its name, or by a path of names with points: "meta.pile_set_name"; None without it."""
    if name in fields:
        return fields[name]
    value: Any = fields
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def short_label(name: str) -> str:
    """A label as in a corpus's name: "PubMed Central" is pubmed_central, "C++" is c_plus_plus.

    Letters, their marks and digits of any script are kept, in small letters; signs other than spaces, points,
    hyphens and the like are written out, so that labels which differ in them stay distinct.
    """
    if name in _PILE_LABELS:
        return _PILE_LABELS[name]
    written = (
        char
        if char.isalnum() or unicodedata.category(char).startswith("M")
        else "_"
        if char in _SEPARATORS
        else f"_{_name_of(char)}_"
        for char in unicodedata.normalize("NFC", name.lower())
    )
    return re.sub("_+", "_", "".join(written)).strip("_")


def _name_of(char: str) -> str:
    """The name of a sign in small letters: "number_sign"; its number where it has none."""
    name = _SIGNS.get(char, "") or str(unicodedata.name(char, f"u{ord(char):x}"))
    return re.sub(r"[^a-z0-9]+", "_", name.lower())


def check_unicode(record: Record, source: str, reading: Reading) -> bool:
    """Whether id, text and label can be written as UTF-8: JSON can spell half a surrogate pair.

    Args:
      record: the document. source: what it is from, for the message. reading: counts bad documents.
    """
    for what, value in (("id", record.id), ("text", record.text), ("label", record.label or "")):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            reading.bad(
                f"{source}: the {what} of document {record.id!a} has a lone surrogate"
                f" at character {error.start}: expected valid Unicode"
            )
            return False
    return True


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
    found: list[Any] = []
    for path in (config.text_field, config.id_field, config.label_path):
        value = lookup(fields, path) if path else None
        if isinstance(value, bytes):  # a column of bytes, or one that is not valid UTF-8
            value = reading.decode(value, place)
            if value is None:
                return None
        found.append(value.removeprefix("\ufeff") if isinstance(value, str) else value)
    text, number, label = found
    if not isinstance(text, str):
        reading.bad(f"{place} has no text in {config.text_field!r}: expected a string")
        return None
    if config.id_field:
        if not isinstance(number, str | int) or isinstance(number, bool):
            reading.bad(
                f"{place} has no id in {config.id_field!r}: expected a string or an integer"
            )
            return None
        name = str(number)
    if config.label_path and not (isinstance(label, str) and label.strip()):
        reading.bad(f"{place} has no label in {config.label_path!r}: expected a string")
        return None
    return Record(name, text, label, place)
