"""What a compiled program does, and what the chips could do at most."""
