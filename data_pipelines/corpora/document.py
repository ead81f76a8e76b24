"""What every reader gives, and what it does with a document that cannot be read."""

import collections
import dataclasses

from retro_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Document:
    """One document: an id that is unique within its corpus, its text, and the corpus's name."""

    id: str
    text: str
    corpus: str


@dataclasses.dataclass
class Reading:
    """How a corpus is being read, and what has been counted so far.

    Attributes:
      skip_bad: count documents that cannot be read and go on, instead of stopping at the first.
      counts: "documents" given out, "bad" and "empty" ones left out.
      first_bad: what was wrong with the first bad one.
      source: which edition of the corpus was read, where it has one.
    """

    skip_bad: bool = False
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    first_bad: str = ""
    source: str = ""

    def bad(self, message: str) -> None:
        """Stops at a bad document, or counts it."""
        if not self.skip_bad:
            raise UserError(f"{message}; skip_bad_documents counts such documents and goes on")
        self.counts["bad"] += 1
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
