"""A training step to be timed: the one that launch.train runs, on random tokens."""

import dataclasses
from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks.timing import Turn, peak_rate, timed
from retro_jax.batch import RetroBatch
from retro_jax.config import PRESETS, ExecutionConfig, RetroConfig
from retro_jax.costs.step_report import abstract_batch, lower
from retro_jax.errors import UserError
from retro_jax.model.flops import training_flops
from retro_jax.sharding import batch_sharding
from retro_jax.train.global_batches import BatchShape
from retro_jax.train.loop import TrainConfig
from retro_jax.train.plan import Plan, Settings, make_plan
from retro_jax.train.step import TrainState

PRESET = flags.DEFINE_string("preset", "peer", "tiny, peer (retro-pytorch's), or a published size.")
POSITIONS = flags.DEFINE_string(
    "positions", None, "relative or rotary. Default: rotary for peer, else relative."
)
DTYPE = flags.DEFINE_string(
    "dtype", None, "Of activations. Default: float32 on CPU, else bfloat16."
)
ROWS = flags.DEFINE_integer(
    "rows", None, "Sequences a step. Default: 4 for peer, else 8.", lower_bound=1
)
LENGTH = flags.DEFINE_integer(
    "length", None, "Tokens a sequence. Default: 512 for peer, else 2048.", lower_bound=64
)
NEIGHBOURS = flags.DEFINE_integer("slots", 2, "Neighbours a chunk.", lower_bound=1)
TURNS = flags.DEFINE_integer("turns", 10, "Turns of each side; the best counts.", lower_bound=1)
STEPS_A_TURN = flags.DEFINE_integer(
    "steps", None, "Steps a turn. Default: 1 on CPU, else 5.", lower_bound=1
)
OUTPUT = flags.DEFINE_string("output", None, "Also write everything to this file, as JSON.")

_STEPS = 1_000_000  # of the schedule, which is a number in the program
_SMALL = RetroConfig(
    vocab_size=512,
    d_model=32,
    num_layers=2,
    num_heads=8,
    head_dim=32,
    d_ff=128,
    cca_layers=(2,),
    encoder_d_model=32,
    encoder_num_layers=1,
    encoder_num_heads=8,
    encoder_head_dim=32,
    encoder_d_ff=128,
    positions="rotary",
)
# name: configuration, rows, tokens a sequence
OWN = {
    "tiny": (_SMALL, 2, 128),
    "peer": (
        dataclasses.replace(
            _SMALL,
            vocab_size=16384,
            d_model=512,
            num_layers=6,
            head_dim=64,
            d_ff=2048,
            cca_layers=(3, 6),
            encoder_d_model=256,
            encoder_num_layers=2,
            encoder_head_dim=64,
            encoder_d_ff=1024,
        ),
        4,
        512,
    ),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """A step to be timed.

    Attributes:
      retro, execution: the model's configurations.
      batch_size: B, rows of the global batch. sequence_length: N. neighbours: K; 0 for none.
    """

    retro: RetroConfig
    execution: ExecutionConfig
    batch_size: int
    sequence_length: int
    neighbours: int

    def plan(self) -> Plan:
        """Of a run that makes such steps on all devices, rows over them."""
        training = TrainConfig(steps=_STEPS)
        settings = Settings(retro=self.retro, execution=self.execution, training=training)
        shape = BatchShape(self.batch_size, self.sequence_length, self.neighbours)
        return make_plan(settings, shape)


def work_from_flags(**execution: Any) -> Work:
    """The step that the flags ask for.

    Args:
      **execution: fields of ExecutionConfig besides the dtype.

    Raises:
      UserError: no such preset, or settings that do not fit.
    """
    presets = {name: (config, 8, 2048) for name, config in PRESETS.items()} | OWN
    if PRESET.value not in presets:
        raise UserError(f"--preset={PRESET.value}: expected one of {', '.join(presets)}")
    retro, rows, length = presets[PRESET.value]
    if POSITIONS.value:
        retro = dataclasses.replace(retro, positions=POSITIONS.value)
    dtype = DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return Work(
        retro,
        ExecutionConfig(activation_dtype=dtype, **execution),
        batch_size=ROWS.value or rows,
        sequence_length=LENGTH.value or length,
        neighbours=NEIGHBOURS.value,
    )


def baseline_of(work: Work) -> Work:
    """The same work for the transformer of equal decoder."""
    return dataclasses.replace(work, retro=work.retro.baseline(), neighbours=0)


class Step:
    """A compiled training step with its state and a batch, on all devices (rows over them).

    Attributes:
      work: its settings. tokens, flops: of a step, the latter by retro_jax.model.flops. temporaries: bytes
        that the program needs on a device besides state and batch. parameters: how many.
    """

    def __init__(self, work: Work):
        self.work = work
        plan = work.plan()
        self.devices = plan.mesh.size
        self._program = lower(plan).compile()
        self.temporaries = self._program.memory_analysis().temp_size_in_bytes
        self.parameters = work.retro.num_parameters()
        self.tokens = work.batch_size * work.sequence_length
        sequence = training_flops(work.retro, work.sequence_length, work.neighbours)
        self.flops = work.batch_size * sequence
        with jax.set_mesh(plan.mesh):
            self._state = plan.first_state()
        batch = random_batch(work, abstract_batch(plan))
        self._batch = jax.device_put(batch, batch_sharding(plan.mesh))
        self.turn(1)

    @property
    def state(self) -> TrainState:
        """As the last step left it; the next one takes its memory."""
        return self._state

    def turn(self, steps: int) -> Turn:
        """Makes steps; the time of one."""

        def run() -> jax.Array:
            for _ in range(steps):
                self._state, metrics = self._program(self._state, self._batch)
            return metrics.loss

        turn = timed(run)
        return Turn(turn.wall / steps, turn.processor / steps)


def random_batch(work: Work, shapes: RetroBatch) -> RetroBatch:
    """Random tokens and neighbours; every row contains two or three documents."""
    draw = np.random.default_rng(0)

    def tokens(leaf: Any) -> np.ndarray:
        return draw.integers(1, work.retro.vocab_size, leaf.shape).astype(np.int32)

    batch = jax.tree.map(tokens, shapes)
    rows, chunks = shapes.documents.shape
    ends = draw.integers(1, chunks + 1, (rows, 2, 1))
    documents = (np.arange(chunks) >= ends).sum(axis=1).astype(np.int32)
    return dataclasses.replace(batch, documents=documents, corpus=np.zeros(rows, np.int32))


def steps_a_turn() -> int:
    """As the flag says, or enough to hide the dispatch."""
    return STEPS_A_TURN.value or (1 if jax.default_backend() == "cpu" else 5)


def figures(name: str, step: Step, turn: Turn, product_rate: float) -> dict[str, Any]:
    """A row of the table.

    Args:
      name: of the row. step: the timed one. turn: its best turn.
      product_rate: operations a second of the measured matrix product, on one device.
    """
    rate = step.flops / turn.wall / step.devices
    peak = peak_rate()
    return {
        "what": name,
        "parameters": step.parameters,
        "step s": turn.wall,
        "tokens/s": step.tokens / turn.wall,
        "GFLOP/token": step.flops / step.tokens / 1e9,
        "TFLOP/s/device": rate / 1e12,
        "of product": rate / product_rate,
        "of peak": None if peak is None else rate / peak,
        "temporaries GB": step.temporaries / 1e9,
    }
