"""Scores a pass of conditions over a text, in pieces that an interrupted run need not repeat."""

import dataclasses
import itertools
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from retro_jax.batch import ChunkText, RetroBatch
from retro_jax.distributed import processes
from retro_jax.distributed.progress import progress_bar
from retro_jax.errors import UserError
from retro_jax.evaluate import score
from retro_jax.model import Retro
from retro_jax.retrofit.kept_states import KeptStates
from retro_jax.sharding import MeshConfig, batch_sharding, make_mesh, replicated
from retro_jax.storage.files import read_array, write_array
from retro_jax.train.global_batches import global_batch, local_rows

# Chunks of a segment; not a setting, as documents at its ends have windows of their own.
SEGMENT = 1 << 14
# Batches of a piece: minutes of a processor's work, and little to write.
PIECE = 16

Losses = Callable[[Retro, RetroBatch], jax.Array]


@dataclasses.dataclass(frozen=True)
class ScoredModel:
    """A trained model, loaded when it is first needed.

    Attributes:
      name: the directory of its run; a Scorer loads a model of one name once.
      mesh: how devices are arranged. load: gives graphdef and parameters on a mesh.
      kept: what is kept of its batches; None for nothing.
    """

    name: str
    mesh: MeshConfig
    load: Callable[[Mesh], tuple[nnx.GraphDef, nnx.State]]
    kept: KeptStates | None = None

    def attach(self, batch: RetroBatch) -> RetroBatch:
        """A batch of NumPy arrays with what is kept of it."""
        return batch if self.kept is None else self.kept.attach(batch)


@dataclasses.dataclass(frozen=True)
class Pass:
    """The losses to compute in one pass over a text.

    Attributes:
      model: which one. losses: of it and a batch, [..., B, N].
      windows: how the text is cut. what: for the progress bar.
      partial: where finished pieces are kept until all are done.
      scoring: what calls the losses on a text, score.score_chunks or another of its form.
    """

    model: ScoredModel
    losses: Losses
    windows: score.WindowConfig
    what: str
    partial: pathlib.Path
    scoring: Callable[..., np.ndarray] = score.score_chunks


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The devices and functions that run batches.

    Attributes:
      mesh: of all devices of all processes. losses: of the rows of a batch that are this process's;
        every process gets those of the whole batch.
      windows: with batches of which every device has an equal part. rows: see losses; None for all.
    """

    mesh: Mesh
    losses: score.TokenLosses
    windows: score.WindowConfig
    rows: Sequence[int] | None


class Scorer:
    """Scores passes one after the other; a model is loaded and compiled once for all of its passes.

    Several processes call it together, each with the whole text.
    """

    def __init__(self) -> None:
        self._compiled: dict[Any, Compiled] = {}

    def nll(self, one: Pass, text: ChunkText) -> np.ndarray:
        """[..., n, M] float32: the model over all windows, batches spread over all devices.

        Raises:
          UserError: a loss that is not finite.
        """
        pieces = _pieces(text, _rounded(one.windows, make_mesh(one.model.mesh)))
        paths = [one.partial / piece.name for piece in pieces]
        present = processes.as_first([path.is_file() for path in paths])
        missing = [i for i in range(len(pieces)) if not present[i]]
        results: dict[int, np.ndarray] = {}
        if missing:
            with_what = self.compiled(one.model, one.losses, one.windows)
            bar = progress_bar(sum(p.windows for p in pieces), one.what, "window")
            bar.update(sum(p.windows for i, p in enumerate(pieces) if present[i]))
            with jax.set_mesh(with_what.mesh), bar:
                for i in missing:
                    results[i] = _scored(one, with_what, pieces[i], bar.update)
                    if len(pieces) > 1:
                        write_array(paths[i], results[i])
        every = [results[i] if i in results else read_array(path) for i, path in enumerate(paths)]
        return _joined(pieces, every, len(text.ids))

    def compiled(self, model: ScoredModel, losses: Losses, windows: score.WindowConfig) -> Compiled:
        """A model's losses as a program for all devices, and how it takes its batches."""
        mesh = make_mesh(model.mesh)
        rounded = _rounded(windows, mesh)
        key = (model.name, losses, rounded.chunks, rounded.batch_size)
        if key not in self._compiled:
            processes.connect(mesh)
            with jax.set_mesh(mesh):
                self._compiled[key] = _compile(model, losses, mesh, rounded)
        return dataclasses.replace(self._compiled[key], windows=rounded)


