"""kNN-LM on a trained model and W's own training text, as a condition of launch.evaluate.

The model is the baseline, or RETRO[ON]: then its activations are those with neighbours, in the
datastore as in the text. The datastore contains the first chunks of the training split, whose
documents are in random order within each corpus: W/evaluation/knn-*.npy. Weight and temperature are
tuned on the validation split. ScaNN searches a large datastore; --knn_exact compares every key instead, which takes a hundred times as long for a million.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from data_pipelines.evaluation.splits import Split, first_documents, open_split
from data_pipelines.retriever.datastore import (
    LookUp,
    search_datastore,
    search_recall,
    spread_chunks,
)
from launch.evaluation.conditions import Condition, neighbour_tokens, scored_model
from launch.evaluation.settings import KnnSettings
from retro_jax.batch import ChunkText, RetroBatch
from retro_jax.distributed import processes
from retro_jax.distributed.progress import progress_bar
from retro_jax.errors import UserError
from retro_jax.evaluate import knn_lm, score
from retro_jax.evaluate.scorer import Pass, Scorer, forget
from retro_jax.model import Retro, backend
from retro_jax.storage import files
from retro_jax.storage.files import read_array, write_array

_SEARCHED = 1 << 12  # tokens that pass over the datastore together
_RECALL_QUERIES = 128  # of which the neighbours are compared with the true ones
_TUNING_CHUNKS = 512  # of the validation split


@dataclasses.dataclass(frozen=True)
class _Store:
    """The datastore: keys [S, D] float16 and the tokens [S] that followed."""

    keys: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class KnnScoring:
    """How kNN-LM is scored.

    Attributes:
      condition: the model and its neighbours. windows: of texts. settings: of the datastore and its
        search. scorer: keeps the loaded model. data, folder: as everywhere. revision: of the database.
    """

    condition: Condition
    windows: score.WindowConfig
    settings: KnnSettings
    scorer: Scorer
    data: pathlib.Path
    folder: pathlib.Path
    revision: int | None = None

    def score(self, split: Split, text: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        """[n, 64] nats of a split, and the tuned settings.

        Args:
          split: the text to score. text: [n, 64] bool, the tokens that count.
        """
        store = self._store()
        settings = self.settings
        look_up, how = search_datastore(store.keys, settings.neighbours, exact=settings.exact)
        tuning, mask = first_documents(self._split("validation"), _TUNING_CHUNKS)
        results, _ = self._find(tuning, mask, store.values, look_up)
        unit = _median(results.distances.min(axis=1)) or 1.0
        config = knn_lm.tune(results, unit, neighbours=results.distances.shape[1])
        results, nll = self._find(split, text, store.values, look_up)
        nll = nll.copy()
        nll[text] = results.nll(config, unit)
        states_of, rows = self._states()
        queries = knn_lm.activations(states_of, self._text(tuning), self.windows, rows=rows)
        sample = next(queries)[1]
        k = results.distances.shape[1]
        facts = dataclasses.asdict(config) | {"unit": unit, "search": how}
        facts |= {"recall": search_recall(look_up, sample[:_RECALL_QUERIES], store.keys, k)}
        facts |= {"datastore_tokens": len(store.values)}
        return nll.astype(np.float32), facts

    def _find(
        self, split: Split, text: np.ndarray, values_of: np.ndarray, look_up: LookUp
    ) -> tuple[knn_lm.Found, np.ndarray]:
        """The datastore's matches for each token that counts, and [n, 64] of the model alone."""
        source = self._text(split)
        partial = self.folder / f".partial-knn-{self.digest(split)}"
        model = scored_model(self.condition.run)
        one = Pass(model, Retro.token_losses, self.windows, "kNN-LM: model", partial)
        nll = self.scorer.nll(one, source)
        forget(one)
        k = min(self.settings.neighbours, len(values_of))
        distances = np.zeros((text.size, k), np.float32)
        values = np.zeros((text.size, k), values_of.dtype)
        with progress_bar(int(text.sum()), "kNN-LM: search", "token") as bar:
            states_of, rows = self._states()
            queries = knn_lm.activations(states_of, source, self.windows, rows=rows)
            for places, states in knn_lm.batched(queries, _SEARCHED):
                inside = text.ravel()[places]
                places = places[inside]
                results, distances[places] = look_up(states[inside], k)
                # Where there is no match, the distance is infinite.
                values[places] = values_of[np.maximum(results, 0)]
                bar.update(len(places))
        here = text.ravel()
        targets = split.database.chunks(split.ids).ravel()[here]
        return knn_lm.Found(nll[text], targets, distances[here], values[here]), nll

    def _split(self, name: str) -> Split:
        """A split with the condition's neighbours."""
        k = self.condition.neighbours
        return open_split(self.data, name, neighbours=k, revision=self.revision)

    def _text(self, split: Split) -> ChunkText:
        """A split as the model reads it."""
        tokens = neighbour_tokens(split, self.condition, self.folder, self.data)
        return dataclasses.replace(split.text(0), neighbours=tokens)

    def digest(self, split: Split) -> str:
        """Names the model's losses or activations on a split: others have another name.

        Args:
          split: with the chunks that are read. Its rows may come in batches of any size.
        """
        run, k = self.condition.run, self.condition.neighbours
        part, windows = run.batches.neighbour_part, (self.windows.chunks, self.windows.stride)
        execution = backend.facts(run.execution)
        facts = [run.identity(), execution, windows, split.hashes(bool(k)), k, part]
        digest = hashlib.sha256(files.to_json(facts) + split.ids.tobytes())
        return digest.hexdigest()[:12]

    def _store(self) -> _Store:
        """The datastore, read where it is there already."""
        split = self._split("train")
        split = dataclasses.replace(split, ids=spread_chunks(split.database, self.settings.tokens))
        digest = self.digest(split)
        paths = [self.folder / f"knn-{what}-{digest}.npy" for what in ("keys", "values")]
        if all(processes.as_first([path.is_file() for path in paths])):
            return _Store(*map(read_array, paths))
        tokens = split.database.chunks(split.ids).ravel()
        keys, values = [], []
        with progress_bar(len(split.ids), "kNN-LM: datastore", "chunk") as bar:
            source = self._text(split)
            states_of, rows = self._states()
            results = knn_lm.activations(states_of, source, self.windows, rows=rows)
            for places, states in results:
                keys.append(states.astype(np.float16))
                values.append(tokens[places])
                bar.update(len(places) // split.database.chunks(split.ids[:1]).shape[1])
        if not keys:
            raise UserError(f"{self.data}: the training split has no token to look up")
        store = _Store(np.concatenate(keys), np.concatenate(values))
        for path, array in zip(paths, (store.keys, store.values), strict=True):
            write_array(path, array)
        return store

    def _states(self) -> tuple[Callable[[RetroBatch], np.ndarray], Sequence[int] | None]:
        """The model's final activations of a batch, and the rows of it that it is given."""
        model = scored_model(self.condition.run)
        compiled = self.scorer.compiled(model, _hidden_states, self.windows)
        assert compiled.windows == self.windows

        def states(batch: RetroBatch) -> np.ndarray:
            with jax.set_mesh(compiled.mesh):
                return np.asarray(compiled.losses(batch))

        return states, compiled.rows


def knn_scoring(
    condition: Condition,
    windows: score.WindowConfig,
    settings: KnnSettings,
    *,
    scorer: Scorer,
    data: pathlib.Path,
    folder: pathlib.Path,
    revision: int | None = None,
) -> KnnScoring:
    """A scoring whose batches every device has an equal part of."""
    rounded = scorer.compiled(scored_model(condition.run), _hidden_states, windows).windows
    return KnnScoring(condition, rounded, settings, scorer, data, folder, revision)


def _median(distances: np.ndarray) -> float:
    """The median of those that are finite; 0 where none is."""
    values = distances[np.isfinite(distances)]
    return float(np.median(values)) if len(values) else 0.0


def _hidden_states(model: Retro, batch: RetroBatch) -> jax.Array:
    """[B, N, D]; with retrieval off where the batch has no neighbours."""
    return model.hidden_states(batch.tokens, batch.neighbours, batch.documents)
