"""lm-eval asks its model `retro`; beside launch.evaluate's scores and the Generator's texts.

    python -m venv lm_eval_venv && lm_eval_venv/bin/pip install '.[data,lm-eval]'
    python -m launch.evaluate --workdir=W
    python -m benchmarks.lm_eval_model --workdir=W --python=lm_eval_venv/bin/python

Three local tasks of the short documents of W's test split, one for each kind of request: whole texts, the second
half of each after the first, and 20 tokens after the first half. Nothing of lm-eval is changed.
"""

import json
import os
import pathlib
import subprocess
import tempfile
from typing import Any

import numpy as np
from absl import flags

from benchmarks.local_completions import documents, first_number
from data_pipelines.chunk_database.tokenizer import Tokenizer
from launch.common import app
from launch.runs.text_generator import Generator
from retro_jax.generate.sampling import SamplingConfig

PYTHON = flags.DEFINE_string("python", "python", "Of an environment with lm-eval and this project.")

_TOKENS = 20
_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
target_delimiter: ""
metric_list: [{{metric: {metric}}}]
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: {tokens}}}
"""
_KINDS = {
    "retro_rolling": ("loglikelihood_rolling", "", "{{text}}", "bits_per_byte"),
    "retro_pairs": ("loglikelihood", "{{context}}", "{{rest}}", "acc"),
    "retro_texts": ("generate_until", "{{context}}", "{{rest}}", "exact_match"),
}


def asked(workdir: pathlib.Path, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The answers of each task by lm-eval, in the order of the rows."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        path = folder / "rows.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        for name, (kind, text, target, metric) in _KINDS.items():
            fields = {"kind": kind, "text": text, "target": target, "metric": metric}
            task = _TASK.format(name=name, path=path, tokens=_TOKENS, **fields)
            if kind != "generate_until":
                task = task.partition("generation_kwargs")[0]
            (folder / f"{name}.yaml").write_text(task)
        command = [
            *(PYTHON.value, "-m", "launch.runs.lm_eval_model", "run", "--model", "retro"),
            *("--model_args", f"workdir={workdir.absolute()}", "--tasks", ",".join(_KINDS)),
            *("--include_path", scratch, "--output_path", scratch, "--log_samples"),
        ]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": scratch}
        subprocess.run(command, check=True, env={**os.environ, **offline})
        return {name: _answers(folder, name, len(rows)) for name in _KINDS}


def _answers(folder: pathlib.Path, name: str, count: int) -> list[Any]:
    """The answers to one task."""
    (path,) = folder.rglob(f"samples_{name}_*.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    answers = {sample["doc"]["number"]: sample["resps"] for sample in samples}
    return [answers[i] for i in range(count)]


def main() -> None:
    """Asks and compares."""
    workdir = pathlib.Path(app.required(app.WORKDIR, "a trained and evaluated run with its data"))
    known, tokenizer = documents(workdir), Tokenizer.open(workdir / "tokenizer")
    rows = []
    for number, (text, ids, _) in enumerate(known):
        context = tokenizer.decode(ids[: len(ids) // 2])
        row = {"number": number, "text": text, "context": context}
        rows.append(row | {"rest": text.removeprefix(context)})
    answers = asked(workdir, rows)
    print(f"{len(known)} documents, {sum(len(ids) for _, ids, _ in known):,} tokens")
    wanted = {
        "retro_rolling": [float(nats.sum()) for _, _, nats in known],
        "retro_pairs": [float(nats[len(nats) // 2 :].sum()) for _, _, nats in known],
    }
    for name, nats in wanted.items():
        found = np.array([-first_number(answer) for answer in answers[name]])
        print(
            f"{name}: lm-eval {found.sum():.3f} nats, launch.evaluate {sum(nats):.3f};"
            f" apart at most {np.abs(found - nats).max():.1e} nats a document"
        )
    greedy = SamplingConfig(max_tokens=_TOKENS, temperature=0, stop=("\n\n",))
    contexts = [row["context"] for row in rows]
    texts = [result.text for result in Generator.open(workdir).generate(contexts, greedy)]
    equal = sum(answer[0][0] == text for answer, text in zip(answers["retro_texts"], texts))
    print(f"retro_texts: {equal} of {len(texts)} continuations are those of the Generator")


if __name__ == "__main__":
    app.run(main)
