"""The first parameters of a run, and those that it trains.

Fine-tuning begins with the parameters of a trained run, on other data or with another database, and
with a schedule and moments of its own. RETRO-fitting (paper, section 4.3) begins with a transformer
without retrieval, adds encoder and CCA, and trains nothing else. The transformer is a run's:

    StartConfig.run = 'W/baseline'
    StartConfig.fresh = ('encoder.*', 'cca.*')
    StartConfig.trained = ('encoder.*', 'cca.*')

or an existing language model, with gated CCA (DecoderForm.gated_cca) copied from its own weights:

    StartConfig.base = 'SmolLM2-135M'
    StartConfig.trained = ('cca.gate',)

or of random values instead: StartConfig.fresh = ('cca.attention.*',). With an adapter that was shared
(retrofit/adapter.py) it begins where that ended: StartConfig.adapter = 'ADAPTER'.
"""

import ast
import dataclasses
import fnmatch
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from retro_jax.config import RetroConfig, require
from retro_jax.errors import UserError
from retro_jax.retrofit import open_base
from retro_jax.retrofit.adapter import open_adapter
from retro_jax.retrofit.decoder import fitted_parameters
from retro_jax.train.checkpoint import restore_params
from retro_jax.train.optimizer import Trainable
from retro_jax.train.parameter_names import map_named, named_leaves
from retro_jax.train.record import CONFIG_FILE, parse_settings
from retro_jax.train.step import TrainState

_ALL = ("*",)
_SHOWN = 3
_PARTS = ("params", "average")  # of a TrainState
_ADDED = ("cca.", "encoder.")
_GATE = "cca.gate"


