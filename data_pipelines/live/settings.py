"""What is retrieved while a text is generated, as one value: of which databases, without what."""

import dataclasses
import pathlib
from typing import Any

from data_pipelines.artefacts.manifest import Path
from data_pipelines.chunk_database.database import CHUNK_LENGTH
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.live.database import LiveDatabase
from data_pipelines.live.several import FixedNeighbours, SeveralDatabases
from data_pipelines.retriever.revisions import latest, open_database
from retro_jax.config import require
from retro_jax.errors import UserError
from retro_jax.storage import files


@dataclasses.dataclass(frozen=True)
class LiveSettings:
    """Where a text's neighbours come from; the defaults are the newest revision of one database.

    Attributes:
      revision: of the first database; None for the newest.
      exclude: its documents that are never retrieved, as CORPUS/ID.
      more: workdirs that are searched too, DIRECTORY or DIRECTORY=NEIGHBOURS.
      file: fixed neighbours instead, JSON lines with a text each; "" for none.
      stride: tokens between retrievals, a divisor of 64.
      bert_folder: the BERT of the first database's keys, where it is no packaged one.
    """

    revision: int | None = None
    exclude: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    file: str = ""
    stride: int = CHUNK_LENGTH
    bert_folder: str | None = None

    def __post_init__(self) -> None:
        for field in ("exclude", "more"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        divides = self.stride > 0 and CHUNK_LENGTH % self.stride == 0
        require(divides, self, "stride", f"a divisor of {CHUNK_LENGTH}")
        alone = self.revision is None and not self.exclude and not self.more
        require(not self.file or alone, self, "file", '"" with a revision, exclude or more')

    def check_off(self) -> None:
        """Raises a UserError for settings that have no meaning without retrieval."""
        for field in ("revision", "exclude", "more", "file"):
            empty = getattr(self, field) == getattr(LiveSettings, field)
            require(empty, self, field, "none with retrieval off")

    def identity(self, data: pathlib.Path) -> dict[str, Any]:
        """What neighbours depend on, by hash, where it is more than revision 0 of W's database."""
        found: dict[str, Any] = {} if self.stride == CHUNK_LENGTH else {"stride": self.stride}
        if self.file:
            path = pathlib.Path(self.file)
            if not path.is_file():
                raise UserError(f"{path} is missing: expected neighbours as JSON lines")
            return found | {"neighbours_file": files.measure(path)[1]}
        # A changed database is searched again.
        if latest(data) or self.revision is not None:
            found["database"] = open_database(data, self.revision).manifest.hash
        if self.exclude:
            found["excluded"] = list(self.exclude)
        if self.more:
            pairs = map(parse_source, self.more)
            hashes = [[open_database(place).manifest.hash, claim] for place, claim in pairs]
            found["more_databases"] = hashes
        return found

    def open(
        self, data: Path, tokenizer: Tokenizer, k: int, part: str = "both"
    ) -> LiveDatabase | SeveralDatabases | FixedNeighbours:
        """Opens what gives chunks their k neighbours; `part` is BatchConfig.neighbour_part.

        Raises:
          UserError: a database, a document, a BERT or the file is missing, or is of another kind.
        """
        if self.file:
            return FixedNeighbours.open(self.file, tokenizer, k, part)
        pairs = [parse_source(text) for text in self.more]
        places = [pathlib.Path(place).resolve() for place in (data, *(place for place, _ in pairs))]
        for number, (place, _) in enumerate(pairs, 1):
            if places[number] in places[:number]:
                raise UserError(f"database {place!r} is searched already: expected each once")
        first = LiveDatabase.open(data, self.revision, model=self.bert_folder, part=part)
        first = first.without(self.exclude) if self.exclude else first
        if not self.more:
            return first
        others = [LiveDatabase.open(place, part=part) for place, _ in pairs]
        return SeveralDatabases([first, *others], [0, *(claim for _, claim in pairs)], k)


def parse_source(text: str) -> tuple[str, int]:
    """DIRECTORY or DIRECTORY=NEIGHBOURS, as flags have it: where, and how many it claims."""
    place, equals, count = text.partition("=")
    if equals and not (count.isdecimal() and int(count)):
        raise UserError(f"database {text!r}: expected DIRECTORY or DIRECTORY=NEIGHBOURS")
    return place, int(count or 0)
