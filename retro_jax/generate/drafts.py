"""Drafts: tokens that probably come next, from places where the text's ending has occurred before.

The model reads the last token and the draft in one block, and draws a token at each place with the
noise of that step. A draft's token stays where it is the one that was drawn; the first that is not is
replaced by what was drawn. So the text is the one that would come without drafts (Leviathan et al.
2022, arXiv 2211.17192, with drafts that are certain):

    text      ... for i in            draft      range ( n )
    block     in  range  (   n        draws      range ( len .       two of three stay; three tokens
    text      ... for i in range ( len                               for one reading of the weights

Drafts come from the neighbours of the last chunk and from the text itself, and from a look-up in a
whole database where that finds a longer ending. A block costs more than a step of one token, so a draft is used
where enough of it will probably stay: what stayed before, after endings of like length, says so.
A draft that is not used says it too, as its first token is compared with the one that comes.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from retro_jax.sharding import target_platform

# (the text's last tokens [n], most tokens) -> (length of the ending that occurs, what followed it)
LookUp = Callable[[np.ndarray, int], tuple[int, np.ndarray]]
# Logits of one token and of a block differ by rounding: a draw that is less ahead is done again.
_NEAR = {"float32": 1e-3, "bfloat16": 0.1}

# Tokens of a block, the last token of the text among them; each size is a program for each capacity.
SIZES = (1, 4, 8)
LONGEST = 32  # tokens of an ending that are compared
_OWN = 2048  # last tokens of the text itself in which it is looked for
_LONGEST_PAUSE = 15  # steps
_BOUNDS = (3, 5, 8, 16)  # least lengths of the classes of endings, but the first
_PRIOR = (0.3, 0.5, 0.7, 0.8, 0.9)  # share of a draft's tokens that stay, before any is seen
_STRENGTH = 2.0  # tokens that the prior counts as
_FORGETTING = 0.97
_WORTH = 1.2  # expected tokens for the cost of one, at least


@dataclasses.dataclass(frozen=True)
class Draft:
    """Tokens that probably come next.

    Attributes:
      tokens: [n] int32, n >= 1. ending: length of the ending after which they came elsewhere.
      of_database: whether a look-up gave them.
    """

    tokens: np.ndarray
    ending: int
    of_database: bool = False


class Acceptance:
    """How many tokens of drafts stayed, of one text, by the length of the ending."""

    def __init__(self) -> None:
        """Nothing has been seen."""
        self._kept = [share * _STRENGTH for share in _PRIOR]
        self._lost = [(1 - share) * _STRENGTH for share in _PRIOR]

    def share(self, ending: int) -> float:
        """The share of tokens that will probably stay, from 0 to 1."""
        kind = self._kind(ending)
        return self._kept[kind] / (self._kept[kind] + self._lost[kind])

    def observe(self, ending: int, kept: int, *, lost: bool) -> None:
        """Takes in that `kept` tokens stayed, and that the next one did not."""
        kind = self._kind(ending)
        self._kept[kind] = _FORGETTING * self._kept[kind] + kept
        self._lost[kind] = _FORGETTING * self._lost[kind] + int(lost)

    @staticmethod
    def _kind(ending: int) -> int:
        """The class of an ending's length."""
        return int(np.searchsorted(_BOUNDS, ending, side="right"))


@dataclasses.dataclass
class Drafting:
    """The drafts of one text.

    Attributes:
      draft: of the tokens that come next. acceptance: of those before.
      is_near: whether the last draw was too near to call, so that it is drawn after one token.
      rest: steps until the database is asked again. pause: the length of the last rest.
    """

    draft: Draft | None = None
    acceptance: Acceptance = dataclasses.field(default_factory=Acceptance)
    is_near: bool = False
    rest: int = 0
    pause: int = 0

    def database_helped(self, helped: bool) -> None:
        """Asks the database again at once, or after a rest that grows while it does not help."""
        self.pause = 0 if helped else min(2 * self.pause + 1, _LONGEST_PAUSE)
        self.rest = self.pause


