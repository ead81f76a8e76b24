"""Which parts of the model move the bytes of HBM in a training step on TPUs, without a TPU.

    python -m benchmarks.hbm --gin_file=experiments/retro_172m.gin --topology=v6e:4x4
    python -m benchmarks.hbm --gin_file=experiments/retro_172m.gin --topology=v6e:4x4 \\
        --gin_bindings='ExecutionConfig.vocab_block = 0' --gin_bindings="RetroConfig.positions = 'rotary'"

Compiles the step as launch.compile_check does, and prints the bytes of a chip and step by part, and the
bound. Needs libtpu. Some 20 s of a processor.
"""

import functools

import jax

from launch import compile_check
from launch.common import app, configurables
from launch.runs.settings import make_settings
from retro_jax.costs import hlo, step_report, topology
from retro_jax.costs.hbm_parts import hbm_by_part
from retro_jax.costs.partial_compile import compile_until_allocated
from retro_jax.errors import UserError
from retro_jax.report.tables import as_text
from retro_jax.report.views import Table
from retro_jax.train.plan import make_plan

TOPOLOGY = compile_check.TOPOLOGY


def main() -> None:
    """Compiles, and prints the table."""
    name = app.required(TOPOLOGY, "chips to compile for, as in v6e:4x4")
    configurables.load_from_flags()
    settings, shape = make_settings(), compile_check.make_shape()
    jax.config.update("jax_platforms", "cpu")
    devices, slice_ = topology.devices(name)
    if slice_ is None:
        raise UserError(f"topology {name!r} has no HBM: expected a slice such as v6e:4x4")
    plan = make_plan(settings, shape, devices)
    lower = functools.partial(step_report.lower_for, settings, shape, slice_.name, step_report.STEP)
    program = compile_until_allocated(lower)
    module = hlo.parse(program.text)
    parts = hbm_by_part(module, program.text)
    rows = [[part, f"{nbytes / 1e9:,.1f}"] for part, nbytes in parts.items()]
    rows.append(["all", f"{sum(parts.values()) / 1e9:,.1f}"])
    print(as_text(Table(("part", "GB"), rows)))
    bound = step_report.bound_of(plan, module, slice_)
    seconds = ", ".join(f"{part} {value:.3f} s" for part, value in bound.seconds.items())
    print(f"\n{seconds}; {bound.binds} binds, MFU at most {bound.mfu:.0%} ({bound.serial_mfu:.0%})")
    print(f"HBM: {program.nbytes / 2**30:.1f} of {slice_.chip.hbm / 2**30:.0f} GiB")


if __name__ == "__main__":
    app.run(main)
