"""Makes old_workdir.tar.gz, .json and .npz: a workdir of the code before its folders were rebuilt.

They were made by commit e8784d1 with the versions of its constraints.txt, Python 3.11.7:

    git worktree add --detach /tmp/e8784d1 e8784d1
    python tests/data/make_old_workdir.py /tmp/e8784d1 /tmp/old

The first folder holds that commit; everything is computed by its code, in processes of their own. The
second one is made. It holds texts, a random BERT of 12 dimensions, gin files, and what the commands
below leave of them, by paths relative to it:

    W   every stage by keys, and a revision; a RETRO that was stopped at step 4 of 8; a baseline that is
        done; batches that were written; figures of the test split and of a slice; a sample
    B   the same chunks, with neighbours by BM25

The json file holds what the same code then makes of a copy: the hash of every manifest, figures, and
the lines, arrays and machine of the training from step 4 to step 8. The npz file holds the last
parameters. Keys, scores, losses and arrays depend on the processor in their last bits. Made again on the
same one, everything is the same but names of files within checkpoints, versions.json and clocks.
"""

import contextlib
import gzip
import hashlib
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import random
import shlex
import shutil
import subprocess
import sys
import tarfile
from typing import Any

import numpy as np

COMMIT = "e8784d1"
HERE = pathlib.Path(__file__).resolve().parent
NAME = "old_workdir"

SETTINGS = """
letters/CorpusConfig.name = 'letters'
letters/CorpusConfig.kind = 'text'
letters/CorpusConfig.path = 'letters'
notes/CorpusConfig.name = 'notes'
notes/CorpusConfig.kind = 'jsonl'
notes/CorpusConfig.path = 'notes.jsonl'
notes/CorpusConfig.id_field = 'id'
DocumentsConfig.corpora = (@letters/CorpusConfig(), @notes/CorpusConfig())
DocumentsConfig.validation = 0.2
DocumentsConfig.test = 0.2
DocumentsConfig.shard_bytes = 8_000
TokenizerConfig.vocab_size = 320
TokenizerConfig.character_coverage = 1.0
KeysConfig.model = 'bert'
NeighboursConfig.train = 2
NeighboursConfig.validation = 3
NeighboursConfig.test = 3
NeighboursConfig.recall_queries = 20
RetroConfig.d_model = 8
RetroConfig.num_layers = 2
RetroConfig.num_heads = 2
RetroConfig.head_dim = 4
RetroConfig.d_ff = 16
RetroConfig.cca_layers = (2,)
RetroConfig.encoder_d_model = 8
RetroConfig.encoder_num_layers = 1
RetroConfig.encoder_num_heads = 2
RetroConfig.encoder_head_dim = 4
RetroConfig.encoder_d_ff = 16
RetroConfig.share_embeddings = True
RetroConfig.dropout = 0.1
BatchConfig.sequence_length = 128
BatchConfig.batch_size = 8
OptimizerConfig.warmup_steps = 2
OptimizerConfig.max_learning_rate = 0.002
TrainConfig.steps = 8
TrainConfig.log_every = 1
TrainConfig.checkpoint_every = 4
TrainConfig.neighbour_dropout = 0.2
TrainConfig.evaluate_every = 4
TrainConfig.evaluate_batches = 1
TrainConfig.average_decay = 0.9
TrainConfig.loss_jump = 50.0
"""
MORE = "notes/CorpusConfig.path = 'more.jsonl'\nnotes/CorpusConfig.split = 'train'\n"

_GIN = "--gin_file=settings.gin"
_BM25 = """ "--gin_bindings=NeighboursConfig.retriever='bm25'" """.strip()
# Module and flags of each command, and the status with which it ends.
COMMANDS = (
    (f"launch.prepare --workdir=W {_GIN}", 0),
    (f"launch.prepare --workdir=B {_GIN} {_BM25}", 0),
    (f"launch.prepare --workdir=W {_GIN} --materialise=2", 0),
    (f"tests.launch.accident stop 3 --workdir=W {_GIN}", 75),
    (f"launch.train --workdir=W {_GIN} --baseline --gin_bindings=TrainConfig.steps=4", 0),
    ("launch.prepare --workdir=W --gin_file=more.gin --append --remove=notes/note-05", 0),
    ("launch.evaluate --workdir=W", 0),
    ("launch.evaluate --workdir=W --slices=own --slice_paths=own=own.jsonl --bert_folder=bert", 0),
    ("launch.sample --workdir=W --data=B '--prompt=the old lighthouse keeper ' --max_tokens=70", 0),
)
LATER = f"launch.train --workdir=W {_GIN}"  # what the test does too
LAST = "W/retro/checkpoints/8"

# As tests/conftest.py has them.
FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    " --xla_cpu_use_fusion_emitters=false"
)
_LEFT_OUT = (".prepare.lock", "events.")
# Begin the names of what differs each time.
_CLOCKED = ("tokens_per_second", "seconds", "mfu", "memory")

_WORDS = (
    "the a of and in is was by old new keeper lighthouse harbour lobster crust letter island storm"
    " def return self x = 0 1 2 ½ 日本 naïve map\tindex boat winter lamp shore rope"
)


def main(checkout: pathlib.Path, folder: pathlib.Path) -> None:
    """Makes the folder, and the three files beside this script."""
    found = _git(checkout, "rev-parse", "--short=7", "HEAD")
    if found != COMMIT or _git(checkout, "status", "--porcelain", "--untracked-files=no"):
        sys.exit(f"{checkout} is of {found}, or changed: expected {COMMIT} as it is")
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS}
    folder.mkdir(parents=True)
    write_inputs(checkout, folder)
    for command, status in COMMANDS:
        run(checkout, folder, command, status)
    pack(folder, HERE / f"{NAME}.tar.gz")
    later = folder.with_name(f"{folder.name}-later")
    shutil.copytree(folder, later)
    run(checkout, later, LATER)
    arrays = read_arrays(later / LAST)
    params = {name: array for name, array in arrays.items() if name.startswith("params.")}
    np.savez_compressed(HERE / f"{NAME}.npz", **params)
    told = json.dumps(facts(folder, later), indent=1, sort_keys=True)
    (HERE / f"{NAME}.json").write_text(told + "\n")


