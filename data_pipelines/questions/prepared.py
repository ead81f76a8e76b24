"""Questions as an artefact, W/questions/NAME: tokens of prompts and answers, with their neighbours.

    prompts.npy [P, 64]         the chunks of all prompts; prompt-ends.npy [n], where each ends
    answers.npy [A]             the tokens of all answers; answer-ends.npy [n]
    neighbours.npy [P, K, 128]  the neighbours of each chunk

The neighbours are the file's passages, or what W's database has for the chunk, as it does while a
text is generated.
"""

import logging
import pathlib
from collections.abc import Sequence

import numpy as np

from data_pipelines.artefacts.manifest import Manifest, Path
from data_pipelines.artefacts.stage import Stage
from data_pipelines.batches.batches import (
    BatchConfig,
    Batches,
    keep_part,
    keep_part_of_text,
    permutation,
)
from data_pipelines.chunk_database.database import CHUNK_LENGTH, token_dtype
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.live.database import LiveDatabase
from data_pipelines.questions import layout
from data_pipelines.questions.passages import FoundPassages, GivenPassages
from data_pipelines.questions.reader import QuestionFile
from data_pipelines.retriever import revisions
from data_pipelines.retriever.retriever import Ranking
from retro_jax.batch import RetroBatch
from retro_jax.errors import UserError

KIND = "questions"
_SHARDS = ("prompts.npy", "prompt-ends.npy", "answers.npy", "answer-ends.npy", "neighbours.npy")
_logger = logging.getLogger(__name__)
_BLOCK = 1024  # prompt chunks that are asked for at once


def folder_of(workdir: Path, name: str) -> pathlib.Path:
    """Where questions of a name are in a workdir.

    Raises:
      UserError: it is no name of a folder.
    """
    if pathlib.PurePath(name).name != name or not name or name.startswith("."):
        raise UserError(
            f"questions {name!r}: expected a name without slashes that does not begin with a dot"
        )
    return pathlib.Path(workdir) / KIND / name


def prepare_questions(workdir: Path, name: str, file: QuestionFile, k: int) -> Manifest:
    """Writes W/questions/NAME, unless it is there.

    Args:
      workdir: W, which launch.prepare has filled: its tokeniser, and its newest database where the
        file has no passages.
      name: of the questions. file: as `read_questions` gives it.
      k: K, neighbours of each prompt.

    Returns:
      The manifest. Facts: questions, chunks of the longest prompt, tokens of the longest answer.

    Raises:
      UserError: W lacks something, or W/questions/NAME is of another file, database or k.
    """
    tokenizer = Tokenizer.open(pathlib.Path(workdir) / "tokenizer")
    parents = {"tokenizer": (tokenizer.manifest, tokenizer.directory)}
    settings = {
        "k": k,
        "file": {"name": file.name, "sha256": file.sha256},
        "passages": "given" if file.has_passages else "database",
        "forms": [layout.FILL, layout.PROMPT, layout.ANSWER, layout.PASSAGE],
        "vocab_size": tokenizer.vocab_size,
        "pad_id": tokenizer.pad_id,
    }
    found, prompts = None, layout.prompts_of(file, tokenizer)
    if not file.has_passages:
        found = FoundPassages(LiveDatabase.open(workdir), prompts, k)
        parents["database"] = (found.database.manifest, found.database.directory)
        settings |= {"ranking": Ranking.of(workdir).settings}
    stage = Stage(folder_of(workdir, name), KIND, settings, parents)
    if stage.done:
        return stage.manifest()
    answers = layout.answer_tokens(tokenizer, [q.answers[0] for q in file.questions])
    passages = found or GivenPassages(tokenizer, file.questions, prompts, k)
    dtype = token_dtype(max(tokenizer.vocab_size, tokenizer.pad_id + 1))
    chunks = np.concatenate([prompt.chunks for prompt in prompts])
    blocks = [chunks[first : first + _BLOCK] for first in range(0, len(chunks), _BLOCK)]
    arrays = (
        chunks.astype(dtype),
        np.cumsum([len(prompt.chunks) for prompt in prompts]),
        np.concatenate(answers).astype(dtype),
        np.cumsum([len(answer) for answer in answers]),
        np.concatenate([passages(block).astype(dtype) for block in blocks]),
    )
    for shard, array in zip(_SHARDS, arrays, strict=True):
        stage.write_array(shard, array)
    facts = {
        "questions": len(prompts),
        "longest_prompt": max(len(prompt.chunks) for prompt in prompts),
        "longest_answer": max(map(len, answers)),
    }
    return stage.finish(facts, _SHARDS)


