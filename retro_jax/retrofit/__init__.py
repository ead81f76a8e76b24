"""Existing language models: what they are, and where their files have their weights."""