def run(checkout: pathlib.Path, folder: pathlib.Path, command: str, status: int = 0) -> None:
    """Runs a module of the old code in the folder."""
    print(f"python -m {command}", flush=True)
    found = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)], cwd=folder, env=_environment(checkout)
    ).returncode
    if found != status:
        sys.exit(f"it ended with status {found}: expected {status}")


def _environment(checkout: pathlib.Path) -> dict[str, str]:
    """That of the old code, on the simulated devices that tests have."""
    return {**os.environ, "PYTHONPATH": str(checkout)}


def write_inputs(checkout: pathlib.Path, folder: pathlib.Path) -> None:
    """Texts that share paragraphs, some of them near-copies; the BERT; both gin files."""
    rng, words = random.Random(0), _WORDS.split(" ")
    paragraphs = [" ".join(rng.choices(words, k=30)) for _ in range(12)]

    def text(name: str) -> str:
        own = [" ".join(rng.choices(words, k=rng.randint(5, 40))) for _ in range(2)]
        shared = rng.sample(paragraphs, rng.randint(1, 3))
        return "\n\n".join([name, *rng.sample([*own, *shared], len(own) + len(shared))])

    (folder / "letters").mkdir()
    for i in range(30):
        (folder / "letters" / f"letter-{i:02d}.txt").write_text(text(f"letter {i}"))
    notes = {f"note-{i:02d}": text(f"note {i}") for i in range(30)}
    notes |= {f"copy-{i:02d}": notes[f"note-{i:02d}"] + " again" for i in range(0, 30, 3)}
    more = {f"more-{i:02d}": text(f"more {i}") for i in range(6)}
    own = {f"own-{i}": text(f"own {i}") for i in range(4)}
    for name, texts in (("notes", notes), ("more", more), ("own", own)):
        lines = [json.dumps({"id": key, "text": texts[key]}) + "\n" for key in texts]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "settings.gin").write_text(SETTINGS.lstrip())
    (folder / "more.gin").write_text(MORE)
    code = "import pathlib; from tests.model import bert_folder as b; b.write(pathlib.Path('bert'))"
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=folder, env=_environment(checkout), check=True)


def pack(folder: pathlib.Path, target: pathlib.Path) -> None:
    """A .tar.gz of all files, in order, without times and owners: equal for equal files."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            if path.name.startswith(_LEFT_OUT):
                continue
            entry = tarfile.TarInfo(f"{NAME}/{path.relative_to(folder).as_posix()}")
            entry.size = path.stat().st_size
            tar.addfile(entry, io.BytesIO(path.read_bytes()))
    target.write_bytes(gzip.compress(whole.getvalue(), mtime=0))


def read_arrays(checkpoint: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its name on disk."""
    import orbax.checkpoint as ocp

    names = sorted(json.loads((checkpoint / "sealed.json").read_text())["arrays"])
    kind = ocp.RestoreArgs(restore_type=np.ndarray)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        args = ocp.args.PyTreeRestore(restore_args=dict.fromkeys(names, kind))
        found = checkpointer.restore(checkpoint / "default", args=args)
    return {name: np.asarray(found[name]) for name in names}


def digest(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of the arrays' bytes in the order of their names."""
    return hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays))).hexdigest()


def manifest_hashes(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every manifest below a folder, by the directory that it is of."""
    return {
        path.parent.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("manifest.json"))
    }


def read_lines(curve: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl without what depends on the clock."""
    lines = map(json.loads, curve.read_text().splitlines())
    return [{n: v for n, v in line.items() if n.split("/")[0] not in _CLOCKED} for line in lines]


def figures(results: pathlib.Path) -> dict[str, dict[str, float]]:
    """What launch.evaluate says of each condition, of all corpora together."""
    names = ("nats", "tokens", "bytes", "bits_per_byte")
    found = json.loads(results.read_text())
    return {name: {n: found[name]["all"][n] for n in names} for name in found}


def machine() -> dict[str, str]:
    """What the last bits of a sum in float32 depend on."""
    told = platform.processor()
    with contextlib.suppress(OSError):  # Linux says more
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        told = "\n".join(sorted({x for x in lines if x.startswith(("model name", "flags"))}))
    xla_flags = os.environ.get("XLA_FLAGS", "").split()
    return {
        "processor": hashlib.sha256(told.encode()).hexdigest(),
        "jax": importlib.metadata.version("jaxlib"),
        "xla_flags": " ".join(flag for flag in xla_flags if "timeout" not in flag),
    }


def facts(folder: pathlib.Path, later: pathlib.Path) -> dict[str, Any]:
    """What the test expects."""
    arrays = read_arrays(later / LAST)
    return {
        "machine": machine(),
        "manifests": manifest_hashes(folder),
        "evaluation": {
            split: figures(folder / "W" / "evaluation" / f"{split}.json")
            for split in ("test", "own")
        },
        "lines": read_lines(later / "W" / "retro" / "metrics.jsonl"),
        "arrays": len(arrays),
        "sha256": digest(arrays),
    }


def _git(checkout: pathlib.Path, *arguments: str) -> str:
    """What git says of a folder."""
    command = ["git", "-C", str(checkout), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).resolve())
