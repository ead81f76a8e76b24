"""A generated text chunk by chunk, each with its neighbours and where they are from; files of prompts."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from data_pipelines.artefacts.manifest import Path
from data_pipelines.chunk_database.database import CHUNK_LENGTH
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.evaluation.text_view import sample_chunk_from_json
from retro_jax.errors import UserError
from retro_jax.report.side_by_side import side_by_side
from retro_jax.report.views import NeighbourView, SampleChunk

# Of a chunk [64] and the tokens [n] that read its neighbours: what is shown of these.
Views = Callable[[np.ndarray, np.ndarray], list[NeighbourView]]


def sampled_chunks(
    tokens: np.ndarray, prompt_length: int, tokenizer: Tokenizer, views_of: Views | None
) -> list[SampleChunk]:
    """The chunks of a text; runs that a neighbour shares with the chunk after it are marked.

    Args:
      tokens: [n] of the whole text. prompt_length: how many are the prompt.
      views_of: the neighbours of a chunk; None where nothing is known of these.
    """
    chunks = []
    for start in range(0, len(tokens), CHUNK_LENGTH):
        chunk = tokens[start : start + CHUNK_LENGTH]
        prompt = min(max(prompt_length - start, 0), CHUNK_LENGTH)
        views: list[NeighbourView] = []
        if views_of is not None:
            views = views_of(chunk, tokens[start + CHUNK_LENGTH : start + 2 * CHUNK_LENGTH])
        given, made = (tokenizer.decode(part) for part in (chunk[:prompt], chunk[prompt:]))
        chunks.append(SampleChunk(given, made, views))
    return chunks


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file of JSON lines, {"prompt": ...} each; empty lines are left out.

    Raises:
      UserError: no such file, a line of another form, or no line.
    """
    file = pathlib.Path(path)
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}): expected JSON lines") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError):
            prompt = None
        if not isinstance(prompt, str):
            raise UserError(f'{file}, line {number}: expected {{"prompt": "..."}}')
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{file} has no line: expected prompts")
    return prompts


def as_text(result: Mapping[str, Any], width: int) -> str:
    """Samples as launch.sample records them, the neighbours of each chunk beside it."""
    settings = shown_settings(result["sampling"])
    lines = []
    for number, sample in enumerate(result["samples"], 1):
        count = len(sample["tokens"]) - sample["prompt_length"]
        end = "ended by the model" if sample["finished"] else "stopped"
        heading = (
            f" sample {number} of {len(result['samples'])}: {count} tokens, {end} ({settings}) "
        )
        lines.append(f"{heading:─^{width}}")
        chunks = [sample_chunk_from_json(fields) for fields in sample["chunks"]]
        lines.append(side_by_side(chunks, width))
    return "\n".join([*lines, "─" * width])


def shown_settings(sampling: Mapping[str, Any]) -> str:
    """The settings of sampling that were set, in a line."""
    return ", ".join(_shown(*setting) for setting in sampling.items() if setting[1] not in ((), []))


def _shown(name: str, value: Any) -> str:
    """A setting of sampling and its value."""
    return f"{name} {value:g}" if isinstance(value, int | float) else f"{name} {value}"
