"""A base model's byte-level BPE: from tokenizer.json or out of a GGUF file, made lossless.

Byte-level BPE writes each byte of a text as one printable character and merges them. What is changed:

- Normalisation (NFC of Qwen and Pythia) is left out, for it changes bytes. Text in NFC, which is
  nearly all, has the same ids.
- No space is put before the text. Special tokens in a text are text.
- Bytes that the vocabulary lacks (SmolLM2's has no U+0004) become those control tokens that text never
  uses, the last first.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from data_pipelines.chunk_database.encodings import byte_level_model
from retro_jax.errors import UserError
from retro_jax.storage import files

_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
_BYTES_ONLY = _GPT2 | {"use_regex": False}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NORMALIZERS = ("NFC",)
_CONTROL, _UNKNOWN, _USER, _UNUSED = 3, 2, 4, 5  # GGUF's types of tokens
_MOST_UNUSED = 1024  # ids beyond twice the tokens: more is a damaged file


def _split(digits: str) -> dict[str, Any]:
    """Llama 3's and Qwen's cut before the bytes, with runs of so many digits."""
    pattern = {"Regex": _WORDS % digits}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


# How a text is cut into words, by GGUF's tokenizer.ggml.pre; and whether a word that is a token is
# never merged otherwise.
_PRE: Mapping[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([_GPT2], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, _GPT2], False),
    "llama-bpe": ([_split("{1,3}"), _BYTES_ONLY], True),
    "qwen2": ([_split(""), _BYTES_ONLY], False),
}


@dataclasses.dataclass
class Vocabulary:
    """A tokenizer.json in the making.

    Attributes:
      path: where it is from.
      fields: the content of tokenizer.json.
      token_bytes: the UTF-8 bytes of each id; none for special tokens and ids without a token.
      special: text of special tokens -> id.
    """

    path: pathlib.Path
    fields: dict[str, Any]
    token_bytes: list[bytes]
    special: dict[str, int]

    def spell_missing_bytes(self, kept: set[int]) -> dict[int, int]:
        """Gives the bytes that the vocabulary lacks to special tokens other than `kept`.

        Returns:
          byte -> id.

        Raises:
          UserError: there are too few such tokens.
        """
        vocab = self.fields["model"]["vocab"]
        missing = [byte for byte in _utf8_bytes() if _characters()[byte] not in vocab]
        spare = sorted((i for i in self.special.values() if i not in kept), reverse=True)
        if len(spare) < len(missing):
            raise UserError(
                f"{self.path} lacks {len(missing)} of the bytes of UTF-8, and has {len(spare)} spare"
                " special tokens: expected a byte-level vocabulary"
            )
        used = dict(zip(missing, spare))
        if used:  # the package numbers added tokens anew that the vocabulary does not have
            vocab |= {token["content"]: token["id"] for token in self.fields["added_tokens"]}
        names = {i: name for name, i in self.special.items()}
        for byte, i in used.items():
            del vocab[names[i]]
            vocab[_characters()[byte]] = i
            self.token_bytes[i] = bytes([byte])
            del self.special[names[i]]
        added = self.fields["added_tokens"]
        self.fields["added_tokens"] = [t for t in added if t["id"] not in used.values()]
        return used

    def put_first(self, token: str) -> None:
        """Has the package put a special token before texts, as some bases do."""
        text = {"Sequence": {"id": "A", "type_id": 0}}
        first = {"SpecialToken": {"id": token, "type_id": 0}}
        known = {"id": token, "ids": [self.special[token]], "tokens": [token]}
        self.fields["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {token: known},
        }

    def to_json(self) -> bytes:
        """The bytes of tokenizer.json."""
        return files.to_json(self.fields)


def read_tokenizer_json(path: pathlib.Path) -> Vocabulary:
    """Reads tokenizer.json.

    Raises:
      UserError: no byte-level BPE, or one that loses parts of a text.
    """
    fields = files.read_json(path)
    loaded = byte_level_model(json.dumps(fields), path)
    model = fields["model"]
    if model.get("type") != "BPE" or not _is_byte_level(fields.get("pre_tokenizer")):
        raise UserError(
            f"{path} is no byte-level BPE: expected one, or a tokenizer.model beside it"
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UserError(f"{path}: model.{name} is {model[name]!r}: expected none")
    for part in _parts(fields.get("normalizer"), "normalizers"):
        if part.get("type") not in _NORMALIZERS:
            raise UserError(
                f"{path} normalises by {part.get('type')!r}: expected one of {_NORMALIZERS}"
            )
    pre = _parts(fields["pre_tokenizer"], "pretokenizers")
    for part in pre:
        keeps = part.get("behavior") != "Removed"
        if part.get("type") not in ("ByteLevel", "Split", "Digits", "Punctuation") or not keeps:
            raise UserError(f"{path} cuts words by {part.get('type')!r}: expected no loss of text")
        if part["type"] == "ByteLevel":
            part["add_prefix_space"] = False
    fields |= {"normalizer": None, "post_processor": None, "truncation": None, "padding": None}
    fields["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": pre}
    model["dropout"] = None
    added = fields.get("added_tokens") or []
    for token in added:
        token |= {"lstrip": False, "rstrip": False}
        if loaded.token_to_id(token["content"]) != token["id"]:
            token_id = loaded.token_to_id(token["content"])
            rule = f"expected {token_id}, the next after the others"
            raise UserError(f"{path}: {token['content']!r} has id {token['id']}: {rule}")
    fields["added_tokens"] = added
    return _vocabulary(path, fields)


def read_gguf_vocabulary(path: pathlib.Path, metadata: Mapping[str, Any]) -> Vocabulary:
    """Rebuilds tokenizer.json from a GGUF file's metadata.

    Raises:
      UserError: no tokens, another kind than byte-level BPE, or an unknown way to cut words.
    """
    model, pre = (metadata.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if model != "gpt2":
        raise UserError(
            f"{path}: tokenizer.ggml.model is {model!r}: expected 'gpt2', byte-level BPE"
        )
    if not isinstance(pre, str) or pre not in _PRE:
        raise UserError(f"{path}: tokenizer.ggml.pre is {pre!r}: expected one of {sorted(_PRE)}")
    tokens, merges = (metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "merges"))
    if not isinstance(tokens, list) or not isinstance(merges, list):
        raise UserError(f"{path} has no tokenizer.ggml.tokens and merges: expected a vocabulary")
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if not isinstance(types, list) or not all(isinstance(kind, int) for kind in types):
        raise UserError(f"{path}: tokenizer.ggml.token_type is no list: expected integers")
    if len(types) != len(tokens):
        raise UserError(f"{path} has {len(types)} token types: expected {len(tokens)}")
    words, whole = _PRE[pre]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, "special": kind != _USER, **flags}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _UNKNOWN, _USER)
    ]
    fields = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [dict(word) for word in words]},
        "post_processor": None,
        "decoder": dict(_GPT2),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": whole,
            "vocab": {t: i for i, (t, kind) in enumerate(zip(tokens, types)) if kind != _UNUSED},
            "merges": merges,
        },
    }
    byte_level_model(json.dumps(fields), path)
    return _vocabulary(path, fields)


def _vocabulary(path: pathlib.Path, fields: dict[str, Any]) -> Vocabulary:
    """The bytes of every id, and which tokens are special."""
    vocab, added = fields["model"]["vocab"], fields["added_tokens"]
    size = 1 + max([*vocab.values(), *(token["id"] for token in added)], default=-1)
    most = 2 * (len(vocab) + len(added)) + _MOST_UNUSED
    if not 0 < size <= most:
        raise UserError(f"{path} has ids up to {size - 1}: expected some, below {most}")
    table, values = [b""] * size, {c: byte for byte, c in _characters().items()}
    for token, i in vocab.items():
        if all(character in values for character in token):
            table[i] = bytes(values[character] for character in token)
    special = {}
    for token in added:
        table[token["id"]] = b"" if token["special"] else token["content"].encode()
        if token["special"]:
            special[token["content"]] = token["id"]
    return Vocabulary(path, fields, table, special)


def _parts(component: Any, name: str) -> list[dict[str, Any]]:
    """The components of a Sequence, of a single one, or of none."""
    if component is None:
        return []
    if component.get("type") == "Sequence":
        return [part for inner in component.get(name, []) for part in _parts(inner, name)]
    return [component]


def _is_byte_level(pre_tokenizer: Any) -> bool:
    """Whether words are written as bytes in the end."""
    parts = _parts(pre_tokenizer, "pretokenizers")
    return bool(parts) and parts[-1].get("type") == "ByteLevel"


@functools.cache
def _characters() -> dict[int, str]:
    """byte -> the character that represents it: itself if printable, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(0x100 + number) for number, byte in enumerate(others)
    }


def _utf8_bytes() -> list[int]:
    """The bytes that occur in UTF-8."""
    return [byte for byte in range(0xF5) if byte not in (0xC0, 0xC1)]