@dataclasses.dataclass(frozen=True)
class StartConfig:
    """Where a run's first parameters are from, and which are trained.

    Attributes:
      run: directory of a trained run (W/retro) with whose parameters it begins; "" for the seed's.
      base: an existing model, a Hugging Face folder or a GGUF file, whose weights the decoder begins
        with; "" for none. Those that it lacks begin with the seed's values, and gated CCA as copies of it.
      adapter: directory of an adapter that was fitted to the base, with whose parameters it begins too;
        "" for none.
      step: which of its checkpoints; 0 for the newest.
      averaged: whether it begins with their moving average.
      fresh: patterns of parameters that begin with the seed's values even so.
      gates: first value of gated CCA's gates beside a base: with 0 the first step is the base's.
      trained: patterns of the parameters that are trained; the others keep their values. Names are
        those of errors and checkpoints: 'encoder.*', '*.norm.scale'.
    """

    run: str = ""
    base: str = ""
    adapter: str = ""
    step: int = 0
    averaged: bool = False
    fresh: Sequence[str] = ()
    gates: float = 0.0
    trained: Sequence[str] = _ALL

    def __post_init__(self) -> None:
        require(self.step >= 0, self, "step", "the step of a checkpoint, or 0 for the newest")
        for field in ("fresh", "trained"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        require(bool(self.trained), self, "trained", "at least one pattern, as in ('*',)")
        idle = self.run or not (self.step or self.averaged or (self.fresh and not self.base))
        require(not (self.run and self.base), self, "base", "'' where StartConfig.run is given")
        require(bool(idle), self, "run", "a run's directory, as step, averaged or fresh are given")
        require(not (self.adapter and self.gates), self, "gates", "0 with StartConfig.adapter")


def trainable(config: StartConfig, params: Any) -> Trainable | None:
    """Which parameters are trained, by name; None for all.

    Args:
      config: of the run. params: a tree of them, or of their shapes.

    Raises:
      UserError: a pattern that matches none; a first value of gates or an adapter without a base.
    """
    # Not of the config alone: launch.retrofit gives the base beside a file of settings.
    require(bool(config.base) or not config.gates, config, "gates", "0 without StartConfig.base")
    alone = bool(config.base) or not config.adapter
    require(alone, config, "adapter", "'' without StartConfig.base")
    names = list(named_leaves(params))
    _check_patterns(config, "trained", names)
    _check_patterns(config, "fresh", names)
    if set(config.trained) & set(_ALL):
        return None
    return lambda name: _matches(name, config.trained)


def begin(
    config: StartConfig,
    state: TrainState,
    checkpoints: str | os.PathLike,
    retro: RetroConfig | None = None,
) -> TrainState:
    """The first state of a run with the parameters of another.

    Args:
      config: of the run. state: made of its seed. checkpoints: of the run to begin with.
      retro: the architecture; needed where the other run was fitted to a base.

    Raises:
      UserError: the other run lacks a parameter that is not `fresh`, or has another shape of it.
    """
    parameters = wanted_parameters(config, state.params)
    part = "average" if config.averaged else "params"
    base = recorded_base(pathlib.Path(checkpoints).parent)
    _, arrays = restore_params(
        checkpoints,
        parameters,
        config.step or None,
        part=part,
        all_of_it=False,
        may_lack=bool(base),
    )
    if base and retro is not None:
        arrays = complete_parameters(base, arrays, retro)
    params = map_named(lambda name, leaf: arrays.get(name, leaf), state.params)
    average = None if state.average is None else jax.tree.map(jnp.copy, params)
    return dataclasses.replace(state, params=params, average=average)


def recorded_base(run: pathlib.Path) -> str:
    """The base that a run was fitted to, as its record says; "" for none."""
    path = run / CONFIG_FILE
    if not path.is_file():
        return ""
    recorded = parse_settings(path.read_text(encoding="utf-8"))
    return str(ast.literal_eval(recorded.get("StartConfig.base", "''")))


def begin_with_base(config: StartConfig, state: TrainState, retro: RetroConfig) -> TrainState:
    """The first state of a run with the weights of an existing model, and of an adapter to it.

    Args:
      config: of the run. state: made of its seed. retro: the architecture.

    Raises:
      UserError: there is no such model, it is another decoder, or the adapter does not fit it.
    """
    base, leaves = open_base(config.base), named_leaves(state.params)
    parameters = fitted_parameters(base, retro, leaves)
    if config.adapter:
        parameters |= open_adapter(config.adapter, base).parameters(leaves)
    if config.gates and _GATE in parameters:
        parameters[_GATE] = parameters[_GATE] + config.gates
    parameters = {n: x for n, x in parameters.items() if not _matches(n, config.fresh)}
    params = map_named(lambda name, leaf: parameters.get(name, leaf), state.params)
    average = None if state.average is None else jax.tree.map(jnp.copy, params)
    return dataclasses.replace(state, params=params, average=average)


def known_from_base(
    config: StartConfig, retro: RetroConfig, trained: Trainable | None
) -> Callable[[str], bool] | None:
    """Which arrays of a state ("params.norm.scale") are the base's bit for bit; None where none is.

    Checkpoints do without them: `complete_with_base` reads them again.

    Args:
      config: of the run. retro: the architecture. trained: as `trainable` gives it.
    """
    if not config.base or trained is None:
        return None
    added = () if retro.form.gated_cca and not config.adapter else _ADDED

    def known(name: str) -> bool:
        part, _, parameter = name.partition(".")
        own = trained(parameter) or _matches(parameter, config.fresh)
        own = own or (config.gates != 0 and parameter == _GATE)
        return part in _PARTS and not own and not parameter.startswith(added)

    return known


def complete_with_base(config: StartConfig, state: TrainState, retro: RetroConfig) -> TrainState:
    """A restored state with the arrays that its checkpoint did without: see `known_from_base`."""
    parts = {name: getattr(state, name) for name in _PARTS}
    whole = {
        name: complete_parameters(config.base, tree, retro)
        for name, tree in parts.items()
        if tree is not None
    }
    return dataclasses.replace(state, **whole)


def complete_parameters(base: str, params: Any, retro: RetroConfig) -> Any:
    """Parameters of which some are shapes only, those with the values of a base.

    Args:
      base: folder or GGUF file. params: arrays, and jax.ShapeDtypeStruct with shardings. retro: of the model.
    """
    named = named_leaves(params)
    missing = [name for name, leaf in named.items() if isinstance(leaf, jax.ShapeDtypeStruct)]
    if not missing:
        return params
    found = fitted_parameters(open_base(base), retro, named)
    return map_named(lambda name, leaf: found[name] if name in missing else leaf, params)


def wanted_parameters(config: StartConfig, params: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters that a run takes from another, by name.

    Args:
      config: of the run. params: a tree of them, or of their shapes.
    """
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in named_leaves(params).items()
        if not _matches(name, config.fresh)
    }


def _check_patterns(config: StartConfig, field: str, names: Sequence[str]) -> None:
    """Refuses a pattern that no parameter's name matches."""
    for pattern in getattr(config, field):
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            shown = ", ".join(names[:: max(1, len(names) // _SHOWN)][:_SHOWN])
            raise UserError(
                f"StartConfig.{field} has {pattern!r}, which no parameter matches: expected patterns "
                f"of names such as {shown}"
            )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of some patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
