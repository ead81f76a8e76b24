"""Results of launch.evaluate: read where they exist, else computed and written."""

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.evaluation.splits import Split, open_split
from data_pipelines.evaluation.texts import evaluation_text
from data_pipelines.retriever.revisions import latest, open_database
from launch.evaluation.conditions import (
    KNN,
    TOKENS,
    Condition,
    condition_settings,
    neighbour_tokens,
    scored_model,
    uses_knn,
)
from launch.evaluation.knn import knn_scoring
from launch.evaluation.settings import EvaluationSettings, KnnSettings
from launch.evaluation.tokens import TokenMixture
from retro_jax.distributed import processes
from retro_jax.evaluate import bits_per_byte, score
from retro_jax.evaluate.conditions import MIXED_WITH_TOKENS, condition_name
from retro_jax.evaluate.in_context import chunk_losses, score_in_context
from retro_jax.evaluate.k_sweep import sweep_losses
from retro_jax.evaluate.scorer import Pass, Scorer, forget
from retro_jax.evaluate.uncertainty import share_with_interval
from retro_jax.model import Retro, backend
from retro_jax.report.result_files import RESULT_FIELDS, read_losses
from retro_jax.storage import files
from retro_jax.storage.files import write_array

_ID_DIGITS = 12


@dataclasses.dataclass(frozen=True)
class Work:
    """A split under evaluation.

    Attributes:
      folder: W/evaluation. data: the directory of the prepared data. split: of it, or a slice.
      text: [n, 64] bool, the tokens of the split that count. lengths: [V] bytes of each token.
      scorer: computes their losses. revision: of the database; None for the newest.
    """

    folder: pathlib.Path
    data: pathlib.Path
    split: Split
    text: np.ndarray
    lengths: np.ndarray
    scorer: Scorer
    revision: int | None = None


def evaluate(
    work: Work, settings: EvaluationSettings, conditions: Sequence[Condition]
) -> dict[str, dict[str, Any]]:
    """The results of one pass by name: read where they are there already, else computed and written.

    Several processes compute together; the first one alone writes, and returns the results.
    """
    folder = work.folder
    heads = {c.name: _head(work, settings, c) for c in conditions}
    names = {c.name: _result_name(work, settings, c) for c in conditions}
    there = processes.as_first([_is_there(folder, names[c.name]) for c in conditions])
    missing = [c for c, is_there in zip(conditions, there, strict=True) if not is_there]
    if missing:
        losses, more = _score(work, settings, missing)
        for condition, nll in zip(missing, losses, strict=True):
            name = names[condition.name]
            result = heads[condition.name] | {"nll": f"{name}.npy", **figures(work, nll), **more}
            result |= _measured(work, settings, condition)
            result |= {"slots_filled": work.split.slots_filled(condition.neighbours)}
            if processes.is_first():
                write_array(folder / f"{name}.npy", nll)
                result["nll_sha256"] = files.measure(folder / f"{name}.npy")[1]
                files.write_atomically(folder / f"{name}.json", files.to_json(result))
    if not processes.is_first():
        return {}
    paths = {c.name: folder / f"{names[c.name]}.json" for c in conditions}
    return {name: files.read_json(path, *RESULT_FIELDS) for name, path in paths.items()}


def _result_name(work: Work, settings: EvaluationSettings, condition: Condition) -> str:
    """The files of a condition's result, without their suffixes."""
    digest = _digest(_head(work, settings, condition))
    return f"{work.split.name}-{condition.name}-{condition.run.step:08d}-{digest}"


def _is_there(folder: pathlib.Path, name: str) -> bool:
    """Whether a condition has been scored."""
    return (folder / f"{name}.json").is_file() and (folder / f"{name}.npy").is_file()


def _head(work: Work, settings: EvaluationSettings, condition: Condition) -> dict[str, Any]:
    """The inputs that a result depends on."""
    split = work.split
    cut = settings.windows(condition.run.chunks)
    return {
        "condition": condition.name,
        "settings": {
            "split": split.name,
            "window_chunks": cut.chunks,
            "stride_chunks": cut.stride,
            "neighbours": condition.neighbours,
            "max_documents": settings.max_documents,
            "execution": backend.facts(condition.run.execution),
            **({"sample_chunks": settings.sample_chunks} if settings.sample_chunks else {}),
            **(_knn_settings(settings.knn) if uses_knn(condition) else {}),
            **condition_settings(condition),
        },
        "model": condition.run.identity(),
        "manifests": split.hashes(bool(condition.neighbours)) | _memory_hashes(work, condition),
    }


def _memory_hashes(work: Work, condition: Condition) -> dict[str, str]:
    """What a condition looks up beside its neighbours, and the text that tunes its mixture."""
    k, hashes = condition.neighbours, {}
    if condition.kind == TOKENS:
        hashes["token_memory"] = open_database(work.data, work.revision).manifest.hash
        tuning = _open_split(work, "validation", k).hashes(bool(k))
        hashes |= {f"tuning_{name}": digest for name, digest in tuning.items()}
    newest = latest(work.data) if work.revision is None else work.revision
    if uses_knn(condition) and (k or newest):
        store = _open_split(work, "train", k).hashes(bool(k))
        hashes |= {f"datastore_{name}": digest for name, digest in store.items()}
    return hashes


