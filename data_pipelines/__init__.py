"""Text in, RetroBatch out: corpora, tokeniser, chunk databases, retrieval and batches."""