def _warn_of_other_passages(manifest: Manifest, folder: pathlib.Path, workdir: Path) -> None:
    """Says where passages were found in another revision of the database than W's newest."""
    found_in, newest = manifest.parents.get("database"), revisions.open_database(workdir).manifest
    if found_in not in (None, newest.hash):
        _logger.warning(
            "%s has passages of the database %s, and revision %d is %s: remove it to find them again",
            *(folder, found_in[:12], newest.revision, newest.hash[:12]),
        )


class QuestionBatches(Batches):
    """Questions as training batches: a row is a question with its answer, and only that has a loss.

    Every question is once in an epoch, in another order each time.

    Attributes:
      directory, manifest: where they are from.
      vocab_size, pad_id: of their tokens.
      lineage: hashes of the artefacts that a run of them depends on.
    """

    def __init__(
        self, directory: Path, manifest: Manifest, config: BatchConfig, chunks: Manifest
    ) -> None:
        """Use `read`; `chunks` is of W's training split."""
        self.directory, self.manifest, self.config = pathlib.Path(directory), manifest, config
        self.vocab_size: int = manifest.settings["vocab_size"]
        self.pad_id: int = manifest.settings["pad_id"]
        self.lineage = {"chunks/train": chunks.hash, KIND: manifest.hash}
        self.corpora = [self.directory.name]
        self.sequences = {self.directory.name: manifest.fact("questions")}
        self._prompts, ends, self._answers, answer_ends, self._neighbour_rows = (
            np.load(self.directory / name, mmap_mode="r") for name in _SHARDS
        )
        self._prompt_bounds = np.concatenate([[0], ends])
        self._answer_bounds = np.concatenate([[0], answer_ends])

    @classmethod
    def read(cls, workdir: Path, config: BatchConfig, *, verify: bool = False) -> "QuestionBatches":
        """Opens W/questions/NAME, NAME being BatchConfig.questions.

        Raises:
          UserError: none there, damaged, of another tokeniser, with fewer neighbours, or longer
            than the sequences.
        """
        tokenizer = Tokenizer.open(pathlib.Path(workdir) / "tokenizer")
        folder = folder_of(workdir, config.questions)
        parents = {"tokenizer": (tokenizer.manifest, tokenizer.directory)}
        manifest = Manifest.open(folder, KIND, parents, verify)
        _warn_of_other_passages(manifest, folder, workdir)
        k, length = manifest.settings["k"], config.sequence_length
        if config.neighbours > k:
            raise UserError(
                f"BatchConfig.neighbours is {config.neighbours}: expected at most {k}, which {folder}"
                " holds"
            )
        least = (manifest.fact("longest_prompt") + 1) * CHUNK_LENGTH
        if length < least:
            raise UserError(
                f"BatchConfig.sequence_length is {length}: expected at least {least}, the longest prompt"
                f" of {folder} and a chunk of its answer"
            )
        chunks = Manifest.read(pathlib.Path(workdir) / "chunks" / "train")
        return cls(folder, manifest, config, chunks)

    def rows(self, step: int, rows: Sequence[int] | None = None) -> RetroBatch:
        """As `Batches.rows`."""
        size, total = self.config.batch_size, self.manifest.fact("questions")
        questions = []
        for row in range(size) if rows is None else rows:
            epoch, position = divmod(step * size + int(row), total)
            questions.append(int(permutation(total, self.config.seed, epoch)[position]))
        count, n, k = len(questions), self.config.sequence_length, self.config.neighbours
        tokens, targets = (np.full((count, n), self.pad_id, np.int32) for _ in range(2))
        documents = np.full((count, self._chunks), -1, np.int32)
        shape = (count, self._chunks, k, layout.NEIGHBOUR_LENGTH)
        neighbours = np.full(shape, self.pad_id, np.int32)
        for row, question in enumerate(questions):
            first, last = self._prompt_bounds[question : question + 2].tolist()
            start, end = self._answer_bounds[question : question + 2].tolist()
            prompt = self._prompts[first:last].ravel()
            text = np.concatenate([prompt, self._answers[start:end]])[: n + 1]
            tokens[row, : len(text)] = text[:n]
            targets[row, len(prompt) - 1 : len(text) - 1] = text[len(prompt) :]
            documents[row, : -(-min(len(text), n) // CHUNK_LENGTH)] = question
            neighbours[row, : last - first] = self._neighbour_rows[first:last, :k]
        return RetroBatch(
            tokens=tokens,
            targets=targets,
            documents=documents,
            corpus=np.zeros(count, np.int32),
            neighbours=self._part(neighbours) if k else None,
        )

    def _part(self, neighbours: np.ndarray) -> np.ndarray:
        """What the model reads of passages, or of chunks where the file has no passages."""
        given = self.manifest.settings["passages"] == "given"
        keep = keep_part_of_text if given else keep_part
        return keep(neighbours, self.config.neighbour_part, self.pad_id)

    def _document_id(self, number: int) -> str:
        """Files of questions are read by their rows."""
        return f"question {number + 1} of {self.manifest.settings['file']['name']}"
