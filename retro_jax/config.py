"""The settings of a RETRO's numbers (RetroConfig), of their computation (ExecutionConfig), and the
paper's sizes (PRESETS). Borgeaud et al. 2021, arXiv 2112.04426."""

import dataclasses
from typing import Any

from retro_jax.errors import UserError

POSITIONS = ("relative", "rotary")
ACTIVATIONS = ("gelu", "relu", "silu", "gelu_exact")
NORMS = ("rms", "layer")
FEED_FORWARDS = ("plain", "gated")
DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "dots", "full")
PACKED = ("float16", "int8")
ATTENTION_KINDS = ("auto", "plain", "chunked", "fused")

_SIZES = (
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
)
_LAYERS_OF = {"cca_layers": "num_layers", "encoder_cca_layers": "encoder_num_layers"}


def require(condition: bool, owner: Any, field: str, rule: str) -> None:
    """Raises the one-line UserError of every configuration: class, field, value and rule."""
    if not condition:
        name, value = type(owner).__name__, getattr(owner, field)
        raise UserError(f"{name}.{field} is {value!r}: expected {rule}")


@dataclasses.dataclass(frozen=True)
class DecoderForm:
    """How the decoder differs from the paper's: the choices of existing language models.

    The defaults are the paper's decoder. `gated_cca` is RETRO-fitting from a model's own weights:
    CCA is beside ATTN and reads the same input, with a copy of the layer's projections and a gate
    for each head, 0 at first. Its keys and values come from the decoder's own states of a neighbour
    that the decoder has read alone, after `sink_id`; there is no encoder.

    Attributes:
      norm: "rms" (RMSNorm) or "layer" (LayerNorm, with a bias).
      num_kv_heads: G, heads of keys and values, each read by num_heads / G heads of queries; 0 for
        num_heads.
      qkv_bias: whether the projections to queries, keys and values have biases.
      out_bias: whether attention's output has one.
      qk_norm: RMSNorm over each head's query and key, before positions.
      feed_forward: "plain", narrow(f(widen(x))), or "gated", narrow(f(gate(x)) * widen(x)).
      mlp_bias: whether the feed-forward's projections have biases.
      parallel_residual: FFW reads the same stream as ATTN, not ATTN's result.
      learned_positions: rows of a table of positions that is added to the embedding, instead of
        RetroConfig.positions; 0 for none.
      rotary_base: theta of rotary positions: pair i of r dimensions turns by theta^(-2i / r) a token.
      rotary_dim: r, how many of a head's first dimensions turn; 0 for all.
      rotary_divisors: what each pair's frequency is divided by, for longer contexts; () for nothing.
      gated_cca: see above.
      neighbour_layer: the layer whose input is the one encoding of a neighbour, for all CCA layers;
        0 for each CCA layer its own input.
      sink_id: the token before a neighbour, which heads that find nothing read.
      cca_rank: rank of what is added to each projection of gated CCA, so that few numbers are trained
        and the copies are not; 0 for nothing.
      shared_softmax: gated CCA and ATTN share one softmax over neighbours and text, as if the neighbours
        were in the context. A gate multiplies its head's weights of neighbours; the sink is not read.
      neighbour_distance: positions between a neighbour's last token and the first that reads it in gated
        CCA. Before a text in the context there are the text's own. Heads that look at what is near read
        the end of a neighbour at 0, and not the text.
    """

    norm: str = "rms"
    num_kv_heads: int = 0
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    feed_forward: str = "plain"
    mlp_bias: bool = False
    parallel_residual: bool = False
    learned_positions: int = 0
    rotary_base: float = 10_000.0
    rotary_dim: int = 0
    rotary_divisors: tuple[float, ...] = ()
    gated_cca: bool = False
    neighbour_layer: int = 0
    sink_id: int = 0
    cca_rank: int = 0
    shared_softmax: bool = False
    neighbour_distance: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rotary_divisors", tuple(self.rotary_divisors))
        require(self.norm in NORMS, self, "norm", f"one of {NORMS}")
        valid = self.feed_forward in FEED_FORWARDS
        require(valid, self, "feed_forward", f"one of {FEED_FORWARDS}")
        counts = ("num_kv_heads", "learned_positions", "rotary_dim", "neighbour_layer", "sink_id")
        for field in (*counts, "cca_rank", "neighbour_distance"):
            require(getattr(self, field) >= 0, self, field, "a number of at least 0")
        require(self.rotary_dim % 2 == 0, self, "rotary_dim", "an even number, or 0 for all")
        require(self.rotary_base > 0, self, "rotary_base", "a positive number")
        positive = all(divisor > 0 for divisor in self.rotary_divisors)
        require(positive, self, "rotary_divisors", "positive numbers")


