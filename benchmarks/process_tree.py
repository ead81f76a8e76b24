"""Memory and processor time of a command and of all processes that it starts (Linux)."""

import dataclasses
import os
import pathlib
import subprocess
import threading
from collections.abc import Iterator, Sequence

_PERIOD = 0.5  # seconds between looks


@dataclasses.dataclass
class Peak:
    """The highest values of all looks, in bytes.

    Attributes:
      tree: proportional set sizes of all processes together: a page that several share counts once.
      anonymous: the part of it that belongs to no file, and must fit into memory.
      bound: the sum of each process's highest resident size, for the processes of one moment. Nothing
        between two looks escapes this, but shared pages count again and peaks of different moments add up.
      open_files: of the process that has most.
    """

    tree: int = 0
    anonymous: int = 0
    bound: int = 0
    open_files: int = 0


def descendants(parent: int) -> Iterator[int]:
    """Processes that a process started, and they in turn."""
    for path in pathlib.Path(f"/proc/{parent}/task").glob("*/children"):
        try:
            children = path.read_text().split()
        except OSError:
            continue
        for child in map(int, children):
            yield child
            yield from descendants(child)


def run(command: Sequence[str]) -> tuple[int, float, Peak]:
    """Runs a command to its end.

    Returns:
      Its exit status, processor seconds of it and of the processes that it waited for, and the peak.
    """
    if not pathlib.Path("/proc/thread-self/children").exists():
        raise SystemExit(
            "/proc/thread-self/children is missing: expected a Linux that lists children"
        )
    process = subprocess.Popen(command)
    peak, over = Peak(), threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peak, over), daemon=True)
    watcher.start()
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        raise
    finally:
        over.set()
        watcher.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    peak.bound = max(peak.bound, usage.ru_maxrss * 1024)
    return process.returncode, usage.ru_utime + usage.ru_stime, peak


def _watch(root: int, peak: Peak, over: threading.Event) -> None:
    """Looks at the tree again and again."""
    while not over.wait(_PERIOD):
        tree = anonymous = bound = 0
        for process in (root, *descendants(root)):
            kilobytes = _kilobytes(process)
            tree += kilobytes.get("Pss", 0)
            anonymous += kilobytes.get("Pss_Anon", 0)
            bound += kilobytes.get("VmHWM", 0)
            peak.open_files = max(peak.open_files, _open_files(process))
        peak.tree = max(peak.tree, 1024 * tree)
        peak.anonymous = max(peak.anonymous, 1024 * anonymous)
        peak.bound = max(peak.bound, 1024 * bound)


def _open_files(process: int) -> int:
    """How many files a process has open; 0 if it has gone."""
    try:
        return sum(1 for _ in os.scandir(f"/proc/{process}/fd"))
    except OSError:
        return 0


def _kilobytes(process: int) -> dict[str, int]:
    """The kernel's figures of a process's memory; empty if it has gone."""
    sizes = {}
    for name in ("smaps_rollup", "status"):
        try:
            lines = pathlib.Path(f"/proc/{process}/{name}").read_text().splitlines()
        except OSError:
            return {}
        for line in lines:
            field, _, value = line.partition(":")
            if value.endswith("kB"):
                sizes[field] = int(value.split()[0])
    return sizes
