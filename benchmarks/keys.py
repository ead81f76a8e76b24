"""Keys per second from text: MiniLM by JAX, and by PyTorch where an interpreter with it is named.

    python -m benchmarks.keys [--texts=384] [--torch_python=/elsewhere/bin/python] [--layers=6]

Texts are pieces of 220 characters of the standard library's source, about as long as 64 tokens. Both
sides get the same word pieces and pad by the same rule: texts sorted by length, batches of so many,
each padded to the next multiple of 8 of its longest. PyTorch runs transformers' BertModel in float32
with either of its attentions, in a process that stays, so no turn includes loading. Its environment:

    python -m venv /elsewhere && /elsewhere/bin/pip install torch==2.13.0 transformers==5.23.0

The sides take turns, so a busy machine slows both; each turn is printed as it ends, and the best turn
of each counts. No round begins after --seconds. The last column has processor time, which a busy
machine changes little (PyTorch's threads sleep while they wait).
"""

import json
import os
import pathlib
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks import small_bert
from data_pipelines.retriever.embedder import Embedder, WordPieces

_TEXTS = flags.DEFINE_integer("texts", 384, "How many texts.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of each side.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 180, "No round begins after so long.")
_LAYERS = flags.DEFINE_integer("layers", None, "Only so many of MiniLM's, on both sides.")
_TORCH = flags.DEFINE_string(
    "torch_python", None, "An interpreter that has torch and transformers."
)
_BATCHES = flags.DEFINE_list("torch_batches", ["16", "64"], "Texts a batch of PyTorch's.")
_OUTPUT = flags.DEFINE_string("output", None, "Write the results to this JSON file.")
_CHARACTERS = 220
_ATTENTIONS = ("sdpa", "eager")

_TORCH_PROGRAM = """
import os, sys, time
import numpy as np, torch
from transformers import BertModel

torch.set_num_threads(os.cpu_count())
folder, path, longest = sys.argv[1], sys.argv[2], int(sys.argv[3])
data = np.load(path)
texts = [data["ids"][a:b][: longest - 2] for a, b in zip(data["ends"][:-1], data["ends"][1:])]
texts = sorted(filter(len, texts), key=len)
models = {}
for name in sys.argv[4].split(","):
    models[name] = BertModel.from_pretrained(folder, attn_implementation=name).eval()
print("ready", flush=True)
for line in sys.stdin:
    attention, batch, most = line.split()
    model, batch = models[attention], int(batch)
    start, processor = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        for i in range(0, min(len(texts), int(most)), batch):
            group = texts[i : i + batch]
            length = min(-(-(max(map(len, group)) + 2) // 8) * 8, longest)
            ids = np.zeros((len(group), length), np.int64)
            mask = np.zeros_like(ids)
            for row, text in enumerate(group):
                ids[row, : len(text) + 2] = [101, *text, 102]
                mask[row, : len(text) + 2] = 1
            ids, mask = torch.from_numpy(ids), torch.from_numpy(mask)
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            (mean / mean.norm(dim=1, keepdim=True)).numpy()
    print(time.perf_counter() - start, time.process_time() - processor, flush=True)
"""

Turn = tuple[float, float]  # wall and processor seconds


def _texts(count: int) -> list[str]:
    """The first texts of the standard library."""
    texts: list[str] = []
    for path in sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        pieces = (source[i : i + _CHARACTERS] for i in range(0, len(source), _CHARACTERS))
        texts += [piece for piece in pieces if piece.strip()]
        if len(texts) >= count:
            break
    return texts[:count]


class Torch:
    """PyTorch in a separate interpreter, which has loaded everything."""

    def __init__(self, folder: pathlib.Path, pieces: WordPieces, longest: int) -> None:
        self._file = tempfile.NamedTemporaryFile(suffix=".npz")  # noqa: SIM115
        np.savez(self._file, ids=pieces.ids, ends=pieces.ends)
        self._file.flush()
        attentions = ",".join(_ATTENTIONS)
        arguments = [str(folder), self._file.name, str(longest), attentions]
        self._process = subprocess.Popen(
            [str(_TORCH.value), "-c", _TORCH_PROGRAM, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"},
        )
        self._line()

    def run(self, attention: str, batch: int, most: int) -> Turn:
        """One turn, of the shortest texts only where `most` are fewer than all."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{attention} {batch} {most}\n")
        self._process.stdin.flush()
        wall, processor = self._line().split()
        return float(wall), float(processor)

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _line(self) -> str:
        """Its next message."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{_TORCH.value} ended with status {self._process.wait()}")
        return line


def _jax_turn(embedder: Embedder, pieces: WordPieces) -> Turn:
    """One turn of ours."""
    start, processor = time.perf_counter(), time.process_time()
    embedder.embed_pieces(pieces)
    return time.perf_counter() - start, time.process_time() - processor


def _measure(sides: dict[str, Callable[[], Turn]]) -> dict[str, list[Turn]]:
    """Turns of every side, one after the other."""
    turns: dict[str, list[Turn]] = {name: [] for name in sides}
    begun = time.perf_counter()
    for number in range(_ROUNDS.value):
        if number and time.perf_counter() - begun > _SECONDS.value:
            print(f"{number} rounds in {_SECONDS.value:.0f} s: no more", flush=True)
            break
        for name, run in sides.items():
            turns[name].append(run())
            wall, processor = turns[name][-1]
            print(f"  {name}: {wall:.2f} s, processor {processor:.2f} s", flush=True)
    return turns


def main(_: list[str]) -> None:
    """Prints the rate of each side."""
    with tempfile.TemporaryDirectory() as folder:
        model = "minilm"
        if _LAYERS.value is not None:
            model = str(small_bert.cut(model, _LAYERS.value, pathlib.Path(folder)))
        embedder = Embedder.open(model)
        pieces = embedder.word_piece.encode(_texts(_TEXTS.value))
        count, positions = len(pieces.lengths), embedder.positions(pieces)
        start = time.perf_counter()
        computed = embedder.embed_pieces(pieces)[1]
        print(f"{count:,} texts, {positions / count:.1f} word pieces each; {model}", flush=True)
        print(f"first call, compiling: {time.perf_counter() - start:.1f} s", flush=True)
        padding = 1 - positions / computed
        print(f"padding: {padding:.1%}", flush=True)
        sides: dict[str, Callable[[], Turn]] = {"JAX": lambda: _jax_turn(embedder, pieces)}
        torch = None
        if _TORCH.value:
            torch = Torch(embedder.model.folder, pieces, embedder.model.max_length)
            for batch in map(int, _BATCHES.value):
                for attention in _ATTENTIONS:

                    def turn(torch: Torch = torch, kind: str = attention, n: int = batch) -> Turn:
                        return torch.run(kind, n, count)

                    torch.run(attention, batch, batch)  # touches what the others find warm
                    sides[f"PyTorch, {attention}, batch {batch}"] = turn
        turns = _measure(sides)
        if torch is not None:
            torch.close()
    print(f"{'best of each':28} texts/s  word pieces/s  texts/processor second")
    results: dict[str, Any] = {"texts": count, "word_pieces": positions, "padding": padding}
    for name, taken in turns.items():
        wall, processor = (min(column) for column in zip(*taken))
        rates = f"{count / wall:8.1f} {positions / wall:14,.0f} {count / processor:23.1f}"
        print(f"{name:27} {rates}", flush=True)
        results[name] = {"texts_per_second": count / wall, "turns": taken}
    if _OUTPUT.value:
        pathlib.Path(_OUTPUT.value).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
