"""Every field of RetroConfig changes the parameter tree, the output or what is accepted.

A field that reaches nothing is the defect users report first: a new field without a case fails.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from retro_jax.config import POSITIONS, PRESETS, DecoderForm, RetroConfig
from retro_jax.errors import UserError
from retro_jax.model import Retro
from tests.model.tiny import TINY, logits, make_batch, make_model, token_losses, with_neighbours

BASE = dataclasses.replace(TINY, encoder_d_model=TINY.d_model)
FIELDS = [field.name for field in dataclasses.fields(RetroConfig)]

TREE: dict[str, Any] = {
    "vocab_size": 31,
    "d_model": 14,
    "num_layers": 4,
    "num_heads": 3,
    "head_dim": 6,
    "d_ff": 21,
    "encoder_d_model": 14,
    "encoder_num_layers": 3,
    "encoder_num_heads": 2,
    "encoder_head_dim": 5,
    "encoder_d_ff": 15,
    "positions": "rotary",
    "cca_positions": False,
    "share_embeddings": True,
    "tie_embeddings": False,
    "norm_conditioning": True,
    "form": DecoderForm(norm="layer"),
}
OUTPUT: dict[str, Any] = {
    "cca_layers": (1, 3),
    "chunk_length": 2,
    "encoder_cca_layers": (2,),
    "pad_id": 5,
    "activation": "relu",
    "norm_epsilon": 0.5,
    "min_shared_tokens": 0.5,
}
LOSS_IN_TRAINING: dict[str, Any] = {"dropout": 0.5}
ACCEPTED_INPUT: dict[str, Any] = {"neighbour_length": 7}


def shapes(config: RetroConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter."""
    state = nnx.state(nnx.eval_shape(lambda: Retro(config, rngs=nnx.Rngs(0))))
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}


def batch_of(config: RetroConfig) -> Any:
    """The same sequences and the same neighbours at every chunk, whatever the chunk length."""
    batch = make_batch(BASE, chunks=4)
    chunks = np.asarray(batch.tokens).shape[1] // config.chunk_length
    neighbours = np.repeat(np.asarray(batch.neighbours)[:, :1], chunks, axis=1)
    neighbours[:, :, 0, 2] = OUTPUT["pad_id"]
    documents: Any = np.zeros((len(neighbours), chunks), np.int32)
    return dataclasses.replace(with_neighbours(batch, neighbours), documents=documents)


@pytest.mark.parametrize("field", FIELDS)
def test_field_matters(field):
    """Each in the strongest way it can: tree, output, training loss, or accepted input."""
    cases = TREE | OUTPUT | LOSS_IN_TRAINING | ACCEPTED_INPUT
    assert field in cases, f"a new field needs a case here: what does {field} change?"
    changed = dataclasses.replace(BASE, **{field: cases[field]})
    if field in TREE:
        assert shapes(changed) != shapes(BASE)
        return
    assert shapes(changed) == shapes(BASE)
    if field in ACCEPTED_INPUT:
        logits(make_model(BASE), batch_of(BASE))
        with pytest.raises(UserError, match="neighbours have shape"):
            logits(make_model(changed), batch_of(BASE))
        return
    compute, extra = (logits, ()) if field in OUTPUT else (token_losses, (jax.random.key(0),))
    one = compute(make_model(BASE), batch_of(BASE), *extra)
    other = compute(make_model(changed), batch_of(changed), *extra)
    assert np.abs(one - other).max() > 1e-3 * np.abs(one).max()


FORM_FIELDS = [field.name for field in dataclasses.fields(DecoderForm)]
FORM_TREE: dict[str, Any] = {
    "norm": "layer",
    "num_kv_heads": 1,
    "qkv_bias": True,
    "out_bias": True,
    "qk_norm": True,
    "feed_forward": "gated",
    "mlp_bias": True,
    "learned_positions": 40,
    "gated_cca": True,
    "cca_rank": 2,
}
FORM_OUTPUT: dict[str, Any] = {
    "parallel_residual": True,
    "rotary_base": 3.0,
    "rotary_dim": 2,
    "rotary_divisors": (1.0, 50.0),
    "neighbour_layer": 2,
    "sink_id": 7,
    "shared_softmax": True,
    "neighbour_distance": 3,
}
NEEDED = {
    name: {"gated_cca": True}
    for name in ("neighbour_layer", "sink_id", "cca_rank", "shared_softmax", "neighbour_distance")
}


def formed(**form: Any) -> RetroConfig:
    """BASE with rotary positions of four dimensions and a form of the decoder."""
    return dataclasses.replace(BASE, positions="rotary", head_dim=4, form=DecoderForm(**form))


