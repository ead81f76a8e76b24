"""AdamW with linear warm-up and cosine decay (paper, section 3 and appendix C), and other choices.

Betas and clipping are not in the paper; the defaults are Gopher's. Weight decay acts on matrices
and embeddings, not on norms' scales nor on any bias, relative positions' u and v included: each
parameter says so where it is defined (retro_jax/parameters.py).
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from retro_jax.config import DTYPES, require
from retro_jax.errors import UserError
from retro_jax.parameters import decays, map_parameters
from retro_jax.train.muon import is_matrix, scale_by_muon
from retro_jax.train.parameter_names import map_named

# Whether a parameter is trained, by its name ("encoder.layers.attention.query"); None trains all.
Trainable = Callable[[str], bool]


ALGORITHMS, SCHEDULES = ("adamw", "adafactor", "muon"), ("cosine", "constant")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimiser and its schedule.

    Attributes:
      algorithm: "adamw"; "adafactor": second moments by rows and columns (arXiv 1804.04235), and no
        first moment; or "muon" for the matrices of layers, whose momentum it makes orthogonal, at
        AdamW's learning rate (arXiv 2502.16982), and AdamW for the rest.
      schedule: "cosine" from the maximum to the last learning rate, or "constant" at the maximum.
      restarts: updates after which the schedule begins anew, with its warm-up, as a run that goes on
        after its end does.
      max_learning_rate: learning rate after the warm-up.
      initial_learning_rate: learning rate of the first update.
      warmup_steps: updates of linear warm-up; less than the run's steps.
      final_fraction: the last learning rate as a fraction of the maximum.
      weight_decay: decoupled weight decay, multiplied by the learning rate.
      beta1: Adam's decay of the first moment.
      beta2: Adam's decay of the second moment.
      epsilon: Adam's epsilon.
      moment_beta: Muon's decay of its momentum.
      moment_dtype: of Adam's first moment and Muon's momentum, "float32" or "bfloat16".
      clip_norm: largest global norm of the gradient; 0 does not clip.
      gate_factor: multiplies the learning rate of gated CCA's gates, one number per head.
    """

    max_learning_rate: float = 2e-4
    initial_learning_rate: float = 1e-7
    warmup_steps: int = 750
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    gate_factor: float = 1.0
    algorithm: str = "adamw"
    moment_dtype: str = "float32"
    moment_beta: float = 0.95
    schedule: str = "cosine"
    restarts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field, choices in (
            ("algorithm", ALGORITHMS),
            ("moment_dtype", DTYPES),
            ("schedule", SCHEDULES),
        ):
            require(getattr(self, field) in choices, self, field, f"one of {choices}")
        rising = all(a < b for a, b in itertools.pairwise((0, *self.restarts)))
        require(rising, self, "restarts", "numbers of updates above 0, in order")
        require(self.max_learning_rate > 0, self, "max_learning_rate", "a positive number")
        initial = 0 <= self.initial_learning_rate <= self.max_learning_rate
        require(initial, self, "initial_learning_rate", "a number from 0 to max_learning_rate")
        require(self.warmup_steps >= 0, self, "warmup_steps", "a number of steps")
        require(0 <= self.final_fraction <= 1, self, "final_fraction", "a number from 0 to 1")
        require(self.weight_decay >= 0, self, "weight_decay", "a number of at least 0")
        for field in ("beta1", "beta2", "moment_beta"):
            require(0 <= getattr(self, field) < 1, self, field, "a number from 0 to below 1")
        require(self.epsilon > 0, self, "epsilon", "a positive number")
        require(self.gate_factor > 0, self, "gate_factor", "a positive number")
        require(self.clip_norm >= 0, self, "clip_norm", "a positive number, or 0 for no clipping")


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """The learning rate of update t = 0, 1, ...

    Args:
      config: the schedule's settings.
      total_steps: updates of the whole run; the cosine ends there and stays at its last value.

    Returns:
      A function from t, a number or an array, to a float32 scalar: initial at 0, max at
      warmup_steps, final_fraction * max at total_steps. With restarts the same from each to the next.
      A run without updates has no warm-up.

    Raises:
      UserError: the warm-up is not shorter than the run.
    """
    bounds = (0, *(step for step in config.restarts if step < total_steps), total_steps)
    for begin, end in itertools.pairwise(bounds):
        if config.warmup_steps >= end - begin and total_steps:
            part = f" from {begin} to {end}" if len(bounds) > 2 else ""
            raise UserError(
                f"OptimizerConfig.warmup_steps is {config.warmup_steps}: expected fewer than the run's "
                f"{end - begin} steps{part}"
            )
    first, highest = config.initial_learning_rate, config.max_learning_rate
    last, warmup = config.final_fraction * highest, config.warmup_steps

    def schedule(step: Any) -> Any:
        # A number is answered by NumPy: JAX would queue it behind the step that runs.
        of = np if isinstance(step, int) else jnp
        step, length = of.asarray(step, np.float32), total_steps
        if len(bounds) > 2:
            part = of.searchsorted(of.asarray(bounds[1:-1], np.float32), step, side="right")
            begin = of.asarray(bounds[:-1], np.float32)[part]
            step, length = step - begin, of.asarray(bounds[1:], np.float32)[part] - begin
        rising = first + (highest - first) * step / max(warmup, 1)
        if config.schedule == "constant":
            return of.where(step < warmup, rising, of.asarray(highest, np.float32))
        progress = of.clip((step - warmup) / (length - warmup), 0.0, 1.0)
        falling = last + (highest - last) * 0.5 * (1.0 + of.cos(np.pi * progress))
        return of.where(step < warmup, rising, falling)

    return schedule


def make_optimizer(
    config: OptimizerConfig, total_steps: int, trainable: Trainable | None = None
) -> optax.GradientTransformation:
    """Builds the optimiser of a run.

    Args:
      config: its settings.
      total_steps: updates of the whole run.
      trainable: which parameters are trained, by name. Frozen ones have no moments, do not decay
        and do not count in the clipped norm. None trains all.

    Raises:
      UserError: the warm-up is not shorter than the run.
    """
    steps = [
        _scale(config),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate(config, total_steps)),
    ]
    if config.clip_norm:
        steps.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.gate_factor != 1.0:
        steps.append(optax.masked(optax.scale(config.gate_factor), gate_mask))
    adamw = optax.chain(*steps)
    if trainable is None:
        return adamw

    def labels(params: Any) -> Any:
        return map_named(lambda name, _: "trained" if trainable(name) else "frozen", params)

    return optax.multi_transform({"trained": adamw, "frozen": optax.set_to_zero()}, labels)


def _scale(config: OptimizerConfig) -> optax.GradientTransformation:
    """The part that turns gradients into directions."""
    if config.algorithm == "adafactor":
        return optax.scale_by_factored_rms()
    dtype = None if config.moment_dtype == "float32" else config.moment_dtype
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon, mu_dtype=dtype)
    if config.algorithm == "adamw":
        return adam

    def labels(params: Any) -> Any:
        return map_named(lambda name, _: "muon" if is_matrix(name) else "adam", params)

    muon = scale_by_muon(config.moment_beta, dtype)
    return optax.multi_transform({"muon": muon, "adam": adam}, labels)


def decay_mask(params: Any) -> Any:
    """A tree like `params` of bools: whether weight decay acts on each parameter."""
    return map_parameters(decays, params)


def gate_mask(params: Any) -> Any:
    """A tree like `params` of bools: whether each is gates of CCA."""
    return map_named(lambda name, _: name == "cca.gate", params)
