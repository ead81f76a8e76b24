"""Tokens a second with drafts and without, on texts of a test split and on prose: ratios of one run.

    python -m benchmarks.drafts --workdir=W                         a trained run, its neighbours too
    python -m benchmarks.drafts --workdir=W --base=MODEL            an existing model and W's token memory
    python -m benchmarks.drafts --workdir=W --base=MODEL --prose_file=prose.txt

Each prompt is the first 128 tokens of a document of W's test split, or of a paragraph of the file. It is
continued by `--continued` tokens in every mode, in turns; the best turn of each counts, and retrieval
is taken off all of them. Off reads one token a step. Texts are compared: they have to be equal.
"""

import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags
from flax import nnx

from benchmarks.timing import machine, table, write_json
from data_pipelines.chunk_database.base_tokenizer import check_base_tokenizer
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.live.settings import LiveSettings
from data_pipelines.retriever.revisions import open_database
from data_pipelines.token_memory.drafts import MemoryDrafts
from data_pipelines.token_memory.workdir_memory import prepare_and_open
from launch.common import app
from launch.common.flags import BASE
from launch.runs import trained_run
from retro_jax.errors import UserError
from retro_jax.generate.generator import Generator, GeneratorOptions
from retro_jax.generate.live_database import Lookup
from retro_jax.generate.sampling import SamplingConfig
from retro_jax.host_memory import keep_freed_memory
from retro_jax.retrofit import open_base
from retro_jax.retrofit.decoder import decoder_config, load_decoder

PROSE = flags.DEFINE_string("prose_file", None, "Text, of whose paragraphs prompts are made too.")
PROMPTS = flags.DEFINE_integer("prompts", 3, "Of each corpus.", lower_bound=1)
CONTINUED = flags.DEFINE_integer("continued", 256, "Tokens after each prompt.", lower_bound=1)
DRAFT_TURNS = flags.DEFINE_integer("draft_turns", 2, "Turns of each mode.", lower_bound=1)
TEMPERATURES = flags.DEFINE_list("temperatures", ["0", "0.8"], "Of the draws; 0 is greedy.")
TO = flags.DEFINE_string("drafts_output", None, "Also write everything to this file, as JSON.")

_PROMPT = 128


def generators(workdir: pathlib.Path) -> tuple[Tokenizer, dict[str, Generator]]:
    """The tokeniser, and a generator of each mode; they share one model."""
    retrieve, neighbours = None, None
    if BASE.value is None:
        run = trained_run.open_run(workdir / "retro")
        tokenizer = Tokenizer.open(workdir / "tokenizer")
        model = nnx.merge(*trained_run.load_model(run))
        chunks, neighbours = run.chunks, run.batches.neighbours
        part = run.batches.neighbour_part
        retrieve = Lookup(LiveSettings().open(workdir, tokenizer, neighbours, part), neighbours)
    else:
        base = open_base(BASE.value)
        size = base.config.vocab_size
        check_base_tokenizer(workdir / "tokenizer", base.path, vocab_size=size)
        tokenizer = Tokenizer.open(workdir / "tokenizer")
        model, chunks = load_decoder(base, decoder_config(base.config, pad_id=tokenizer.pad_id)), 8
    memory = prepare_and_open(open_database(workdir))
    look_up = MemoryDrafts(memory)
    modes = {
        "off": GeneratorOptions(neighbours),
        "text": GeneratorOptions(neighbours, drafts=True),
        "database": GeneratorOptions(neighbours, drafts=True, look_up=look_up),
    }
    common = {
        "chunks": chunks,
        "eos_id": tokenizer.eos_id,
        "retrieve": retrieve,
        "forbidden": sorted(tokenizer.special_ids - {tokenizer.eos_id}),
    }
    made = {name: Generator(model, **common, options=mode) for name, mode in modes.items()}
    return tokenizer, made


def prompts(workdir: pathlib.Path, tokenizer: Tokenizer) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Corpora and the prompts of each."""
    database = ChunkDatabase.open(workdir / "chunks" / "test")
    for corpus, ranges in database.corpora.items():
        chunks = np.concatenate([np.arange(ids.start, ids.stop) for ids in ranges])
        records = map(database.record, np.unique(database.documents(chunks)).tolist())
        firsts = [record.first_chunk for record in records if record.chunks >= 4]
        rows = [first + np.arange(_PROMPT // 64) for first in firsts[: PROMPTS.value]]
        yield corpus, [database.chunks(ids).reshape(-1) for ids in rows]
    if PROSE.value is not None:
        paragraphs = pathlib.Path(PROSE.value).read_text(encoding="utf-8").split("\n")
        tokens = (tokenizer.encode(text) for text in paragraphs if len(text) > 8 * _PROMPT)
        heads = [
            np.r_[tokenizer.bos_id, ids][:_PROMPT] for ids, _ in zip(tokens, range(PROMPTS.value))
        ]
        if not heads:
            raise UserError(
                f"--prose_file={PROSE.value}: expected paragraphs of {8 * _PROMPT} letters"
            )
        yield "prose file", heads


def measure(
    modes: dict[str, Generator], texts: Sequence[np.ndarray], sampling: SamplingConfig
) -> dict[str, Any]:
    """A row of the table: seconds of each mode, summed over the prompts."""
    seconds, equal = dict.fromkeys(modes, 0.0), True
    for mode in modes.values():
        mode.blocks = 0
    for prompt in texts:
        made = {}
        best = dict.fromkeys(modes, float("inf"))
        for _ in range(DRAFT_TURNS.value):
            for name, generator in modes.items():
                retrieval, start = generator.retrieval_seconds, time.perf_counter()
                (text,) = generator.generate([prompt], sampling)
                wall = time.perf_counter() - start
                best[name] = min(best[name], wall - (generator.retrieval_seconds - retrieval))
                made[name] = text.tokens.tolist()
        equal &= all(tokens == made["off"] for tokens in made.values())
        for name in modes:
            seconds[name] += best[name]
    tokens = len(texts) * CONTINUED.value
    row: dict[str, Any] = {"temperature": sampling.temperature, "texts": len(texts)}
    row["tokens/s off"] = tokens / seconds["off"]
    for name in ("text", "database"):
        row[f"{name} / off"] = seconds["off"] / seconds[name]
        row[f"tokens a block, {name}"] = modes["off"].blocks / modes[name].blocks
    return row | {"equal": str(equal)}


def main() -> None:
    """Times, and prints the table."""
    workdir = pathlib.Path(app.required(app.WORKDIR, "a prepared workdir"))
    tokenizer, modes = generators(workdir)
    rows = []
    for corpus, texts in prompts(workdir, tokenizer):
        warm = SamplingConfig(max_tokens=CONTINUED.value, min_tokens=CONTINUED.value, temperature=0)
        for generator in modes.values():
            generator.generate(texts[:1], warm)
        for temperature in map(float, TEMPERATURES.value):
            settings = {"max_tokens": CONTINUED.value, "min_tokens": CONTINUED.value, "seed": 1}
            sampling = SamplingConfig(temperature=temperature, **settings)
            rows.append({"corpus": corpus} | measure(modes, texts, sampling))
    print(f"drafts: {modes['off'].decoder.config.num_parameters():,} parameters, {machine()}")
    print(table(rows))
    if TO.value:
        write_json(pathlib.Path(TO.value), {"machine": machine(), "table": rows})


if __name__ == "__main__":
    keep_freed_memory()
    app.run(main)
