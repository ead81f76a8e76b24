"""The cost of every published size on slices of Cloud TPU: the table of docs/scaling.md.

    nice python -m benchmarks.scaling --folder=scaling [--sizes=172m,7.5b] [--generations=v5p]
    nice python -m benchmarks.scaling --folder=scaling --sizes=7.5b --norotary
    python -m benchmarks.scaling --estimate

Compiles the train step of experiments/retro_SIZE.gin by launch.compile_check for the smallest slice of
each generation that it fits. The fsdp axis has as many chips as divide the widths, the data axis the
others; positions are rotary, which fused attention supports. Each takes less than a minute of a
processor; every report is a file in the folder, and existing ones are not compiled again. Needs libtpu,
and no TPU. --estimate compiles nothing: it computes its figures from the configuration by arithmetic.
"""

import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
from typing import Any

from absl import flags

from benchmarks.timing import write_json
from launch.common import app
from retro_jax.config import PRESETS
from retro_jax.costs.roofline import parse_slice
from retro_jax.errors import UserError
from retro_jax.model.flops import training_flops

FOLDER = flags.DEFINE_string("folder", None, "Where the reports go.")
SIZES = flags.DEFINE_list("sizes", ["172m", "425m", "1.5b", "7.5b"], "Which sizes.")
GENERATIONS = flags.DEFINE_list("generations", ["v4", "v5e", "v5p", "v6e"], "Which chips.")
ROTARY = flags.DEFINE_bool("rotary", True, "Rotary positions; --norotary: relative ones.")
ESTIMATE = flags.DEFINE_bool("estimate", False, "Arithmetic only, of the first slice of each.")