def opened(config: RetroConfig) -> Retro:
    """A model whose gates are open."""
    model = make_model(config)
    if config.form.gated_cca:
        model.cca.gate[...] = model.cca.gate[...] + 3.0
    return model


@pytest.mark.parametrize("field", FORM_FIELDS)
def test_field_of_the_form_matters(field):
    """Each changes the tree, or else what the same tree computes."""
    cases = FORM_TREE | FORM_OUTPUT
    assert field in cases, f"a new field needs a case here: what does {field} change?"
    others = NEEDED.get(field, {})
    plain, changed = formed(**others), formed(**others, **{field: cases[field]})
    assert (shapes(changed) != shapes(plain)) == (field in FORM_TREE)
    assert np.isfinite(logits(opened(changed), batch_of(changed))).all()
    if field in FORM_OUTPUT:
        one, other = (logits(opened(config), batch_of(config)) for config in (plain, changed))
        assert np.abs(one - other).max() > 1e-3 * np.abs(one).max()


VARIANTS = {
    **PRESETS,
    **{f"{name} baseline": config.baseline() for name, config in PRESETS.items()},
    **{name: dataclasses.replace(TINY, positions=name) for name in POSITIONS},
    "no cca positions": dataclasses.replace(TINY, cca_positions=False),
    "untied": dataclasses.replace(TINY, tie_embeddings=False),
    "untied baseline": dataclasses.replace(TINY, tie_embeddings=False).baseline(),
    "shared": dataclasses.replace(BASE, share_embeddings=True),
    "no encoder crossing": dataclasses.replace(TINY, encoder_cca_layers=()),
    **{f"form {n}": formed(**NEEDED.get(n, {}), **{n: value}) for n, value in FORM_TREE.items()},
    "gated with biases": formed(gated_cca=True, qkv_bias=True, out_bias=True, num_kv_heads=2),
    "crossing twice": dataclasses.replace(TINY, encoder_cca_layers=(1, 2)),
    "norm, no crossing": dataclasses.replace(TINY, encoder_cca_layers=(), norm_conditioning=True),
    **{f"{n}, normed": dataclasses.replace(c, norm_conditioning=True) for n, c in PRESETS.items()},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_num_parameters_is_what_the_module_has(name):
    """By abstract evaluation, with and without embeddings: nothing is allocated."""
    config = VARIANTS[name]
    sizes = {path: int(np.prod(shape)) for path, shape in shapes(config).items()}
    assert config.num_parameters() == sum(sizes.values())
    tables = [path for path in sizes if "table" in path or "read_out" in path]
    without = sum(size for path, size in sizes.items() if path not in tables)
    assert config.num_parameters(embeddings=False) == without


@pytest.mark.parametrize(
    "form",
    [
        {"neighbour_distance": 1},
        {"neighbour_distance": -1, "gated_cca": True},
        {"neighbour_distance": 1, "gated_cca": True, "learned_positions": 40},
    ],
)
def test_a_distance_that_nothing_reads_is_refused(form):
    """Without gated CCA, below 0, or where the states themselves contain positions."""
    with pytest.raises(UserError, match=r"neighbour_distance is -?1: expected (0|a number)"):
        formed(**form)


BAD_INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "tokens of one axis": ({"tokens": (16,)}, r"tokens have shape \(16,\): expected \[B, N\]"),
    "tokens not whole chunks": ({"tokens": (2, 18)}, "multiple of chunk_length 4"),
    "no tokens": ({"tokens": (2, 0)}, "multiple of chunk_length 4"),
    "documents by token": ({"documents": (2, 16)}, r"documents have shape .*= \(2, 4\)"),
    "neighbours of another batch": ({"neighbours": (1, 4, 2, 8)}, "neighbours have shape"),
    "neighbours of other chunks": ({"neighbours": (2, 3, 2, 8)}, "neighbours have shape"),
    "no neighbour slots": ({"neighbours": (2, 4, 0, 8)}, "neighbours have shape .*K >= 1"),
    "neighbours of other length": ({"neighbours": (2, 4, 2, 9)}, "neighbours have shape .*8"),
    "neighbours without slots": ({"neighbours": (2, 4, 8)}, "neighbours have shape"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_refused_in_one_line(name):
    changes, message = BAD_INPUTS[name]
    shape = {"tokens": (2, 16), "neighbours": (2, 4, 2, 8), "documents": (2, 4)} | changes
    arrays: Any = {key: np.ones(value, np.int32) for key, value in shape.items()}
    with pytest.raises(UserError, match=message) as raised:
        make_model(TINY)(**arrays)
    assert "\n" not in str(raised.value)
