"""A prepared workdir as a whole: its stages, updates, checks and summary.

from data_pipelines.workdir import DocumentsConfig, PrepareConfig, TextCorpus, prepare

prepare("W", PrepareConfig(DocumentsConfig([TextCorpus("mine", texts)])))
"""

from data_pipelines.chunk_database.tokenizer import TokenizerConfig
from data_pipelines.corpora import CorpusConfig, TextCorpus
from data_pipelines.documents.documents import DocumentsConfig
from data_pipelines.leakage.near_documents import LeakageConfig
from data_pipelines.retriever.bm25 import Bm25Config
from data_pipelines.retriever.index_config import IndexConfig
from data_pipelines.retriever.keys import KeysConfig
from data_pipelines.retriever.neighbours import NeighboursConfig
from data_pipelines.workdir.preparation import PrepareConfig
from data_pipelines.workdir.stages import prepare

__all__ = [
    "Bm25Config",
    "CorpusConfig",
    "DocumentsConfig",
    "IndexConfig",
    "KeysConfig",
    "LeakageConfig",
    "NeighboursConfig",
    "PrepareConfig",
    "TextCorpus",
    "TokenizerConfig",
    "prepare",
]
