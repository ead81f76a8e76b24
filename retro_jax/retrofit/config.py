"""The settings behind the numbers of an existing language model (BaseConfig)."""

import dataclasses

import numpy as np

from retro_jax.config import require

NORMS = ("rms", "layer")
POSITIONS = ("rotary", "learned")
FEED_FORWARDS = ("gated", "plain")
ACTIVATIONS = ("silu", "gelu", "gelu_new", "relu")
ROPE_SCALINGS = ("linear", "llama3", "factors")

_SIZES = (
    "vocab_size",
    "d_model",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "d_ff",
    "context_length",
)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are lowered for contexts longer than those of the first training.

    Attributes:
      kind: "linear" divides all by `factor`. "llama3" divides the low ones by `factor` and leaves the
        high ones (Llama 3.1). "factors" divides each by its own of `factors` (GGUF's rope_freqs).
      factor: see kind.
      low_factor, high_factor: "llama3" divides where a wavelength is above original_context /
        low_factor, leaves it below original_context / high_factor, and interpolates between them.
      original_context: tokens of context in the first training.
      factors: one for each pair of rotated dimensions.
    """

    kind: str
    factor: float = 1.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_context: int = 8192
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        require(self.kind in ROPE_SCALINGS, self, "kind", f"one of {ROPE_SCALINGS}")
        require(self.factor > 0, self, "factor", "a positive number")
        require(self.low_factor > 0, self, "low_factor", "a positive number")
        above = self.high_factor > self.low_factor
        require(above, self, "high_factor", f"more than low_factor = {self.low_factor}")
        require(self.original_context > 0, self, "original_context", "a positive integer")
        stated = all(f > 0 for f in self.factors) and bool(self.factors) == (self.kind == "factors")
        require(stated, self, "factors", "positive numbers with kind 'factors', none with others")


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """The architecture of an existing decoder-only language model.

    Every layer computes h + attention(norm(h)), then h + mlp(norm(h)). With `parallel_residual` both
    read the same h. A last norm and the read-out follow. Logits of attention are divided by
    sqrt(head_dim).

    Attributes:
      architecture: the class of Hugging Face's transformers, as in config.json.
      vocab_size: V, rows of the embedding; a tokeniser may use fewer.
      d_model, num_layers, num_heads, head_dim, d_ff: widths and depth.
      num_kv_heads: G, heads of keys and values. Query head h reads head h // (num_heads / G).
      context_length: the longest context that the model was trained for, in tokens.
      norm: "rms" (RMSNorm, scale alone) or "layer" (LayerNorm, scale and bias).
      norm_epsilon: added to the mean square, or to the variance.
      positions: "rotary", or "learned" (a table of context_length rows, added to the embedding).
      rotary_base: theta. Pair i of r dimensions turns by position * theta ** (-2i / r).
      rotary_dim: r, how many of a head's first dimensions turn. Pair i is (i, i + r / 2).
      rope_scaling: a change of the frequencies, or None.
      feed_forward: "gated", down(activation(gate(x)) * up(x)), or "plain", down(activation(up(x))).
      activation: "silu", "gelu" (exact), "gelu_new" (tanh approximation) or "relu".
      qkv_bias, out_bias, mlp_bias: whether these projections have biases.
      qk_norm: RMSNorm over each head's query and key, before the rotation (Qwen 3).
      parallel_residual: see above (Pythia).
      tie_embeddings: the read-out is the transposed embedding.
      bos_id, eos_ids, pad_id: as the model's files name them; None or () where they do not.
    """

    architecture: str
    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    context_length: int
    norm: str = "rms"
    norm_epsilon: float = 1e-6
    positions: str = "rotary"
    rotary_base: float = 10_000.0
    rotary_dim: int = 0
    rope_scaling: RopeScaling | None = None
    feed_forward: str = "gated"
    activation: str = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    parallel_residual: bool = False
    tie_embeddings: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self) -> None:
        for field in _SIZES:
            value = getattr(self, field)
            whole = isinstance(value, int) and not isinstance(value, bool)
            require(whole and value > 0, self, field, "a positive integer")
        heads = self.num_heads
        require(heads % self.num_kv_heads == 0, self, "num_kv_heads", f"a divisor of {heads} heads")
        for field, choices in (
            ("norm", NORMS),
            ("positions", POSITIONS),
            ("feed_forward", FEED_FORWARDS),
            ("activation", ACTIVATIONS),
        ):
            require(getattr(self, field) in choices, self, field, f"one of {choices}")
        require(self.norm_epsilon > 0, self, "norm_epsilon", "a positive number")
        require(self.rotary_base > 0, self, "rotary_base", "a positive number")
        if self.positions == "rotary":
            paired = 0 < self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0
            rule = f"an even number up to head_dim = {self.head_dim}"
            require(paired, self, "rotary_dim", rule)
            scaling = self.rope_scaling
            divisors = scaling.factors if scaling is not None else ()
            fits = len(divisors) in (0, self.rotary_dim // 2)
            rule = f"{self.rotary_dim // 2} factors, one for each pair"
            require(fits, self, "rope_scaling", rule)
        for field in ("bos_id", "pad_id"):
            value = getattr(self, field)
            known_id = value is None or 0 <= value < self.vocab_size
            require(known_id, self, field, f"None or an id below vocab_size = {self.vocab_size}")
        known_ids = all(0 <= i < self.vocab_size for i in self.eos_ids)
        require(known_ids, self, "eos_ids", f"ids below vocab_size = {self.vocab_size}")


def rotary_frequencies(config: BaseConfig) -> np.ndarray:
    """[rotary_dim / 2] float64: radians per position of each rotated pair, with its scaling."""
    pairs = np.arange(config.rotary_dim // 2)
    plain = config.rotary_base ** (-2.0 * pairs / config.rotary_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.kind == "factors":
        return plain / np.array(scaling.factors)
    if scaling.kind == "linear":
        return plain / scaling.factor
    # The share of the plain frequency grows from 0 to 1 as a context contains more turns of it.
    turns = scaling.original_context * plain / (2 * np.pi)
    share = (turns - scaling.low_factor) / (scaling.high_factor - scaling.low_factor)
    share = np.clip(share, 0.0, 1.0)
    return (1 - share) * plain / scaling.factor + share * plain
