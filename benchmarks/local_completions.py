"""lm-eval's `local-completions` scores texts through the server, beside launch.evaluate's scores.

    python -m venv lm_eval_venv && lm_eval_venv/bin/pip install 'lm-eval[api]'
    python -m launch.evaluate --workdir=W
    python -m benchmarks.local_completions --workdir=W --lm_eval=lm_eval_venv/bin/lm_eval

The task is local: the short documents of W's test split, as JSON lines, scored by their log-likelihood.
Nothing of lm-eval is changed; it finds the tokeniser at the server. Compared are the nats of each
document with the sums of launch.evaluate's file, retrieval on. Documents are short enough to be read
whole in any window.
"""

import json
import os
import pathlib
import subprocess
import tempfile

import httpx2
import numpy as np
from absl import flags

from benchmarks.serve import Server
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.evaluation.splits import open_split
from launch.common import app
from retro_jax.errors import UserError
from retro_jax.report.result_files import EVALUATION
from retro_jax.storage import files

LM_EVAL = flags.DEFINE_string("lm_eval", "lm_eval", "The command of an environment of its own.")
MOST = flags.DEFINE_integer("most_documents", 40, "Documents at most.", lower_bound=1)

_TASK = """
task: retro_local
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""


def documents(workdir: pathlib.Path) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Text, tokens [n] and their nats [n] of short documents, as launch.evaluate has them.

    Raises:
      UserError: launch.evaluate has not scored the test split with retrieval.
    """
    path = workdir / EVALUATION / "test.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: expected launch.evaluate --workdir={workdir}")
    result = files.read_json(path)["on"]
    nll = np.load(workdir / EVALUATION / result["nll"])
    windows = result["settings"]
    most = windows["window_chunks"] - windows["stride_chunks"] + 1
    split, tokenizer = (
        open_split(workdir, "test", neighbours=0),
        Tokenizer.open(workdir / "tokenizer"),
    )
    lengths, database = tokenizer.byte_lengths, split.database
    tokens, owners = database.chunks(split.ids), database.documents(split.ids)
    text = split.text_mask(lengths)
    found = []
    for number in np.unique(owners):
        own = owners == number
        if own.sum() <= most:
            ids = tokens[own][text[own]]
            found.append((tokenizer.decode(ids), ids, nll[own][text[own]]))
    return found[: MOST.value]


def scored(url: str, texts: list[str]) -> list[float]:
    """Nats of texts by lm-eval, in their order."""
    model = httpx2.get(f"{url}/v1/models").json()["data"][0]
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        lines = [json.dumps({"number": i, "text": text}) for i, text in enumerate(texts)]
        (folder / "texts.jsonl").write_text("".join(f"{line}\n" for line in lines))
        (folder / "retro_local.yaml").write_text(_TASK % (folder / "texts.jsonl"))
        settings = {
            "model": model["id"],
            "base_url": f"{url}/v1/completions",
            "max_length": model["max_model_len"],
            "num_concurrent": 4,
        }
        command = [
            LM_EVAL.value,
            *("--model", "local-completions", "--tasks", "retro_local"),
            *("--model_args", ",".join(f"{name}={value}" for name, value in settings.items())),
            *("--include_path", scratch, "--output_path", scratch, "--log_samples"),
        ]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": scratch}
        subprocess.run(command, check=True, env={**os.environ, **offline})
        (path,) = folder.rglob("samples_retro_local*.jsonl")
        samples = [json.loads(line) for line in path.read_text().splitlines()]
    nats = {sample["doc"]["number"]: first_number(sample["resps"]) for sample in samples}
    return [-nats[i] for i in range(len(texts))]


def first_number(value: object) -> float:
    """The first number inside of lists."""
    while isinstance(value, list):
        value = value[0]
    return float(str(value))


def main() -> None:
    """Scores and compares."""
    workdir = pathlib.Path(app.required(app.WORKDIR, "a trained and evaluated run with its data"))
    known = [(text, len(ids), float(nats.sum())) for text, ids, nats in documents(workdir)]
    with Server(workdir) as server:
        nats = scored(server.url, [text for text, _, _ in known])
    tokens = sum(count for _, count, _ in known)
    apart = [abs(value - wanted) for value, (_, _, wanted) in zip(nats, known, strict=True)]
    each = [gap / count for gap, (_, count, _) in zip(apart, known, strict=True)]
    print(f"{len(known)} documents, {tokens:,} tokens")
    print(f"lm-eval {sum(nats):.3f} nats, launch.evaluate {sum(n for _, _, n in known):.3f}")
    print(f"apart at most {max(apart):.1e} nats a document, {max(each):.1e} a token")


if __name__ == "__main__":
    app.run(main)
