"""A lossless SentencePiece tokeniser, and the UTF-8 bytes of each of its tokens.

SentencePiece writes a space as U+2581 and treats NUL apart, so neither may occur in its input:

    text      U+2581    NUL     U+10FFFD        the escape character itself is escaped too
    escaped   E"1"      E"2"    E"0"            E = U+10FFFD, followed by a digit wherever it occurs

The three pairs are user-defined symbols: SentencePiece never splits them or joins them with anything,
so each is one token, and its bytes are those of the character it represents. Byte pieces cover every
other character that the vocabulary lacks. Hence the bytes of a text are the bytes of its tokens, one
after the other, and decoding needs nothing but that table.
"""

import dataclasses
import functools
import io
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

import numpy as np
import sentencepiece

from data_pipelines.artefacts.manifest import Manifest, Path
from data_pipelines.artefacts.stage import Stage
from data_pipelines.chunk_database.encodings import Encoding, open_encoding, sentencepiece_bytes
from data_pipelines.corpora import Document
from data_pipelines.documents.documents import read_documents, read_shard, stable_fraction
from retro_jax.config import require
from retro_jax.errors import UserError

KIND = "tokenizer"
PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
MODEL_FILE = "tokenizer.model"
BYTES_FILE, ENDS_FILE = "token_bytes.npy", "token_ends.npy"

_ESCAPE = "\U0010fffd"
_ESCAPED = {_ESCAPE: f"{_ESCAPE}0", "\u2581": f"{_ESCAPE}1", "\0": f"{_ESCAPE}2"}
_TRANSLATION = str.maketrans(_ESCAPED)
_NEEDS_ESCAPE = re.compile("[\u2581\0\U0010fffd]")
# No piece has a space after anything but spaces, so a text may be cut before the first of a run of
# spaces without changing its tokens. Short segments are faster: BPE is more than linear in them.
_SEGMENT = 400
_TRAINING_SEGMENT = 4000
_SMALL_SHARE = 0.01  # of all text, below which a sample is taken of the beginning of each corpus
_LOOKED_AT = 10  # times as much text as is wanted


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """How the tokeniser is trained, or which existing model's it is.

    Attributes:
      base: a Hugging Face folder or a GGUF file whose own tokeniser is taken; "" trains one, and only
        then the other fields have a meaning.
      vocab_size: V, including 4 special tokens, 3 for escapes and 256 bytes.
      model_type: "bpe" or "unigram".
      character_coverage: share of the training text's characters that get a token each; the others
        are spelt in bytes.
      whitespace_pieces: allow tokens of several spaces (indentation of code).
      max_training_bytes: approximate size of the training sample, chosen by a hash of the document
        ids.
      seed: seed of the sample.
    """

    vocab_size: int = 32_000
    model_type: str = "bpe"
    character_coverage: float = 0.9995
    whitespace_pieces: bool = True
    max_training_bytes: int = 100_000_000
    seed: int = 0
    base: str = ""

    def __post_init__(self) -> None:
        smallest = 4 + len(_ESCAPED) + 256
        require(self.vocab_size > smallest, self, "vocab_size", f"more than {smallest}")
        require(self.model_type in ("bpe", "unigram"), self, "model_type", "'bpe' or 'unigram'")
        covers = 0 < self.character_coverage <= 1
        require(covers, self, "character_coverage", "a share from 0 to 1")
        require(self.max_training_bytes > 0, self, "max_training_bytes", "a positive number")