@dataclasses.dataclass(frozen=True)
class RetroConfig:
    """The architecture of a RETRO (paper, section 2 and Algorithm 1).

    Layers are numbered from 1, as in the paper. Without `cca_layers` there is no retrieval encoder
    and the model is the baseline transformer.

    Attributes:
      vocab_size: V, rows of the embedding; token ids are in [0, V).
      d_model: D, width of the decoder.
      num_layers: layers of the decoder.
      num_heads: H, attention heads per layer.
      head_dim: width of a head; it need not be d_model / num_heads.
      d_ff: F, width of the feed-forward layers.
      cca_layers: P, the decoder layers with chunked cross-attention, increasing.
      chunk_length: M, tokens per chunk.
      neighbour_length: R, tokens per neighbour: the chunk and its continuation, or what a model reads of
        them (BatchConfig.neighbour_part sets it).
      encoder_d_model: E, width of the bidirectional encoder of neighbours.
      encoder_num_layers: layers of the encoder.
      encoder_num_heads: attention heads per encoder layer.
      encoder_head_dim: width of an encoder head.
      encoder_d_ff: width of the encoder's feed-forward layers.
      encoder_cca_layers: P_enc, the encoder layers that attend to the decoder's activations.
      norm_conditioning: whether an RMSNorm scales the decoder's activations before the encoder attends
        to them; without, they have the scale of the residual stream.
      pad_id: the id of padding in tokens and neighbours.
      positions: "relative" (the paper's, Transformer-XL) or "rotary".
      cca_positions: whether CCA logits depend on positions (an ablation of the paper).
      share_embeddings: the encoder reads the decoder's embedding (needs equal widths).
      tie_embeddings: the read-out is the transposed input embedding.
      activation: the feed-forward's non-linearity, "gelu" (its tanh approximation), "gelu_exact",
        "relu" or "silu".
      dropout: rate on the embedding and on every residual branch, in training only.
      min_shared_tokens: part of a chunk's distinct tokens that a retrieved chunk must have, or the neighbour
        is not read; its continuation does not count. 0 reads all. Training reads all neighbours, so
        that a model can be read with another value than it was trained with.
      norm_epsilon: the norms' epsilon.
      form: how the decoder differs from the paper's (@DecoderForm()).
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    head_dim: int
    d_ff: int
    cca_layers: tuple[int, ...]
    chunk_length: int = 64
    neighbour_length: int = 128
    encoder_d_model: int = 896
    encoder_num_layers: int = 2
    encoder_num_heads: int = 16
    encoder_head_dim: int = 64
    encoder_d_ff: int = 3584
    encoder_cca_layers: tuple[int, ...] = (1,)
    pad_id: int = 0
    positions: str = "relative"
    cca_positions: bool = True
    share_embeddings: bool = False
    tie_embeddings: bool = True
    activation: str = "gelu"
    dropout: float = 0.0
    norm_epsilon: float = 1e-6
    norm_conditioning: bool = False
    min_shared_tokens: float = 0.0
    form: DecoderForm = DecoderForm()

    def __post_init__(self) -> None:
        for field in ("cca_layers", "encoder_cca_layers"):  # gin gives lists
            object.__setattr__(self, field, tuple(getattr(self, field)))
        for field in _SIZES:
            value = getattr(self, field)
            require(isinstance(value, int) and value > 0, self, field, "a positive integer")
        for field, depth in _LAYERS_OF.items():
            layers, last = getattr(self, field), getattr(self, depth)
            ok = list(layers) == sorted(set(layers)) and all(1 <= p <= last for p in layers)
            require(ok, self, field, f"increasing layer numbers from 1 to {depth} = {last}")
        for field in ("d_model", "encoder_d_model"):
            require(
                getattr(self, field) % 2 == 0,
                self,
                field,
                "an even width (sinusoids come in pairs)",
            )
        for field in ("head_dim", "encoder_head_dim"):
            even = self.positions != "rotary" or getattr(self, field) % 2 == 0
            require(even, self, field, "an even width with rotary positions")
        require(
            0 <= self.pad_id <= self.vocab_size,
            self,
            "pad_id",
            "0 <= pad_id <= vocab_size",
        )
        require(self.positions in POSITIONS, self, "positions", f"one of {POSITIONS}")
        require(self.activation in ACTIVATIONS, self, "activation", f"one of {ACTIVATIONS}")
        require(0.0 <= self.dropout < 1.0, self, "dropout", "0 <= dropout < 1")
        require(self.norm_epsilon > 0, self, "norm_epsilon", "a positive number")
        require(0 <= self.min_shared_tokens <= 1, self, "min_shared_tokens", "from 0 to 1")
        whole = self.neighbour_length >= 2 * self.chunk_length
        require(
            whole or not self.min_shared_tokens,
            self,
            "min_shared_tokens",
            f"0 where neighbour_length is {self.neighbour_length}, less than a chunk and its continuation",
        )
        shareable = not self.share_embeddings or self.encoder_d_model == self.d_model
        require(
            shareable,
            self,
            "share_embeddings",
            "False unless encoder_d_model equals d_model",
        )
        self._check_form()

    def _check_form(self) -> None:
        """Refuses a form of the decoder that its sizes do not allow."""
        form, heads, turned = self.form, self.num_heads, self.rotary_dim
        divides = heads % self.num_kv_heads == 0
        require(divides, form, "num_kv_heads", f"a divisor of num_heads = {heads}, or 0")
        fits = turned <= self.head_dim
        require(fits, form, "rotary_dim", f"at most head_dim = {self.head_dim}")
        fits = len(form.rotary_divisors) in (0, turned // 2)
        require(fits, form, "rotary_divisors", f"{turned // 2} numbers, one for each pair, or ()")
        within = form.neighbour_layer <= self.num_layers
        require(within, form, "neighbour_layer", f"at most num_layers = {self.num_layers}")
        room, longest = form.learned_positions, 1 + self.neighbour_length
        fits = not (room and form.gated_cca) or longest <= room
        require(fits, form, "learned_positions", f"{longest} at least, for neighbours")
        without = form.gated_cca or not form.cca_rank
        require(without, form, "cca_rank", "0 without gated_cca")
        beside = form.gated_cca or not form.shared_softmax
        require(beside, form, "shared_softmax", "False without gated_cca")
        apart = form.gated_cca and not form.learned_positions
        require(
            apart or not form.neighbour_distance,
            form,
            "neighbour_distance",
            "0 without gated_cca, and with learned_positions, which neighbours' states contain",
        )
        valid = form.sink_id < self.vocab_size
        require(valid, form, "sink_id", f"an id below vocab_size = {self.vocab_size}")

    @property
    def num_kv_heads(self) -> int:
        """G, heads of the decoder's keys and values."""
        return self.form.num_kv_heads or self.num_heads

    @property
    def rotary_dim(self) -> int:
        """How many of a decoder head's dimensions rotary positions turn."""
        return self.form.rotary_dim or self.head_dim

    @property
    def has_encoder(self) -> bool:
        """Whether the model has an encoder of its own for neighbours."""
        return self.has_retrieval and not self.form.gated_cca

    @property
    def has_retrieval(self) -> bool:
        """Whether the model has chunked cross-attention at all."""
        return bool(self.cca_layers)

    def baseline(self) -> "RetroConfig":
        """The transformer of equal decoder, without encoder and CCA."""
        return dataclasses.replace(self, cca_layers=())

    def num_parameters(self, embeddings: bool = True) -> int:
        """Counts the parameters; without embeddings (and untied read-out), as the paper's table 1 does."""
        norm = _norm_parameters(self)
        total = self.num_layers * (_decoder_attention(self) + _decoder_feed_forward(self)) + norm
        if self.has_encoder:
            total += _encoder_and_cca(self)
        elif self.has_retrieval:
            of_layer = _decoder_attention(self) - self.form.out_bias * self.d_model + self.num_heads
            inner, narrow = (n * self.head_dim for n in (self.num_heads, self.num_kv_heads))
            of_layer += self.form.cca_rank * (3 * self.d_model + 2 * inner + 2 * narrow)
            total += len(self.cca_layers) * of_layer
        if embeddings:
            total += self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
            total += self.form.learned_positions * self.d_model
            if self.has_encoder and not self.share_embeddings:
                total += self.vocab_size * self.encoder_d_model
        return total


