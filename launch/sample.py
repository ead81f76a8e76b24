"""Continues prompts with a trained RETRO, and shows the neighbours that it retrieved on the way.

    python -m launch.sample --workdir=W --prompt="The history of the city"
    python -m launch.sample --workdir=W --prompt="def main(" --prompt="import " --temperature=0.7 --seed=3

Neighbours are retrieved from W's database as soon as a chunk of 64 tokens is complete, in the prompt
too, and read while the next chunk is generated. Everything is written to W/samples/ID.json; the same
request is read from there the next time.
"""

import dataclasses
import hashlib
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags
from flax import nnx

from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.evaluation.text_view import Viewer, sample_chunk_from_json
from data_pipelines.evaluation.trace_sources import DatabaseLibrary
from data_pipelines.retriever.live import LiveRetrieval
from data_pipelines.retriever.retriever import Retriever
from data_pipelines.retriever.revisions import latest, open_database
from data_pipelines.token_memory.workdir_memory import open_existing
from launch.common import app, configurables
from launch.common.flags import (
    AVERAGED,
    DATA,
    MAX_TOKENS,
    NUM_NEIGHBOURS,
    RETRIEVAL,
    data_directory,
)
from launch.runs import trained_run
from retro_jax.distributed.progress import progress_bar
from retro_jax.errors import UserError
from retro_jax.generate.sample import Generation, Generator, Sample, SamplingConfig, sample_text
from retro_jax.model import Retro
from retro_jax.report.result_files import SAMPLES
from retro_jax.report.side_by_side import side_by_side
from retro_jax.report.trace_page import trace_page
from retro_jax.report.trace_value import traced_text
from retro_jax.report.views import NeighbourSource, SampleChunk
from retro_jax.storage import files

PROMPT = flags.DEFINE_multi_string("prompt", None, "The text to continue.")
MIN_TOKENS = flags.DEFINE_integer("min_tokens", 0, "The text does not end before so many.")
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Divides the logits; 0 is greedy.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Draw among the k most likely tokens; 0 for all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw among the likeliest that reach this probability.")
MIN_P = flags.DEFINE_float("min_p", 0.0, "Draw tokens at least this times as likely as the best.")
REPETITION_PENALTY = flags.DEFINE_float(
    "repetition_penalty", 1.0, "Divides the logits of tokens that the text has already."
)
STOP = flags.DEFINE_multi_string("stop", [], "The text ends before this string.")
SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")
TRACE = flags.DEFINE_string("trace", None, "Also write a page: what retrieval changed, by token.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Samples of each prompt.", lower_bound=1)

_ID_DIGITS = 12
# Settings that are part of a request only where they are set: older requests had none of them.
_OPTIONAL = ("min_p", "repetition_penalty", "allowed_tokens", "forbidden_tokens", "stop")


def main() -> None:
    """Draws samples, or reads earlier ones, and prints them."""
    workdir = pathlib.Path(app.required(app.WORKDIR, "the directory of a run"))
    data = data_directory(DATA.value or workdir)
    trained_run.refuse_gin_file()
    prompts = app.required(PROMPT, "a text to continue")
    sampling = SamplingConfig(
        max_tokens=MAX_TOKENS.value,
        min_tokens=MIN_TOKENS.value,
        temperature=TEMPERATURE.value,
        top_k=TOP_K.value,
        top_p=TOP_P.value,
        seed=SEED.value,
        min_p=MIN_P.value,
        repetition_penalty=REPETITION_PENALTY.value,
        stop=tuple(STOP.value),
    )
    run = trained_run.open_run(
        workdir / "retro", configurables.GIN_BINDINGS.value, averaged=AVERAGED.value
    )
    trained_run.check_data(run, data)
    k = _neighbours(run)
    request = {
        "prompts": prompts,
        "num_samples": NUM_SAMPLES.value,
        "sampling": _asked(sampling),
        "neighbours": k,
        "model": run.identity(),
        "execution": run.execution.facts(),
    }
    if k and latest(data):  # a changed database is searched again
        request["database"] = open_database(data).manifest.hash
    digest = hashlib.sha256(files.to_json(request)).hexdigest()[:_ID_DIGITS]
    path = workdir / SAMPLES / f"{digest}.json"
    if TRACE.value and not pathlib.Path(TRACE.value).absolute().parent.is_dir():
        raise UserError(f"--trace={TRACE.value}: expected a file in a directory that is there")
    if path.is_file() and not TRACE.value:
        result = files.read_json(path)
    else:
        texts = [prompt for prompt in prompts for _ in range(NUM_SAMPLES.value)]
        samples = make_samples(data, run, k, sampling=sampling, prompts=texts)
        result = {**request, "samples": samples}
        with files.writing(path):
            path.parent.mkdir(exist_ok=True)
        files.write_atomically(path, files.to_json(result))
    show(result)
    print(f"written to {' and '.join(filter(None, [str(path), TRACE.value]))}")


def _asked(sampling: SamplingConfig) -> dict[str, Any]:
    """The settings of a request, as JSON gives them back."""
    settings = dataclasses.asdict(sampling)
    for name in _OPTIONAL:
        if settings[name] == getattr(SamplingConfig, name):
            del settings[name]
        elif isinstance(settings[name], tuple):
            settings[name] = list(settings[name])
    return settings


