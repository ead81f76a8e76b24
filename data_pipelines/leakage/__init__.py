"""Training documents that are near-copies of held-out ones."""
