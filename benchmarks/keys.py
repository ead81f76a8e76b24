"""Keys a second from text: MiniLM by JAX, and by PyTorch where an interpreter with it is named.

    python benchmarks/keys.py [--texts=2048] [--torch_python=/elsewhere/bin/python]

Texts are pieces of 220 characters of the standard library's source, about what 64 tokens hold. Both
sides get the same word pieces, sorted by length; PyTorch pads each batch to its longest
text and runs transformers' BertModel in float32 with either of its attentions. Its environment:

    python -m venv /elsewhere && /elsewhere/bin/pip install torch==2.13.0 transformers==5.23.0

The two take turns, so that a busy machine slows both; the best round of each counts. The last column
is of processor time (PyTorch's threads are told to sleep while they wait), which a busy machine
changes little.
"""

import os
import pathlib
import subprocess
import sysconfig
import tempfile
import time

import numpy as np
from absl import app, flags

from data_pipelines.embedder import Embedder, WordPieces

_TEXTS = flags.DEFINE_integer("texts", 2048, "How many texts.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds of each side.")
_TORCH = flags.DEFINE_string(
    "torch_python", None, "An interpreter that has torch and transformers."
)
_BATCHES = flags.DEFINE_list("torch_batches", ["16", "64"], "Texts a batch of PyTorch's.")
_CHARACTERS = 220

_TORCH_PROGRAM = """
import sys, time
import numpy as np, torch
from transformers import BertModel

folder, path, batch, attention = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
data = np.load(path)
model = BertModel.from_pretrained(folder, attn_implementation=attention).eval()
texts = [data["ids"][a:b] for a, b in zip(data["ends"][:-1], data["ends"][1:])]
texts.sort(key=len)
start, processor = time.perf_counter(), time.process_time()
with torch.inference_mode():
    for i in range(0, len(texts), batch):
        group = texts[i : i + batch]
        longest = max(map(len, group)) + 2
        ids = torch.zeros(len(group), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(group):
            ids[row, : len(text) + 2] = torch.tensor([101, *text.tolist(), 102])
            mask[row, : len(text) + 2] = 1
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        mean / mean.norm(dim=1, keepdim=True)
print(time.perf_counter() - start, time.process_time() - processor)
"""


def _texts(count: int) -> list[str]:
    """The first texts of the standard library."""
    texts: list[str] = []
    for path in sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        texts += [source[i : i + _CHARACTERS] for i in range(0, len(source), _CHARACTERS)]
        if len(texts) >= count:
            break
    return [text for text in texts[:count] if text.strip()]


def _run_torch(
    folder: pathlib.Path, pieces: WordPieces, batch: int, attention: str
) -> tuple[float, float]:
    """Wall and processor seconds that PyTorch takes, without loading."""
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        np.savez(file, ids=pieces.ids, ends=pieces.ends)
        file.flush()
        program = [
            str(_TORCH.value),
            "-c",
            _TORCH_PROGRAM,
            str(folder),
            file.name,
            str(batch),
            attention,
        ]
        quiet = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
        done = subprocess.run(program, check=True, capture_output=True, text=True, env=quiet)
    wall, processor = done.stdout.split()[-2:]
    return float(wall), float(processor)


def main(_: list[str]) -> None:
    """Prints the rate of each side."""
    embedder = Embedder.open("minilm")
    pieces = embedder.word_piece.encode(_texts(_TEXTS.value))
    count, positions = len(pieces.lengths), int((pieces.lengths + 2).sum())
    start = time.perf_counter()
    computed = embedder.embed_pieces(pieces)[1]
    print(f"{count:,} texts, {positions / count:.1f} word pieces each", flush=True)
    print(f"first call, compiling: {time.perf_counter() - start:.1f} s", flush=True)
    print(f"padding: {1 - positions / computed:.1%}", flush=True)
    seconds: dict[str, list[tuple[float, float]]] = {}
    for _round in range(_ROUNDS.value):
        start, processor = time.perf_counter(), time.process_time()
        embedder.embed_pieces(pieces)
        took = time.perf_counter() - start, time.process_time() - processor
        seconds.setdefault("JAX", []).append(took)
        for batch in map(int, _BATCHES.value) if _TORCH.value else ():
            for attention in ("eager", "sdpa"):
                took = _run_torch(embedder.model.folder, pieces, batch, attention)
                seconds.setdefault(f"PyTorch, {attention}, batch {batch}", []).append(took)
    print(f"{'':28} texts/s  word pieces/s  texts/processor second")
    for name, rounds in seconds.items():
        wall, processor = (min(column) for column in zip(*rounds))
        rates = f"{count / wall:8.1f} {positions / wall:14,.0f} {count / processor:23.1f}"
        print(f"{name:27} {rates}", flush=True)


if __name__ == "__main__":
    app.run(main)