def _norm_parameters(config: RetroConfig) -> int:
    """One norm of the decoder."""
    return config.d_model * (2 if config.form.norm == "layer" else 1)


def _decoder_attention(config: RetroConfig) -> int:
    """Norm, Q, K, V, O, biases, norms of heads and positions of a decoder layer's attention."""
    form, width = config.form, config.d_model
    inner, narrow = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    count = _norm_parameters(config) + 2 * width * (inner + narrow)
    count += form.qkv_bias * (inner + 2 * narrow) + form.out_bias * width
    count += 2 * config.head_dim * form.qk_norm
    if config.positions == "relative" and not form.learned_positions:
        count += width * inner + 2 * inner
    return count


def _decoder_feed_forward(config: RetroConfig) -> int:
    """Norm, matrices and biases of a decoder layer's feed-forward."""
    wide = 2 if config.form.feed_forward == "gated" else 1
    count = _norm_parameters(config) + (wide + 1) * config.d_model * config.d_ff
    return count + config.form.mlp_bias * (wide * config.d_ff + config.d_model)


def _encoder_and_cca(config: RetroConfig) -> int:
    """The paper's encoder, without its embedding, and CCA."""
    width, inner = config.encoder_d_model, config.encoder_num_heads * config.encoder_head_dim
    heads = config.num_heads * config.head_dim
    total = len(config.cca_layers) * _attention_parameters(
        config, config.d_model, width, heads, config.cca_positions
    )
    total += config.encoder_num_layers * (
        _attention_parameters(config, width, width, inner)
        + _feed_forward_parameters(width, config.encoder_d_ff)
    )
    total += len(config.encoder_cca_layers) * _attention_parameters(
        config, width, config.d_model, inner
    )
    total += config.norm_conditioning * bool(config.encoder_cca_layers) * config.d_model
    return total + width  # the encoder's final norm


