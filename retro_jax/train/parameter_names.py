"""Names of the leaves of parameter trees, as messages, masks and checkpoints use them."""

from collections.abc import Callable
from typing import Any

import jax

_WRAPPERS = ("value", "raw_value")  # nnx's names between a parameter's name and its array


def leaf_name(path: tuple[Any, ...]) -> str:
    """A tree path as a dotted name, as in "layers.attention.query"."""
    keys = (jax.tree_util.keystr((key,), simple=True) for key in path)
    return ".".join(key for key in keys if key not in _WRAPPERS)


def named_leaves(tree: Any) -> dict[str, Any]:
    """All leaves of a tree by name.

    Raises:
      ValueError: two leaves have the same name.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    by_name = {leaf_name(path): leaf for path, leaf in leaves}
    if len(by_name) != len(leaves):
        raise ValueError("two leaves of the tree have the same name")
    return by_name


def map_named(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Maps function(name, leaf, ...) over trees of equal structure."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(leaf_name(path), *leaves), tree, *rest
    )