def train_tokenizer(
    directory: Path, documents_directory: Path, config: TokenizerConfig
) -> Manifest:
    """Trains a tokeniser on the training split, unless it is there already.

    Byte-identical for the same documents and settings: one thread, and a sample by hash.

    Args:
      directory: where it goes.
      documents_directory: the training split's documents.
      config: its settings.

    Raises:
      UserError: too little text for the vocabulary, or a directory made with other settings.
    """
    documents = Manifest.open(documents_directory, "documents")
    parents = {"documents": (documents, documents_directory)}
    # Manifests from before there was `base` have the same settings.
    settings = {name: value for name, value in vars(config).items() if name != "base"}
    stage = Stage(directory, KIND, settings, parents, claim=False)
    if stage.done:
        return stage.manifest()
    sizes = []

    def sentences() -> Iterator[str]:
        for text in _sample(documents_directory, documents, config):
            sizes.append(len(text.encode()))
            yield from _segments(_escape(text), _TRAINING_SEGMENT)

    model = train_model(sentences(), config)
    characters = {escaped: plain for plain, escaped in _ESCAPED.items()}
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    table = sentencepiece_bytes(pieces, characters)
    stage.claim()
    stage.write_file(MODEL_FILE, lambda file: _write(file, model))
    stage.write_array(BYTES_FILE, np.frombuffer(b"".join(table), np.uint8))
    stage.write_array(ENDS_FILE, np.cumsum([len(token) for token in table], dtype=np.int64))
    special = {"pad_id": PAD_ID, "bos_id": BOS_ID, "eos_id": EOS_ID, "unk_id": UNK_ID}
    facts = {"vocab_size": len(table), "training_bytes": sum(sizes), **special}
    return stage.finish(facts, [MODEL_FILE, BYTES_FILE, ENDS_FILE])


def train_model(sentences: Iterable[str], config: TokenizerConfig) -> bytes:
    """SentencePiece's model of some escaped text."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=config.vocab_size,
            model_type=config.model_type,
            character_coverage=config.character_coverage,
            allow_whitespace_only_pieces=config.whitespace_pieces,
            user_defined_symbols=list(_ESCAPED.values()),
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=1 << 30,
            pad_id=PAD_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        # Its message is "Internal: FILE(LINE) [condition] sentence", and the sentence is what helps.
        reason = str(error).split("] ")[-1].strip() or str(error)
        raise UserError(
            f"TokenizerConfig.vocab_size is {config.vocab_size}: SentencePiece cannot train it on this"
            f" text: {' '.join(reason.split())}"
        ) from error
    return model.getvalue()


class TrainedEncoding:
    """The encoding of `train_tokenizer`: escaped text in segments."""

    def __init__(self, model: bytes):
        self.model = sentencepiece.SentencePieceProcessor(model_proto=model)

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        """[n_i] int32 ids of each text."""
        segments: list[str] = []
        ends = []
        for text in texts:
            segments.extend(_segments(_escape(text), _SEGMENT))
            ends.append(len(segments))
        ids = self.model.encode(segments, return_type="numpy", num_threads=threads)
        starts = [0, *ends][:-1]
        empty = np.zeros(0, np.int32)
        return [np.concatenate([empty, *ids[a:b]]) for a, b in zip(starts, ends, strict=True)]


class Tokenizer:
    """Text to ids and back, exactly: a trained tokeniser's, or a base model's (base_tokenizer.py).

    Attributes:
      directory, manifest: where it is from.
      vocab_size: V; ids are in [0, V).
      pad_id, bos_id, eos_id: special ids, which `encode` never gives. A base model's tokeniser may
        have pad_id = V, and bos_id = eos_id.
      token_bytes: [V] list of bytes; empty for special ids. It has an entry for pad_id = V too.
      special_ids: the ids below V that encode no text.
    """

    def __init__(self, directory: Path, manifest: Manifest, threads: int | None = None):
        """Use `open`."""
        self.directory, self.manifest = pathlib.Path(directory), manifest
        self._threads = threads or os.cpu_count() or 1
        kind = manifest.settings.get("encoding")
        self.encoding: Encoding
        if kind is None:
            self.encoding = TrainedEncoding((self.directory / MODEL_FILE).read_bytes())
        else:
            self.encoding = open_encoding(kind, self.directory)
        data = np.load(self.directory / BYTES_FILE).tobytes()
        ends = np.load(self.directory / ENDS_FILE)
        starts = np.concatenate([[0], ends[:-1]])
        self.vocab_size: int = manifest.facts.get("vocab_size", len(ends))
        self.pad_id: int = manifest.facts.get("pad_id", PAD_ID)
        self.bos_id: int = manifest.facts.get("bos_id", BOS_ID)
        self.eos_id: int = manifest.facts.get("eos_id", EOS_ID)
        self.token_bytes = [data[a:b] for a, b in zip(starts, ends, strict=True)]
        self._lengths = ends - starts
        self.special_ids = frozenset(np.flatnonzero(self._lengths[: self.vocab_size] == 0).tolist())

    @classmethod
    def open(
        cls, directory: Path, *, verify: bool = False, threads: int | None = None
    ) -> "Tokenizer":
        """Opens a tokeniser of either kind; `threads` of `encode_batch`, by default one for each core.

        Raises:
          UserError: no tokeniser there, or a damaged one.
        """
        return cls(directory, Manifest.open(directory, KIND, verify=verify), threads)

    def encode(self, text: str) -> np.ndarray:
        """[n] int32 ids of a text, without bos and eos.

        Raises:
          UserError: the text has a lone surrogate, which is no Unicode text.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """[n_i] int32 ids of each text; the same for any number of threads."""
        return self.encoding.encode_batch([_checked(text) for text in texts], self._threads)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of any ids; U+FFFD where tokens split a character that others do not complete."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The UTF-8 bytes of any ids."""
        return b"".join([self.token_bytes[i] for i in np.asarray(ids, np.int64).ravel().tolist()])

    def num_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        """The number of bytes of text that some ids encode."""
        return int(self._lengths[np.asarray(ids, np.int64)].sum())

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """[V] int64, bytes of each token; one more for pad_id = V."""
        lengths = self._lengths.copy()
        lengths.flags.writeable = False
        return lengths


