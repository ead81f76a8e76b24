"""A base model's own tokeniser as a chunk database's: an artefact of the same kind, W/tokenizer.

    prepare_base_tokenizer(W / "tokenizer", "SmolLM2-135M", vocab_size=config.vocab_size)
    Tokenizer.open(W / "tokenizer")            encodes as the base does

It comes from a Hugging Face folder (tokenizer.json, else tokenizer.model), a GGUF file, or a file of the
package tokenizers (.json) or of SentencePiece (.model) by itself. Every id below the model's vocab_size has
its exact bytes, none for special tokens. Ids of documents:

    bos    the base's, where the base puts it before a text (Llama); else eos
    eos    what ends a text in training: <|endoftext|> and the like before a chat model's end of a turn
    pad    the base's, if it is a special token other than id 0, bos and any eos; else vocab_size
"""

import dataclasses
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import sentencepiece

from data_pipelines.artefacts.manifest import Manifest, Path
from data_pipelines.artefacts.stage import Stage
from data_pipelines.chunk_database.byte_level import (
    Vocabulary,
    read_gguf_vocabulary,
    read_tokenizer_json,
)
from data_pipelines.chunk_database.encodings import (
    BYTE_LEVEL,
    FILES,
    SENTENCEPIECE,
    ByteLevelEncoding,
    Encoding,
    SentencePieceEncoding,
    byte_level_model,
    sentencepiece_bytes,
)
from data_pipelines.chunk_database.tokenizer import BYTES_FILE, ENDS_FILE, KIND, Tokenizer
from retro_jax.errors import UserError
from retro_jax.storage import files
from retro_jax.storage.gguf_file import open_gguf

_CONFIG, _TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
_TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_MOST_UNUSED = 1024  # rows of an embedding beyond the tokens: widths are rounded up, not doubled
_PROBE = "a  b\tc\r\n\u00a0\u2581 \0 é e\u0301 ﬁ 日本 \U0001f99e \U000e0041 \x04 0123 <s></s><|endoftext|> x"
# Appended to a serialised ModelProto, whose last value of a field counts: a normalizer_spec with
# name "identity", an empty precompiled_charsmap, no added prefix, no whitespace removed.
_IDENTITY = b"\x1a\x10" + b"\x0a\x08identity" + b"\x12\x00" + b"\x18\x00" + b"\x20\x00"


@dataclasses.dataclass
class _Source:
    """What was found of a base's tokeniser.

    Attributes:
      path: its file. encoding: BYTE_LEVEL or SENTENCEPIECE.
      data: the bytes of the artefact's file. encoder: of these.
      token_bytes: the bytes of each token.
      bos, pad: ids, or None. eos: the id that ends a document. adds_bos: whether the base puts bos
        before a text.
      reserved: ids that are not padding, whatever the base says: its own bos and eos.
      special: texts of special tokens, which are text in a text.
      spelt: byte -> the id of the special token that encodes it.
    """

    path: pathlib.Path
    encoding: str
    data: bytes
    encoder: Encoding
    token_bytes: list[bytes]
    bos: int | None
    eos: int
    pad: int | None
    adds_bos: bool
    reserved: frozenset[int | None]
    special: tuple[str, ...]
    spelt: dict[int, int] = dataclasses.field(default_factory=dict)


def prepare_base_tokenizer(
    directory: Path, base: Path, *, vocab_size: int | None = None
) -> Manifest:
    """Writes a base model's tokeniser as an artefact, unless it is there already.

    Args:
      directory: where it goes.
      base: a Hugging Face folder, or a .gguf, .json or .model file.
      vocab_size: rows of the model's embedding (BaseConfig.vocab_size); None for those that its files
        state, or as many as tokens.

    Returns:
      Its manifest. Facts: vocab_size, pad_id, bos_id, eos_id, tokens, adds_bos (the base puts bos
      before a text), spelt_bytes (see byte_level.py).

    Raises:
      UserError: no tokeniser, one that would lose parts of a text, or one of other weights.
    """
    source = _open(pathlib.Path(base))
    tokens = len(source.token_bytes)
    settings = _settings_of(source, _rows(pathlib.Path(base)) if vocab_size is None else vocab_size)
    rows = settings["vocab_size"]
    _check_lossless(source)
    ids = _ids(source, rows)
    stage = Stage(directory, KIND, settings, claim=False)
    if stage.done:
        return stage.manifest()
    # Padding is an id of every array of tokens, so it has a length, 0, even beyond the vocabulary.
    table = source.token_bytes + [b""] * (max(rows, ids["pad_id"] + 1) - tokens)
    stage.claim()
    name = FILES[source.encoding]
    stage.write_file(name, lambda file: _write(file, source.data))
    stage.write_array(BYTES_FILE, np.frombuffer(b"".join(table), np.uint8))
    stage.write_array(ENDS_FILE, np.cumsum([len(token) for token in table], dtype=np.int64))
    facts = {
        "vocab_size": rows,
        "tokens": tokens,
        **ids,
        "spelt_bytes": {str(byte): i for byte, i in source.spelt.items()},
    }
    return stage.finish(facts, [name, BYTES_FILE, ENDS_FILE])


