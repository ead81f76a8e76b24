"""What a frozen base computes of neighbours and of texts, computed once and kept on disk.

With gated CCA (DecoderForm) a neighbour's states depend on its tokens and the base alone, and so does
what the first CCA layer reads of a text. Both are found by a hash of the tokens: every split, revision
of the database, run of W and condition of an evaluation shares them.

    W/states/neighbours-ID/manifest.json      the base's fingerprint and settings, layers, lengths, format
    W/states/neighbours-ID/PART-keys.npy      [n, 16] hashes; a part's name is its time and a random one
    W/states/neighbours-ID/PART-values.npy, -scales.npy      packed.Packed, mapped into memory
    W/states/texts-ID/...                     likewise, one entry a sequence

Retrieval off reads none of it: it stays the base bit for bit.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from retro_jax.batch import RetroBatch
from retro_jax.config import RetroConfig
from retro_jax.distributed import processes
from retro_jax.errors import UserError
from retro_jax.model.decoder import WholeSequences
from retro_jax.packed import Packed, check_packed, pack
from retro_jax.retrofit.base_model import open_base
from retro_jax.retrofit.decoder import base_settings, check_decoder, load_decoder
from retro_jax.sharding import MeshConfig, make_mesh
from retro_jax.storage import files
from retro_jax.train.global_batches import BatchSource

STATES = "states"  # the folder of W
FORMAT_VERSION = 1
_MANIFEST = "manifest.json"
_NEIGHBOURS_AT_ONCE, _TEXTS_AT_ONCE = 8, 1
_PENDING = 64  # entries in memory before they are written
_KEY_BYTES = 16


class StateFolder:
    """Packed arrays of one shape by key, in files that are only added to."""

    def __init__(
        self,
        directory: pathlib.Path,
        about: Mapping[str, Any],
        shape: tuple[int, ...] | None = None,
    ):
        """Opens what is there.

        Args:
          directory: of the files; made when the first are written.
          about: what the arrays depend on besides their keys.
          shape: of each array's values; None for any.

        Raises:
          UserError: a file is damaged, or the folder has other arrays.
        """
        self.directory, self._about = directory, files.plain({"format": FORMAT_VERSION, **about})
        self._shape = shape
        self._written: list[Packed] = []
        self._places: dict[bytes, tuple[int, int]] = {}  # part, row; part -1 is pending
        self._pending: list[tuple[bytes, Packed]] = []
        if (directory / _MANIFEST).is_file():
            found = files.read_json(directory / _MANIFEST)
            if found != self._about:
                raise UserError(f"{directory} has states of {found}: expected {self._about}")
        for path in files.matching(directory, "*-keys.npy"):
            self._open(path)

    def __len__(self) -> int:
        """Entries."""
        return len(self._places)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(p.nbytes for p in self._written) + sum(p.nbytes for _, p in self._pending)

    def __contains__(self, key: bytes) -> bool:
        """Whether there is an entry."""
        return key in self._places

    def __getitem__(self, key: bytes) -> Packed:
        """An entry, without a copy."""
        part, row = self._places[key]
        if part < 0:
            return self._pending[row][1]
        return jax.tree.map(lambda x: x[row], self._written[part])

    def add(self, key: bytes, entry: Packed) -> None:
        """Adds an entry; it is on disk after some more of them, or after `flush`.

        Raises:
          UserError: the entry has numbers that its format cannot state.
        """
        numbers = entry.values if entry.scales is None else entry.scales
        if not np.isfinite(numbers).all():
            raise UserError(
                f"{self.directory}: states of the base are not finite as {self._about['packed']}: expected"
                " ExecutionConfig.kept_states = ''"
            )
        self._places[key] = (-1, len(self._pending))
        self._pending.append((key, entry))
        if len(self._pending) >= _PENDING:
            self.flush()

    def flush(self) -> None:
        """Writes what is only in memory."""
        if not self._pending:
            return
        keys = np.array([np.frombuffer(key, np.uint8) for key, _ in self._pending])
        packed = jax.tree.map(lambda *rows: np.stack(rows), *(entry for _, entry in self._pending))
        with files.writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        files.write_atomically(self.directory / _MANIFEST, files.to_json(self._about))
        # Another process, of this run or another, may write at the same time.
        path = self.directory / f"{time.time_ns():020d}-{os.urandom(4).hex()}-keys.npy"
        arrays = {"values": packed.values, "scales": packed.scales, "keys": keys}
        for name, array in arrays.items():  # keys last: with them the part is there
            if array is not None:
                files.write_arrays(_beside(path, name), [array])
        self._pending = []
        self._open(path)

    def _open(self, path: pathlib.Path) -> None:
        """Maps one part."""
        try:
            keys = np.load(path)
            values = np.load(_beside(path, "values"), mmap_mode="r")
            scales = None
            if _beside(path, "scales").is_file():
                scales = np.load(_beside(path, "scales"), mmap_mode="r")
            if keys.shape != (len(values), _KEY_BYTES):
                raise ValueError(f"{len(values)} entries with keys of shape {keys.shape}")
            check_packed(values, scales, self._about["packed"])
            if self._shape not in (None, values.shape[1:]):
                raise ValueError(f"values are {values.dtype} of shape {values.shape}")
        except (ValueError, OSError, EOFError) as error:
            raise UserError(
                f"{path} is damaged ({error}): move {self.directory} away, and its states are computed again"
            ) from error
        self._written.append(Packed(values, scales))
        part = len(self._written) - 1
        self._places |= {key.tobytes(): (part, row) for row, key in enumerate(keys)}


class KeptStates:
    """Gives batches what the base computes of their neighbours and texts; computes what is missing.

    Attributes:
      neighbours, texts: where it is kept; no texts where CCA begins in layer 1.
    """

    def __init__(self, directory: pathlib.Path, base: str, retro: RetroConfig, form: str):
        """Opens the folders; loads no weights.

        Args:
          directory: W/states. base: folder or GGUF file. retro: of the fitted model. form: of packed.FORMATS.

        Raises:
          UserError: another decoder than the base's, or a damaged folder.
        """
        check_kept(retro, form)
        opened = open_base(base)
        check_decoder(retro, opened)
        self._retro, self._form, self._base = retro, form, opened
        self._mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
        first, one = retro.cca_layers[0], retro.form.neighbour_layer
        common: dict[str, Any] = {
            "base": opened.fingerprint(),
            "decoder": base_settings(opened.config),
        }
        common |= {"packed": form, "chunk_length": retro.chunk_length}
        layers = [one] if one else list(retro.cca_layers)
        about = {"layers": layers, "one": bool(one), "sink": retro.form.sink_id}
        about |= {"length": retro.neighbour_length, "pad": retro.pad_id}
        self.neighbours = _folder(directory, "neighbours", common | about, _shape(retro))
        self.texts: StateFolder | None = None
        if first > 1:  # a text's states go on through the decoder: float16 always
            below = common | {"packed": "float16", "layer": first, "pad": retro.pad_id}
            self.texts = _folder(directory, "texts", below)

    def attach(self, batch: RetroBatch) -> RetroBatch:
        """A batch of NumPy arrays with `states` and `below`; one without neighbours as it is."""
        if batch.neighbours is None:
            return batch
        if batch.neighbours.shape[-1] != self._retro.neighbour_length:
            raise ValueError(
                f"neighbours of {batch.neighbours.shape[-1]} tokens: expected"
                f" {self._retro.neighbour_length}"
            )
        with jax.set_mesh(self._mesh):  # whatever mesh the caller's batches go to
            states = self._states(np.asarray(batch.neighbours, np.int32))
            below = None if self.texts is None else self._below(self.texts, batch)
        return dataclasses.replace(batch, states=states, below=below)

    def flush(self) -> None:
        """Writes what is only in memory."""
        for folder in (self.neighbours, self.texts):
            if folder is not None:
                folder.flush()

    def summary(self) -> str:
        """How much is kept."""
        parts = [f"{len(self.neighbours):,} neighbours ({self.neighbours.nbytes / 1e6:,.0f} MB)"]
        if self.texts is not None:
            parts.append(f"{len(self.texts):,} sequences ({self.texts.nbytes / 1e6:,.0f} MB)")
        return f"kept states: {', '.join(parts)} in {self.neighbours.directory.parent}"

    def _states(self, neighbours_BxCxKxR: np.ndarray) -> Packed:
        """RetroBatch.states: zeros for neighbours that are all padding."""
        *leading, length = neighbours_BxCxKxR.shape
        rows = neighbours_BxCxKxR.reshape(-1, length)
        filled = np.flatnonzero((rows != self._retro.pad_id).any(axis=1))
        keys = {int(i): _key(rows[i]) for i in filled}
        self._fill(
            self.neighbours,
            {key: (rows[i],) for i, key in keys.items()},
            self._encode,
            _NEIGHBOURS_AT_ONCE,
        )
        entries = [
            self.neighbours[keys[i]] if i in keys else self._nothing for i in range(len(rows))
        ]
        return _together(entries, leading)

    @functools.cached_property
    def _nothing(self) -> Packed:
        """The states of an absent neighbour: zeros, which are not read."""
        return jax.device_get(pack(jnp.zeros(_shape(self._retro)), self._form))

    def _below(self, folder: StateFolder, batch: RetroBatch) -> Packed:
        """RetroBatch.below."""
        tokens = np.asarray(batch.tokens, np.int32)
        documents = _first_places(np.asarray(batch.documents))
        keys = [_key(t, d) for t, d in zip(tokens, documents, strict=True)]
        wanted = {key: (tokens[i], documents[i]) for i, key in enumerate(keys)}
        self._fill(folder, wanted, self._run_below, _TEXTS_AT_ONCE)
        return _together([folder[key] for key in keys], [len(keys)])

    @staticmethod
    def _fill(
        folder: StateFolder,
        wanted: Mapping[bytes, tuple[np.ndarray, ...]],
        compute: Callable[..., Packed],
        at_once: int,
    ) -> None:
        """Computes the missing entries, always as many at once."""
        missing = [key for key in wanted if key not in folder]
        for first in range(0, len(missing), at_once):
            part = missing[first : first + at_once]
            inputs = [wanted[key] for key in part] + [wanted[part[0]]] * (at_once - len(part))
            packed = compute(*(np.stack(arrays) for arrays in zip(*inputs, strict=True)))
            for row, key in enumerate(part):
                folder.add(key, jax.tree.map(lambda x, row=row: np.asarray(x[row]), packed))

    @functools.cached_property
    def _model(self) -> tuple[nnx.GraphDef, nnx.State]:
        """The base with its CCA, on this process's first device."""
        return nnx.split(load_decoder(self._base, self._retro, mesh=self._mesh))

    def _encode(self, neighbours_IxR: np.ndarray) -> Packed:
        """[I, P, 1 + R, D] packed, on the host."""
        return jax.device_get(self._encoding(self._model[1], neighbours_IxR))

    def _run_below(self, tokens_BxN: np.ndarray, documents_BxC: np.ndarray) -> Packed:
        """[B, N, D] packed, on the host."""
        return jax.device_get(self._running(self._model[1], tokens_BxN, documents_BxC))

    @functools.cached_property
    def _encoding(self) -> Callable[..., Packed]:
        """The compiled encoding of neighbours."""

        @jax.jit
        def encode(params: nnx.State, neighbours_IxR: jax.Array) -> Packed:
            states = nnx.merge(self._model[0], params).decoder_states(neighbours_IxR[:, None, None])
            return pack(states[:, 0, 0], self._form)

        return encode

    @functools.cached_property
    def _running(self) -> Callable[..., Packed]:
        """The compiled layers below the first CCA."""

        @jax.jit
        def run(params: nnx.State, tokens_BxN: jax.Array, documents_BxC: jax.Array) -> Packed:
            model = nnx.merge(self._model[0], params)
            operators = WholeSequences(self._retro, documents_BxC)
            return pack(model.below_retrieval(tokens_BxN, operators), "float16")

        return run


