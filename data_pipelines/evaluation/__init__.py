"""Evaluation texts: splits of a workdir and texts beside them, as rows of chunks."""
