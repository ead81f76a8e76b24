"""Generation with live retrieval."""