class KeptBatches:
    """A source of batches whose batches come with kept states."""

    def __init__(self, source: BatchSource, kept: KeptStates):
        self._source, self._kept = source, kept
        self.config, self.corpora, self.sequences = source.config, source.corpora, source.sequences
        self.noise = source.noise

    def rows(self, step: int, rows: Sequence[int] | None = None) -> RetroBatch:
        """As the source's."""
        return self._kept.attach(self._source.rows(step, rows))

    def iterate(
        self, start_step: int = 0, rows: Sequence[int] | None = None
    ) -> Generator[RetroBatch, None, None]:
        """As the source's; states are computed when a batch is asked for."""
        batches = self._source.iterate(start_step, rows)
        try:
            for batch in batches:
                yield self._kept.attach(batch)
        finally:
            batches.close()
            self._kept.flush()

    def document_ids(self, step: int) -> list[str]:
        """As the source's."""
        return self._source.document_ids(step)


@functools.lru_cache(maxsize=2)
def kept_of(run: pathlib.Path, base: str, retro: RetroConfig, form: str) -> KeptStates | None:
    """The kept states of a run, the same object for each caller; None where it keeps none.

    Args:
      run: its directory. base: of the run. retro: its model. form: ExecutionConfig.kept_states.
    """
    return KeptStates(run.parent / STATES, base, retro, form) if form else None


