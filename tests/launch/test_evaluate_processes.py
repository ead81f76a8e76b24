"""launch.evaluate by two processes writes the bytes that one writes."""

import os
import pathlib
import shutil
import socket
import subprocess
import sys


def _start_two(*arguments: str) -> list[subprocess.Popen]:
    """Two processes of four devices each: eight together, as this process has."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    where = [f"--coordinator_address=localhost:{port}", "--num_processes=2"]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "launch.evaluate", *arguments, *where, f"--process_id={i}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "XLA_FLAGS": flags},
        )
        for i in range(2)
    ]


def test_two_processes_score_as_one_and_the_first_one_writes(
    evaluated: dict, workdir: pathlib.Path, prepared_workdir: pathlib.Path, tmp_path: pathlib.Path
):
    (tmp_path / "retro").symlink_to(workdir / "retro")
    data = shutil.copytree(prepared_workdir, tmp_path / "data")  # a token memory is built there
    arguments = [f"--workdir={tmp_path}", f"--data={data}", "--retrieval=tokens"]
    processes = _start_two(*arguments)  # RETRO[ON] is scored on the way
    printed = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    for name in (evaluated["on"]["nll"], evaluated["on"]["nll"].replace(".npy", ".json")):
        found, expected = (folder / "evaluation" / name for folder in (tmp_path, workdir))
        assert found.read_bytes() == expected.read_bytes()
    # The second prints no result and leaves no file that is not the first's. Gloo prints lines of its
    # own, from several threads at once, so that no line can be expected to be whole.
    assert "RETRO[ON] + tokens at step 6" in printed[0][0] and "RETRO" not in printed[1][0]
    assert "window" in printed[0][1] and "window" not in printed[1][1]
    assert not list((tmp_path / "evaluation").glob(".*"))

    processes = _start_two(*arguments[:2], "--retrieval=on,tokens", "--credit=0.5")
    printed = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert "documents of the database saved bits" in printed[0][0]
    assert (tmp_path / "evaluation" / "test-credit.csv").is_file()
