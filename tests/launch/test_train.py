"""launch/train.py as a user runs it: to the end, killed and started again, and given bad input."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import fsspec
import jax
import numpy as np
import pytest

from data_pipelines.batches.batches import BatchConfig
from data_pipelines.batches.training_data import open_training_data
from launch import train
from launch.common import app
from launch.runs import trained_run
from retro_jax.errors import UserError
from retro_jax.storage.buckets import Bucket
from retro_jax.train.bad_batches import describe_documents
from retro_jax.train.bucket_checkpoints import sealed_steps
from retro_jax.train.bucket_workdir import BucketWorkdir
from retro_jax.train.checkpoint import latest_step
from retro_jax.train.curves import read_curve, without_clock
from retro_jax.train.held_out import OFF, ON
from retro_jax.train.parameter_names import named_leaves
from retro_jax.train.utilisation import parse_steps
from tests import object_stores
from tests.launch.prepared import prepare_workdir
from tests.ports import free_port


@pytest.fixture(name="workdir", scope="module")
def _workdir(tmp_path_factory):
    """A prepared workdir, W, beside tiny.gin."""
    return prepare_workdir(tmp_path_factory.mktemp("train"))


def _arguments(workdir, out, *extra):
    """The command line of a run on the prepared data, into `out`/retro."""
    gin_file = workdir.parent / "tiny.gin"
    paths = [f"--gin_file={gin_file}", f"--data={workdir}", f"--workdir={out}"]
    return ["launch.train", *paths, *extra]


def _run(workdir, out, *extra):
    return app.execute(train.main, _arguments(workdir, out, *extra))


@pytest.fixture(name="whole", scope="module")
def _whole(workdir, tmp_path_factory):
    """A run from its first to its last step without a break: (directory, what it printed)."""
    out = tmp_path_factory.mktemp("whole")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert _run(workdir, out, "--gin_bindings=TrainConfig.checkpoint_every = 14") == 0
    return out, printed.getvalue()


def _params(directory):
    run = trained_run.open_run(directory)
    _, params = trained_run.load_model(run)
    return run, {name: np.asarray(leaf) for name, leaf in named_leaves(params).items()}


def test_a_run_from_data_to_checkpoint_and_again(workdir, whole, capsys):
    out, printed = whole
    assert "trained 28 steps" in printed
    lines = read_curve(out / "retro" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 29))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"loss/letters", "loss/words", "learning_rate", "grad_norm"} <= set(lines[-1])
    assert [line["step"] for line in lines if {ON, OFF} <= set(line)] == [14, 28]
    assert lines[-1][ON] != lines[-1][OFF]
    run, params = _params(out / "retro")
    assert run.step == 28
    assert run.model.cca_layers == (2,)
    assert run.model.vocab_size == 320  # the tokeniser's: the gin file leaves it open
    count = sum(leaf.size for leaf in params.values())
    assert count == run.model.num_parameters()
    assert f"RETRO of {count:,} parameters on 8 cpu devices" in printed

    assert _run(workdir, out) == 0
    assert "trained already, 28 steps" in capsys.readouterr().out
    assert read_curve(out / "retro" / "metrics.jsonl") == lines


def test_the_baseline_is_the_same_decoder_without_retrieval(workdir, tmp_path, capsys):
    four = ["--gin_bindings=TrainConfig.steps = 4", "--gin_bindings=TrainConfig.evaluate_every = 2"]
    assert _run(workdir, tmp_path, "--baseline", *four, "--profile_steps=2:3") == 0
    lines = read_curve(tmp_path / "baseline" / "metrics.jsonl")
    assert [line["step"] for line in lines if OFF in line] == [2, 4]
    assert not any(ON in line for line in lines)
    assert list((tmp_path / "baseline" / "profile").rglob("*.xplane.pb"))
    run, params = _params(tmp_path / "baseline")
    assert not (tmp_path / "retro").exists()
    assert run.model.cca_layers == ()
    assert run.batches.neighbours == 0
    assert not any(name.startswith(("cca", "encoder")) for name in params)
    parents = json.loads((tmp_path / "baseline" / "parents.json").read_text())
    assert list(parents) == ["chunks/train"]
    assert "baseline of" in capsys.readouterr().out
    # The record is written without gin, and is what gin has in force.
    assert _run(workdir, tmp_path, "--baseline", *four, "--print_config") == 0
    assert capsys.readouterr().out == (tmp_path / "baseline" / "config.gin").read_text()


def test_print_config_writes_nothing(workdir, tmp_path, capsys):
    assert _run(workdir, tmp_path / "new", "--print_config") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == sorted(shown)
    assert "RetroConfig.vocab_size = 320" in shown
    assert "TrainConfig.keep = 3" in shown
    assert not (tmp_path / "new").exists()


@pytest.fixture(name="cut")
def _cut(tmp_path, monkeypatch):
    """Where a run with breaks goes; what is brought of buckets goes there too."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def _befall(workdir, out, what, step, *extra):
    """A run in a process of its own to which something happens; its status and what it printed."""
    command = [sys.executable, "-m", "tests.launch.accident", what, str(step)]
    done = subprocess.run(
        [*command, *_arguments(workdir, out, *extra)[1:]],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def _harm(checkpoint, bucket=None, place=""):
    """Cuts the largest file of a checkpoint in half, here or in a bucket."""
    files = [path for path in (checkpoint / "default").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    if bucket is not None:
        bucket.put(largest, f"{place}/{largest.relative_to(checkpoint)}")


def _steps(checkpoints):
    """The steps of whole checkpoints in a directory."""
    return sorted(
        int(p.parent.name) for p in checkpoints.glob("*/sealed.json") if p.parent.suffix == ""
    )


def test_killed_damaged_and_stopped_runs_end_with_the_same_bits(
    workdir, whole, cut, capsys, caplog
):
    checkpoints, step = cut / "retro" / "checkpoints", random.randint(13, 16)
    status, *_ = _befall(workdir, cut, "kill", step)
    assert status == -signal.SIGKILL
    reached, begun = latest_step(checkpoints), (step - 1) // 4 * 4
    assert reached in (begun, begun - 4)  # or the last write was cut short
    _harm(checkpoints / str(reached))

    # It makes the damaged checkpoint once more, from the one before.
    with object_stores.s3() as url:
        status, out, err = _befall(workdir, cut, "stop", reached + 5, f"--mirror={url}/W")
        assert status == app.SAVED
        assert f"checkpoints/{reached} is damaged" in err
        assert "using the one before it" in err
        assert f"going on from step {reached - 4} of 28" in out
        assert "Traceback" not in err
        stopped = latest_step(checkpoints)
        assert stopped == reached + 6  # metrics are read one step late
        assert f"stopped and saved at step {stopped} of 28; run it again" in err
        assert (checkpoints / f"{reached}.damaged").is_dir()
        assert (checkpoints / f"{reached}").is_dir()

        # The host and its disk are lost; of what stands in the bucket the newest is damaged too.
        kept, bucket = _steps(checkpoints), Bucket(f"{url}/W")
        assert sealed_steps(bucket.list("retro/checkpoints")) == kept
        curve = (cut / "retro/metrics.jsonl").read_bytes()
        assert bucket.read("retro/metrics.jsonl") == curve
        _harm(checkpoints / str(kept[-1]), bucket, f"retro/checkpoints/{kept[-1]}")
        shutil.rmtree(cut / "retro")
        assert _run(workdir, f"{url}/W") == 0
        assert f"checkpoints/{kept[-1]} is damaged (" in caplog.text
        out = capsys.readouterr().out
        assert f"going on from step {kept[-2]} of 28" in out
        assert f"{url}/W/retro: trained 28 steps" in out
        assert 28 in sealed_steps(bucket.list("retro/checkpoints"))
        here = BucketWorkdir(f"{url}/W").bring() / "retro"
        _, resumed = _params(here)
        assert bucket.read("retro/metrics.jsonl") == (here / "metrics.jsonl").read_bytes()
        # Another host finds it finished, and refuses other settings by the bucket's name.
        shutil.rmtree(BucketWorkdir(f"{url}/W", "train").folder)
        assert _run(workdir, f"{url}/W") == 0
        assert f"{url}/W/retro: trained already, 28 steps" in capsys.readouterr().out
        assert _run(workdir, f"{url}/W", "--gin_bindings=TrainConfig.seed = 1") == 1
        assert f"error: {url}/W/retro belongs to a run of other" in capsys.readouterr().err
    _, expected = _params(whole[0] / "retro")
    for name, leaf in expected.items():
        assert leaf.tobytes() == resumed[name].tobytes(), name
    curves = [read_curve(path / "metrics.jsonl") for path in (whole[0] / "retro", here)]
    assert list(map(without_clock, curves[0])) == list(map(without_clock, curves[1]))


@pytest.mark.parametrize(
    ("bindings", "expected"),
    [
        (
            ["BatchConfig.sequence_length = 100"],
            "sequence_length is 100: expected a positive multiple",
        ),
        (["RetroConfig.vocab_size = 999"], "RetroConfig.vocab_size is 999: expected 320, that of"),
        (["RetroConfig.pad_id = 3"], "RetroConfig.pad_id is 3: expected 0, that of"),
        (["RetroConfig.chunk_length = 32"], "RetroConfig.chunk_length is 32: expected 64"),
        (["RetroConfig.neighbour_length = 64"], "RetroConfig.neighbour_length is 64: expected 128"),
        (["BatchConfig.neighbours = 0"], "BatchConfig.neighbours is 0: expected at least 1"),
        (["BatchConfig.neighbours = 3"], "BatchConfig.neighbours is 3: expected at most 2"),
        (["BatchConfig.mixture = {'wrods': 1.0}"], "'wrods', which the database"),
        (["BatchConfig.batch_size = 9"], "batch size 9 cannot be split over data x fsdp = 8"),
        (["MeshConfig.data = 3"], "does not fit 8 devices"),
        (["TrainConfig.steps = 2"], "OptimizerConfig.warmup_steps is 2: expected fewer than"),
        (
            ["TrainConfig.stesp = 9"],
            "unknown parameter of TrainConfig 'stesp': did you mean 'steps'",
        ),
        (
            ["TrainConfig.checkpoint_every = 3", "TrainConfig.log_every = 2"],
            "a multiple of log_every",
        ),
    ],
)
def test_bad_settings_are_one_line(workdir, tmp_path, capsys, bindings, expected):
    out = tmp_path / "new"
    assert _run(workdir, out, *(f"--gin_bindings={binding}" for binding in bindings)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert expected in error
    assert error.count("\n") == 1
    assert not out.exists()  # refused before anything is written


def test_bad_paths_are_one_line(workdir, tmp_path, capsys):
    assert app.execute(train.main, ["launch.train"]) == 2
    assert "--workdir is missing: expected" in capsys.readouterr().err
    assert app.execute(train.main, ["launch.train", f"--workdir={tmp_path}"]) == 1
    assert f"{tmp_path}/chunks/train" in capsys.readouterr().err
    gin_file = f"--gin_file={tmp_path}/none.gin"
    assert app.execute(train.main, ["launch.train", f"--workdir={workdir}", gin_file]) == 1
    assert "none.gin (No such file or directory)" in capsys.readouterr().err


def test_a_directory_of_another_run_is_refused(workdir, whole, capsys):
    out, _ = whole
    changed = ["--gin_bindings=RetroConfig.d_ff = 64", "--gin_bindings=TrainConfig.seed = 1"]
    assert _run(workdir, out, *changed) == 1
    error = capsys.readouterr().err
    assert "RetroConfig.d_ff 32 -> 64; TrainConfig.seed 0 -> 1; expected the same" in error
    assert _run(workdir, out, "--profile_steps=10:29") == 1
    assert "--profile_steps=10:29: expected steps up to 28, the last" in capsys.readouterr().err
    assert _run(workdir, out, "--profile_steps=10:12") == 0  # a cluster repeats the command
    assert f"10:12: no trace, {out}/retro is at step 28\n" in capsys.readouterr().err
    # How it is computed and logged may change.
    free = ["--gin_bindings=ExecutionConfig.remat = 'full'", "--gin_bindings=TrainConfig.keep = 9"]
    assert _run(workdir, out, *free) == 0
    assert "TrainConfig.keep = 9" in (out / "retro" / "config.gin").read_text()
    assert _run(workdir, out) == 0


def test_a_run_is_replayed_to_the_same_bits(workdir, whole, tmp_path, capsys, caplog):
    recorded, again = whole[0] / "retro", tmp_path / "again"
    command = ["launch.train", f"--replay={whole[0]}", f"--workdir={again}"]
    assert app.execute(train.main, command) == 0
    assert f"the same as {recorded} bit for bit, in all 28 lines" in capsys.readouterr().out
    assert not caplog.records  # nothing differs here
    # Another day: other versions, and losses that are not the same.
    versions, curve = again / "retro" / "versions.json", again / "retro" / "metrics.jsonl"
    versions.write_text(
        versions.read_text().replace(f'"jax": "{jax.__version__}"', '"jax": "0.0.1"')
    )
    lines = curve.read_text().splitlines()
    lines[6] = lines[6].replace('"loss": ', '"loss": 1')
    curve.write_text("\n".join(lines) + "\n")
    third = ["launch.train", f"--replay={again / 'retro'}", f"--workdir={tmp_path / 'third'}"]
    assert app.execute(train.main, [*third, "--gin_bindings=TrainConfig.steps = 20"]) == 1
    assert "TrainConfig.steps = 28: expected the same, found 20" in capsys.readouterr().err
    # Its data has moved to a bucket meanwhile.
    memory, disk = fsspec.filesystem("memory"), tmp_path / "disk"
    memory.put(str(workdir), "/moved/W", recursive=True)
    third += ["--data=memory://moved/W"]
    assert app.execute(train.main, third) == 2
    assert "--stage_to is missing: expected a directory on this" in capsys.readouterr().err
    assert app.execute(train.main, [*third, f"--stage_to={disk}"]) == 1
    starts = json.loads((tmp_path / "third" / "retro" / "versions.json").read_text())["starts"]
    assert [start["data"] for start in starts] == ["memory://moved/W"]
    staged = {str(path.relative_to(disk)) for path in disk.glob("*/*")}
    kinds = ("chunks", "neighbours")
    assert staged == {f"{kind}/{split}" for kind in kinds for split in ("train", "validation")}
    error = capsys.readouterr().err
    assert f"packages.jax 0.0.1 -> {jax.__version__}" in caplog.text
    assert f"is not as {again / 'retro'}: at step 7 loss was 1" in error


def test_a_bad_batch_is_told_by_its_documents(workdir, tmp_path):
    data = open_training_data(workdir, BatchConfig(sequence_length=128, batch_size=8))
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    told = describe_documents(tmp_path, data.batches, 7)
    (line,) = (tmp_path / "bad_batches.jsonl").read_text().splitlines()
    entry = json.loads(line)
    batch = data.batches.rows(6)
    present = batch.documents[batch.documents >= 0] % 2**30
    expected = {data.database.record(int(number)).id for number in present}
    assert (entry["step"], set(entry["documents"])) == (7, expected)
    assert len(entry["documents"]) == len(expected) > 3
    assert f"documents {entry['documents'][0]!r}, " in told
    assert f"and {len(expected) - 3} more: {tmp_path}/bad_batches.jsonl" in told
    assert told.endswith(f"the last good checkpoint is {tmp_path}/checkpoints/4")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--replay={whole}", "--gin_file=x.gin"], "expected no --gin_file beside it"),
        (["--replay={whole}", "--workdir={whole}"], "holds the run to replay: expected another"),
        (["--replay={whole}/none"], "there is no {whole}/none/retro/config.gin"),
        (["--replay={whole}", "--baseline"], "there is no {whole}/baseline/config.gin"),
        (
            ["--data=gs://B/W"],
            "--stage_to is missing: expected a directory on this host's own disk",
        ),
        (["--workdir=nowhere://B/W"], "nowhere://B/W cannot be opened"),
    ],
)
def test_a_replay_or_a_place_that_cannot_be_is_one_line(whole, tmp_path, capsys, flags, message):
    flags = [flag.format(whole=whole[0]) for flag in flags]
    assert app.execute(train.main, ["launch.train", f"--workdir={tmp_path}", *flags]) in (1, 2)
    assert message.format(whole=whole[0]) in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "5", "5:", ":5", "7:5", "0:3", "a:b"])