def open_base_tokenizer(base: Path, *, vocab_size: int | None = None) -> Tokenizer:
    """A base model's tokeniser without a workdir; arguments and errors are those of prepare_base_tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder) / "tokenizer"
        prepare_base_tokenizer(directory, base, vocab_size=vocab_size)
        return Tokenizer.open(directory)


def tokenizer_files(base: Path) -> dict[str, bytes]:
    """A GGUF file's tokeniser as a Hugging Face folder has it: name -> the bytes of a file.

    Special tokens are as the model has them. Another base has such files, or none: no name.

    Raises:
      UserError: a vocabulary that is not read.
    """
    path = pathlib.Path(base)
    if path.suffix != ".gguf":
        return {}
    vocabulary, roles, adds_bos = _read_gguf(path)
    texts = {i: text for text, i in vocabulary.special.items()}
    stated = {f"{role}_token": texts[i] for role, i in roles.items() if i in texts}
    template = open_gguf(path).metadata.get("tokenizer.chat_template")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos,
        **stated,
        **({} if template is None else {"chat_template": template}),
    }
    if adds_bos and "bos_token" in stated:
        vocabulary.put_first(stated["bos_token"])
    names = (FILES[BYTE_LEVEL], _TOKENIZER_CONFIG)
    return dict(zip(names, (vocabulary.to_json(), files.to_json(settings)), strict=True))


def check_base_tokenizer(directory: Path, base: Path, *, vocab_size: int) -> Manifest:
    """Refuses a workdir's tokeniser that is not a base model's.

    Args:
      directory: the tokeniser's. base, vocab_size: as in prepare_base_tokenizer.

    Returns:
      Its manifest.

    Raises:
      UserError: it was trained on texts, or is another model's, or one of other weights.
    """
    manifest, source = Manifest.open(directory, KIND), _open(pathlib.Path(base))
    settings = _settings_of(source, vocab_size)
    if manifest.settings != settings:
        raise UserError(
            f"{directory} is not the tokeniser of {base}: expected a workdir prepared with"
            f" TokenizerConfig.base = {str(base)!r}"
        )
    for name, value in _ids(source, settings["vocab_size"]).items():
        if manifest.facts.get(name, value) != value:
            raise UserError(
                f"{directory} has {name} {manifest.facts[name]}: expected {value}, that of {base}"
            )
    return manifest


def _ids(source: _Source, rows: int) -> dict[str, int]:
    """The ids that documents have beside those of their text, and whether the base puts bos first.

    Raises:
      UserError: bos or eos is a token of texts.
    """
    bos = source.bos if source.adds_bos and source.bos is not None else source.eos
    for role, i in (("bos", bos), ("eos", source.eos)):
        if source.token_bytes[i]:
            raise UserError(
                f"{source.path}: the {role} token {i} is the text {source.token_bytes[i]!r}: expected a"
                " special token"
            )
    pad = source.pad
    if pad is None or pad in (0, bos, source.eos, *source.reserved) or source.token_bytes[pad]:
        pad = rows
    return {"pad_id": pad, "bos_id": bos, "eos_id": source.eos, "adds_bos": source.adds_bos}


def _settings_of(source: _Source, vocab_size: int | None) -> dict[str, Any]:
    """What identifies a tokeniser's artefact."""
    tokens = len(source.token_bytes)
    rows = tokens if vocab_size is None else vocab_size
    if not tokens <= rows <= tokens + _MOST_UNUSED:
        raise UserError(
            f"{source.path} has {tokens} tokens: expected those of the weights' {rows} rows"
        )
    digest = hashlib.sha256(source.data).hexdigest()
    return {"encoding": source.encoding, "vocab_size": rows, "sha256": digest}


def _rows(base: pathlib.Path) -> int | None:
    """Rows of the model's embedding, where its files state them."""
    if base.suffix == ".gguf":
        embedding = open_gguf(base).tensors.get("token_embd.weight")
        return None if embedding is None else embedding.shape[0]
    if not base.is_dir():
        return None
    stated = (
        files.read_json(base / _CONFIG).get("vocab_size") if (base / _CONFIG).is_file() else None
    )
    return stated if isinstance(stated, int) else None


