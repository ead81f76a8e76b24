"""Questions with their answers and passages, as training batches and as prompts."""
