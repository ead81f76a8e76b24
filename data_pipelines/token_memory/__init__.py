"""What followed the longest part of a text's end that occurs in a chunk database.

`from data_pipelines.token_memory import TokenMemory`
"""

from data_pipelines.token_memory.memory import TokenMemory

__all__ = ["TokenMemory"]
