"""Documents that come one at a time, as a server receives them, into a workdir's database."""

import dataclasses
import pathlib
import shutil
from collections.abc import Sequence

from data_pipelines.artefacts.manifest import Path
from data_pipelines.artefacts.runner import InProcess
from data_pipelines.corpora import TextCorpus
from data_pipelines.retriever import revisions
from data_pipelines.workdir.preparation import Preparation, PrepareConfig
from data_pipelines.workdir.stages import only_one
from data_pipelines.workdir.update import update


def change_documents(
    workdir: Path,
    config: PrepareConfig,
    corpus: str,
    append: Sequence[tuple[str, str]],
    remove: Sequence[str],
) -> list[str]:
    """Publishes a revision with other documents; a change that fails leaves nothing behind.

    Args:
      workdir: W. config: its settings; the corpora in them are not read.
      corpus: of what is appended. append: ids and texts. remove: CORPUS/ID each, before appending.

    Returns:
      Lines about what was done.

    Raises:
      UserError: W is not prepared, a document is not there, or another preparation runs.
    """
    directory = pathlib.Path(workdir)
    if append:
        texts = TextCorpus(corpus, tuple(append), split="train")
        documents = dataclasses.replace(config.documents, corpora=(texts,))
        config = dataclasses.replace(config, documents=documents)
    lines: list[str] = []
    with only_one(directory):
        folder = revisions.folder_of(directory, revisions.latest(directory) + 1)
        began_before = revisions.is_begun(folder)
        try:
            preparation = Preparation(directory, config, InProcess(), lines.append)
            update(preparation, append=bool(append), remove=list(remove))
        except BaseException:
            published = revisions.latest(directory) > int(folder.name) - 1
            if not began_before and not published:
                shutil.rmtree(folder, ignore_errors=True)
            raise
    return lines
