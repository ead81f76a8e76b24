"""Compiles a run's programs for devices that need not be there, and reports their costs.

The programs are those of a Plan: the one that builds the first state, and the train step. Nothing is
allocated: the state and the batch are shapes on a mesh. For TPUs no machine code is generated either
(partial_compile.py), which is most of a compilation and changes none of the figures.
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
from jax.sharding import Mesh

from retro_jax.batch import RetroBatch
from retro_jax.costs import hlo, topology
from retro_jax.costs.partial_compile import CompilationError, Program, compile_until_allocated
from retro_jax.costs.program_costs import Collective, Costs, program_costs
from retro_jax.costs.roofline import Bound, Slice
from retro_jax.errors import UserError
from retro_jax.model.flops import training_flops
from retro_jax.sharding import batch_sharding
from retro_jax.train.global_batches import BatchShape
from retro_jax.train.plan import Plan, Settings, make_plan
from retro_jax.train.warm_start import wanted_parameters

STEP, FIRST_STATE = "step", "first state"  # the programs of a plan
_HBM_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of the train step on the device that needs most.

    Attributes:
      parameters, optimizer, average, batch: of the step's arguments; average: the moving average of
        the parameters.
      temporaries: activations, gradients and all else inside the step; its code too, except of TPUs.
    """

    parameters: float
    optimizer: float
    average: float
    batch: float
    temporaries: float

    @property
    def total(self) -> float:
        """All of it; the new state replaces the old one."""
        arguments = self.parameters + self.optimizer + self.average + self.batch
        return arguments + self.temporaries


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Collectives of one kind over the same mesh axes.

    Attributes:
      kind: such as all-gather. axes: mesh axes, "fsdp" or "data+fsdp". count: per step.
      nbytes: received by a device per step. seconds: at the links' full rate; None off TPU.
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
    """The costs of a run for each device.

    Attributes:
      mesh: devices by axis. memory: of the step. model_flops: the algorithm's own, a device's share.
      first_state: bytes while the first state is built. restore: bytes once a checkpoint is restored,
        or another run's parameters are taken (StartConfig.run).
      costs: of the compiled program on a device. exchanges: its collectives, the largest first.
      bound: of the step's time; None off TPU. compile_seconds: of a processor of this machine.
        lowered_bytes, compiled_bytes: of the program's text before and after compilation.
    """

    mesh: dict[str, int]
    memory: Memory
    first_state: float
    restore: float
    model_flops: float
    costs: Costs
    exchanges: tuple[Exchange, ...]
    bound: Bound | None
    compile_seconds: float
    lowered_bytes: int
    compiled_bytes: int