def test_steps_that_are_no_range_are_refused(text):
    assert parse_steps("profile_steps", "10:12") == (10, 12)
    with pytest.raises(UserError, match="expected FIRST:LAST"):
        parse_steps("profile_steps", text)


def test_no_tensorflow_before_it_is_used():
    program = (
        "import sys, launch.train; sys.exit('tensorflow' in sys.modules or 'scann' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def _start_many(workdir, out, count, *extra, of_process=None, accident=()):
    """Starts processes of one device each that train together; accident: (process, what, step)."""
    address = f"--coordinator_address=localhost:{free_port()}"
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    arguments = _arguments(workdir, out, *extra)[1:]

    def command(i):
        victim = accident and accident[0] == i
        module = ["tests.launch.accident", *map(str, accident[1:])] if victim else ["launch.train"]
        own = (f"--num_processes={count}", f"--process_id={i}", *(of_process or {}).get(i, ()))
        return [sys.executable, "-m", *module, *arguments, address, *own]

    return [
        subprocess.Popen(
            command(i),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "XLA_FLAGS": flags},
        )
        for i in range(count)
    ]


def _finish(processes, status):
    """Waits for all; what each of them printed, standard output and error."""
    printed = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [status] * len(processes), printed
    return printed


def test_four_processes_stop_and_two_go_on_as_one_would(workdir, whole, cut):
    """Their disks have nothing in common, and are lost: what they share is a bucket."""
    mesh = [f"--gin_bindings=MeshConfig.{axis} = 2" for axis in ("data", "tensor")]
    with object_stores.s3() as url:
        place, bucket = f"{url}/W", Bucket(f"{url}/W")
        # Both axes lie across the four.
        four = _start_many(workdir, place, 4, *mesh, accident=(2, "stop", 2))
        printed = _finish(four, app.SAVED)
        (*_, stopped) = sealed_steps(bucket.list("retro/checkpoints"))
        assert 3 <= stopped < 28
        assert f"{place}/retro: stopped and saved at step {stopped} of 28" in printed[0][1]
        assert [out.count("RETRO of") for out, _ in printed] == [1, 0, 0, 0]
        parts = bucket.list(f"retro/checkpoints/{stopped}/parts")
        assert len(parts) == 8  # each process wrote its own
        shutil.rmtree(cut / "home")

        two = _start_many(workdir, place, 2, "--gin_bindings=MeshConfig.fsdp = 2")
        out, _ = _finish(two, 0)[0]
        assert f"going on from step {stopped} of 28" in out
        names = bucket.list("retro")
        here = BucketWorkdir(place).bring() / "retro"
    curves = [read_curve(path / "metrics.jsonl") for path in (whole[0] / "retro", here)]
    assert [line["step"] for line in curves[1]] == list(range(1, 29))
    for one, many in zip(*curves, strict=True):
        assert one["tokens"] == many["tokens"]
        tolerance = 1e-6 if one["step"] == 1 else 1e-4 if one["step"] <= 10 else 1e-2
        for name in {"loss", ON, OFF} & set(one):
            assert many[name] == pytest.approx(one[name], rel=tolerance)
    assert sum(name.startswith("events.") for name in names) == 2  # of process 0 at each start
    assert not any(".damaged" in name for name in names)


def test_an_error_of_one_process_is_told_by_all(workdir, cut, tmp_path):
    elsewhere = {1: [f"--data={tmp_path / 'none'}"]}
    (_, first), (_, second) = _finish(_start_many(workdir, cut, 2, of_process=elsewhere), 1)
    problem = f"{tmp_path}/none/chunks/train"
    assert f"process 0 of 2: error: process 1 failed: {problem}" in first
    assert f"process 1 of 2: error: {problem}" in second
    assert "Traceback" not in first + second
    assert not (cut / "retro").exists()