def _open_split(work: Work, name: str, neighbours: int) -> Split:
    """Another split, against the same revision of the database."""
    return open_split(work.data, name, neighbours=neighbours, revision=work.revision)


def _knn_settings(settings: KnnSettings) -> dict[str, Any]:
    """The settings that a result of kNN-LM reports."""
    return {f"knn_{name}": value for name, value in vars(settings).items()}


def _digest(head: Mapping[str, Any]) -> str:
    """A few digits that differ where any of it does."""
    return hashlib.sha256(files.to_json(head)).hexdigest()[:_ID_DIGITS]


def _measured(
    work: Work, settings: EvaluationSettings, condition: Condition
) -> dict[str, dict[str, float | None]]:
    """The further figure that the text is measured by, under conditions with one model's logits."""
    measure = evaluation_text(work.split.name).measure
    if measure is None or condition.kind in (KNN, "k", "context", TOKENS):
        return {}
    return {measure: share_with_interval(documents_right(work, settings, condition))}


def documents_right(work: Work, settings: EvaluationSettings, condition: Condition) -> np.ndarray:
    """[D] bool: documents whose every scored token is the model's most likely one."""
    tokens = neighbour_tokens(work.split, condition, work.folder, work.data)
    text = dataclasses.replace(work.split.text(0), neighbours=tokens)
    digest = _digest({"hits": _head(work, settings, condition)})
    cut = settings.windows(condition.run.chunks)
    what = f"{condition_name(condition.name)}, last words"
    one = Pass(
        scored_model(condition.run), score.token_hits, cut, what, work.folder / f".partial-{digest}"
    )
    hits = work.scorer.nll(one, text)
    forget(one)
    return bits_per_byte.documents_hit(hits == 1, work.text, text.documents)


def _score(
    work: Work, settings: EvaluationSettings, conditions: Sequence[Condition]
) -> tuple[np.ndarray, dict[str, dict[str, Any]]]:
    """[len(conditions), n, 64] float32 nats, and further facts about them."""
    folder, split = work.folder, work.split
    last = max(conditions, key=lambda c: c.neighbours)
    cut = settings.windows(last.run.chunks)
    if last.kind == KNN:
        knn = knn_scoring(
            last,
            cut,
            settings.knn,
            scorer=work.scorer,
            data=work.data,
            folder=folder,
            revision=work.revision,
        )
        nll, facts = knn.score(split, work.text)
        return nll[None], {"knn": facts}
    if last.kind == TOKENS:
        nll, facts = _score_with_tokens(work, settings, last)
        return nll[None], {"tokens": facts}
    sweep = last.kind == "k"
    losses = sweep_losses([c.neighbours for c in conditions]) if sweep else Retro.token_losses
    tokens = neighbour_tokens(split, last, folder, work.data)
    text = dataclasses.replace(split.text(0), neighbours=tokens)
    heads = {c.name: _head(work, settings, c) for c in conditions}
    heads["ids"] = {"sha256": hashlib.sha256(split.ids.tobytes()).hexdigest()}
    partial = folder / f".partial-{_digest(heads)}"
    what = "k sweep" if sweep else condition_name(last.name)
    method: Callable[..., np.ndarray] = score.score_chunks
    if last.kind == "context":
        losses, method = chunk_losses, score_in_context
    one = Pass(scored_model(last.run), losses, cut, what, partial, method)
    nll = work.scorer.nll(one, text)
    forget(one)
    return (nll if sweep else nll[None]), {}


def _score_with_tokens(
    work: Work, settings: EvaluationSettings, condition: Condition
) -> tuple[np.ndarray, dict[str, Any]]:
    """[n, 64] nats of a model with the token memory, and the facts of their mixture."""
    name = MIXED_WITH_TOKENS[condition.name]
    alone = dataclasses.replace(condition, name=name, kind=KNN if name.endswith(KNN) else name)
    evaluate(work, settings, [alone])
    processes.meet("scored")  # the first one alone writes
    path = work.folder / f"{_result_name(work, settings, alone)}.json"
    nll = read_losses(work.folder, files.read_json(path, *RESULT_FIELDS))

    def nll_of(split: Split, text: np.ndarray) -> np.ndarray:
        other = dataclasses.replace(work, split=split, text=text)
        return _score(other, settings, [alone])[0][0]

    mixture = TokenMixture(
        alone.neighbours, nll_of, work.data, work.folder, work.revision, settings.sample_chunks
    )
    return mixture.mix(work.split, work.text, nll)


def figures(work: Work, nll: np.ndarray) -> dict[str, Any]:
    """Sums and figures of scored chunks: by corpus, and of all."""
    database, ids = work.split.database, work.split.ids
    scores = bits_per_byte.measure(
        nll,
        database.chunks(ids),
        database.documents(ids),
        records=work.split.records(),
        eos_id=database.eos_id,
        pad_id=database.pad_id,
        text=work.text,
    )
    by_corpus = {name: _plain(result) for name, result in scores.items()}
    return {"corpora": by_corpus, "all": _plain(bits_per_byte.total(scores.values()))}


def _plain(result: bits_per_byte.Score) -> dict[str, float | None]:
    """A Score for JSON, which has no NaN."""
    return {name: v if math.isfinite(v) else None for name, v in result.to_dict().items()}
