"""The cost of saving to training: the time that a checkpoint adds, at one checkpoint a minute.

    python -m benchmarks.saving --preset=peer --saves=5

    step step step step [save step step step step] step step step step [save ...
                         handed over ... on disk

The state is handed to the run's own Checkpoints, as in launch.train, and steps continue while it is
written and sealed. A save costs the handing over, and the time of those steps beyond the median of the
steps around them. A sixtieth of its seconds is its share at one per minute. Steps wait for their end
here, as the loop's do. --workdir is the target directory: a temporary one unless given.
"""

import pathlib
import shutil
import statistics
import tempfile
import time

import jax
from absl import flags

from benchmarks.timing import machine, table, write_json
from benchmarks.training import OUTPUT, PRESET, Step, work_from_flags
from launch.common import app
from retro_jax.train.checkpoint import Checkpoints

SAVES = flags.DEFINE_integer("saves", 5, "How often the state is saved.", lower_bound=1)
PLAIN = flags.DEFINE_integer("plain_steps", 8, "Steps between two saves.", lower_bound=2)
HELP_ALSO = ("benchmarks.training",)
_A_MINUTE = 60.0


def main() -> None:
    """Measures, and prints one table."""
    folder = pathlib.Path(app.WORKDIR.value or tempfile.mkdtemp(prefix="retro-jax-saving-"))
    step = Step(work_from_flags())
    checkpoints = Checkpoints(folder / "checkpoints", keep=2)
    rows = []
    before = [step.turn(1).wall for _ in range(PLAIN.value)]
    for number in range(1, SAVES.value + 1):
        blocked, total, steps = _save(step, checkpoints)
        after = [step.turn(1).wall for _ in range(PLAIN.value)]
        plain = statistics.median(before + after)
        cost = total - steps * plain
        rows.append(
            {
                "save": number,
                "step s": plain,
                "handing over s": blocked,
                "until on disk s": total,
                "steps meanwhile": steps,
                "added s": cost,
                "share at one a minute": cost / _A_MINUTE,
            }
        )
        before = after
    checkpoints.close()
    size = sum(f.stat().st_size for f in (folder / "checkpoints").rglob("*") if f.is_file()) / 2
    if app.WORKDIR.value is None:
        shutil.rmtree(folder)
    share = statistics.median(row["share at one a minute"] for row in rows)
    print(table(rows))
    print(f"{PRESET.value}: {step.parameters:,} parameters, {size / 1e6:,.0f} MB a checkpoint")
    print(f"saving once a minute takes {share:.2%} of the time (median of {len(rows)} saves)")
    if OUTPUT.value:
        write_json(
            pathlib.Path(OUTPUT.value),
            {"machine": machine(), "saves": rows, "megabytes": size / 1e6},
        )


def _save(step: Step, checkpoints: Checkpoints) -> tuple[float, float, int]:
    """Saves once; seconds of handing over, seconds until it is on disk, and steps made meanwhile."""
    began, steps = time.perf_counter(), 0
    jax.block_until_ready(step.state)
    checkpoints.save(step.state)
    blocked = time.perf_counter() - began
    while checkpoints.writing:
        step.turn(1)
        steps += 1
    checkpoints.wait()
    return blocked, time.perf_counter() - began, steps


if __name__ == "__main__":
    app.run(main)