def _compile(
    scored: ScoredModel, losses: Losses, mesh: Mesh, windows: score.WindowConfig
) -> Compiled:
    """A program for the devices of this process, or for those of several, which share its answers."""
    model = scored.load(mesh)
    if jax.process_count() == 1:
        whole = batch_sharding(mesh)
        function = score.compiled_token_losses(
            *model, place=lambda batch: jax.device_put(scored.attach(batch), whole), losses=losses
        )
        return Compiled(mesh, function, windows, None)
    size, rows = windows.batch_size, local_rows(mesh, windows.batch_size)
    function = score.compiled_token_losses(
        *model,
        place=lambda batch: global_batch(scored.attach(batch), mesh, size, rows),
        losses=lambda *arguments: replicated(losses(*arguments)),
    )
    return Compiled(mesh, function, windows, rows)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Some windows of a segment.

    Attributes:
      text: of the segment, which begins at chunk `offset` of the whole.
      first, last: of its windows, from first to before last.
      begin, end: the segment's chunks that have their scores.
    """

    text: ChunkText
    offset: int
    first: int
    last: int
    begin: int
    end: int

    @property
    def windows(self) -> int:
        """How many."""
        return self.last - self.first

    @property
    def name(self) -> str:
        """Of its file: which windows of which segment."""
        return f"{self.offset:09d}-{self.first:07d}-{self.last:07d}.npy"


def _pieces(text: ChunkText, windows: score.WindowConfig) -> list[_Piece]:
    """A text's windows, PIECE batches at once; segments without any window have none."""
    pieces, most = [], PIECE * windows.batch_size
    for part in segments(text.documents):
        segment = _part(text, part)
        plan = score.text_windows(segment, windows)
        for first in range(0, len(plan), most):
            last = min(first + most, len(plan))
            # The last position of a chunk predicts the first token of the next.
            end = min(int(plan[last - 1, 2]) + 1, len(segment.ids))
            pieces.append(_Piece(segment, part.start, first, last, int(plan[first, 1]), end))
    return pieces


def _scored(
    one: Pass, with_what: Compiled, piece: _Piece, on_windows: Callable[[int], object]
) -> np.ndarray:
    """[..., end - begin, M]: a piece's losses."""
    losses = one.scoring(
        with_what.losses,
        piece.text,
        with_what.windows,
        rows=with_what.rows,
        on_windows=on_windows,
        part=slice(piece.first, piece.last),
    )
    _refuse_infinite(losses, one.model)
    if one.model.kept is not None:
        one.model.kept.flush()
    return losses[..., piece.begin : piece.end, :]


def _joined(pieces: Sequence[_Piece], parts: Sequence[np.ndarray], count: int) -> np.ndarray:
    """[..., count, M]: each token's loss is in one piece, and 0 in others."""
    if not parts:
        return np.zeros((0, 0), np.float32)
    whole = np.zeros((*parts[0].shape[:-2], count, parts[0].shape[-1]), np.float32)
    for piece, losses in zip(pieces, parts, strict=True):
        begin = piece.offset + piece.begin
        whole[..., begin : begin + losses.shape[-2], :] += losses
    return whole


def _part(text: ChunkText, part: slice) -> ChunkText:
    """Some documents of a text."""
    wanted = None if text.wanted is None else text.wanted[part]
    return dataclasses.replace(
        text, ids=text.ids[part], documents=text.documents[part], wanted=wanted
    )


def _rounded(windows: score.WindowConfig, mesh: Any) -> score.WindowConfig:
    """The windows in batches that every device has an equal part of."""
    divisor = mesh.size // batch_sharding(mesh).shard_shape((mesh.size,))[0]
    size = -(-windows.batch_size // divisor) * divisor
    return dataclasses.replace(windows, batch_size=size)


def forget(one: Pass) -> None:
    """Removes the finished segments of a pass whose result is written."""
    if processes.is_first():
        shutil.rmtree(one.partial, ignore_errors=True)


def segments(documents: np.ndarray) -> Sequence[Any]:
    """Slices of whole documents, each of SEGMENT chunks or, at its last document, more."""
    ends = np.append(np.flatnonzero(documents[1:] != documents[:-1]) + 1, len(documents))
    cuts = [0]
    while cuts[-1] < len(documents):
        at = np.searchsorted(ends, min(cuts[-1] + SEGMENT, len(documents)))
        cuts.append(int(ends[at]))
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


def _refuse_infinite(nll: np.ndarray, model: ScoredModel) -> None:
    """Raises where a loss is not finite."""
    bad = int(np.count_nonzero(~np.isfinite(nll)))
    if bad:
        raise UserError(f"{model.name}: the loss of {bad} tokens is not finite")
