"""A random sample of a split's chunks, for scores that a whole split would take too long for."""

import dataclasses

import numpy as np

from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.evaluation.splits import Split
from data_pipelines.evaluation.texts import MEASURE_NAMES

RUN = 4  # consecutive chunks that are drawn together, so that they share their context


def sampled(split: Split, count: int, tokenizer: Tokenizer) -> Split:
    """A split of which only `count` random chunks are scored, in runs of RUN; the same ones each time.

    Bytes, words and lines are those of the sampled chunks. A word across a chunk's edge counts on both
    sides. Documents without a sampled chunk are left out.

    Args:
      split: whole. count: chunks, rounded up to whole runs. tokenizer: of its text.
    """
    runs = -(-len(split.ids) // RUN)
    drawn = np.random.Generator(np.random.Philox(0)).permutation(runs)[: -(-count // RUN)]
    wanted = np.isin(np.arange(len(split.ids)) // RUN, drawn)
    owners = split.database.documents(split.ids)
    keep = np.isin(owners, owners[wanted])
    part = dataclasses.replace(split, ids=split.ids[keep], wanted=wanted[keep])
    return dataclasses.replace(part, measures=_measures(part, tokenizer))


def _measures(split: Split, tokenizer: Tokenizer) -> np.ndarray:
    """[documents, 4] int64, of the chunks that are scored."""
    lengths, database = tokenizer.byte_lengths, split.database
    mask = split.text_mask(lengths)
    tokens, owners = database.chunks(split.ids), database.documents(split.ids)
    measures = np.zeros((owners.max() + 1, len(MEASURE_NAMES)), np.int64)
    if split.measures is not None:
        measures[:, 3] = split.measures[: len(measures), 3]  # where scoring begins
    for row, inside, owner in zip(tokens, mask, owners, strict=True):
        if inside.any():
            text = tokenizer.decode(row[inside].tolist())
            measures[owner, :3] += (lengths[row[inside]].sum(), len(text.split()), text.count("\n"))
    return measures