def _neighbours(run: trained_run.Run) -> int:
    """How many neighbours a chunk has; 0 with --retrieval=off."""
    values = RETRIEVAL.value if RETRIEVAL.value is not None else ["on"]
    if values not in (["on"], ["off"]):
        raise flags.Error(f"--retrieval={','.join(values)}: expected on or off")
    if values == ["off"]:
        return 0
    k = NUM_NEIGHBOURS.value or run.batches.neighbours
    if not (k and run.model.has_retrieval):
        raise UserError(f"--retrieval=on: {run.directory} was trained without, expected off")
    return k


def make_samples(
    data: pathlib.Path,
    run: trained_run.Run,
    k: int,
    *,
    sampling: SamplingConfig,
    prompts: Sequence[str],
) -> list[dict[str, Any]]:
    """A sample of each prompt, with the neighbours of each chunk, as JSON takes it."""
    tokenizer = Tokenizer.open(data / "tokenizer")
    database = open_database(data)
    retrieve = (
        LiveRetrieval(Retriever.open(data), database, k, run.batches.neighbour_part) if k else None
    )
    special = tokenizer.special_ids - {tokenizer.eos_id}
    model = nnx.merge(*trained_run.load_model(run))
    generator = Generator(
        model,
        chunks=run.chunks,
        eos_id=tokenizer.eos_id,
        retrieve=retrieve,
        forbidden=[*special, *range(tokenizer.vocab_size, run.model.vocab_size)],
        decode=tokenizer.decode if sampling.stop else None,
        num_neighbours=k or None,
    )
    with progress_bar(sampling.max_tokens, "sampling", "token") as bar:
        samples = sample_text(generator, tokenizer, prompts, sampling, on_step=bar.update)
    if TRACE.value:
        library = DatabaseLibrary(tokenizer, database, open_existing(database))
        facts = [("model", f"{run.directory} at step {run.step}"), ("database", str(data))]
        page = _page(model, run.chunks, samples, library, retrieve, facts)
        files.write_atomically(pathlib.Path(TRACE.value), page.encode())
    viewer = Viewer(tokenizer, database)
    return [_to_json(sample, viewer, retrieve) for sample in samples]


def _page(
    model: Retro,
    chunks: int,
    samples: Sequence[Sample],
    library: DatabaseLibrary,
    retrieve: LiveRetrieval | None,
    facts: Sequence[tuple[str, str]],
) -> str:
    """The page of --trace."""

    def found(chunk: np.ndarray) -> Sequence[NeighbourSource | None]:
        return [] if retrieve is None else library.sources(*retrieve.found(chunk), retrieve.score)

    traces = [
        traced_text(
            model, s.generation, found, library, chunks=chunks, heading=s.prompt, facts=facts
        )
        for s in samples
    ]
    return trace_page(traces)


def _to_json(sample: Sample, viewer: Viewer, retrieve: LiveRetrieval | None) -> dict[str, Any]:
    """A sample with its chunks and their neighbours."""
    generation = sample.generation
    return {
        "prompt": sample.prompt,
        "text": sample.text,
        "finished": generation.finished,
        "tokens": generation.tokens.tolist(),
        "prompt_length": generation.prompt_length,
        "log_probabilities": generation.log_probabilities.tolist(),
        "chunks": [dataclasses.asdict(c) for c in _chunks(generation, viewer, retrieve)],
    }


def _chunks(
    generation: Generation, viewer: Viewer, retrieve: LiveRetrieval | None
) -> list[SampleChunk]:
    """The chunks of a sample; runs that a neighbour shares with the chunk after it are marked."""
    length, tokens = viewer.chunk_length, generation.tokens
    used = 0 if generation.neighbours is None else len(generation.neighbours)
    chunks = []
    for u, start in enumerate(range(0, len(tokens), length)):
        chunk = tokens[start : start + length]
        prompt = min(max(generation.prompt_length - start, 0), length)
        views = []
        if retrieve is not None and u < used:
            following = tokens[start + length : start + 2 * length]
            views = viewer.neighbours(*retrieve.found(chunk), following, retrieve.score)
        chunks.append(SampleChunk(viewer.text(chunk[:prompt]), viewer.text(chunk[prompt:]), views))
    return chunks


def _shown(name: str, value: Any) -> str:
    """A setting of sampling and its value."""
    return f"{name} {value:g}" if isinstance(value, int | float) else f"{name} {value}"


def show(result: dict[str, Any]) -> None:
    """Prints samples, chunk by chunk, with the neighbours of each beside it."""
    width = min(shutil.get_terminal_size((120, 40)).columns, 200)
    settings = ", ".join(
        _shown(*setting) for setting in result["sampling"].items() if setting[1] not in ((), [])
    )
    for number, sample in enumerate(result["samples"], 1):
        count = len(sample["tokens"]) - sample["prompt_length"]
        end = "ended by the model" if sample["finished"] else "stopped"
        heading = (
            f" sample {number} of {len(result['samples'])}: {count} tokens, {end} ({settings}) "
        )
        print(f"{heading:─^{width}}")
        chunks = [sample_chunk_from_json(fields) for fields in sample["chunks"]]
        print(side_by_side(chunks, width))
    print("─" * width)


if __name__ == "__main__":
    app.run(main)