def state_bytes(retro: RetroConfig, form: str) -> int:
    """Bytes that are kept of one neighbour, and read for it; `form` of packed.FORMATS."""
    packed = jax.eval_shape(lambda: pack(jnp.zeros(_shape(retro)), form))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(packed))


def _shape(retro: RetroConfig) -> tuple[int, ...]:
    """[P, 1 + R, D] of a neighbour's states, without P where one layer's are read by all."""
    layers = () if retro.form.neighbour_layer else (len(retro.cca_layers),)
    return (*layers, 1 + retro.neighbour_length, retro.d_model)


def check_kept(retro: RetroConfig, form: str) -> None:
    """Refuses to keep states that are not the base's alone.

    Raises:
      UserError: names the setting.
    """
    if not retro.has_retrieval:
        raise UserError(
            f"ExecutionConfig.kept_states is {form!r}: expected '' without RetroConfig.cca_layers"
        )
    if not retro.form.gated_cca:
        raise UserError(
            f"ExecutionConfig.kept_states is {form!r}: expected '' without DecoderForm.gated_cca, whose"
            " neighbours' states do not depend on the query"
        )
    if retro.dropout:
        raise UserError(f"RetroConfig.dropout is {retro.dropout}: expected 0 with kept states")


def _folder(
    directory: pathlib.Path,
    kind: str,
    about: Mapping[str, Any],
    shape: tuple[int, ...] | None = None,
) -> StateFolder:
    """The folder of one kind of entries; the first process makes sure that it can be read."""
    digest = hashlib.sha256(files.to_json(files.plain(dict(about)))).hexdigest()[:12]
    return processes.together(lambda: StateFolder(directory / f"{kind}-{digest}", about, shape))


def _beside(path: pathlib.Path, name: str) -> pathlib.Path:
    """Another array of a part."""
    return path.with_name(path.name.replace("-keys.npy", f"-{name}.npy"))


def _key(*arrays: np.ndarray) -> bytes:
    """A hash of integers."""
    digest = hashlib.blake2b(digest_size=_KEY_BYTES)
    for array in arrays:
        digest.update(np.ascontiguousarray(array, np.int32).tobytes())
        digest.update(b"|")
    return digest.digest()


def _first_places(documents_BxC: np.ndarray) -> np.ndarray:
    """[B, C] int32: where each chunk's document begins in its row, which is all that attention asks."""
    same = documents_BxC[:, :, None] == documents_BxC[:, None, :]
    return same.argmax(axis=2).astype(np.int32)


def _together(entries: Sequence[Packed], leading: Sequence[int]) -> Packed:
    """Entries as one array with leading axes."""
    return jax.tree.map(lambda *rows: np.stack(rows).reshape(*leading, *rows[0].shape), *entries)
