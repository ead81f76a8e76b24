"""Which files of a folder an evaluation text is read from: those of one split, never of all."""

import logging
import pathlib
import re
from collections.abc import Iterator, Sequence

from data_pipelines.corpora.config import CorpusConfig
from data_pipelines.corpora.sources import SourceFile, find_files
from retro_jax.errors import UserError
from retro_jax.storage.urls import is_url

_NAMES = {
    "train": "train",
    "training": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
_logger = logging.getLogger(__name__)


def split_in_name(name: str) -> str | None:
    """The split that a file's name tells of, else that of its folders; None where none does.

    "wiki.test.tokens" is test, and so is "test/part-0.parquet".
    """
    for part in reversed(pathlib.PurePosixPath(name).parts):
        found = [_NAMES[word] for word in re.findall("[a-z]+", part.lower()) if word in _NAMES]
        if found:
            return found[0]
    return None


def files_to_score(config: CorpusConfig) -> Iterator[SourceFile]:
    """The files of an evaluation text: of a folder with several splits, those of the test split.

    Raises:
      UserError: a folder of several splits without a test split, or of a training split alone.
    """
    path = str(config.path)
    files = list(find_files(path, config))
    splits = {file.name: split_in_name(file.name) for file in files}
    held = {split for split in splits.values() if split}
    if _is_file(path, files) or held in (set(), {"validation"}, {"test"}):
        yield from files
        return
    if "test" not in held:
        raise UserError(
            f"{path} has files of {' and '.join(sorted(held))}: expected the path of the file to score"
        )
    chosen = [file for file in files if splits[file.name] == "test"]
    left = [file.name for file in files if splits[file.name] != "test"]
    _logger.warning(
        "%s: %s is scored; left out are %d other files, such as %s",
        *(path, chosen[0].name, len(left), left[0]),
    )
    yield from chosen


def _is_file(path: str, files: Sequence[SourceFile]) -> bool:
    """Whether a path or URL names a file, not a folder of some."""
    if not is_url(path):
        return pathlib.Path(path).is_file()
    return len(files) == 1 and pathlib.PurePosixPath(path).name == files[0].name
