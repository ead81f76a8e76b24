"""Documents that an older version named by file and line, as in "x.jsonl:7", and their ids now.

A line's number changes whenever lines come before it, so an id that the corpus does not give is made
of the text. A database with the older ids keeps them; what is appended to it is compared by text.
"""

import itertools
import pathlib
from collections.abc import Callable, Collection, Iterable, Iterator

import numpy as np

from data_pipelines.artefacts.manifest import MANIFEST_FILE, Manifest
from data_pipelines.corpora import SPLITS, Document
from data_pipelines.corpora.config import LABELLED_KINDS
from data_pipelines.corpora.document import content_id

Name = tuple[str, str]
_ROW = np.dtype([("corpus", "<u4"), ("c0", "<u8"), ("c1", "<u8")])


def corpora_of_line_ids(folder: pathlib.Path) -> set[str]:
    """The corpora of a documents stage whose ids are those of lines; none before it is finished."""
    places = [path for split in SPLITS if ((path := folder / split) / MANIFEST_FILE).is_file()]
    if not places:
        return set()
    corpora = Manifest.read(places[0]).settings.get("corpora", {})
    return {
        name
        for name, settings in corpora.items()
        if settings["kind"] in LABELLED_KINDS
        and settings["id_field"] is None
        and "ids" not in settings
    }


class ContentNames:
    """The names by content of documents that have ids of lines, 20 bytes for each."""

    def __init__(
        self,
        folders: Iterable[pathlib.Path],
        read: Callable[[pathlib.Path], Iterator[Document]],
        without: Collection[Name] = (),
    ) -> None:
        """Reads their texts.

        Args:
          folders: finished documents stages; those without ids of lines are not read.
          read: yields the documents of a split's directory.
          without: (corpus, id) of documents that are left out.
        """
        self._corpora: dict[str, int] = {}
        rows = (
            (self._corpora.setdefault(d.corpus, len(self._corpora)), *_halves(content_id(d.text)))
            for d in itertools.chain.from_iterable(_documents(f, read) for f in folders)
            if (d.corpus, d.id) not in without
        )
        self._rows = np.fromiter(rows, _ROW)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._rows)

    def ids(self) -> Iterator[str]:
        """Their ids, in order."""
        return (self.name(number)[1] for number in range(len(self)))

    def name(self, number: int) -> Name:
        """The corpus and the id of one."""
        corpus, *halves = self._rows[number].tolist()
        return list(self._corpora)[corpus], "".join(f"{half:016x}" for half in halves)


def _documents(
    folder: pathlib.Path, read: Callable[[pathlib.Path], Iterator[Document]]
) -> Iterator[Document]:
    """The documents of one stage, of all splits, that have ids of lines."""
    numbered = corpora_of_line_ids(folder)
    places = [path for split in SPLITS if ((path := folder / split) / MANIFEST_FILE).is_file()]
    for place in places if numbered else ():
        for document in read(place):
            # A label's corpus is called CORPUS-LABEL.
            if any(f"{document.corpus}-".startswith(f"{name}-") for name in numbered):
                yield document


def _halves(name: str) -> tuple[int, int]:
    """An id by content as two numbers."""
    return int(name[:16], 16), int(name[16:], 16)