class Drafter:
    """Makes blocks with drafts, and says how much of them the model's draws keep.

    Attributes:
      drafted: tokens of drafts read so far. kept_tokens: of these, those that stayed.
    """

    def __init__(self, pad_id: int, dtype: str, look_up: LookUp | None = None):
        """`pad_id` of neighbours; `dtype` of activations; `look_up` as in `find_draft`."""
        self.drafted, self.kept_tokens = 0, 0
        self._pad_id, self._look_up = pad_id, look_up
        self._costs, self._near = block_costs(), _NEAR[dtype]

    def propose(
        self,
        drafting: Drafting,
        text: Sequence[int],
        neighbours: np.ndarray | None,
        *,
        most: int,
    ) -> None:
        """Finds a text's draft; arguments as of `find_draft`."""
        asks = self._look_up is not None and drafting.rest <= 0
        drafting.rest -= 1
        drafting.draft = find_draft(
            text,
            neighbours,
            most=min(most, SIZES[-1] - 1),
            pad_id=self._pad_id,
            look_up=self._look_up if asks else None,
        )
        if asks and (drafting.draft is None or not drafting.draft.of_database):
            drafting.database_helped(False)

    def block(
        self, tokens: np.ndarray, texts: Mapping[int, Drafting], limit: int
    ) -> np.ndarray | None:
        """The tokens to read at once.

        Args:
          tokens: [B, 1] the texts' last tokens. texts: by row. limit: tokens of a block at most.

        Returns:
          [B, T] with drafts after the last tokens, or None where one token is read.
        """
        if any(drafting.is_near for drafting in texts.values()):
            return None
        drafts = {row: drafting.draft for row, drafting in texts.items()}
        hopes = [
            (0, 0.0)
            if drafting.draft is None
            else (len(drafting.draft.tokens), drafting.acceptance.share(drafting.draft.ending))
            for drafting in texts.values()
        ]
        size = block_size(hopes, limit, self._costs)
        if size == 1:
            return None
        block = np.repeat(tokens, size, axis=1)
        for row, draft in drafts.items():
            if draft is not None:
                own = draft.tokens[: size - 1]
                block[row, 1 : 1 + len(own)] = own
        return block

    def kept(self, drafting: Drafting, tokens: np.ndarray, ahead: np.ndarray) -> int:
        """How many of a block's draws are the text's next tokens; learns from them.

        Args:
          drafting: of the text. tokens: [T] draws after each token of the block.
          ahead: [T] how far each was ahead of the next likely one.
        """
        draft, drafting.draft, drafting.is_near = drafting.draft, None, False
        length = 0 if draft is None else min(len(draft.tokens), len(tokens) - 1)
        count, lost = 0, False
        while count <= length and not lost:
            if ahead[count] < self._near:
                drafting.is_near = True
                break
            # Where the draft was not read, its first token is compared all the same.
            if draft is not None and count < max(length, 1):
                lost = bool(tokens[count] != draft.tokens[count])
            count += 1
        if draft is not None:
            stayed = min(count - int(lost), max(length, 1))
            drafting.acceptance.observe(draft.ending, stayed, lost=lost)
            if draft.of_database:
                drafting.database_helped(stayed > 0)
            self.drafted += length
            self.kept_tokens += min(stayed, length)
        return count


def find_draft(
    text: Sequence[int],
    neighbours: np.ndarray | None,
    *,
    most: int,
    pad_id: int,
    look_up: LookUp | None = None,
) -> Draft | None:
    """What followed the longest ending of a text, in its neighbours, in itself or in a database.

    Args:
      text: all tokens so far. neighbours: [K, R] of its last complete chunk, or None.
      most: tokens of a draft, at most.
      pad_id: of neighbours.
      look_up: asks a database, where the ending is not found whole at once.
    """
    if most < 1:
        return None
    ending = np.asarray(text[-LONGEST:], np.int32)
    best, draft, of_database = 0, np.zeros(0, np.int32), False
    own = np.asarray(text[-_OWN:], np.int32)[None]
    for rows in (own, neighbours) if neighbours is not None else (own,):
        for row in rows:
            # The last place of the text is the ending itself.
            length, place = longest_ending(ending, row[:-1])
            following = row[place + 1 : place + 1 + most]
            following = _before(following, pad_id)
            if length and len(following) and (length, len(following)) > (best, len(draft)):
                best, draft = length, following
    if look_up is not None and best < len(ending):
        length, following = look_up(ending, most)
        following = _before(np.asarray(following, np.int32)[:most], pad_id)
        if length > best and len(following):
            best, draft, of_database = length, following, True
    return Draft(np.asarray(draft, np.int32), best, of_database) if len(draft) else None


def longest_ending(ending: np.ndarray, text: np.ndarray) -> tuple[int, int]:
    """The longest ending of one array that occurs in another.

    Args:
      ending: [n] tokens, of which the last ones are looked for. text: [m] tokens.

    Returns:
      Its length, and the place in `text` of its last token; of equally long ones the last. (0, -1)
      where not even the last token occurs.
    """
    places = np.flatnonzero(text == ending[-1])
    if not len(places):
        return 0, -1
    length = 1
    while length < len(ending):
        longer = places[places >= length]
        longer = longer[text[longer - length] == ending[-1 - length]]
        if not len(longer):
            break
        places, length = longer, length + 1
    return length, int(places[-1])


def _before(tokens: np.ndarray, token: int) -> np.ndarray:
    """The tokens before the first that is `token`."""
    ends = np.flatnonzero(tokens == token)
    return tokens[: ends[0]] if len(ends) else tokens


def block_costs() -> dict[int, float]:
    """The time of a block of each of SIZES over that of one token.

    On a CPU somewhat more than docs/generation.md measured: other work on its cores slows blocks more.

    A step waits for the weights to come from memory. Larger blocks wait for a CPU's arithmetic.
    """
    if target_platform() != "cpu":
        return {size: 1 + 0.01 * (size - 1) for size in SIZES}
    return dict(zip(SIZES, (1.0, 1.3, 2.0), strict=True))


def block_size(drafts: Sequence[tuple[int, float]], limit: int, costs: dict[int, float]) -> int:
    """Tokens of the block of most expected tokens for its cost; 1 for none.

    Args:
      drafts: of every text the length of its draft, 0 for none, and the share that will stay.
      limit: tokens of a block at most. costs: of each size.
    """
    best, value = 1, _WORTH
    for size in SIZES[1:]:
        if size > limit:
            break
        expected = [expected_tokens(min(length, size - 1), share) for length, share in drafts]
        rate = sum(expected) / len(expected) / costs[size]
        if rate > value:
            best, value = size, rate
    return best


def expected_tokens(length: int, share: float) -> float:
    """Tokens of one block with a draft: those that stay, up to the first that does not, and one more."""
    if share >= 1:
        return 1.0 + length
    return float((1 - share ** (length + 1)) / (1 - share))
