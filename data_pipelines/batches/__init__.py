"""Chunk databases and neighbour tables as training batches, made on the fly or written out."""
