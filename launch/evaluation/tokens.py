"""A model mixed with the token memory of the retrieval database, as a condition of launch.evaluate.

The memory is W/token_memory, with one more for each revision; it is built where it is missing. Its
votes on a text are saved as W/evaluation/SPLIT-votes-ID.npy. The weights of the mixture are tuned on
the first chunks of the validation split.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.evaluation.sample import sampled
from data_pipelines.evaluation.splits import Split, first_documents, open_split
from data_pipelines.evaluation.stored_votes import memory_of, stored_votes
from data_pipelines.retriever.revisions import open_database
from data_pipelines.token_memory.memory import TokenMemory
from launch.evaluation.conditions import TUNING_CHUNKS
from retro_jax.evaluate.token_mixture import Votes, mixed_nll, summary, tune_weights


@dataclasses.dataclass(frozen=True)
class TokenMixture:
    """How a condition's model is mixed with the token memory.

    Attributes:
      neighbours: a chunk's, of the condition. nll_of: the nats [n, 64] of the condition alone on a
        split, given the tokens [n, 64] bool that count. data: of the prepared data. folder:
        W/evaluation. revision: of the database; None for the newest. sample: how many random chunks of
        the validation split tune it; None for its first TUNING_CHUNKS.
    """

    neighbours: int
    nll_of: Callable[[Split, np.ndarray], np.ndarray]
    data: pathlib.Path
    folder: pathlib.Path
    revision: int | None = None
    sample: int | None = None

    def mix(
        self, split: Split, text: np.ndarray, nll: np.ndarray
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """The nats [n, 64] of the mixture, and the facts of its tuning.

        Args:
          split: the text. text: [n, 64] bool, the tokens that count. nll: [n, 64] of the model.

        Raises:
          UserError: the database has another tokeniser than the text.
        """
        memory = memory_of(open_database(self.data, self.revision))
        k, revision = self.neighbours, self.revision
        tuning = open_split(self.data, "validation", neighbours=k, revision=revision)
        if self.sample is None:
            tuning, mask = first_documents(tuning, TUNING_CHUNKS)
        else:
            tokenizer = Tokenizer.open(self.data / "tokenizer")
            tuning = sampled(tuning, self.sample, tokenizer)
            mask = tuning.text_mask(tokenizer.byte_lengths)
        tuning_votes = self._votes(memory, tuning, mask)
        model_nll = self.nll_of(tuning, mask)[mask]
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

    def _votes(self, memory: TokenMemory, split: Split, text: np.ndarray) -> Votes:
        """The memory's votes on a split, without their documents."""
        found = stored_votes(memory, split, text, self.folder)
        return Votes(found.lengths, found.counts, found.agreements, found.shares)
