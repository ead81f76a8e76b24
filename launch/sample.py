"""Continues prompts with a trained RETRO, and shows the neighbours that it retrieved on the way.

    python -m launch.sample --workdir=W --prompt="The history of the city"
    python -m launch.sample --workdir=W --prompt="def main(" --prompt="import " --temperature=0.7 --seed=3
    python -m launch.sample --workdir=W --prompts_file=prompts.jsonl --json_lines=samples.jsonl
    python -m launch.sample --base=MODEL --prompt="Once upon"      an existing model alone

Neighbours are retrieved from W's database as soon as a chunk of 64 tokens is complete, in the prompt
too, and read while the next chunk is generated. Everything is written to W/samples/ID.json; the same
request is read from there the next time.
"""

import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags
from flax import nnx

from data_pipelines.chunk_database.base_tokenizer import check_base_tokenizer, open_base_tokenizer
from data_pipelines.chunk_database.database import CHUNK_LENGTH
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.evaluation.sampled_text import as_text, read_prompts, sampled_chunks
from data_pipelines.evaluation.trace_sources import DatabaseLibrary
from data_pipelines.live.database import excluded_numbers
from data_pipelines.live.settings import LiveSettings
from data_pipelines.live.several import SeveralDatabases
from data_pipelines.retriever.revisions import open_database
from data_pipelines.token_memory.drafts import MemoryDrafts, memory_votes
from data_pipelines.token_memory.memory import TokenMemory
from data_pipelines.token_memory.workdir_memory import open_existing, prepare_and_open
from launch.common import app, configurables, workdirs
from launch.common.flags import (
    AVERAGED,
    BASE,
    BERT_FOLDER,
    DATA,
    MAX_TOKENS,
    NUM_NEIGHBOURS,
    RETRIEVAL,
    REVISION,
    data_directory,
)
from launch.runs import trained_run
from retro_jax.config import ExecutionConfig
from retro_jax.distributed.progress import progress_bar
from retro_jax.errors import UserError
from retro_jax.evaluate.token_mixture import tuned_weights
from retro_jax.generate.drafts import LookUp
from retro_jax.generate.generator import GeneratorOptions
from retro_jax.generate.live_database import Lookup
from retro_jax.generate.mixture import Mixture
from retro_jax.generate.sample import Generator, Sample, SamplingConfig, sample_text
from retro_jax.model import Retro, backend
from retro_jax.report.result_files import SAMPLE_FIELDS, SAMPLES
from retro_jax.report.trace_page import trace_page
from retro_jax.report.trace_value import traced_text
from retro_jax.report.views import NeighbourSource, NeighbourView
from retro_jax.retrofit import open_base
from retro_jax.retrofit.decoder import base_settings, decoder_config, load_decoder
from retro_jax.storage import files

PROMPT = flags.DEFINE_multi_string("prompt", None, "The text to continue.")
PROMPTS = flags.DEFINE_string(
    "prompts_file", None, 'More of them, a JSON line {"prompt": ...} each.'
)
LINES = flags.DEFINE_string("json_lines", None, "Also write a JSON line for each sample.")
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
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Samples of each prompt.", lower_bound=1)

TRACE = flags.DEFINE_string("trace", None, "Also write a page: what retrieval changed, by token.")
EXCLUDE = flags.DEFINE_list(
    "exclude_documents", [], "Never retrieved, as in CORPUS/ID,CORPUS/ID: of --data's database."
)
DATABASES = flags.DEFINE_list(
    "more_databases", [], "Workdirs that are searched too, as in V,U=1: U gives one neighbour each."
)
FIXED = flags.DEFINE_string(
    "neighbours_file", "", "The neighbours of every chunk, a JSON line with a text each."
)

STRIDE = flags.DEFINE_integer(
    "retrieval_stride", 64, "Tokens between retrievals: 64, as in training, or a divisor."
)
DRAFTS = flags.DEFINE_enum(
    "drafts",
    "off",
    ["off", "text", "database"],
    "Read several tokens at once that followed the text's ending in neighbours and in the text, or in "
    "the whole database too; the text stays the same.",
)
MIXTURE = flags.DEFINE_bool(
    "token_memory", False, "Mix the model with W's token memory, as launch.evaluate tuned it."
)

_ID_DIGITS = 12
_AT_ONCE = 32  # texts that are continued together
_MOST_CHUNKS = 128  # of an existing model's window


@dataclasses.dataclass(frozen=True)
class _Writer:
    """What continues the texts: a trained run, or an existing model alone.

    Attributes:
      identity: what a result records of it. execution: how it is computed.
      chunks: of its window. load: reads its parameters.
      data: of the database, or None. neighbours: K, 0 for none. part: BatchConfig.neighbour_part.
    """

    identity: dict[str, Any]
    execution: ExecutionConfig
    tokenizer: Tokenizer
    chunks: int
    load: Callable[[], Retro]
    data: pathlib.Path | None = None
    neighbours: int = 0
    part: str = "both"


