"""RETRO in NumPy float64: naive loops from the paper's equations (arXiv 2112.04426, Algorithm 1).

Written without sight of retro_jax.model, to be compared with it. One sequence at a time; nothing is
vectorised over positions, heads, chunks or neighbours. Inside the formulas, chunks (u), positions in
a chunk (i) and positions in a neighbour (i') are counted from 1, as the paper counts them.

Parameters are a plain dict:

    embedding [V, D], encoder_embedding [V, E] (absent: shared), read_out [V, D] (absent: tied),
    final_norm [D], encoder_norm [E], conditioning_norm [D] (absent: none),
    layers: list of {attention, cca (where the layer is in P), feed_forward}
    encoder: list of {attention, cross_attention (where the layer is in P_enc), feed_forward}

    attention, cca, cross_attention: {norm [W], q [W, H, d], k [Wk, H, d], v [Wk, H, d],
        o [H, d, W]} and, with relative positions, {r [W, H, d], bias_u [H, d], bias_v [H, d]}
    feed_forward: {norm [W], w_in [W, F], w_out [F, W]}
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from retro_jax.config import RetroConfig

Array = np.ndarray
Params = dict[str, Any]
# (query, key) -> may it be read; (query, key) -> the two positions whose difference is the distance
Allowed = Callable[[int, int], bool]
Positions = Callable[[int, int], tuple[int, int]]


def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """x / sqrt(mean(x^2) + epsilon) * scale, of one vector."""
    mean_square = sum(float(value) ** 2 for value in x) / len(x)
    return np.array([value / math.sqrt(mean_square + epsilon) for value in x]) * scale


def sinusoid(distance: int, width: int) -> Array:
    """concat(sin(d f), cos(d f)) with f_t = 10000^(-2t / width)."""
    angles = [distance * 10000.0 ** (-2.0 * t / width) for t in range(width // 2)]
    return np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])


def rotate(x: Array, position: int) -> Array:
    """Rotates the pairs (x[t], x[t + d/2]) by position * 10000^(-2t / d)."""
    half = len(x) // 2
    turned = np.zeros(len(x))
    for t in range(half):
        angle = position * 10000.0 ** (-2.0 * t / len(x))
        turned[t] = x[t] * math.cos(angle) - x[t + half] * math.sin(angle)
        turned[t + half] = x[t + half] * math.cos(angle) + x[t] * math.sin(angle)
    return turned


def attend(
    params: Params,
    queries: list[Array],
    keys: list[Array],
    allowed: Allowed,
    *,
    positions: Positions | None,
    kind: str,
    epsilon: float,
) -> list[Array]:
    """The residual branch of one attention: for every query, what is added to its stream.

    Queries are normalised here, keys are read as they are. Where no key is allowed, zero.
    """
    normed = [rms_norm(x, params["norm"], epsilon) for x in queries]
    branches = []
    for a, query in enumerate(normed):
        branch = np.zeros(len(query))
        readable = [b for b in range(len(keys)) if allowed(a, b)]
        for head in range(params["q"].shape[1]):
            if not readable:
                continue
            q = query @ params["q"][:, head]
            logits = []
            for b in readable:
                k = keys[b] @ params["k"][:, head]
                places = None if positions is None else positions(a, b)
                logits.append(_logit(params, head, q, k, places, kind))
            largest = max(logits)
            weights = [math.exp(logit - largest) for logit in logits]
            total = sum(weights)
            mixed = np.zeros(params["v"].shape[2])
            for weight, b in zip(weights, readable, strict=True):
                mixed += weight / total * (keys[b] @ params["v"][:, head])
            branch += mixed @ params["o"][head]
        branches.append(branch)
    return branches


def _logit(
    params: Params,
    head: int,
    q: Array,
    k: Array,
    places: tuple[int, int] | None,
    kind: str,
) -> float:
    """One scaled logit; `places`: the query's and the key's position, None without positions."""
    scale = math.sqrt(len(q))
    if places is None:
        return float(q @ k) / scale
    if kind == "rotary":
        return float(rotate(q, places[0]) @ rotate(k, places[1])) / scale
    r = sinusoid(places[0] - places[1], params["r"].shape[0]) @ params["r"][:, head]
    u, v = params["bias_u"][head], params["bias_v"][head]
    return float(q @ k + u @ k + q @ r + v @ r) / scale


def feed_forward(params: Params, x: Array, activation: str, epsilon: float) -> Array:
    """The residual branch of the ungated two-matrix feed-forward."""
    hidden = rms_norm(x, params["norm"], epsilon) @ params["w_in"]
    if activation == "relu":
        active = [max(h, 0.0) for h in hidden]
    else:
        root = math.sqrt(2.0 / math.pi)
        active = [0.5 * h * (1.0 + math.tanh(root * (h + 0.044715 * h**3))) for h in hidden]
    return np.array(active) @ params["w_out"]


def embed(table: Array, tokens: Array) -> list[Array]:
    """Rows of the embedding; an id past the vocabulary (a padding id) reads the last row."""
    return [np.array(table[min(int(token), len(table) - 1)]) for token in tokens]


def add(streams: list[Array], branches: list[Array]) -> list[Array]:
    """The residual connection."""
    return [x + y for x, y in zip(streams, branches, strict=True)]


def encode_neighbour(
    params: Params,
    config: RetroConfig,
    neighbour: Array,
    chunk: Array,
    h_u: list[Array],
) -> list[Array]:
    """E_uj: one neighbour [R] of one chunk [M], conditioned on the chunk's activations H_u."""
    name = "encoder_embedding" if "encoder_embedding" in params else "embedding"
    e = embed(params[name], neighbour)
    common: dict[str, Any] = {"kind": config.positions, "epsilon": config.norm_epsilon}
    if "conditioning_norm" in params:
        h_u = [rms_norm(x, params["conditioning_norm"], config.norm_epsilon) for x in h_u]
    for p in range(1, config.encoder_num_layers + 1):
        layer = params["encoder"][p - 1]
        keys = [rms_norm(x, layer["attention"]["norm"], config.norm_epsilon) for x in e]
        branches = attend(
            layer["attention"],
            e,
            keys,
            lambda a, b: neighbour[b] != config.pad_id,
            positions=lambda a, b: (a, b),
            **common,
        )
        e = add(e, branches)
        if p in config.encoder_cca_layers:
            branches = attend(
                layer["cross_attention"],
                e,
                h_u,
                lambda a, b: chunk[b] != config.pad_id,
                positions=lambda a, b: (a + 1, b + 1),  # d(i', i) = i' - i
                **common,
            )
            e = add(e, branches)
        weights = layer["feed_forward"]
        e = [x + feed_forward(weights, x, config.activation, config.norm_epsilon) for x in e]
    return [rms_norm(x, params["encoder_norm"], config.norm_epsilon) for x in e]


