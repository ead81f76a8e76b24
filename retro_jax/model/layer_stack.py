"""Stacks of equal layers: one loop over them, unrolled or by scan, with rematerialisation.

Some layers have an extra module, as a decoder's have CCA. By scan, equal groups of layers share one
program. With layers 2 to 9 and extras in layers 3, 6 and 9:

    layer      2 3 | 4 5 6 | 7 8 9         layers 2 and 3 are one group,
    extra        x       x       x         4 to 6 and 7 to 9 are two equal groups in one scan
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from retro_jax.config import ExecutionConfig
from retro_jax.model.layers import Module

# (layer, its extra module or None, carry, the layer's number from 1, shared) -> carry
LayerFunction = Callable[[Any, Any, Any, Any, Any], Any]

_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """`repeats` equal groups of `size` layers; the last layer of each has an extra module or not."""

    size: int
    has_extra: bool
    repeats: int

    @property
    def layers(self) -> int:
        """Layers in all repeats."""
        return self.size * self.repeats


def layer_groups(first: int, last: int, extra_layers: Sequence[int]) -> list[LayerGroup]:
    """The groups that cover layers first .. last, of which some have an extra module."""
    ends = [p for p in extra_layers if first <= p <= last]
    sizes = [end - start for start, end in zip([first - 1, *ends], ends, strict=False)]
    groups = [LayerGroup(size, True, len(list(same))) for size, same in itertools.groupby(sizes)]
    rest = last - (ends[-1] if ends else first - 1)
    return [*groups, LayerGroup(1, False, rest)] if rest else groups


@dataclasses.dataclass(frozen=True)
class Extras:
    """The extra modules of some layers.

    Attributes:
      stack: the modules, stacked. layers: which layers have them, from 1, increasing.
    """

    stack: nnx.Module
    layers: Sequence[int]


def run_layers(
    run: LayerFunction,
    carry: Any,
    stacks: tuple[nnx.Module, Extras | None],
    *,
    first: int,
    last: int,
    shared: Any,
    execution: ExecutionConfig,
) -> Any:
    """Runs layers first .. last, one after the other or by scan.

    Args:
      run: runs one layer; its extra module is None for a layer without. The layer's number is a
        Python int unrolled and an int32 scalar in a scan.
      carry: passed from layer to layer: the residual stream, or any tree with it. A cache of all
        layers' keys and values is an array with an axis of layers in it, updated in place at p - 1.
      stacks: all layers, from layer 1, and the extra modules of some of them. Layers that are a
        list and no stack are never scanned.
      first, last: layer numbers from 1; none runs where last < first.
      shared: read by all layers: a tree of arrays, which rematerialisation keeps.
      execution: its scan_layers and remat.

    Returns:
      The last layer's carry.
    """
    layers, extras = stacks
    if not execution.scan_layers or isinstance(layers, nnx.List):
        for p in range(first, last + 1):
            has_extra = extras is not None and p in extras.layers
            extra = take_extra(extras, p) if extras is not None and has_extra else None
            one = rematerialised(_one_layer(run, take_layer(layers, p - 1), extra), execution)
            carry = one(carry, p, shared)
        return carry
    start = first
    for group in layer_groups(first, last, () if extras is None else extras.layers):
        scanned = _scanned_group(run, stacks, group, start=start, execution=execution)
        carry = scanned(carry, shared)
        start += group.layers
    return carry


def rematerialised(
    run: Callable[..., Any], execution: ExecutionConfig, *, scanned: bool = False
) -> Callable[..., Any]:
    """Wraps a part of the model so that the backward pass recomputes all but the policy's arrays.

    Args:
      run: a function of arrays. execution: its remat names the policy.
      scanned: whether it runs inside a loop, which by itself keeps XLA from merging the two passes.
    """
    if execution.remat == "none":
        return run
    return jax.checkpoint(run, policy=_POLICIES[execution.remat], prevent_cse=not scanned)


def _one_layer(run: LayerFunction, layer: Any, extra: Any) -> Callable[[Any, Any, Any], Any]:
    """A function of (carry, layer number, shared)."""
    return lambda carry, p, shared: run(layer, extra, carry, p, shared)


def _scanned_group(
    run: LayerFunction,
    stacks: tuple[nnx.Module, Extras | None],
    group: LayerGroup,
    *,
    start: int,
    execution: ExecutionConfig,
) -> Callable[[Any, Any], Any]:
    """A function of (carry, shared): equal groups of layers, from layer `start` on, by jax.lax.scan."""
    layers, extras = stacks
    layer_graph, layer_params = _cut(layers, start - 1, group.layers)
    layer_params = jax.tree.map(
        lambda x: x.reshape(group.repeats, group.size, *x.shape[1:]), layer_params
    )
    extra_graph, extra_params = None, None
    if extras is not None and group.has_extra:
        index = extras.layers.index(start + group.size - 1)
        extra_graph, extra_params = _cut(extras.stack, index, group.repeats)
    numbers = jnp.arange(group.layers).reshape(group.repeats, group.size) + start

    def scan(carry: Any, shared: Any) -> Any:
        def body(carry: Any, params: Any) -> tuple[Any, None]:
            layer_params, extra_params, p = params
            for i in range(group.size):
                layer = nnx.merge(
                    layer_graph, jax.tree.map(lambda leaf, i=i: leaf[i], layer_params)
                )
                extra = None
                if extra_graph is not None and i == group.size - 1:
                    extra = nnx.merge(extra_graph, extra_params)
                one = rematerialised(_one_layer(run, layer, extra), execution, scanned=True)
                carry = one(carry, p[i], shared)
            return carry, None

        return jax.lax.scan(body, carry, (layer_params, extra_params, numbers))[0]

    return scan


def stack_layers(make: Callable[[nnx.Rngs], Module], count: int, rngs: nnx.Rngs) -> Module:
    """A module like make(rngs) whose every parameter has a leading axis of `count` layers."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    keys = jax.random.split(rngs.params(), count)
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.split(make(nnx.Rngs(key)))[1])(keys))


def unstack_layers(stacked: nnx.Module, count: int) -> nnx.List:
    """The layers of a stack as a list, each with arrays of its own.

    A program that runs once for every token would copy each layer out of the stack every time.
    """
    return nnx.List([take_layer(stacked, index) for index in range(count)])


def take_layer(stacked: Module, index: int) -> Module:
    """Layer `index` (from 0) of a stack, or of a list of layers."""
    if isinstance(stacked, nnx.List):
        return stacked[index]
    graphdef, params = nnx.split(stacked)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index], params))


def take_extra(extras: Extras, p: int) -> Any:
    """The extra module of layer p (from 1)."""
    return take_layer(extras.stack, extras.layers.index(p))


def _cut(stacked: nnx.Module, start: int, count: int) -> tuple[nnx.GraphDef, Any]:
    """One layer's graph definition, and the parameters of `count` layers from index `start` on."""
    graphdef, params = nnx.split(stacked)
    return graphdef, jax.tree.map(lambda leaf: leaf[start : start + count], params)