def _sample(directory: Path, documents: Manifest, config: TokenizerConfig) -> Iterator[str]:
    """Texts of about max_training_bytes, and never more than that."""
    total = max(1, documents.fact("bytes"))
    share, left = (
        config.max_training_bytes / total,
        config.max_training_bytes,
    )
    share_read = share if share >= _SMALL_SHARE else 1 / _LOOKED_AT
    for document in _candidates(directory, documents, share):
        if share < 1 and stable_fraction(f"{config.seed}:{document.id}", "sample") >= share_read:
            continue
        size = len(document.text.encode())
        if size <= left:
            left -= size
            yield document.text
    if left == config.max_training_bytes:
        rule = "enough for one of the documents that the sample takes"
        require(False, config, "max_training_bytes", rule)


def _candidates(directory: Path, documents: Manifest, share: float) -> Iterator[Document]:
    """The documents among which a sample is taken.

    Of a share of less than a hundredth these are the first of each corpus, ten times as much as is
    wanted: documents are in random order, so no more needs to be read.
    """
    if share >= _SMALL_SHARE:
        yield from read_documents(directory, documents)
        return
    sizes: dict[str, int] = {}
    for facts in documents.fact("shards"):
        sizes[facts["corpus"]] = sizes.get(facts["corpus"], 0) + facts["bytes"]
    left = {corpus: _LOOKED_AT * share * size for corpus, size in sizes.items()}
    for facts, shard in zip(documents.fact("shards"), documents.shards, strict=True):
        corpus = facts["corpus"]
        if left[corpus] <= 0:
            continue
        for document in read_shard(pathlib.Path(directory) / shard.name):
            left[corpus] -= len(document.text)
            yield document
            if left[corpus] <= 0:
                break


def _checked(text: str) -> str:
    """The text, if it is Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text has a lone surrogate at character {error.start}: expected valid Unicode"
        ) from error
    return text


def _escape(text: str) -> str:
    """The text without characters that SentencePiece takes to mean something."""
    return text.translate(_TRANSLATION) if _NEEDS_ESCAPE.search(text) else text


def _segments(text: str, size: int) -> Iterator[str]:
    """Cuts of at least `size` characters before the first of a run of spaces."""
    start = 0
    while start < len(text):
        end = text.find(" ", start + size)
        while end > 0 and text[end - 1] == " ":
            end = text.find(" ", end + 1)
        end = end if end > 0 else len(text)
        yield text[start:end]
        start = end


def _write(file: BinaryIO, data: bytes) -> None:
    """Writes all of it."""
    file.write(data)
