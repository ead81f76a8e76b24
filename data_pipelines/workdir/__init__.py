"""A workdir W: its stages, updates, verification and summary."""
