"""Compiles a run's train step for devices that need not be there, and says what it will cost them.

Nothing is allocated: the state and the batch are shapes on a mesh. For TPUs no machine code is made
either (stopped.py), which is most of a compilation and changes none of the figures.
"""

import collections
import dataclasses
import functools
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from retro_jax.batch import RetroBatch
from retro_jax.config import ExecutionConfig, RetroConfig
from retro_jax.costs import hlo, topology
from retro_jax.costs.partial_compile import CompilationError, Program, compile_until_allocated
from retro_jax.costs.program_costs import Collective, Costs, program_costs
from retro_jax.costs.roofline import Bound, Slice
from retro_jax.errors import UserError
from retro_jax.model import Retro
from retro_jax.model.flops import training_flops
from retro_jax.sharding import MESH_SHARDINGS, MeshConfig, batch_sharding, check_mesh, make_mesh
from retro_jax.train.optimizer import OptimizerConfig, make_optimizer
from retro_jax.train.step import StepConfig, TrainState, abstract_state, compile_train_step

_HBM_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")
STEPS = 1_000_000  # of the schedule, which is a number in the program


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step is compiled for.

    Attributes:
      retro, execution, optimizer: the run's configurations.
      batch_size: B, rows of the global batch. sequence_length: N. neighbours: K; 0 for none.
      neighbour_dropout: part of the sequences trained without neighbours.
      num_corpora: in the mixture.
    """

    retro: RetroConfig
    execution: ExecutionConfig
    optimizer: OptimizerConfig
    batch_size: int = 256
    sequence_length: int = 2048
    neighbours: int = 2
    neighbour_dropout: float = 0.0
    num_corpora: int = 1


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on the device that holds most.

    Attributes:
      parameters, optimizer, batch: of the step's arguments. temporaries: activations, gradients and
        what else lives inside the step; its code too, except of TPUs.
    """

    parameters: float
    optimizer: float
    batch: float
    temporaries: float

    @property
    def total(self) -> float:
        """All of it; the new state replaces the old one."""
        return self.parameters + self.optimizer + self.batch + self.temporaries


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Collectives of one kind over the same mesh axes.

    Attributes:
      kind: such as all-gather. axes: mesh axes, "fsdp" or "data+fsdp". count: how often a step.
      nbytes: that a device receives a step. seconds: at the links' full rate; None off TPU.
      operations: where the program asks for them, each with its bytes, largest first.
    """

    kind: str
    axes: str
    count: int
    nbytes: float
    seconds: float | None
    operations: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Report:
    """What one train step costs each device.

    Attributes:
      mesh: devices by axis. memory: per device. model_flops: the algorithm's own, a device's share.
      costs: of the compiled program on a device. exchanges: its collectives, the largest first.
      bound: of the step's time; None off TPU. compile_seconds: of a processor of this machine.
        lowered_bytes, compiled_bytes: of the program's text before and after compilation.
    """

    mesh: dict[str, int]
    memory: Memory
    model_flops: float
    costs: Costs
    exchanges: tuple[Exchange, ...]
    bound: Bound | None
    compile_seconds: float
    lowered_bytes: int
    compiled_bytes: int


def abstract_batch(work: Work, mesh: Mesh) -> RetroBatch:
    """The shapes of a global batch on a mesh."""
    chunk_length = work.retro.chunk_length
    if work.sequence_length % chunk_length:
        raise UserError(
            f"sequence_length {work.sequence_length}: expected a multiple of chunk_length {chunk_length}"
        )
    sharding = batch_sharding(mesh)

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)

    rows, length = work.batch_size, work.sequence_length
    chunks = length // chunk_length
    retrieval = work.retro.has_retrieval and work.neighbours
    slots = (rows, chunks, work.neighbours, work.retro.neighbour_length)
    return RetroBatch(
        tokens=array(rows, length),
        targets=array(rows, length),
        documents=array(rows, chunks),
        corpus=array(rows),
        neighbours=array(*slots) if retrieval else None,
    )


def lower(work: Work, mesh: Mesh) -> tuple[TrainState, RetroBatch, Any]:
    """Traces the step that launch.train runs.

    Args:
      work: what to trace. mesh: of any devices, present or described.

    Returns:
      The abstract state and batch, and JAX's lowered program.

    Raises:
      UserError: the mesh does not divide the model or the batch.
    """
    step, state, batch = _abstract_step(work, mesh)
    with jax.set_mesh(mesh):
        return state, batch, step.lower(state, batch)


def _abstract_step(work: Work, mesh: Mesh) -> tuple[Any, TrainState, RetroBatch]:
    """The step before it is traced, and what it is called with."""
    check_mesh(work.retro, mesh, work.batch_size)
    optimizer = make_optimizer(work.optimizer, STEPS)

    def make() -> Retro:
        return Retro(work.retro, work.execution, shardings=MESH_SHARDINGS, rngs=nnx.Rngs(0))

    graphdef, state = abstract_state(make, optimizer, mesh)
    config = StepConfig(
        work.retro.pad_id, work.num_corpora, neighbour_dropout=work.neighbour_dropout
    )
    step: Any = compile_train_step(graphdef=graphdef, optimizer=optimizer, config=config)
    return step, state, abstract_batch(work, mesh)


def check(work: Work, mesh: Mesh, slice_: Slice | None) -> Report:
    """Compiles a step and reads what it costs.

    Args:
      work: what to compile. mesh: of the slice's devices, or of simulated ones.
      slice_: the slice; None for simulated devices, which have no roofline.

    Raises:
      UserError: the mesh does not fit, or the step needs more memory than the chip has.
    """
    _, state, batch = _abstract_step(work, mesh)
    program = _compile_here(work, mesh) if slice_ is None else _compile_for(work, mesh, slice_)
    costs = program_costs(hlo.parse(program.text), mesh.size)
    exchanges = tuple(group_exchanges(costs.collectives, mesh, slice_))
    sequence = training_flops(
        work.retro, work.sequence_length, work.neighbours if work.retro.has_retrieval else 0
    )
    model_flops = work.batch_size * sequence / mesh.size
    params, optimizer, rows = map(shard_bytes, (state.params, state.opt_state, batch))
    return Report(
        mesh=dict(mesh.shape),
        memory=Memory(params, optimizer, rows, program.nbytes - params - optimizer - rows),
        model_flops=model_flops,
        costs=costs,
        exchanges=exchanges,
        bound=None if slice_ is None else _bound(costs, exchanges, slice_, model_flops),
        compile_seconds=program.seconds,
        lowered_bytes=program.lowered_bytes,
        compiled_bytes=len(program.text),
    )


def _compile_here(work: Work, mesh: Mesh) -> Program:
    """Compiles for devices of this process, machine code and all."""
    lowered = lower(work, mesh)[2]
    start = time.process_time()
    compiled = lowered.compile()
    seconds = time.process_time() - start
    analysis = compiled.memory_analysis()
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    held += analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes
    nbytes = held - analysis.alias_size_in_bytes
    return Program(compiled.as_text(), nbytes, seconds, len(lowered.as_text()))


def _compile_for(work: Work, mesh: Mesh, slice_: Slice) -> Program:
    """Compiles for a slice as far as its costs are settled.

    Raises:
      UserError: the step needs more memory than the chip has.
    """
    axes = {str(name): size for name, size in mesh.shape.items()}
    try:
        program = compile_until_allocated(
            functools.partial(lower_for, work, MeshConfig(**axes), slice_.name)
        )
    except CompilationError as error:
        raise _out_of_memory(error, slice_) from error
    if program.nbytes > slice_.chip.hbm:
        needed, has = (f"{nbytes / 2**30:.2f} GiB" for nbytes in (program.nbytes, slice_.chip.hbm))
        raise _too_large(needed, has, slice_)
    return program


def lower_for(work: Work, mesh_config: MeshConfig, name: str) -> Any:
    """JAX's lowered program of the step for a slice, in a process that has not used JAX yet.

    Args:
      work: what to trace. mesh_config: of the slice's chips. name: the slice's.
    """
    jax.config.update("jax_platforms", "cpu")  # nothing runs: an accelerator here stays free
    return lower(work, make_mesh(mesh_config, topology.devices(name)[0]))[2]


def shard_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays on one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _bound(
    costs: Costs, exchanges: tuple[Exchange, ...], slice_: Slice, model_flops: float
) -> Bound:
    """The roofline of one device."""
    chip = slice_.chip
    seconds = {
        "compute": costs.flops / chip.peak,
        "HBM": costs.hbm_bytes / chip.bandwidth,
        "ICI": sum(exchange.seconds or 0.0 for exchange in exchanges),
    }
    return Bound(seconds, model_flops, chip.peak)


def group_exchanges(
    collectives: tuple[Collective, ...], mesh: Mesh, slice_: Slice | None
) -> list[Exchange]:
    """Collectives gathered by kind and axes, the largest first."""
    grouped: dict[tuple[str, str], list[Collective]] = collections.defaultdict(list)
    for collective in collectives:
        grouped[collective.kind, _axes(collective, mesh)].append(collective)
    found = []
    for (kind, axes), members in grouped.items():
        operations: dict[str, float] = collections.defaultdict(float)
        seconds = 0.0
        for member in members:
            nbytes = member.times * member.received
            operations[member.operation] += nbytes
            if slice_ is not None:
                seconds += nbytes / _bandwidth(member, mesh, slice_)
        found.append(
            Exchange(
                kind,
                axes,
                count=sum(member.times for member in members),
                nbytes=sum(operations.values()),
                seconds=None if slice_ is None else seconds,
                operations=dict(sorted(operations.items(), key=lambda item: -item[1])),
            )
        )
    return sorted(found, key=lambda exchange: -exchange.nbytes)


def _axes(collective: Collective, mesh: Mesh) -> str:
    """The mesh axes along which a group's devices differ."""
    places = np.stack(np.unravel_index(np.array(collective.groups[0]), mesh.devices.shape))
    axes = [name for name, place in zip(mesh.axis_names, places) if len(set(place)) > 1]
    return "+".join(map(str, axes))


def _bandwidth(collective: Collective, mesh: Mesh, slice_: Slice) -> float:
    """Bytes a second that a device of the first group receives."""
    devices = mesh.devices.flatten()
    return slice_.bandwidth([devices[number].coords for number in collective.groups[0]])


def _out_of_memory(error: Exception, slice_: Slice) -> Exception:
    """The compiler's refusal in one line; any other error as it is."""
    used = _HBM_USED.search(str(error))
    if used is None:
        return error
    return _too_large(f"{used[1]} {used[2]}iB", f"{used[3]} {used[4]}iB", slice_)


def _too_large(needed: str, has: str, slice_: Slice) -> UserError:
    """What a step that does not fit is told."""
    return UserError(
        f"the step needs {needed} of the {has} that a {slice_.chip.name} has: expected a "
        "larger mesh axis fsdp or tensor, remat 'full', fewer rows or more chips"
    )
