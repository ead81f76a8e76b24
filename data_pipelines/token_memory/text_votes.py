"""What a token memory says of every token of a text: the votes beside which the text is scored."""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.token_memory.memory import LONGEST, MOST_VOTES, Match, TokenMemory


@dataclasses.dataclass(frozen=True)
class TextVotes:
    """The votes on the tokens [t] of a text, in its order.

    Attributes:
      lengths: [t] int32 tokens of the longest ending before the token that occurs; 0 for none.
      counts: [t] int32 votes. agreements: [t] float32 the share of the token with most votes.
      shares: [t] float32 the share of the token that follows.
      documents: [t] int64 a document that votes for the token that follows; -1 for none.
    """

    lengths: np.ndarray
    counts: np.ndarray
    agreements: np.ndarray
    shares: np.ndarray
    documents: np.ndarray


def votes_on(
    memory: TokenMemory,
    text: ChunkDatabase,
    ids: np.ndarray,
    mask: np.ndarray,
    *,
    longest: int = LONGEST,
    most_votes: int = MOST_VOTES,
    on_chunks: Callable[[int], object] = lambda count: None,
) -> TextVotes:
    """Looks up what precedes each token of a text within its document.

    Args:
      memory: of the retrieval database, which has the text's tokeniser.
      text: the chunk database of the text; none of its documents are in the retrieval database.
      ids: [n] int64 its chunks that are scored, ascending and in whole documents.
      mask: [n, 64] bool the t tokens of which votes are wanted.
      longest, most_votes: as `TokenMemory.match` takes them.
      on_chunks: called with how many more chunks are done.
    """
    owners = text.documents(ids)
    borders = np.flatnonzero(np.diff(owners, prepend=-1, append=-1))
    columns: list[list[float]] = []
    for first, last in itertools.pairwise(borders):
        rows = text.chunks(ids[first:last])
        is_scored = mask[first:last]
        tokens, is_scored = rows[rows != text.pad_id], is_scored[rows != text.pad_id]
        for position in np.flatnonzero(is_scored):
            ending = tokens[max(0, position - longest) : position]
            match = memory.match(ending, longest=longest, most_votes=most_votes)
            columns.append(_row(match, int(tokens[position])))
        on_chunks(int(last - first))
    table = np.array(columns, np.float64).reshape(-1, 5).T
    return TextVotes(
        lengths=table[0].astype(np.int32),
        counts=table[1].astype(np.int32),
        agreements=table[2].astype(np.float32),
        shares=table[3].astype(np.float32),
        documents=table[4].astype(np.int64),
    )


def _row(match: Match, token: int) -> list[float]:
    """The five figures of a token."""
    if not len(match.tokens):
        return [match.length, 0, 0.0, 0.0, -1]
    _, counts = np.unique(match.tokens, return_counts=True)
    right = match.tokens == token
    document = int(match.documents[right][0]) if right.any() else -1
    total = len(match.tokens)
    return [match.length, total, counts.max() / total, right.sum() / total, document]
