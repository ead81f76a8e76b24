"""Rotary positions in config.json: the older rope_theta and rope_scaling, the newer rope_parameters."""

from typing import Any

from retro_jax.errors import UserError
from retro_jax.retrofit.config import BaseConfig, RopeScaling
from retro_jax.retrofit.fields import Fields


def read_rope(fields: Fields, head_dim: int, *, theta: str, share: str, default: float) -> dict:
    """BaseConfig's rotary fields.

    Args:
      fields: a config.json.
      head_dim: width of a head.
      theta, share: the older names of the base and of the rotated share of a head.
      default: the share where neither the newer nor the older field is there.

    Raises:
      UserError: a scaling that is not read.
    """
    newer, older = fields.inside("rope_parameters"), fields.inside("rope_scaling")
    if newer is not None and any(isinstance(value, dict) for value in newer.values.values()):
        raise fields.error("rope_parameters", "one set of values for all layers")
    given = [_read_scaling(each) for each in (newer, older) if each is not None and each.values]
    if any(each != given[0] for each in given):
        raise fields.error("rope_scaling", "that of rope_parameters")
    return {
        "positions": "rotary",
        "rotary_base": _once(fields, newer, theta, "rope_theta", 10_000.0),
        "rotary_dim": int(head_dim * _once(fields, newer, share, "partial_rotary_factor", default)),
        "rope_scaling": given[0] if given else None,
    }


def _once(
    fields: Fields, newer: Fields | None, older_name: str, newer_name: str, default: float
) -> float:
    """A number that may be in rope_parameters, beside it, or in both."""
    inside = None if newer is None else newer.number(newer_name, None)
    beside = fields.number(older_name, None)
    if None not in (inside, beside) and inside != beside:
        raise fields.error(older_name, f"that of rope_parameters, {inside}")
    given = [value for value in (inside, beside, default) if value is not None]
    return float(given[0])


def _read_scaling(fields: Fields) -> RopeScaling | None:
    """The scaling of rope_scaling or rope_parameters."""
    name = "rope_type" if "rope_type" in fields.values else "type"
    kinds = {"default": None, "linear": "linear", "llama3": "llama3"}
    kind = fields.one_of(name, kinds, "default")
    if fields.values.get("type", fields.values.get(name)) != fields.values.get(name):
        raise fields.error("type", f"that of {name}")
    if kind is None and fields.number("factor", 1.0) != 1:
        raise fields.error(name, "linear or llama3, as there is a factor")
    if kind is None:
        return None
    factor = fields.number("factor")
    if kind == "linear":
        return RopeScaling(kind, factor)
    return RopeScaling(
        kind,
        factor,
        low_factor=fields.number("low_freq_factor"),
        high_factor=fields.number("high_freq_factor"),
        original_context=fields.integer("original_max_position_embeddings"),
    )


def write_rope(config: BaseConfig, *, theta: str) -> dict[str, Any]:
    """The older fields of config.json, which every version of transformers reads."""
    scaling, written = config.rope_scaling, {theta: config.rotary_base}
    if scaling is not None and scaling.kind == "factors":
        raise UserError(
            "rope_scaling has factors of its own: expected a formula that config.json can state"
        )
    if scaling is None:
        return written
    fields: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        fields |= {
            "low_freq_factor": scaling.low_factor,
            "high_freq_factor": scaling.high_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    return {**written, "rope_scaling": fields}
