"""Reports installed packages, devices and limits, and whatever would fail.

    python -m launch.doctor
    python -m launch.doctor --extras=data,cuda --workdir=W

Each line begins with ok, note (less usual work would fail) or fails. The exit status is 1 where
something that every run needs is missing, or an extra that --extras names. Nothing is changed.
"""

import sys

from absl import flags

from launch.common import app
from retro_jax import installation

WITHOUT_SETTINGS = True
NEEDED = flags.DEFINE_list("extras", [], "Extras that must be whole, as in data,cuda.")


def main() -> None:
    """Prints the findings under their headings; ends with status 1 where something fails."""
    unknown = set(NEEDED.value) - set(installation.EXTRAS)
    if unknown:
        names = ", ".join(installation.EXTRAS)
        raise flags.Error(f"--extras={','.join(sorted(unknown))}: expected some of {names}")
    findings = installation.examine(app.WORKDIR.value or ".", NEEDED.value)
    width = max(len(each.subject) for lines in findings.values() for each in lines)
    for heading, lines in findings.items():
        print(f"\n{heading}" if heading != next(iter(findings)) else heading)
        for each in lines:
            print(f"  {each.level:5}  {each.subject:{width}}  {each.text}")
    every = [each for lines in findings.values() for each in lines]
    failures = [each.subject for each in every if each.level == "fails"]
    notes = sum(each.level == "note" for each in every)
    verdict = (
        f"needed and missing: {', '.join(failures)}" if failures else "nothing needed is missing"
    )
    print(f"\n{verdict}; {notes} notes")
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
