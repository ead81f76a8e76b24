"""A model mixed with the token memory of the retrieval database, as a condition of launch.evaluate.

The memory is W/token_memory, with one more for each revision; it is built where it is missing. Its
votes on a text are saved as W/evaluation/SPLIT-votes-ID.npy. The weights of the mixture are tuned on
the first chunks of the validation split.
"""

import dataclasses
import hashlib
import pathlib
from typing import Any

import numpy as np

from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.evaluation.splits import Split, open_split
from data_pipelines.retriever.revisions import open_database
from data_pipelines.token_memory.memory import LONGEST, MOST_VOTES, TokenMemory
from data_pipelines.token_memory.text_votes import TextVotes, votes_on
from data_pipelines.token_memory.workdir_memory import prepare_and_open
from launch.evaluation.conditions import TUNING_CHUNKS, Condition, neighbour_tokens, scored_model
from retro_jax.batch import text_mask
from retro_jax.distributed import processes
from retro_jax.distributed.progress import progress_bar
from retro_jax.errors import UserError
from retro_jax.evaluate.score import WindowConfig
from retro_jax.evaluate.scorer import Pass, Scorer, forget
from retro_jax.evaluate.token_mixture import Votes, mixed_nll, summary, tune_weights
from retro_jax.model import Retro
from retro_jax.storage import files

_COLUMNS = tuple(field.name for field in dataclasses.fields(Votes))


@dataclasses.dataclass(frozen=True)
class TokenMixture:
    """How a condition's model is mixed with the token memory.

    Attributes:
      condition: whose model and neighbours. windows: of texts. scorer: keeps the loaded model.
      data: of the prepared data. folder: W/evaluation.
    """

    condition: Condition
    windows: WindowConfig
    scorer: Scorer
    data: pathlib.Path
    folder: pathlib.Path

    def mix(
        self, split: Split, text: np.ndarray, nll: np.ndarray
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """The nats [n, 64] of the mixture, and the facts of its tuning.

        Args:
          split: the text. text: [n, 64] bool, the tokens that count. nll: [n, 64] of the model.

        Raises:
          UserError: the text is the database itself, the database has another tokeniser than the text,
            or there is no validation split to tune on.
        """
        database = open_database(self.data)
        if split.database.manifest.hash == database.manifest.hash:
            raise UserError(
                "--retrieval=tokens of the training split itself, whose own documents would vote:"
                " expected another split"
            )
        memory = self._memory(database)
        tuning = self._tuning_split()
        mask = text_mask(
            tuning.database.chunks(tuning.ids),
            tuning.database.documents(tuning.ids),
            eos_id=tuning.database.eos_id,
            pad_id=tuning.database.pad_id,
        )
        tuning_votes = self._votes(memory, tuning, mask)
        model_nll = self._model_nll(tuning)[mask]
        weights = tune_weights(model_nll, tuning_votes)
        votes = self._votes(memory, split, text)
        mixed = nll.astype(np.float64)
        mixed[text] = mixed_nll(mixed[text], votes, weights)
        facts = {
            "memories": list(memory.hashes),
            "weights": weights.tolist(),
            "tuned_on_tokens": len(tuning_votes),
            "by_length": summary(nll[text], votes, weights),
        }
        return mixed.astype(np.float32), facts

    def _memory(self, database: ChunkDatabase) -> TokenMemory:
        """The token memory, which the first process builds where it is missing."""

        def build() -> str:
            prepare_and_open(database)
            return ""

        processes.from_first(build)
        return prepare_and_open(database)

    def _tuning_split(self) -> Split:
        """The first documents of the validation split, with the condition's neighbours."""
        split = open_split(self.data, "validation", neighbours=self.condition.neighbours)
        owners = split.database.documents(split.ids)
        last = owners[min(TUNING_CHUNKS, len(owners)) - 1]
        return dataclasses.replace(split, ids=split.ids[owners <= last])

    def _model_nll(self, split: Split) -> np.ndarray:
        """[n, 64] nats of the model alone on a split."""
        tokens = neighbour_tokens(split, self.condition, self.folder, self.data)
        source = dataclasses.replace(split.text(0), neighbours=tokens)
        model_of = [
            self.condition.name,
            self.condition.run.identity(),
            dataclasses.asdict(self.windows),
        ]
        digest = _digest(model_of, split.hashes(bool(self.condition.neighbours)), split.ids)
        partial = self.folder / f".partial-tokens-{digest}"
        what = "token memory: tuning"
        model = scored_model(self.condition.run)
        one = Pass(model, Retro.token_losses, self.windows, what, partial)
        nll = self.scorer.nll(one, source)
        forget(one)
        return nll

    def _votes(self, memory: TokenMemory, split: Split, text: np.ndarray) -> Votes:
        """The memory's votes on a split, read where it is there already."""
        if split.database.vocab_size != memory.database.vocab_size:
            raise UserError(
                f"{split.database.directory} has {split.database.vocab_size} tokens: expected"
                f" {memory.database.vocab_size}, those of the token memory"
            )
        digest = _digest(
            [*memory.hashes, memory.database.manifest.hash, split.database.manifest.hash],
            [LONGEST, MOST_VOTES],
            split.ids,
            text,
        )
        path = self.folder / f"{split.name}-votes-{digest}.npy"
        if not processes.as_first([path.is_file()])[0]:
            with progress_bar(len(split.ids), "token memory: look-up", "chunk") as bar:
                columns = votes_on(memory, split.database, split.ids, text, on_chunks=bar.update)
            processes.from_first(lambda: _write(path, columns))
        return Votes(*files.read_arrays(path, len(_COLUMNS)))


def _write(path: pathlib.Path, votes: TextVotes) -> str:
    """Writes the columns of votes."""
    files.write_arrays(path, [getattr(votes, name) for name in _COLUMNS])
    return ""


def _digest(*parts: Any) -> str:
    """A few digits that differ where any part does."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.tobytes() if isinstance(part, np.ndarray) else files.to_json(part))
    return digest.hexdigest()[:12]
