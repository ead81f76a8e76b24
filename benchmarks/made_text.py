"""Text of any size for runs of the data path: lines of this machine's code and prose, drawn at random.

    python -m benchmarks.made_text --folder=NEW --text_megabytes=1000

Writes JSON lines of about 64 MB a file. A document is lines of code drawn from 400 that follow each other, or
in one of eight of prose; its size is log-normal about 6 kB. Its tokens and its topic are those of real text,
and its order is not: no two documents are near-copies, and few chunks are. The same arguments give the
same bytes on the same machine.
"""

import itertools
import json
import pathlib
import random
from collections.abc import Iterator

from absl import app, flags

from data_pipelines.corpora import CorpusConfig, Reading, read_corpus

_FOLDER = flags.DEFINE_string("folder", None, "Where the files go.")
_MEGABYTES = flags.DEFINE_integer("text_megabytes", 1000, "Of text.", lower_bound=1)
_FILE, _POOL = 64 << 20, 100 << 20  # bytes of a file, and of the lines that are drawn from
_LONGEST = 200  # characters of a line
_WINDOW = 400  # lines that a document draws from
_MEAN, _SIGMA = 8.2, 1.0  # of the logarithm of a document's characters


def write(folder: pathlib.Path, megabytes: int) -> None:
    """Writes the files, unless they are there."""
    if (folder / "done").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    made = documents(megabytes * 1_000_000)
    for number in itertools.count():
        size = 0
        with open(folder / f"{number:05d}.jsonl", "w") as file:
            for name, text in made:
                size += file.write(json.dumps({"id": name, "text": text}) + "\n")
                if size >= _FILE:
                    break
        if size < _FILE:
            break
    (folder / "done").touch()


def documents(size: int) -> Iterator[tuple[str, str]]:
    """Ids and texts, of so many characters altogether."""
    chance, total = random.Random(0), 0
    code, prose = _lines("packages"), _lines("wikipedia")
    for number in itertools.count():
        every = prose if number % 8 == 0 else code
        first = chance.randrange(len(every) - _WINDOW)
        lines = every[first : first + _WINDOW]
        wanted, text = chance.lognormvariate(_MEAN, _SIGMA), list[str]()
        left = min(wanted, size - total)
        while left > 0:
            text += chance.choices(lines, k=max(1, int(left) // 40))
            left = min(wanted, size - total) - sum(map(len, text))
        yield f"made-{number}", "\n".join(text)
        total += sum(map(len, text))
        if total >= size:
            return


def _lines(kind: str) -> list[str]:
    """Lines of a corpus, sentences of prose."""
    config, lines, size = CorpusConfig(kind, kind), list[str](), 0
    for document in read_corpus(config, Reading(skip_bad=True)):
        text = document.text if kind == "packages" else document.text.replace(". ", ".\n")
        lines += [line for line in text.split("\n") if len(line) < _LONGEST]
        size += len(text)
        if size > _POOL:
            break
    return lines


def main(_: list[str]) -> None:
    """Writes the files."""
    if _FOLDER.value is None:
        raise app.UsageError("--folder is missing: expected a new folder")
    write(pathlib.Path(_FOLDER.value), _MEGABYTES.value)


if __name__ == "__main__":
    app.run(main)