def _open(base: pathlib.Path) -> _Source:
    """The tokeniser of a folder or a file."""
    if base.is_dir():
        if (base / FILES[BYTE_LEVEL]).is_file() and not _prefers_sentencepiece(base):
            return _of_tokenizer_json(base / FILES[BYTE_LEVEL])
        if (base / FILES[SENTENCEPIECE]).is_file():
            return _of_sentencepiece(base / FILES[SENTENCEPIECE])
        raise UserError(f"{base} has no tokeniser: expected tokenizer.json or tokenizer.model")
    readers = {".gguf": _of_gguf, ".json": _of_tokenizer_json, ".model": _of_sentencepiece}
    if base.suffix not in readers or not base.is_file():
        raise UserError(
            f"{base} is no base model: expected a Hugging Face folder or a .gguf file, or a"
            " tokenizer.json or .model file"
        )
    return readers[base.suffix](base)


def _prefers_sentencepiece(folder: pathlib.Path) -> bool:
    """Whether tokenizer.json only imitates the SentencePiece model beside it."""
    if not (folder / FILES[SENTENCEPIECE]).is_file():
        return False
    model = files.read_json(folder / FILES[BYTE_LEVEL]).get("model")
    return isinstance(model, dict) and bool(model.get("byte_fallback"))


def _of_tokenizer_json(path: pathlib.Path) -> _Source:
    """A byte-level BPE with the settings beside it."""
    settings = _settings(path)
    model = byte_level_model(path.read_text(encoding="utf-8", errors="replace"), path)
    vocabulary = read_tokenizer_json(path)
    roles = {role: _id(path, settings, role, vocabulary.special) for role in ("bos", "eos", "pad")}
    eos = _end_of_text(path, roles["eos"], vocabulary.special)
    adds_bos = roles["bos"] is not None and _first_id(model, path) == roles["bos"]
    role_ids = {i for i in (*roles.values(), eos) if i is not None}
    spelt = vocabulary.spell_missing_bytes(role_ids)
    data = vocabulary.to_json()
    return _Source(
        path,
        BYTE_LEVEL,
        data,
        ByteLevelEncoding(data.decode(), path),
        vocabulary.token_bytes,
        bos=roles["bos"],
        eos=eos,
        pad=roles["pad"],
        adds_bos=adds_bos or settings.get("add_bos_token") is True,
        reserved=frozenset((roles["bos"], roles["eos"])),
        special=tuple(vocabulary.special),
        spelt=spelt,
    )


def _first_id(model: Any, path: pathlib.Path) -> int | None:
    """The id that a tokenizer.json puts before a text, whatever padding it states; None for none."""
    model.no_padding()
    model.no_truncation()
    try:
        ids = model.encode("", add_special_tokens=True).ids
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the package's Rust is no Exception
        about = str(error).partition("\n")[0]
        raise UserError(
            f"{path} cannot encode a text ({about}): expected special tokens that it has"
        ) from error
    return ids[0] if ids else None


def _of_gguf(path: pathlib.Path) -> _Source:
    """A byte-level BPE out of a GGUF file."""
    vocabulary, roles, adds_bos = _read_gguf(path)
    eos = _end_of_text(path, roles["eos"], vocabulary.special)
    spelt = vocabulary.spell_missing_bytes({i for i in (*roles.values(), eos) if i is not None})
    data = vocabulary.to_json()
    return _Source(
        path,
        BYTE_LEVEL,
        data,
        ByteLevelEncoding(data.decode(), path),
        vocabulary.token_bytes,
        bos=roles["bos"],
        eos=eos,
        pad=roles["pad"],
        adds_bos=adds_bos,
        reserved=frozenset((roles["bos"], roles["eos"])),
        special=tuple(vocabulary.special),
        spelt=spelt,
    )


