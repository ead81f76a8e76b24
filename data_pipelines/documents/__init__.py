"""Corpora to shards of documents by split, in an order that never changes."""