def main() -> None:
    """Draws samples, or reads earlier ones, and prints them."""
    trained_run.refuse_gin_file()
    prompts = [*(PROMPT.value or []), *(read_prompts(PROMPTS.value) if PROMPTS.value else [])]
    if not prompts:
        app.required(PROMPT, "a text to continue")
    sampling = _sampling()
    retrieval = LiveSettings(
        revision=REVISION.value,
        exclude=tuple(EXCLUDE.value),
        more=tuple(DATABASES.value),
        file=FIXED.value,
        stride=STRIDE.value,
        bert_folder=BERT_FOLDER.value,
    )
    writer = _base_alone() if BASE.value is not None else _trained()
    if writer.data is None or not writer.neighbours:
        retrieval.check_off()
    if TRACE.value:
        _check_trace(writer, TRACE.value)
    for flag in (TRACE, LINES):
        if flag.value and not pathlib.Path(flag.value).absolute().parent.is_dir():
            message = "expected a file in a directory that is there"
            raise UserError(f"--{flag.name}={flag.value}: {message}")
    request = {
        "prompts": prompts,
        "num_samples": NUM_SAMPLES.value,
        "sampling": sampling.record(),
        "neighbours": writer.neighbours,
        "model": writer.identity,
        "execution": backend.facts(writer.execution),
    }
    if writer.data is not None and writer.neighbours:
        request |= retrieval.identity(writer.data)
    mixture = _mixture(writer)
    if mixture is not None:
        request["token_memory"] = list(_memory(writer, MIXTURE).hashes)
        request["mixture"] = hashlib.sha256(mixture.weights.tobytes()).hexdigest()
    digest = hashlib.sha256(files.to_json(request)).hexdigest()[:_ID_DIGITS]
    path = None
    if app.WORKDIR.value is not None:
        path = pathlib.Path(app.WORKDIR.value) / SAMPLES / f"{digest}.json"
    if path is not None and path.is_file() and not TRACE.value:
        result = files.read_json(path, *SAMPLE_FIELDS)
    else:
        texts = [prompt for prompt in prompts for _ in range(NUM_SAMPLES.value)]
        made = make_samples(writer, retrieval, mixture, sampling=sampling, prompts=texts)
        result = request | made
        if path is not None:
            with files.writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomically(path, files.to_json(result))
    print(as_text(result, min(shutil.get_terminal_size((120, 40)).columns, 200)))
    if LINES.value:
        lines = [f"{json.dumps(each)}\n" for each in result["samples"]]
        files.write_atomically(pathlib.Path(LINES.value), "".join(lines).encode())
    if written := [str(each) for each in (path, TRACE.value, LINES.value) if each]:
        print(f"written to {' and '.join(written)}")