def _attention_parameters(
    config: RetroConfig, width: int, kv_width: int, inner: int, positions: bool = True
) -> int:
    """Norm, Q, K, V, O and, for relative positions, R (which reads the query's width), u and v."""
    count = width + 2 * width * inner + 2 * kv_width * inner
    if config.positions == "relative" and positions:
        count += width * inner + 2 * inner
    return count


def _feed_forward_parameters(width: int, d_ff: int) -> int:
    """Norm and two matrices."""
    return width + 2 * width * d_ff


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """How the numbers are computed; no field changes them beyond tolerance (bfloat16: its own).

    Attributes:
      activation_dtype: "float32" or "bfloat16"; parameters, softmax, norms and loss stay float32.
      scan_layers: run equal groups of layers by jax.lax.scan, for short compilation; or unrolled.
      remat: how much the backward pass recomputes: "none", "dots" (all but matrix products) or
        "full".
      attention: how the decoder attends: "plain" (one [N, N] matrix), "chunked" (by blocks of
        queries; plain if the sequence is one block), "fused" (the backend's kernel, for rotary
        positions on GPU and TPU), or "auto": fused where it exists, else chunked.
      attention_block: queries per block of chunked attention.
      loss_block: positions of every row per block of the loss, so that [B, N, V] never exists at
        once; 0 for one block.
      vocab_block: ids of the vocabulary per block of the loss beside those of positions, so that a block's
        logits stay in the chip's memory (model/tiled_loss.py); 0 for all. For TPUs.
      float32_gradients: with bfloat16 activations, whether weights' gradients are summed over tokens and
        devices in float32; without, only those of embeddings, read-out and norms are.
      kept_states: "float16" or "int8" keeps on disk what a frozen base computes of neighbours, and of
        texts below the first CCA, with gated CCA (retrofit/kept_states.py); "" computes it each time.
    """

    activation_dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"
    attention: str = "auto"
    attention_block: int = 256
    loss_block: int = 1024
    vocab_block: int = 0
    float32_gradients: bool = False
    kept_states: str = ""

    def facts(self) -> dict[str, Any]:
        """The fields that a result records; one that came later only where it is not its default."""
        facts = dataclasses.asdict(self)
        later = ("vocab_block", "float32_gradients", "kept_states")
        return {k: v for k, v in facts.items() if v or k not in later}

    def __post_init__(self) -> None:
        require(
            self.activation_dtype in DTYPES,
            self,
            "activation_dtype",
            f"one of {DTYPES}",
        )
        require(self.remat in REMAT_POLICIES, self, "remat", f"one of {REMAT_POLICIES}")
        require(
            self.attention in ATTENTION_KINDS,
            self,
            "attention",
            f"one of {ATTENTION_KINDS}",
        )
        require(self.attention_block > 0, self, "attention_block", "a positive integer")
        require(self.kept_states in ("", *PACKED), self, "kept_states", f"'' or one of {PACKED}")
        require(
            self.loss_block >= 0,
            self,
            "loss_block",
            "a number of tokens, or 0 for one block",
        )
        require(self.vocab_block >= 0, self, "vocab_block", "a number of ids, or 0 for all")


def _published(d_model: int, heads: int, head_dim: int, layers: int, last_cca: int) -> RetroConfig:
    """One row of the paper's table of sizes; the feed-forward is four times the width."""
    return RetroConfig(
        vocab_size=128_000,
        d_model=d_model,
        num_layers=layers,
        num_heads=heads,
        head_dim=head_dim,
        d_ff=4 * d_model,
        cca_layers=tuple(range(6, last_cca + 1, 3)),
    )


PRESETS: dict[str, RetroConfig] = {
    "172m": _published(896, heads=16, head_dim=64, layers=12, last_cca=12),
    "425m": _published(1536, heads=12, head_dim=128, layers=12, last_cca=12),
    "1.5b": _published(2048, heads=16, head_dim=128, layers=24, last_cca=24),
    "7.5b": _published(4096, heads=32, head_dim=128, layers=32, last_cca=30),
    "wikitext103": RetroConfig(
        vocab_size=128_000,
        d_model=1024,
        num_layers=18,
        num_heads=16,
        head_dim=64,
        d_ff=4096,
        cca_layers=tuple(range(6, 19, 3)),
        encoder_d_model=1024,
        encoder_d_ff=4096,
        share_embeddings=True,
        dropout=0.25,
    ),
}
