"""Documents as 64-token chunks: `from data_pipelines.chunk_database import ChunkDatabase`."""

from data_pipelines.chunk_database.database import ChunkDatabase

__all__ = ["ChunkDatabase"]