def _sampling() -> SamplingConfig:
    """As the flags say."""
    return SamplingConfig(
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


def _trained() -> _Writer:
    """The run W/retro."""
    workdir, data = workdirs.open_to_read(DATA)
    run = trained_run.open_run(
        workdir / "retro", configurables.GIN_BINDINGS.value, averaged=AVERAGED.value
    )
    trained_run.check_data(run, data)
    return _Writer(
        run.identity(),
        run.execution,
        Tokenizer.open(data / "tokenizer"),
        run.chunks,
        lambda: nnx.merge(*trained_run.load_model(run)),
        data,
        _neighbours(run),
        run.batches.neighbour_part,
    )


def _base_alone() -> _Writer:
    """The model of --base, which has no memory."""
    if RETRIEVAL.value not in (None, ["off"]):
        raise UserError(
            f"--retrieval={','.join(RETRIEVAL.value)} with --base: expected off, or --workdir of a"
            " run that launch.retrofit fitted, without --base"
        )
    base = open_base(app.required(BASE, "a Hugging Face folder or a .gguf file"))
    tokenizer = open_base_tokenizer(base.path, vocab_size=base.config.vocab_size)
    ids = tokenizer.manifest.hash
    config, execution = decoder_config(base.config, pad_id=tokenizer.pad_id), ExecutionConfig()
    data = None
    if DATA.value is not None:  # drafts come from there
        data = data_directory(DATA.value)
        check_base_tokenizer(data / "tokenizer", base.path, vocab_size=base.config.vocab_size)
    return _Writer(
        {"base": base.fingerprint(), "decoder": base_settings(base.config), "tokenizer": ids},
        execution,
        tokenizer,
        max(1, min(base.config.context_length // config.chunk_length, _MOST_CHUNKS)),
        lambda: load_decoder(base, config, execution),
        data,
    )


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


def _memory(writer: _Writer, flag: flags.FlagHolder) -> TokenMemory:
    """The token memory of the database, which a flag asks for; built where it is missing."""
    if writer.data is None:
        raise UserError(
            f"--{flag.name}={flag.value} without a database: expected --data or a trained --workdir"
        )
    return prepare_and_open(open_database(writer.data, REVISION.value))


def _look_up(writer: _Writer) -> LookUp | None:
    """Drafts from the whole database, but for excluded documents."""
    if DRAFTS.value != "database":
        return None
    memory = _memory(writer, DRAFTS)
    return MemoryDrafts(memory, excluded_numbers(memory.database, EXCLUDE.value))


def _mixture(writer: _Writer) -> Mixture | None:
    """The token memory's votes, with the weights that launch.evaluate tuned."""
    if not MIXTURE.value:
        return None
    memory = _memory(writer, MIXTURE)
    excluded = excluded_numbers(memory.database, EXCLUDE.value)
    workdir = app.required(app.WORKDIR, "the directory of a run")
    known = (writer.identity, memory.database.manifest.hash, writer.neighbours)
    weights = tuned_weights(pathlib.Path(workdir) / "evaluation", *known)
    return Mixture(memory_votes(memory, excluded), weights)


def _check_trace(writer: _Writer, page: str) -> None:
    """Refuses --trace where it cannot be made."""
    if writer.data is None or FIXED.value or STRIDE.value != CHUNK_LENGTH:
        raise UserError(f"--trace={page}: expected a database, retrieved from at every chunk's end")


def _page(model: Retro, writer: _Writer, samples: Sequence[Sample], retrieve: Lookup | None) -> str:
    """The page of --trace."""
    assert writer.data is not None
    if retrieve is None:
        chunks = open_database(writer.data)
        library = DatabaseLibrary(writer.tokenizer, chunks, open_existing(chunks))
    else:
        library = retrieve.database.library()

    def found(chunk: np.ndarray) -> Sequence[NeighbourSource | None]:
        return library.sources(*retrieve.found(chunk)) if retrieve is not None else []

    facts = [("model", str(app.WORKDIR.value)), ("database", str(writer.data))]
    return trace_page(
        [
            traced_text(
                model,
                sample.generation,
                found,
                library,
                chunks=writer.chunks,
                heading=sample.prompt,
                facts=facts,
            )
            for sample in samples
        ]
    )


def make_samples(
    writer: _Writer,
    retrieval: LiveSettings,
    mixture: Mixture | None,
    *,
    sampling: SamplingConfig,
    prompts: Sequence[str],
) -> dict[str, Any]:
    """A sample of each prompt, with the neighbours of each chunk, as JSON takes it."""
    tokenizer, source, retrieve = writer.tokenizer, None, None
    if writer.data is not None and writer.neighbours:
        source = retrieval.open(writer.data, tokenizer, writer.neighbours, writer.part)
        retrieve = Lookup(source, writer.neighbours)
    model = writer.load()
    special = tokenizer.special_ids - {tokenizer.eos_id}
    generator = Generator(
        model,
        chunks=writer.chunks,
        eos_id=tokenizer.eos_id,
        retrieve=retrieve,
        forbidden=[*special, *range(tokenizer.vocab_size, model.config.vocab_size)],
        decode=tokenizer.decode if sampling.stop else None,
        options=GeneratorOptions(
            neighbours=writer.neighbours or None,
            stride=retrieval.stride if retrieve is not None else None,
            drafts=DRAFTS.value != "off",
            look_up=_look_up(writer),
            mixture=mixture,
        ),
    )
    samples: list[Sample] = []
    size = max(1, _AT_ONCE // NUM_SAMPLES.value) * NUM_SAMPLES.value
    blocks = [prompts[first : first + size] for first in range(0, len(prompts), size)]
    with progress_bar(len(blocks) * sampling.max_tokens, "sampling", "token") as bar:
        for block in blocks:
            samples += sample_text(generator, tokenizer, block, sampling, on_step=bar.update)
    made: dict[str, Any] = {"samples": []}

    def views(chunk: np.ndarray, reader: np.ndarray) -> list[NeighbourView]:
        return source.views(*retrieve.found(chunk), reader) if source and retrieve else []

    if TRACE.value:
        page = _page(model, writer, samples, retrieve)
        files.write_atomically(pathlib.Path(TRACE.value), page.encode())
    for sample in samples:
        text = sample.generation
        fields = {
            "prompt": sample.prompt,
            "text": sample.text,
            "finished": text.finished,
            "tokens": text.tokens.tolist(),
            "prompt_length": text.prompt_length,
            "log_probabilities": text.log_probabilities.tolist(),
        }
        parts = sampled_chunks(text.tokens, text.prompt_length, tokenizer, views)
        made["samples"].append(fields | {"chunks": [dataclasses.asdict(part) for part in parts]})
    if retrieve is not None and isinstance(source, SeveralDatabases):
        pairs = zip(source.identity(), source.shares(retrieve.ids()), strict=True)
        return made | {"databases": [{**place, "share": share} for place, share in pairs]}
    return made


if __name__ == "__main__":
    app.run(main)
