"""Chunks to keys to nearest chunks: `from data_pipelines.retriever import Retriever`."""

from data_pipelines.retriever.retriever import Retriever

__all__ = ["Retriever"]
