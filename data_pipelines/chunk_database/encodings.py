"""How a base model's own tokeniser turns text into ids: byte-level BPE, or its SentencePiece model.

Both give ids whose bytes, one after the other, are those of the text. See base_tokenizer.py for what
is changed in the model's files so that this is so.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import sentencepiece

from retro_jax.errors import UserError

BYTE_LEVEL, SENTENCEPIECE = "byte-level BPE", "SentencePiece"
FILES = {BYTE_LEVEL: "tokenizer.json", SENTENCEPIECE: "tokenizer.model"}
INSTALL = "expected `pip install retro-jax[fit]`"
# What SentencePiece takes to mean something; spelt in bytes instead.
_SPELT = re.compile("([\u2581\0])")


class Encoding(Protocol):
    """Text to ids."""

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        """[n_i] int32 ids of each text; the same for any number of threads."""
        ...


class ByteLevelEncoding:
    """Byte-level BPE by the package tokenizers, from the text of a tokenizer.json."""

    def __init__(self, text: str, path: pathlib.Path):
        self._model = byte_level_model(text, path)

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        """[n_i] int32 ids of each text."""
        if threads == 1:  # the package's batches use every core
            results = [self._model.encode(text, add_special_tokens=False) for text in texts]
        else:
            results = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, np.int32) for each in results]


class SentencePieceEncoding:
    """A SentencePiece model with byte pieces."""

    def __init__(self, model: bytes):
        self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._bytes = {
            self._model.id_to_piece(i): i
            for i in range(self._model.get_piece_size())
            if self._model.is_byte(i)
        }

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        """[n_i] int32 ids of each text."""
        pieces = [_SPELT.split(text) for text in texts]  # odd ones are to be spelt
        plain = [piece for parts in pieces for piece in parts[::2]]
        ids = iter(self._model.encode(plain, return_type="numpy", num_threads=threads))
        results = []
        for parts in pieces:
            row = [np.zeros(0, np.int32)]
            for number, piece in enumerate(parts):
                row.append(next(ids) if number % 2 == 0 else self._spell(piece))
            results.append(np.concatenate(row).astype(np.int32))
        return results

    def _spell(self, text: str) -> np.ndarray:
        """A text in byte pieces."""
        return np.array([self._bytes[f"<0x{byte:02X}>"] for byte in text.encode()], np.int32)


def open_encoding(kind: str, directory: pathlib.Path) -> Encoding:
    """The encoding of a tokeniser's directory, by the kind that its manifest records."""
    if kind not in FILES:
        raise UserError(f"{directory} has an encoding {kind!r}: expected one of {sorted(FILES)}")
    path = directory / FILES[kind]
    if kind == BYTE_LEVEL:
        return ByteLevelEncoding(path.read_text(encoding="utf-8"), path)
    return SentencePieceEncoding(path.read_bytes())


def byte_level_model(text: str, path: pathlib.Path) -> Any:
    """The package's model of a tokenizer.json, to which special tokens in a text are plain text.

    Raises:
      UserError: the package is not installed, or does not read it.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(f"{path}: the package tokenizers is not installed: {INSTALL}") from error
    try:
        model = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the package raises nothing more precise
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read ({reason}): expected a tokenizer.json") from error
    model.encode_special_tokens = True
    return model


def sentencepiece_bytes(
    model: sentencepiece.SentencePieceProcessor, characters: Mapping[str, str] | None = None
) -> list[bytes]:
    """The UTF-8 bytes that each piece encodes; none for control and unknown pieces.

    Args:
      model: of SentencePiece.
      characters: pieces that encode another text than they spell.
    """
    spellings, table = characters or {}, []
    for i in range(model.get_piece_size()):
        piece = model.id_to_piece(i)
        if model.is_control(i) or model.is_unknown(i) or model.is_unused(i):
            table.append(b"")
        elif model.is_byte(i):
            table.append(bytes([int(piece[3:5], 16)]))
        else:
            table.append(spellings.get(piece, piece.replace("\u2581", " ")).encode())
    return table