def _read_gguf(path: pathlib.Path) -> tuple[Vocabulary, dict[str, int | None], bool]:
    """A GGUF file's vocabulary, the ids of bos, eos and pad, and whether bos comes before texts."""
    metadata = open_gguf(path).metadata
    vocabulary = read_gguf_vocabulary(path, metadata)
    roles: dict[str, int | None] = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        fits = isinstance(value, int) and 0 <= value < len(vocabulary.token_bytes)
        if value is not None and not fits:
            tokens = len(vocabulary.token_bytes)
            raise UserError(f"{path}: the {key} token's id is {value}: expected one below {tokens}")
        roles[role] = value
    # llama.cpp puts bos before texts of Llama 3 where the file does not say.
    adds_bos = metadata.get(
        "tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    )
    return vocabulary, roles, bool(adds_bos)


def _of_sentencepiece(path: pathlib.Path) -> _Source:
    """A SentencePiece model; with an identity normaliser, so that it loses nothing."""
    data = path.read_bytes() + _IDENTITY
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
        table = sentencepiece_bytes(model)
    except (RuntimeError, ValueError) as error:  # a message, or a piece that is no UTF-8 or byte
        raise UserError(f"{path} cannot be read: expected a SentencePiece model") from error
    if not all(model.piece_to_id(f"<0x{byte:02X}>") != model.unk_id() for byte in range(256)):
        raise UserError(f"{path} has no pieces of single bytes: expected byte fallback")
    settings = _settings(path)
    added = _added(path, settings, len(table))
    table += [b""] * (1 + max(added.values(), default=-1) - len(table))
    special = added | {
        model.id_to_piece(i): i for i in range(model.get_piece_size()) if model.is_control(i)
    }
    declared = {"bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id()}
    roles = {}
    for role, value in declared.items():
        stated = _id(path, settings, role, special)
        roles[role] = stated if stated is not None else (value if value >= 0 else None)
    eos = _end_of_text(path, roles["eos"], special)
    adds_bos = settings.get("add_bos_token", True) is True and roles["bos"] is not None
    return _Source(
        path,
        SENTENCEPIECE,
        data,
        SentencePieceEncoding(data),
        table,
        bos=roles["bos"],
        eos=eos,
        pad=roles["pad"],
        adds_bos=adds_bos,
        reserved=frozenset((roles["bos"], roles["eos"])),
        special=tuple(special),
    )


def _settings(path: pathlib.Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json, and the ids of config.json as they are.

    A file of another name than Hugging Face's has none beside it.
    """
    merged: dict[str, Any] = {}
    folder = path.parent
    if path.name not in FILES.values():
        return merged
    for name in (_CONFIG, "special_tokens_map.json", _TOKENIZER_CONFIG):
        if (folder / name).is_file():
            stated = files.read_json(folder / name)
            merged |= {key: value for key, value in stated.items() if value is not None}
    return merged


def _added(path: pathlib.Path, settings: Mapping[str, Any], tokens: int) -> dict[str, int]:
    """Tokens that a folder adds to a SentencePiece model of so many: text -> id."""
    beside = path.with_name("added_tokens.json")
    stated = settings.get("added_tokens_decoder") or {}
    added: dict[Any, Any] = {}
    if isinstance(stated, Mapping):
        contents = [token.get("content") for token in stated.values() if isinstance(token, Mapping)]
        numbers = [int(i) if i.isdecimal() else None for i in stated]
        added = dict(zip(contents, numbers)) if len(contents) == len(numbers) else {None: None}
    if beside.is_file() and path.name in FILES.values():
        added |= files.read_json(beside)
    for text, i in added.items():
        fits = isinstance(text, str) and isinstance(i, int) and 0 <= i < tokens + _MOST_UNUSED
        if not fits or isinstance(i, bool):
            rule = f"expected texts with ids below {tokens + _MOST_UNUSED}"
            raise UserError(f"{path.parent}: the added token {text!r} has id {i!r}: {rule}")
    return added


def _id(
    path: pathlib.Path, settings: Mapping[str, Any], role: str, special: Mapping[str, int]
) -> int | None:
    """The id of bos, eos or pad: by the token's text, else by the id in config.json."""
    token = settings.get(f"{role}_token")
    if isinstance(token, Mapping):
        token = token.get("content")
    if token is not None:
        if not isinstance(token, str) or token not in special:
            raise UserError(f"{path} has no special token {token!r}: expected the {role}_token")
        return special[token]
    value = settings.get(f"{role}_token_id")
    value = value[0] if isinstance(value, list) and value else value
    if isinstance(value, int) and value not in special.values():
        raise UserError(f"{path} has no special token {value}: expected the {role}_token_id")
    return value if isinstance(value, int) else None


def _end_of_text(path: pathlib.Path, eos: int | None, special: Mapping[str, int]) -> int:
    """The id that ends a document."""
    texts = {special[name]: name for name in _TEXT_ENDS if name in special}
    if texts and eos not in texts:
        return next(iter(texts))
    if eos is None:
        raise UserError(f"{path} has no end-of-text token: expected an eos_token")
    return eos


def _check_lossless(source: _Source) -> None:
    """Raises unless a text with all that tokenisers like to change comes back."""
    probes = [_PROBE, *source.special]
    for probe, ids in zip(probes, source.encoder.encode_batch(probes, 1), strict=True):
        result = b"".join(source.token_bytes[i] for i in ids)
        if result != probe.encode():
            lost = json.dumps(result.decode(errors="replace"))
            raise UserError(f"{source.path} makes {lost} of a text: expected {json.dumps(probe)}")


def _write(file: Any, data: bytes) -> None:
    """Writes all of it."""
    file.write(data)
