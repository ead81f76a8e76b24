"""The word pieces of a BERT's folder: vocab.txt, or the tokenizer.json that transformers writes since 5.0."""

import dataclasses
from pathlib import Path
from typing import Any

from data_pipelines.retriever.bert import read_json
from retro_jax.errors import UserError
from retro_jax.storage import files

VOCABULARY, TOKENIZER = "vocab.txt", "tokenizer.json"
_LONGEST = 256  # bytes of a piece
_NEEDED = ("[CLS]", "[SEP]", "[UNK]")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The word pieces of a folder.

    Attributes:
      file: the name of the file that they are from.
      pieces: in the order of their ids.
      lower_case: whether case and accents are dropped; None where the file does not say.
    """

    file: str
    pieces: tuple[str, ...]
    lower_case: bool | None = None

    @classmethod
    def read(cls, folder: Path) -> "Vocabulary":
        """Reads vocab.txt, else tokenizer.json.

        Raises:
          UserError: neither is there, or it is no vocabulary of word pieces; it names the file.
        """
        if (folder / VOCABULARY).is_file() or not (folder / TOKENIZER).is_file():
            path = folder / VOCABULARY
            lines = files.read_text_lines(path, f"a WordPiece vocabulary (or {TOKENIZER})")
            while lines and not lines[-1]:
                lines.pop()
            found = cls(VOCABULARY, tuple(lines))
        else:
            path = folder / TOKENIZER
            found = _of_tokenizer(path)
        for token in _NEEDED:
            if token not in found.pieces:
                raise UserError(f"{path}: no {token}: expected a WordPiece vocabulary")
        return dataclasses.replace(found, pieces=_reachable(found.pieces))


def _reachable(pieces: tuple[str, ...]) -> tuple[str, ...]:
    """The pieces, with a name of its own for each that no text is cut into.

    That is one that comes again, whose last id counts, one with a NUL, or a very long one; tensorflow-text
    takes none of them.
    """
    last = {piece: i for i, piece in enumerate(pieces)}
    return tuple(
        piece
        if last[piece] == i and "\0" not in piece and len(piece.encode()) <= _LONGEST
        else f"[no text {i}]"
        for i, piece in enumerate(pieces)
    )


def _of_tokenizer(path: Path) -> Vocabulary:
    """The vocabulary in a file of the package tokenizers."""
    stored = read_json(path)
    model = stored.get("model")
    fields: dict[str, Any] = model if isinstance(model, dict) else {}
    expected = {"type": "WordPiece", "continuing_subword_prefix": "##", "unk_token": "[UNK]"}
    for name, value in expected.items():
        if fields.get(name) != value:
            raise UserError(f"{path}: model.{name} is {fields.get(name)!a}: expected {value!r}")
    vocab = fields.get("vocab")
    numbers = list(vocab.values()) if isinstance(vocab, dict) else []
    plain = all(isinstance(i, int) and not isinstance(i, bool) for i in numbers)
    if not (numbers and plain and sorted(numbers) == list(range(len(numbers)))):
        raise UserError(f"{path}: model.vocab: expected word pieces with the ids 0, 1, 2, ...")
    assert isinstance(vocab, dict)
    normalizer = stored.get("normalizer")
    kind = normalizer.get("type") if isinstance(normalizer, dict) else None
    if not isinstance(normalizer, dict) or kind != "BertNormalizer":
        raise UserError(f"{path}: the normalizer is {kind!a}: expected 'BertNormalizer'")
    lower = normalizer.get("lowercase")
    strips = normalizer.get("strip_accents")
    if not isinstance(lower, bool) or strips not in (None, lower):
        raise UserError(
            f"{path}: lowercase is {lower!a} and strip_accents {strips!a}: expected both alike"
        )
    return Vocabulary(TOKENIZER, tuple(sorted(vocab, key=vocab.__getitem__)), lower)