def abstract_batch(plan: Plan) -> RetroBatch:
    """The shapes of a global batch on a plan's mesh."""
    retro, shape = plan.settings.retro, plan.shape
    sharding = batch_sharding(plan.mesh)

    def array(*extents: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(extents, dtype, sharding=sharding)

    rows, length = shape.batch_size, shape.sequence_length
    chunks = length // retro.chunk_length
    retrieval = retro.has_retrieval and shape.neighbours
    slots = (rows, chunks, shape.neighbours, retro.neighbour_length)
    return RetroBatch(
        tokens=array(rows, length),
        targets=array(rows, length),
        documents=array(rows, chunks),
        corpus=array(rows),
        neighbours=array(*slots) if retrieval else None,
        noise=array(rows, chunks, dtype=jnp.bool) if shape.noise else None,
    )


def lower(plan: Plan, program: str = STEP) -> Any:
    """JAX's lowered program of a plan: STEP or FIRST_STATE."""
    with jax.set_mesh(plan.mesh):
        if program == FIRST_STATE:
            first_state: Any = plan.first_state
            return first_state.lower()
        step: Any = plan.step
        return step.lower(plan.abstract, abstract_batch(plan))


def lower_for(settings: Settings, shape: BatchShape, slice_name: str, program: str) -> Any:
    """JAX's lowered program for a slice, in a process that has not used JAX yet.

    Args:
      settings, shape: of the run. slice_name: such as "v5p:4x4x4". program: STEP or FIRST_STATE.
    """
    jax.config.update("jax_platforms", "cpu")  # nothing runs: an accelerator here stays free
    return lower(make_plan(settings, shape, topology.devices(slice_name)[0]), program)


def check(plan: Plan, slice_: Slice | None) -> Report:
    """Compiles the programs of a plan and reads their costs.

    Args:
      plan: on the slice's devices, or on simulated ones.
      slice_: the slice; None for simulated devices, which have no roofline.

    Raises:
      UserError: a program needs more memory than the chip has.
    """
    programs = {}
    for name in (STEP, FIRST_STATE):
        compiled = _compile_here(plan, name) if slice_ is None else _compile_for(plan, name, slice_)
        programs[name] = compiled
    program = programs[STEP]
    costs = program_costs(hlo.parse(program.text), plan.mesh.size)
    exchanges = tuple(group_exchanges(costs.collectives, plan.mesh, slice_))
    model_flops = _model_flops(plan)
    return Report(
        mesh={str(name): size for name, size in plan.mesh.shape.items()},
        memory=_memory(plan, program.nbytes),
        first_state=programs[FIRST_STATE].nbytes,
        restore=restored_bytes(plan),
        model_flops=model_flops,
        costs=costs,
        exchanges=exchanges,
        bound=None if slice_ is None else _bound(costs, exchanges, slice_, model_flops),
        compile_seconds=program.seconds,
        lowered_bytes=program.lowered_bytes,
        compiled_bytes=len(program.text),
    )


def _memory(plan: Plan, nbytes: int) -> Memory:
    """The bytes of the step by purpose."""
    state = plan.abstract
    parts = (state.params, state.opt_state, state.average, abstract_batch(plan))
    params, optimizer, average, batch = map(shard_bytes, parts)
    temporaries = nbytes - params - optimizer - average - batch
    return Memory(params, optimizer, average, batch, temporaries)


def restored_bytes(plan: Plan) -> int:
    """Bytes on a device once a checkpoint is restored, or other parameters are taken."""
    nbytes, start = shard_bytes(plan.abstract), plan.settings.start
    if not (start.run or start.base):
        return nbytes
    parameters = wanted_parameters(start, plan.abstract.params)  # beside those of the first state
    return nbytes + shard_bytes(parameters) + shard_bytes(plan.abstract.average)


def _model_flops(plan: Plan) -> float:
    """A device's share of the algorithm's own operations."""
    retro, shape = plan.settings.retro, plan.shape
    neighbours = shape.neighbours if retro.has_retrieval else 0
    sequence = training_flops(retro, shape.sequence_length, neighbours)
    return shape.batch_size * sequence / plan.mesh.size


def _compile_here(plan: Plan, name: str) -> Program:
    """Compiles for devices of this process, machine code and all."""
    lowered = lower(plan, name)
    start = time.process_time()
    compiled = lowered.compile()
    seconds = time.process_time() - start
    analysis = compiled.memory_analysis()
    nbytes = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    nbytes += analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes
    nbytes -= analysis.alias_size_in_bytes
    return Program(compiled.as_text(), nbytes, seconds, len(lowered.as_text()))


def _compile_for(plan: Plan, name: str, slice_: Slice) -> Program:
    """Compiles for a slice as far as its costs are settled.

    Raises:
      UserError: the program needs more memory than the chip has.
    """
    try:
        program = compile_until_allocated(
            functools.partial(lower_for, plan.settings, plan.shape, slice_.name, name)
        )
    except CompilationError as error:
        raise _out_of_memory(error, name, slice_) from error
    if program.nbytes > slice_.chip.hbm:
        needed, has = (f"{nbytes / 2**30:.2f} GiB" for nbytes in (program.nbytes, slice_.chip.hbm))
        raise _too_large(needed, has, name, slice_)
    return program


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


def bound_of(plan: Plan, module: hlo.Module, slice_: Slice) -> Bound:
    """The roofline of a plan's compiled step."""
    costs = program_costs(module, plan.mesh.size)
    exchanges = tuple(group_exchanges(costs.collectives, plan.mesh, slice_))
    return _bound(costs, exchanges, slice_, _model_flops(plan))


def group_exchanges(
    collectives: tuple[Collective, ...], mesh: Mesh, slice_: Slice | None
) -> list[Exchange]:
    """Collectives gathered by kind and axes, the largest first."""
    grouped: dict[tuple[str, str], list[Collective]] = collections.defaultdict(list)
    for collective in collectives:
        grouped[collective.kind, _axes(collective, mesh)].append(collective)
    exchanges = []
    for (kind, axes), members in grouped.items():
        operations: dict[str, float] = collections.defaultdict(float)
        seconds = 0.0
        for member in members:
            nbytes = member.times * member.received
            operations[member.operation] += nbytes
            if slice_ is not None:
                seconds += nbytes / _bandwidth(member, mesh, slice_)
        exchanges.append(
            Exchange(
                kind,
                axes,
                count=sum(member.times for member in members),
                nbytes=sum(operations.values()),
                seconds=None if slice_ is None else seconds,
                operations=dict(sorted(operations.items(), key=lambda item: -item[1])),
            )
        )
    return sorted(exchanges, key=lambda exchange: -exchange.nbytes)


def _axes(collective: Collective, mesh: Mesh) -> str:
    """The mesh axes along which a group's devices differ."""
    places = np.stack(np.unravel_index(np.array(collective.groups[0]), mesh.devices.shape))
    axes = [name for name, indices in zip(mesh.axis_names, places) if len(set(indices)) > 1]
    return "+".join(map(str, axes))


def _bandwidth(collective: Collective, mesh: Mesh, slice_: Slice) -> float:
    """Bytes per second that a device of the first group receives."""
    devices = mesh.devices.flatten()
    return slice_.bandwidth([devices[number].coords for number in collective.groups[0]])


def _out_of_memory(error: Exception, name: str, slice_: Slice) -> Exception:
    """The compiler's refusal in one line; any other error as it is."""
    match = _HBM_USED.search(str(error))
    if match is None:
        return error
    return _too_large(f"{match[1]} {match[2]}iB", f"{match[3]} {match[4]}iB", name, slice_)


def _too_large(needed: str, has: str, name: str, slice_: Slice) -> UserError:
    """The refusal of a program that does not fit."""
    return UserError(
        f"the {name} needs {needed} of the {has} that a {slice_.chip.name} has: expected a "
        "larger mesh axis fsdp or tensor, remat 'full', fewer rows or more chips"
    )
