"""What is read beside texts: gin files, models of other projects, tokenisers, manifests, id lists."""

import dataclasses
import functools
import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from data_pipelines.artefacts.manifest import Manifest
from data_pipelines.chunk_database.base_tokenizer import open_base_tokenizer
from data_pipelines.corpora import CorpusConfig, Reading, read_corpus
from data_pipelines.documents.documents import DocumentsConfig, prepare_documents
from data_pipelines.retriever.bert import load_bert
from data_pipelines.retriever.embedder import BertFolder
from data_pipelines.workdir.update import named_documents
from launch.common import configurables
from retro_jax.retrofit.base_model import open_base
from tests.data_pipelines.chunk_database import base_tokenizers
from tests.data_pipelines.retriever import bert_folder
from tests.fuzz.mutations import BYTE_CHANGES, JSON_CHANGES, VALUES, changed_bytes, changed_json
from tests.fuzz.target import Target

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_MODELS = _ROOT / "tests" / "data" / "base_models"
_GIN = (_ROOT / "experiments" / "quickstart.gin").read_bytes()
_NAMES = b"wikipedia/Lobster\nwikipedia/A / B\npython/os.py\n"


@dataclasses.dataclass(frozen=True)
class _InFolder:
    """Writes a folder as it should be, then one file of it changed."""

    source: pathlib.Path
    name: str

    def __call__(self, folder: pathlib.Path, changes: list) -> None:
        """JSON changes are objects, changes of bytes begin with the name of their kind."""
        shutil.rmtree(folder)
        shutil.copytree(self.source, folder)
        data = (folder / self.name).read_bytes()
        if isinstance(changes[0][0], str):
            (folder / self.name).write_bytes(changed_bytes(data, changes))
        else:
            (folder / self.name).write_text(json.dumps(changed_json(json.loads(data), changes)))


def _folder(
    name: str, source: pathlib.Path, file: str, read: Callable[[pathlib.Path], object]
) -> Target:
    """One file of a folder; JSON by value and by byte, others by byte."""
    changes = BYTE_CHANGES | JSON_CHANGES if file.endswith(".json") else BYTE_CHANGES
    return Target(f"{name} {file}", changes, _InFolder(source, file), read)


def _open_bert(folder: pathlib.Path) -> None:
    """Everything that is read of a BERT before texts are embedded."""
    model = BertFolder.open(folder)
    model.identity  # noqa: B018
    load_bert(folder)


def _file(name: str, data: bytes, read: Callable[[pathlib.Path], object]) -> Target:
    """A file by itself."""

    def write(folder: pathlib.Path, changes: list) -> None:
        (folder / name).write_bytes(changed_bytes(data, changes))

    return Target(name, BYTE_CHANGES, write, lambda folder: read(folder / name))


def _read_gin(path: pathlib.Path) -> None:
    """The settings of a preparation."""
    configurables.load(str(path))
    configurables.make(DocumentsConfig)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """JSON lines of any values; every one is a document, or is counted."""

    def write(self, folder: pathlib.Path, rows: list[Any]) -> None:
        """A line for each."""
        lines = [json.dumps(row) for row in rows]
        (folder / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines))

    def read(self, folder: pathlib.Path) -> None:
        """As documents with ids and labels."""
        path = folder / "rows.jsonl"
        config = CorpusConfig("rows", "jsonl", str(path), id_field="id", label_field="meta.label")
        lines, reading = path.read_text().count("\n"), Reading(skip_bad=True)
        documents = list(read_corpus(config, reading))
        counts = reading.counts
        assert len(documents) + counts["bad"] + counts["empty"] == lines


_ROW = st.fixed_dictionaries(
    {"text": VALUES | st.text(), "id": VALUES | st.integers(0, 9)},
    optional={"meta": st.fixed_dictionaries({"label": VALUES | st.sampled_from(["C", "C++"])})},
)


def _small_documents(folder: pathlib.Path) -> pathlib.Path:
    """A finished documents stage."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    for i in range(3):
        (corpus / f"{i}.txt").write_text(f"text {i}")
    config = DocumentsConfig((CorpusConfig("c", "text", str(corpus), split="train"),))
    prepare_documents(folder / "documents", config)
    return folder / "documents" / "train"


@functools.cache
def targets() -> list[Target]:
    """Every reader of settings and models."""
    root = pathlib.Path(tempfile.mkdtemp(prefix="fuzz-"))
    bert = bert_folder.write(root / "bert")
    (bert / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    (bert / "sentence_bert_config.json").write_text('{"max_seq_length": 30}')
    prompts = {"prompts": {"query": "query: ", "document": "passage: "}}
    (bert / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    today = root / "today"  # as transformers 5 saves a BERT's tokeniser
    shutil.copytree(bert, today)
    (today / "vocab.txt").unlink()
    (today / "tokenizer.json").write_text(bert_folder.tokenizer_json())
    bpe, piece = root / "bpe", root / "piece"
    base_tokenizers.train(bpe)
    shutil.rmtree(bpe / "texts")
    base_tokenizers.write_gguf(bpe, "gpt-2", root / "vocabulary.gguf")
    piece.mkdir()
    base_tokenizers.train_sentencepiece(piece)
    shutil.rmtree(piece / "texts", ignore_errors=True)
    documents, rows = _small_documents(root / "small"), _Rows()
    files = ("config.json", "vocab.txt", "model.safetensors", "modules.json")
    files += ("1_Pooling/config.json", "tokenizer_config.json", "sentence_bert_config.json")
    files += ("config_sentence_transformers.json",)
    return [
        *(_folder("bert", bert, file, _open_bert) for file in files),
        _folder("bert", today, "tokenizer.json", _open_bert),
        _folder("byte-level", bpe, "tokenizer.json", open_base_tokenizer),
        _folder("byte-level", bpe, "tokenizer_config.json", open_base_tokenizer),
        _folder("sentencepiece", piece, "tokenizer.model", open_base_tokenizer),
        _folder("llama", _MODELS / "llama", "config.json", open_base),
        _folder("llama", _MODELS / "llama", "model.safetensors.index.json", open_base),
        _folder("gpt2", _MODELS / "gpt2", "model.safetensors", open_base),
        _folder("documents", documents, "manifest.json", lambda f: Manifest.open(f, "documents")),
        _file("vocabulary.gguf", (root / "vocabulary.gguf").read_bytes(), open_base_tokenizer),
        _file("quickstart.gin", _GIN, _read_gin),
        _file("names.txt", _NAMES, lambda path: named_documents([f"@{path}"])),
        Target("rows of any values", st.lists(_ROW, max_size=4), rows.write, rows.read),
    ]
