"""A server of texts: OpenAI's completions over HTTP, with retrieval, by continuous batching."""
