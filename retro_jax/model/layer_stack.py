"""Stacks of equal layers, run one after the other or by scan, with rematerialisation."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from retro_jax.config import RetroConfig
from retro_jax.model.layers import Layout, Module

if TYPE_CHECKING:
    from retro_jax.model.retro import Context, Retro

_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Run:
    """`repeats` equal groups of layers; a group is `size` layers, the last of them with CCA or not."""

    size: int
    cca: bool
    repeats: int

    @property
    def layers(self) -> int:
        """Decoder layers in all groups."""
        return self.size * self.repeats


def runs_after(config: RetroConfig, first: int) -> list[Run]:
    """The runs that cover layers first + 1 .. L, CCA layers included."""
    ends = [p for p in config.cca_layers if p > first]
    gaps = [end - start for start, end in zip([first, *ends], ends, strict=False)]
    runs = [Run(size, True, len(list(same))) for size, same in itertools.groupby(gaps)]
    return runs + plain_runs(config.num_layers - (ends[-1] if ends else first))


def plain_runs(layers: int) -> list[Run]:
    """One run of layers without CCA, or none."""
    return [Run(1, False, layers)] if layers else []


def scan_layers(
    model: "Retro",
    h: jax.Array,
    tokens: jax.Array,
    neighbours: jax.Array | None,
    context: "Context",
) -> jax.Array:
    """Algorithm 1's loop over a Retro's layers: [B, N, D] -> [B, N, D]."""
    config = model.config
    layers = _Stack(model.layers)
    if neighbours is None:
        for run in plain_runs(config.num_layers):
            h = _scan_run(model, run, layers, None, h, context)
        return h
    cca = _Stack(model.cca)
    first = config.cca_layers[0]
    for run in plain_runs(first - 1):
        h = _scan_run(model, run, layers, None, h, context)
    layer, first_cca = layers.merge(_first(layers)), cca.merge(_first(cca))
    h, context = first_retrieval(model, layer, first_cca, h, tokens, neighbours, context)
    for run in runs_after(config, first):
        h = _scan_run(model, run, layers, cca if run.cca else None, h, context)
    return h


def first_retrieval(
    model: "Retro",
    layer: Any,
    cca: Any,
    h: jax.Array,
    tokens: jax.Array,
    neighbours: jax.Array,
    context: "Context",
) -> tuple[jax.Array, "Context"]:
    """Layer min(P): ATTN, ENCODER, CCA, FFW; the activations, and the context with E in it."""
    first = model.config.cca_layers[0]

    def retrieve(h: jax.Array, context: "Context") -> jax.Array:
        return model.feed_forward(layer, model.retrieve(cca, h, first, context), first, context)

    h = rematerialised(lambda h: model.attend(layer, h, first, context), model.layout)(h)
    encode = rematerialised(lambda h: model.encode(neighbours, h, tokens, context), model.layout)
    context = encode(h)
    return rematerialised(retrieve, model.layout)(h, context), context


def rematerialised(
    run: Callable[..., Any], layout: Layout, *, scanned: bool = False
) -> Callable[..., Any]:
    """Wraps a part of the model so that the backward pass makes again what the policy does not keep.

    Args:
      run: a function of arrays. layout: says the policy.
      scanned: whether it runs inside a loop, which by itself keeps XLA from merging the two passes.
    """
    policy = layout.execution.remat
    if policy == "none":
        return run
    return jax.checkpoint(run, policy=_POLICIES[policy], prevent_cse=not scanned)


class _Stack:
    """A stack of layers handed out from the front."""

    def __init__(self, stacked: nnx.Module):
        self.graphdef, self.rest = nnx.split(stacked)
        self.taken = 0

    def take(self, count: int) -> tuple[int, Any]:
        """The index of the next layer and the parameters of the next `count`, stacked."""
        start, self.taken = self.taken, self.taken + count
        params = jax.tree.map(lambda leaf: leaf[start : start + count], self.rest)
        return start, params

    def merge(self, params: Any) -> Any:
        """One layer's module."""
        return nnx.merge(self.graphdef, params)


def _first(stack: _Stack) -> Any:
    """The parameters of the next layer of a stack."""
    return jax.tree.map(lambda leaf: leaf[0], stack.take(1)[1])


def _scan_run(
    model: "Retro",
    run: Run,
    layers: _Stack,
    cca: _Stack | None,
    h: jax.Array,
    context: "Context",
) -> jax.Array:
    """Runs equal groups of layers by jax.lax.scan."""
    start, params = layers.take(run.layers)
    group_params = jax.tree.map(lambda x: x.reshape(run.repeats, run.size, *x.shape[1:]), params)
    cca_params = cca.take(run.repeats)[1] if cca is not None else None
    numbers = jnp.arange(run.layers).reshape(run.repeats, run.size) + start + 1

    def group(h: jax.Array, xs: Any) -> tuple[jax.Array, None]:
        layer_params, cca_params, p = xs
        for i in range(run.size):
            layer = layers.merge(jax.tree.map(lambda leaf, i=i: leaf[i], layer_params))
            module = cca.merge(cca_params) if cca is not None and i == run.size - 1 else None
            run_layer = functools.partial(model.run_layer, layer, module)
            h = rematerialised(run_layer, model.layout, scanned=True)(h, p[i], context)
        return h, None

    return jax.lax.scan(group, h, (group_params, cca_params, numbers))[0]


def stack_layers(make: Callable[[nnx.Rngs], Module], count: int, rngs: nnx.Rngs) -> Module:
    """A module like make(rngs) whose every parameter has a leading axis of `count` layers."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    keys = jax.random.split(rngs.params(), count)
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.split(make(nnx.Rngs(key)))[1])(keys))


def take_layer(stacked: Module, index: int) -> Module:
    """Layer `index` (from 0) of a stack."""
    graphdef, params = nnx.split(stacked)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index], params))
