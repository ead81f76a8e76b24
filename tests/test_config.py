"""The configurations: every validation error, and the parameter counts the paper prints."""

import dataclasses
from typing import Any

import pytest

from retro_jax.config import PRESETS, DecoderForm, ExecutionConfig, RetroConfig
from retro_jax.errors import UserError

TINY = RetroConfig(
    vocab_size=16, d_model=8, num_layers=3, num_heads=2, head_dim=4, d_ff=16, cca_layers=(2, 3)
)

# millions, without embeddings: (with retrieval, baseline), the paper's table of sizes
PRINTED = {
    "172m": (172, 132),
    "425m": (425, 368),
    "1.5b": (1451, 1309),
    "7.5b": (7532, 6982),
}

SIZES = [
    "vocab_size",
    "d_model",
    "num_layers",
    "num_heads",
    "head_dim",
    "d_ff",
    "chunk_length",
    "neighbour_length",
    "encoder_d_model",
    "encoder_num_layers",
    "encoder_num_heads",
    "encoder_head_dim",
    "encoder_d_ff",
]

BAD = [
    *((size, {size: bad}) for size in SIZES for bad in (0, -2, 2.0)),
    ("cca_layers", {"cca_layers": (3, 2)}),
    ("cca_layers", {"cca_layers": (2, 2)}),
    ("cca_layers", {"cca_layers": (0,)}),
    ("cca_layers", {"cca_layers": (4,)}),
    ("encoder_cca_layers", {"encoder_cca_layers": (2, 1)}),
    ("encoder_cca_layers", {"encoder_cca_layers": (0,)}),
    ("encoder_cca_layers", {"encoder_cca_layers": (3,)}),
    ("d_model", {"d_model": 7}),
    ("encoder_d_model", {"encoder_d_model": 7}),
    ("head_dim", {"head_dim": 3, "positions": "rotary"}),
    ("encoder_head_dim", {"encoder_head_dim": 3, "positions": "rotary"}),
    ("pad_id", {"pad_id": -1}),
    ("pad_id", {"pad_id": 17}),
    ("positions", {"positions": "absolute"}),
    ("activation", {"activation": "swish"}),
    ("dropout", {"dropout": 1.0}),
    ("dropout", {"dropout": -0.1}),
    ("dropout", {"dropout": float("nan")}),
    ("norm_epsilon", {"norm_epsilon": 0.0}),
    ("share_embeddings", {"share_embeddings": True}),
]

BAD_EXECUTION = [
    ("activation_dtype", "float16"),
    ("remat", "some"),
    ("attention", "flash"),
    ("attention_block", 0),
    ("loss_block", -1),
]


def _assert_names(error: UserError, owner: str, field: str, value: object) -> None:
    """The message is one line with class, field, value and what was expected."""
    message = str(error)
    assert message.startswith(f"{owner}.{field} is {value!r}: expected ")
    assert "\n" not in message


@pytest.mark.parametrize(("field", "changes"), BAD)
def test_bad_retro_config_names_the_field(field, changes):
    with pytest.raises(UserError) as raised:
        dataclasses.replace(TINY, **changes)
    _assert_names(raised.value, "RetroConfig", field, changes[field])


@pytest.mark.parametrize(("field", "value"), BAD_EXECUTION)
def test_bad_execution_config_names_the_field(field, value):
    with pytest.raises(UserError) as raised:
        ExecutionConfig(**{field: value})
    _assert_names(raised.value, "ExecutionConfig", field, value)


def test_accepted_edges():
    """The limits themselves are allowed: each of these is one step from an error above."""
    assert dataclasses.replace(TINY, pad_id=16).pad_id == TINY.vocab_size
    assert dataclasses.replace(TINY, head_dim=3).head_dim == 3
    assert dataclasses.replace(TINY, share_embeddings=True, encoder_d_model=8).share_embeddings
    assert ExecutionConfig(loss_block=0).loss_block == 0


def test_lists_become_tuples_so_that_a_config_can_be_hashed():
    lists: dict[str, Any] = {"cca_layers": [2, 3], "encoder_cca_layers": [1]}
    config = dataclasses.replace(TINY, **lists)
    assert config == TINY
    assert hash(config) == hash(TINY)


def test_a_config_cannot_be_mutated():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.d_model = 4  # type: ignore[misc]


@pytest.mark.parametrize("name", PRINTED)
def test_the_papers_parameter_counts(name):
    """Within 0.5% of the eight printed counts (millions, without embeddings)."""
    retro, baseline = PRINTED[name]
    config = PRESETS[name]
    assert config.num_parameters(embeddings=False) == pytest.approx(retro * 1e6, rel=5e-3)
    without = config.baseline().num_parameters(embeddings=False)
    assert without == pytest.approx(baseline * 1e6, rel=5e-3)


def test_the_wikitext103_model_is_the_papers():
    """Section 4.1 and appendix C: 18 layers of width 1024, one embedding for both, dropout 0.25."""
    config = PRESETS["wikitext103"]
    sizes = (config.num_layers, config.d_model, config.d_ff, config.num_heads, config.head_dim)
    assert sizes == (18, 1024, 4096, 16, 64)
    assert config.dropout == 0.25
    assert config.share_embeddings
    embeddings = config.num_parameters() - config.num_parameters(embeddings=False)
    assert embeddings == config.vocab_size * config.d_model


def test_baseline_differs_in_retrieval_only():
    baseline = TINY.baseline()
    assert not baseline.has_retrieval
    assert dataclasses.replace(baseline, cca_layers=TINY.cca_layers) == TINY


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("norm", "batch"),
        ("feed_forward", "mixed"),
        ("num_kv_heads", -1),
        ("learned_positions", -1),
        ("rotary_dim", 3),
        ("rotary_base", 0.0),
        ("rotary_divisors", (1.0, 0.0)),
        ("neighbour_layer", -1),
        ("sink_id", -1),
        # Together with the sizes of TINY.
        ("num_kv_heads", 4),
        ("rotary_dim", 6),
        ("rotary_divisors", (1.0, 2.0, 3.0)),
        ("neighbour_layer", 4),
        ("sink_id", 16),
        ("learned_positions", 128),
    ],
)
def test_a_bad_form_names_field_value_and_rule(field: str, bad: Any):
    with pytest.raises(UserError) as raised:
        dataclasses.replace(TINY, form=DecoderForm(**{field: bad}, gated_cca=True))
    _assert_names(raised.value, "DecoderForm", field, bad)