def encode(
    params: Params,
    config: RetroConfig,
    tokens: Array,
    neighbours: Array,
    h: list[Array],
) -> list[list[list[Array]]]:
    """E[u][j][i']: the encoded neighbours [C, K, R] of a sequence [N] with activations h."""
    m = config.chunk_length
    encoded = []
    for u in range(len(neighbours)):
        chunk, h_u = tokens[u * m : (u + 1) * m], h[u * m : (u + 1) * m]
        encoded.append([encode_neighbour(params, config, n, chunk, h_u) for n in neighbours[u]])
    return encoded


def self_attention(
    params: Params, config: RetroConfig, h: list[Array], documents: Array
) -> list[Array]:
    """The decoder's causal self-attention inside a document, residual included."""
    m = config.chunk_length
    branches = attend(
        params,
        h,
        [rms_norm(x, params["norm"], config.norm_epsilon) for x in h],
        lambda a, b: b <= a and documents[a // m] == documents[b // m],
        positions=lambda a, b: (a, b),
        kind=config.positions,
        epsilon=config.norm_epsilon,
    )
    return add(h, branches)


def chunked_cross_attention(
    params: Params,
    config: RetroConfig,
    h: list[Array],
    encoded: list[list[list[Array]]],
    neighbours: Array,
    documents: Array,
) -> list[Array]:
    """CCA, residual included: H_u+ = (h_{um}, ..., h_{um+m-1}) reads E_u, one softmax over all."""
    m = config.chunk_length
    out = [np.array(x) for x in h]
    for u in range(1, len(neighbours) + 1):
        times = [
            (j, t)
            for j in range(len(neighbours[u - 1]))
            for t in range(1, config.neighbour_length + 1)
        ]
        keys = [encoded[u - 1][j][t - 1] for j, t in times]
        present = [neighbours[u - 1][j][t - 1] != config.pad_id for j, t in times]
        for i in range(1, m + 1):
            place = u * m + i - 1  # from 1: h_{um + i - 1}
            if place > len(h):
                continue
            readable = (
                present if documents[(place - 1) // m] == documents[u - 1] else [False] * len(times)
            )
            places = [(i + m - 1, t) for _, t in times]  # d(i, i') = i - i' + m - 1
            branches = attend(
                params,
                [h[place - 1]],
                keys,
                functools.partial(_look_up, readable),
                positions=functools.partial(_look_up, places) if config.cca_positions else None,
                kind=config.positions,
                epsilon=config.norm_epsilon,
            )
            out[place - 1] = h[place - 1] + branches[0]
    return out


def _look_up(values: list[Any], a: int, b: int) -> Any:
    """What the list holds for the key `b` of a single query."""
    return values[b]


def hidden_states(
    params: Params,
    config: RetroConfig,
    tokens: Array,
    neighbours: Array | None = None,
    documents: Array | None = None,
) -> Array:
    """[N, D] after the final norm, of one sequence [N]; neighbours [C, K, R], documents [C]."""
    if documents is None:
        documents = np.zeros(len(tokens) // config.chunk_length, dtype=int)
    h = embed(params["embedding"], tokens)
    encoded: list[list[list[Array]]] = []
    for p in range(1, config.num_layers + 1):
        layer = params["layers"][p - 1]
        h = self_attention(layer["attention"], config, h, documents)
        if neighbours is not None and config.cca_layers:
            if p == min(config.cca_layers):
                encoded = encode(params, config, tokens, neighbours, h)
            if p in config.cca_layers:
                h = chunked_cross_attention(layer["cca"], config, h, encoded, neighbours, documents)
        weights = layer["feed_forward"]
        h = [x + feed_forward(weights, x, config.activation, config.norm_epsilon) for x in h]
    return np.stack([rms_norm(x, params["final_norm"], config.norm_epsilon) for x in h])


def logits(
    params: Params,
    config: RetroConfig,
    tokens: ArrayLike,
    neighbours: ArrayLike | None = None,
    documents: ArrayLike | None = None,
) -> Array:
    """[B, N, V] of a batch: tokens [B, N], neighbours [B, C, K, R], documents [B, C]."""
    table = params["read_out"] if "read_out" in params else params["embedding"]
    rows = []
    for b in range(len(np.asarray(tokens))):
        h = hidden_states(
            params,
            config,
            np.asarray(tokens)[b],
            None if neighbours is None else np.asarray(neighbours)[b],
            None if documents is None else np.asarray(documents)[b],
        )
        rows.append(np.array([[float(x @ word) for word in table] for x in h]))
    return np.stack(rows)


def token_losses(all_logits: Array, given_targets: ArrayLike, pad_id: int) -> Array:
    """[B, N] nats: minus the log-probability of each target, 0 where it is pad_id."""
    targets = np.asarray(given_targets)
    losses = np.zeros(targets.shape)
    for b in range(targets.shape[0]):
        for n in range(targets.shape[1]):
            if targets[b, n] == pad_id:
                continue
            row = all_logits[b, n]
            largest = max(row)
            normaliser = largest + math.log(sum(math.exp(x - largest) for x in row))
            losses[b, n] = normaliser - row[targets[b, n]]
    return losses
