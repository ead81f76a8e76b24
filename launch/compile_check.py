"""Compiles a run's programs for TPUs that need not be there, and reports their cost.

    python -m launch.compile_check --gin_file=experiments/retro_7_5b.gin --topology=v5p:4x4x4
    python -m launch.compile_check --gin_file=experiments/retro_172m.gin --topology=v5e:4x4 \\
        --gin_bindings='MeshConfig.fsdp = 16' --gin_bindings="ExecutionConfig.remat = 'full'"

The plan is that of launch.train, with accumulation, moving average, trained parameters and all else
that needs memory. Prints memory per chip against its HBM, for the step and for its first state. Also
prints operations against the model's own count, collectives by kind and bytes, and the least time of
a step, with its bottleneck. Compilation stops once these are settled: there is no machine code, and
the memory does not include its bytes. Needs libtpu: pip install 'retro-jax[tpu]'. --topology=cpu:8
compiles for simulated devices instead, and needs nothing.
"""

import json
import pathlib

import jax
from absl import flags

from launch.common import app, configurables
from launch.runs.settings import make_settings
from retro_jax.costs import topology
from retro_jax.costs.report_text import as_json, lines
from retro_jax.costs.step_report import check
from retro_jax.storage import files
from retro_jax.train.global_batches import BatchShape
from retro_jax.train.plan import make_plan

TOPOLOGY = flags.DEFINE_string(
    "topology", None, "What to compile for: v4:AxBxC, v5p:AxBxC, v5e:AxB, v6e:AxB chips, or cpu:N."
)
JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")


def main() -> None:
    """Compiles, and prints the report."""
    name = app.required(TOPOLOGY, "chips to compile for, as in v5p:4x4x4")
    configurables.load_from_flags()
    settings, shape = make_settings(), make_shape()
    if configurables.PRINT_CONFIG.value:
        print(configurables.operative_config(), end="")
        return
    jax.config.update("jax_platforms", "cpu")  # nothing runs: an accelerator here stays free
    devices, slice_ = topology.devices(name)
    plan = make_plan(settings, shape, devices)
    report = check(plan, slice_)
    if JSON.value:
        figures = {
            "topology": name,
            "remat": settings.execution.remat,
            "positions": settings.retro.positions,
        }
        figures |= as_json(report, slice_)
        text = json.dumps(figures, indent=1) + "\n"
        files.write_atomically(pathlib.Path(JSON.value), text.encode())
    print("\n".join(lines(plan, report, slice_)))


def make_shape() -> BatchShape:
    """The shape of the batches that launch.train would read with this configuration."""
    # Imported here: it brings the data pipelines' libraries along.
    from data_pipelines.batches.batches import BatchConfig

    batch = configurables.make(BatchConfig)
    corpora = len(batch.mixture or [""])
    length, k = batch.sequence_length, batch.neighbours
    return BatchShape(batch.batch_size, length, k, corpora, batch.noise)


if __name__ == "__main__":
    app.run(main)
