"""Mutated real files for every reader: never a traceback, never a document lost without a count."""
