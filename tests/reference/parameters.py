"""Brings the parameters of a Retro into the form that retro_numpy reads."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from retro_jax.model import Retro

Tree = dict[str, Any]


def reference_parameters(model: Retro) -> Tree:
    """The reference's dict of float64 arrays; every parameter of the model is used exactly once."""
    config = model.config
    left = _Counted(nnx.to_pure_dict(nnx.state(model)))
    params: Tree = {
        "embedding": left.take("embedding", "table"),
        "final_norm": left.take("norm", "scale"),
        "layers": _layers(left, ("layers",), config.num_layers),
    }
    if not config.tie_embeddings:
        params["read_out"] = left.take("read_out")
    if config.has_retrieval:
        for index, p in enumerate(config.cca_layers):
            params["layers"][p - 1]["cca"] = _attention(left, ("cca", "attention"), index)
        params["encoder"] = _layers(left, ("encoder", "layers"), config.encoder_num_layers)
        for index, p in enumerate(config.encoder_cca_layers):
            cross = _attention(left, ("encoder", "cross_attention"), index)
            params["encoder"][p - 1]["cross_attention"] = cross
        if config.norm_conditioning and config.encoder_cca_layers:
            params["conditioning_norm"] = left.take("encoder", "conditioning_norm", "scale")
        params["encoder_norm"] = left.take("encoder", "norm", "scale")
        if not config.share_embeddings:
            params["encoder_embedding"] = left.take("encoder", "embedding", "table")
    assert not left.unused(), f"parameters that the reference does not know: {left.unused()}"
    return params


class _Counted:
    """A tree of parameters that knows which of them were taken."""

    def __init__(self, tree: Tree):
        self.tree = tree
        self.taken: set[tuple[str, ...]] = set()

    def take(self, *path: str) -> np.ndarray:
        """The parameter at a path, as float64."""
        self.taken.add(path)
        node: Any = self.tree
        for name in path:
            node = node[name]
        return np.asarray(node, np.float64)

    def has(self, *path: str) -> bool:
        """Whether there is something at a path."""
        node: Any = self.tree
        for name in path:
            if name not in node:
                return False
            node = node[name]
        return True

    def unused(self) -> list[tuple[str, ...]]:
        """The paths that were never taken."""
        leaves = jax.tree_util.tree_flatten_with_path(self.tree)[0]
        paths = [tuple(str(key.key) for key in path) for path, _ in leaves]
        return [path for path in paths if path not in self.taken]


def _layers(left: _Counted, path: tuple[str, ...], count: int) -> list[Tree]:
    """The self-attention and feed-forward of a stack of layers."""
    return [
        {
            "attention": _attention(left, (*path, "attention"), index),
            "feed_forward": {
                "norm": left.take(*path, "feed_forward", "norm", "scale")[index],
                "w_in": left.take(*path, "feed_forward", "widen")[index],
                "w_out": left.take(*path, "feed_forward", "narrow")[index],
            },
        }
        for index in range(count)
    ]


def _attention(left: _Counted, path: tuple[str, ...], index: int) -> Tree:
    """One layer's attention, its fused projections cut apart."""
    params = {
        "norm": left.take(*path, "norm", "scale")[index],
        "o": left.take(*path, "output")[index],
    }
    if left.has(*path, "query_key_value"):
        fused = left.take(*path, "query_key_value")[index]
        params |= {"q": fused[:, 0], "k": fused[:, 1], "v": fused[:, 2]}
    else:
        fused = left.take(*path, "key_value")[index]
        query = left.take(*path, "query")[index]
        params |= {"q": query, "k": fused[:, 0], "v": fused[:, 1]}
    if left.has(*path, "relative"):
        params |= {
            "r": left.take(*path, "relative")[index],
            "bias_u": left.take(*path, "content_bias")[index],
            "bias_v": left.take(*path, "position_bias")[index],
        }
    return params