_CUBES = ("2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
_SQUARES = ("4x4", "4x8", "8x8", "8x16", "16x16")
GRIDS = {"v4": _CUBES, "v5p": _CUBES, "v5e": _SQUARES, "v6e": _SQUARES}
# The first slice to try; the paper's batch gives each chip of it 4 rows at least.
FIRST = {
    "172m": {"v4": "2x2x4", "v5e": "4x4", "v5p": "2x2x4", "v6e": "4x4"},
    "425m": {"v4": "2x4x4", "v5e": "4x8", "v5p": "2x4x4", "v6e": "4x8"},
    "1.5b": {"v4": "4x4x4", "v5e": "8x8", "v5p": "4x4x4", "v6e": "8x8"},
    "7.5b": {"v4": "4x4x8", "v5e": "16x16", "v5p": "4x4x4", "v6e": "16x16"},
}
# The paper's: sequences a batch, tokens a sequence, neighbours a chunk.
ROWS = {"172m": 256, "425m": 256, "1.5b": 256, "7.5b": 1024}
LENGTH, NEIGHBOURS = 2048, 2
_DOES_NOT_FIT = "the step needs"


def main() -> None:
    """Compiles missing reports, and prints the table."""
    for names, choices, flag in ((SIZES, FIRST, "sizes"), (GENERATIONS, GRIDS, "generations")):
        for name in names.value:
            if name not in choices:
                raise UserError(f"--{flag}={name}: expected some of {', '.join(choices)}")
    if ESTIMATE.value:
        named = [
            (size, slices(size, kind)[0]) for size in SIZES.value for kind in GENERATIONS.value
        ]
        print("\n".join([*ESTIMATE_HEADER, *(estimate(*names) for names in named)]))
        return
    folder = pathlib.Path(app.required(FOLDER, "a folder for the reports"))
    rows = []
    for size in SIZES.value:
        for generation in GENERATIONS.value:
            rows.append(row(size, _fitting_report(folder, size, generation)))
            print(rows[-1], flush=True)
    print()
    print("\n".join([*HEADER, *rows]))


HEADER = (
    "| size | slice | chips | positions, mesh, remat | parameters | optimiser | activations (GiB) "
    "| total of HBM | first state, restore (GiB) | operations / model's | compute, HBM, links (s) | step (s) | bound by | MFU at most | compiled in |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
)


def row(size: str, report: dict[str, Any]) -> str:
    """One line of the table, in Markdown.

    Args:
      size: of the model. report: as launch.compile_check --json writes it, or {"error": why not}.
    """
    if "error" in report:
        return f"| {size} | {report['topology']} | does not fit: {report['error']} |"
    memory, bound = report["memory"], report["bound"]
    parts = [f"{memory[part] / 2**30:.2f}" for part in ("parameters", "optimizer", "temporaries")]
    axes = " ".join(f"{axis}={size}" for axis, size in report["mesh"].items() if size > 1)
    seconds = ", ".join(f"{value:.2f}" for value in bound["seconds"].values())
    cells = [
        size,
        report["topology"],
        str(parse_slice(report["topology"]).size),
        f"{report['positions']}, {axes}, {report['remat']}",
        *parts,
        f"{memory['total'] / 2**30:.1f} of {memory['hbm'] / 2**30:.0f} GiB",
        f"{report['first_state'] / 2**30:.2f}, {report['restore'] / 2**30:.2f}",
        f"{report['program_flops'] / report['model_flops']:.2f}",
        seconds,
        f"{bound['step']:.2f}",
        bound["binds"],
        f"{bound['mfu']:.0%} ({bound['serial_mfu']:.0%})",
        f"{report['compile_seconds']:.0f} s, {report['compiled_bytes'] / 1e6:.1f} MB",
    ]
    return f"| {' | '.join(cells)} |"


ESTIMATE_HEADER = (
    "| size | slice | chips | rows a chip | state (GiB) | kept activations (GiB) | HBM (GiB) "
    "| model TFLOP a chip | compute (s) | links (GB, s) | MFU at most |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)


def mesh(size: str, topology: str) -> dict[str, int]:
    """Chips on each axis: those of fsdp split every width evenly, the encoder's too."""
    config, chips = PRESETS[size], parse_slice(topology).size
    fsdp = math.gcd(chips, config.d_model, config.encoder_d_model)
    return {"data": chips // fsdp, "fsdp": fsdp}


def estimate(size: str, topology: str) -> str:
    """Estimates from a configuration alone, with remat full, in Markdown; sums over data left out.

    Args:
      size: of the model. topology: the slice.
    """
    config, slice_ = PRESETS[size], parse_slice(topology)
    chips, chip = slice_.size, slice_.chip
    rows = ROWS[size] / chips
    flops = rows * training_flops(config, LENGTH, NEIGHBOURS)
    compute = 4 / 3 * flops / chip.peak  # the forward pass once more
    decoder = config.vocab_size * config.d_model
    tables = decoder + config.vocab_size * config.encoder_d_model
    # Weights there twice and gradients back in bfloat16; tables once for the look-ups, with their
    # gradients, and the decoder's for the read-out, whose gradient comes back in float32.
    moved = 6 * config.num_parameters(embeddings=False) + 4 * tables + 6 * decoder
    fsdp = mesh(size, topology)["fsdp"]
    moved *= (fsdp - 1) / fsdp
    everyone = list(itertools.product(*map(range, slice_.extents)))
    links = moved / slice_.bandwidth(everyone)
    activations = 2 * config.num_layers * rows * LENGTH * config.d_model
    cells = [
        *(size, topology, str(chips), f"{rows:.0f}"),
        f"{12 * config.num_parameters() / fsdp / 2**30:.2f}",
        *(f"{activations / 2**30:.1f}", f"{chip.hbm / 2**30:.0f}", f"{flops / 1e12:,.0f}"),
        *(f"{compute:.2f}", f"{moved / 1e9:.1f}, {links:.2f}"),
        f"{flops / chip.peak / max(compute, links):.0%} ({flops / chip.peak / (compute + links):.0%})",
    ]
    return f"| {' | '.join(cells)} |"


def slices(size: str, generation: str) -> list[str]:
    """The slices to try, the smallest first."""
    grids = GRIDS[generation]
    return [f"{generation}:{grid}" for grid in grids[grids.index(FIRST[size][generation]) :]]


def _fitting_report(folder: pathlib.Path, size: str, generation: str) -> dict[str, Any]:
    """The report of the smallest slice that fits, or of the largest that does not."""
    report: dict[str, Any] = {}
    for name in slices(size, generation):
        report = _report(folder, size, name)
        if "error" not in report:
            break
    return report


def _report(folder: pathlib.Path, size: str, topology: str) -> dict[str, Any]:
    """Compiles, or reads an earlier report.

    Raises:
      UserError: the compilation fails for another reason than memory.
    """
    positions = "rotary" if ROTARY.value else "relative"
    path = folder / f"{size}-{topology.replace(':', '-')}-{positions}.json"
    if path.exists():
        return json.loads(path.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "launch.compile_check"),
        f"--gin_file=experiments/retro_{size.replace('.', '_')}.gin",
        f"--topology={topology}",
        *(f"--gin_bindings=MeshConfig.{axis} = {n}" for axis, n in mesh(size, topology).items()),
        f"--gin_bindings=RetroConfig.positions = '{positions}'",
        f"--json={path}",
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode == 0:
        path.with_suffix(".txt").write_text(done.stdout)
        return json.loads(path.read_text())
    message = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
    if _DOES_NOT_FIT not in message:
        raise UserError(f"{size} on {topology}: {message}")
    report = {"topology": topology, "error": message.partition(": expected")[0]}
    write_json(path, report)
    return report


if __name__ == "__main__":
    app.run(main)
