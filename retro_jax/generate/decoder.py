"""Cached decoding: programs that read a block of tokens and give the logits after it.

    prefill     a prompt, one chunk at a time, for several prompts at once
    step        one token of every text; where a chunk is complete, its neighbours are encoded too
    logits      after every token of a block (drafts are verified so)

All three are one program, `_run_block`, which calls the two halves of the model's loop. Shapes are
bucketed (rows and positions by powers of two), so that few programs serve all texts; a cache grows
at the end of a chunk. weights.py prepares the weights.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from retro_jax.errors import UserError
from retro_jax.generate import cache as caches
from retro_jax.generate.cache import Cache, CacheLayout
from retro_jax.generate.operators import CachedBlock, CompletedChunks, DistanceTables
from retro_jax.generate.weights import ReadOut, prepare
from retro_jax.model.backend import few_rows_product, has_few_rows, product
from retro_jax.model.decoder import Retrieved, WholeSequences
from retro_jax.model.retro import Retro
from retro_jax.sharding import Shardings


@dataclasses.dataclass(frozen=True)
class Window:
    """The part of a text that the model reads: its last chunks, cut from a chunk's first token on.

    Attributes:
      tokens: [n], n >= 1.
      neighbours: of its complete chunks, [n // M, K, R], or None without. With a stride s [n // s, K, R]:
        what was retrieved after each s tokens; those of fewer than M tokens are not read.
    """

    tokens: np.ndarray
    neighbours: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Completed:
    """A row whose chunk is complete with the tokens of this step: its tokens [M], neighbours [K, R]."""

    row: int
    tokens: np.ndarray
    neighbours: np.ndarray


class Decoder:
    """Reads texts with a cache. Its weights are those of the model at construction.

    Attributes:
      config: the architecture. chunks: C of the longest window.
      stride: s, tokens between retrievals, where a call does not say.
    """

    def __init__(
        self,
        model: Retro,
        *,
        chunks: int,
        mesh: Mesh | None = None,
        scan: bool | None = None,
        stride: int | None = None,
    ):
        """Prepares the weights.

        Args:
          model: on `mesh`, or on one device.
          chunks: C, the trained sequence length in chunks: the longest context.
          mesh: of the model's parameters.
          scan: runs layers by scan: programs compile sooner; on a CPU each step copies the weights.
            None is as the model's execution says, and unrolled on a CPU.
          stride: tokens between retrievals; None for a chunk, as in training.

        Raises:
          UserError: the window is longer than the model's learned positions, or the stride divides no
            chunk.
        """
        self.stride = stride or model.config.chunk_length
        if self.stride < 1 or model.config.chunk_length % self.stride:
            raise UserError(
                f"retrieval_stride is {stride}: expected a divisor of {model.config.chunk_length}"
            )
        longest, room = chunks * model.config.chunk_length, model.config.form.learned_positions
        if room and longest > room:
            raise UserError(
                f"a window of {longest} tokens: expected at most {room}, the learned positions"
            )
        self.config, self.chunks, self._mesh = model.config, chunks, mesh
        if scan is None:
            scan = model.layout.execution.scan_layers and jax.default_backend() != "cpu"
        tiled = mesh is None and not scan and jax.default_backend() == "cpu"
        tiled = tiled and model.layout.dtype == jnp.float32
        with self.on_mesh():
            model, tables, read_out = prepare(model, chunks=chunks, scan=scan, tiled=tiled)
        self.layout = model.layout
        self._shapes = CacheLayout(self.config, self.layout.dtype, self.layout.shardings, scan)
        graphdef, params = nnx.split(model)
        leaves, structure = jax.tree.flatten((params, tables, read_out))
        self._weights = leaves
        self._programs = programs(graphdef, structure, self._shapes)

    def on_mesh(self) -> Any:
        """The context in which arrays of a mesh are used."""
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def empty(self, rows: int, capacity: int, neighbours: int) -> Cache:
        """CacheLayout.empty, by a compiled program."""
        with self.on_mesh():
            return self.beside_weights(self._programs.empty(rows, capacity, neighbours))

    def beside_weights(self, arrays: Any) -> Any:
        """Arrays that belong to the weights' device for good, as what programs give; a mesh's as they are.

        A program is compiled again for arrays that may move.
        """
        if self._mesh is not None:
            return arrays
        (device,) = self._weights[0].devices()
        return jax.device_put(arrays, device)

    def row_bucket(self, rows: int) -> int:
        """How many rows a program has for so many texts: a power of two for each part of the batch."""
        parts = self._batch_parts()
        return parts * power_of_two(-(-rows // parts))

    def capacity_for(self, length: int) -> int:
        """Positions of the smallest cache for windows of `length` tokens."""
        chunk_length = self.config.chunk_length
        return chunk_length * min(power_of_two(-(-length // chunk_length)), self.chunks)

    def prefill(
        self, windows: Sequence[Window], *, neighbours: int, capacity: int | None = None
    ) -> tuple[jax.Array, Cache]:
        """Reads windows from their first chunk on.

        Args:
          windows: at least one. neighbours: K of the cache, 0 for retrieval off.
          capacity: positions of the cache; None for the fewest.

        Returns:
          Logits [B, V] float32 after each window's last token, and the cache; B is the rows' bucket.
        """
        length, rows = self.stride, self.row_bucket(len(windows))
        longest = max(len(window.tokens) for window in windows)
        cache = self.empty(rows, capacity or self.capacity_for(longest), neighbours)
        ends = np.array([len(window.tokens) for window in windows])
        logits = None
        for u in range(-(-longest // length)):
            block = np.full((rows, length), self.config.pad_id, np.int32)
            completed = []
            for row, window in enumerate(windows):
                part = window.tokens[u * length : (u + 1) * length]
                block[row, : len(part)] = part
                if window.neighbours is None or not neighbours or u >= len(window.neighbours):
                    continue
                query = window.tokens[: (u + 1) * length][-self.config.chunk_length :]
                if len(query) == self.config.chunk_length:
                    completed.append(Completed(row, query, window.neighbours[u]))
            live = np.zeros(rows, bool)
            live[: len(windows)] = ends > u * length
            last = np.zeros(rows, np.int32)
            last[: len(windows)] = np.clip(ends - 1 - u * length, 0, length - 1)
            starts = np.full(rows, u * length, np.int32)
            new_logits, cache = self._run(cache, block, starts, live, completed, last=last)
            logits = new_logits if logits is None else self._choose(live, new_logits, logits)
        assert logits is not None
        return logits, cache

    def step(
        self,
        cache: Cache,
        tokens: np.ndarray | jax.Array,
        starts: np.ndarray,
        *,
        live: np.ndarray,
        completed: Sequence[Completed] = (),
        all_logits: bool = False,
        strides: np.ndarray | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Reads a block of tokens of every row; takes the cache's memory.

        Args:
          cache: of the tokens before. tokens: [B, T], none past its row's chunk.
          starts: [B] int32, the position in its window of each row's first token; less than S.
          live: [B] bool; the tokens of other rows change nothing that is read later.
          completed: rows whose chunk is complete with this block.
          all_logits: after every token, else after the last.
          strides: [B] int32, tokens between each row's retrievals; None for the decoder's.

        Returns:
          Logits [B, V] or [B, T, V] float32, and the cache with these tokens in it.
        """
        last = None if all_logits else np.full(len(starts), np.shape(tokens)[1] - 1, np.int32)
        return self._run(cache, tokens, starts, live, completed, last=last, strides=strides)

    def compiled_step(self, rows: int, *, capacity: int, neighbours: int) -> str:
        """The compiled program of one step for every row, as text: its reads and copies."""
        cache = self.empty(rows, capacity, neighbours)
        zeros = np.zeros(rows, np.int32)
        strides = np.full(rows, self.stride, np.int32)
        inputs = self._place((zeros[:, None], zeros, np.ones(rows, bool), None, zeros, strides))
        with self.on_mesh():
            lowered = self._programs.run_block.lower(self._weights, cache, *inputs)
        return str(lowered.compile().as_text())

    def grow(self, cache: Cache, capacity: int) -> Cache:
        """The cache with room for more positions; its memory is taken."""
        with self.on_mesh():
            return self._programs.grow(cache, capacity)

    def choose_rows(self, cache: Cache, logits: jax.Array, rows: Sequence[int]) -> Any:
        """Logits and a cache of the rows given, which may repeat, in the bucket of so many rows."""
        index = np.zeros(self.row_bucket(len(rows)), np.int32)
        index[: len(rows)] = rows
        with self.on_mesh():
            return self._programs.choose_rows(cache, logits, self._place(index))

    def replace_rows(
        self, old: tuple[jax.Array, Cache], new: tuple[jax.Array, Cache], rows: dict[int, int]
    ) -> tuple[jax.Array, Cache]:
        """Logits and a cache whose row i is row `rows[i]` of new ones; others stay as they were.

        The old cache's memory is taken.
        """
        index = np.zeros(old[1].rows, np.int32)
        replaced = np.zeros(old[1].rows, bool)
        for row, source in rows.items():
            index[row], replaced[row] = source, True
        with self.on_mesh():
            return self._programs.replace_rows(old, new, self._place(index), self._place(replaced))

    def on_one_device(self, logits: jax.Array) -> Any:
        """Logits of a mesh as one array of the host; of one device as they are."""
        return logits if self._mesh is None else np.asarray(logits)

    def _run(
        self,
        cache: Cache,
        tokens: np.ndarray | jax.Array,
        starts: np.ndarray,
        live: np.ndarray,
        completed: Sequence[Completed],
        *,
        last: np.ndarray | None,
        strides: np.ndarray | None = None,
    ) -> tuple[jax.Array, Cache]:
        """One block, its inputs laid out on the mesh."""
        chunks = self._stack_completed(completed, cache.rows) if completed else None
        strides = np.full(cache.rows, self.stride, np.int32) if strides is None else strides
        inputs = self._place((tokens, starts, live, chunks, last, strides))
        with self.on_mesh():
            return self._programs.run_block(self._weights, cache, *inputs)

    def _choose(self, live: np.ndarray, new: jax.Array, old: jax.Array) -> jax.Array:
        """New logits for live rows."""
        with self.on_mesh():
            return self._programs.choose(self._place(live), new, old)

    def _stack_completed(self, completed: Sequence[Completed], rows: int) -> CompletedChunks:
        """The completed chunks as arrays, padded to a bucket by repeating the first."""
        count = min(self.row_bucket(len(completed)), rows)
        padded = [*completed, *[completed[0]] * (count - len(completed))]
        source: Any = np.zeros(rows, np.int32)
        completes: Any = np.zeros(rows, bool)
        for i, chunk in enumerate(completed):
            source[chunk.row], completes[chunk.row] = i, True
        arrays: list[Any] = [
            np.stack([chunk.neighbours for chunk in padded]).astype(np.int32),
            np.stack([chunk.tokens for chunk in padded]).astype(np.int32),
            np.array([chunk.row for chunk in padded], np.int32),
        ]
        arrays += [source, completes]
        return CompletedChunks(*arrays)

    def _place(self, arrays: Any) -> Any:
        """Arrays whose first axis is the rows, over the mesh."""
        if self._mesh is None:
            return arrays
        return jax.device_put(arrays, NamedSharding(self._mesh, P(self.layout.shardings.batch)))

    def _batch_parts(self) -> int:
        """Over how many devices the rows are split."""
        if self._mesh is None:
            return 1
        axes = self.layout.shardings.batch or ()
        return int(np.prod([self._mesh.shape[axis] for axis in axes]))


def power_of_two(count: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(count - 1, 0).bit_length()


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled functions of one model's shapes; models of equal shapes share them."""

    empty: Callable[[int, int, int], Cache]
    run_block: jax.stages.Wrapped
    grow: Callable[[Cache, int], Cache]
    choose_rows: Callable[..., Any]
    replace_rows: Callable[..., tuple[jax.Array, Cache]]
    choose: Callable[..., jax.Array]


@functools.lru_cache(maxsize=32)
def programs(graphdef: nnx.GraphDef, structure: Any, shapes: CacheLayout) -> Programs:
    """The functions of a prepared model; `structure` belongs to (parameters, tables, read-out)."""

    def run_block(weights: list[jax.Array], cache: Cache, *inputs: Any) -> Any:
        params, tables, read_out = jax.tree.unflatten(structure, weights)
        parts = (nnx.merge(graphdef, params), tables, read_out)
        return _run_block(parts, cache, *inputs)

    def choose_rows(cache: Cache, logits: jax.Array, rows: jax.Array) -> Any:
        return caches.take_rows(logits, rows), caches.choose_rows(cache, rows)

    def replace_rows(old: Any, new: Any, rows: jax.Array, replaced: jax.Array) -> Any:
        logits = choose(replaced, caches.take_rows(new[0], rows), old[0])
        return logits, caches.replace_rows(old[1], new[1], rows, replaced)

    def choose(live: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(live[:, None], new, old)

    return Programs(
        empty=jax.jit(shapes.empty, static_argnums=(0, 1, 2)),
        run_block=jax.jit(run_block, donate_argnums=1),
        grow=jax.jit(caches.grow, static_argnums=1),
        choose_rows=jax.jit(choose_rows),
        replace_rows=jax.jit(replace_rows, donate_argnums=0),
        choose=jax.jit(choose),
    )


def _run_block(
    parts: tuple[Retro, DistanceTables, ReadOut],
    cache: Cache,
    tokens_BxT: jax.Array,
    starts_B: jax.Array,
    live_B: jax.Array,
    completed: CompletedChunks | None,
    last_B: jax.Array | None,
    strides_B: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Logits after the tokens `last_B` of a block, or after all, and the cache with the block in it."""
    model, tables, read_out = parts
    operators = CachedBlock(model.config, starts_B, tables, completed, strides_B)
    carry = (model.embed(tokens_BxT, operators), cache)
    if cache.chunk is None:
        h_BxTxD, cache = model.without_retrieval(carry, operators)
    else:
        h_BxTxD, cache = model.before_retrieval(carry, operators)
        cache = _keep_activations(cache, h_BxTxD, starts_B, live_B, model)
        ends_B = starts_B // strides_B * strides_B + strides_B
        retrieved = _encode(model, cache, completed, ends_B)
        h_BxTxD, cache = model.after_retrieval((h_BxTxD, cache), retrieved, operators)
        cache = operators.finish(cache, retrieved)
    h_BxTxD = model.norm(h_BxTxD)
    shardings = model.layout.shardings
    if last_B is not None:
        h_BxTxD = jnp.take_along_axis(h_BxTxD, last_B[:, None, None], axis=1)
    logits_BxTxV = _logits(h_BxTxD, read_out, shardings)
    return (logits_BxTxV if last_B is None else logits_BxTxV[:, 0]), cache


def _keep_activations(
    cache: Cache, h_BxTxD: jax.Array, starts_B: jax.Array, live_B: jax.Array, model: Retro
) -> Cache:
    """Writes the activations of a block's tokens, which the encoder will read."""
    assert cache.chunk is not None
    offsets_B = starts_B % model.config.chunk_length
    # As keys of one head: [B, 1, D, M].
    old = cache.chunk.activations
    if old is None:
        return cache
    written = caches.write_block(
        old[:, None],
        h_BxTxD[:, :, None],
        offsets_B,
        dataclasses.replace(model.layout.shardings, tensor=None),
    )[:, 0]
    activations = jnp.where(live_B[:, None, None], written, old)
    return dataclasses.replace(
        cache, chunk=dataclasses.replace(cache.chunk, activations=activations)
    )


def _encode(
    model: Retro, cache: Cache, completed: CompletedChunks | None, ends_B: jax.Array
) -> Retrieved:
    """E of the chunks completed, [n, 1, K, R, E]; n is 0 where none is. `ends_B` are their ends."""
    config = model.config
    assert cache.chunk is not None
    if completed is None:
        length = caches.encoded_length(config)
        shape = (0, 1, cache.chunk.present.shape[1] // length, length)
        width = config.d_model if config.form.gated_cca else config.encoder_d_model
        encoded = jnp.zeros((*shape, width), model.layout.dtype)
        return Retrieved(encoded, jnp.zeros(shape, bool))
    if cache.chunk.activations is None:  # gated CCA's encoding reads nothing else
        read = jnp.zeros((0, 0, config.d_model), model.layout.dtype)
    else:
        read = caches.take_rows(cache.chunk.activations, completed.rows).swapaxes(1, 2)
        ends_N, shardings = caches.take_rows(ends_B, completed.rows), model.layout.shardings
        specs = (shardings.rows(3), shardings.rows(1))
        read = caches.on_devices(_oldest_first, shardings, specs, specs[0])(read, ends_N)
    neighbours = completed.neighbours[:, None]
    return model.encode(neighbours, read, completed.tokens, WholeSequences(config))


def _oldest_first(ring_NxMxD: jax.Array, ends_N: jax.Array) -> jax.Array:
    """The last M positions up to an end, of rings in which position p is at p modulo M."""
    length = ring_NxMxD.shape[1]
    places_NxM = (ends_N[:, None] + jnp.arange(length)) % length
    return jnp.take_along_axis(ring_NxMxD, places_NxM[..., None], axis=1)


def _logits(h_BxTxD: jax.Array, read_out: ReadOut, shardings: Shardings) -> jax.Array:
    """[B, T, V] float32."""
    if read_out.tiles is not None and has_few_rows(h_BxTxD):
        return few_rows_product(h_BxTxD, read_out.tiles, read_out.weight.shape[1:])
    if h_BxTxD.dtype == jnp.float32:
        return product(h_BxTxD, read_out.weight, out_sharding=shardings.wide(3))
    return jnp.einsum(
        "btd,dv->btv",
        h_BxTxD,
        read_out.weight,
        preferred_element_type=jnp.float32,
        out_sharding=shardings.wide(3),
    )
