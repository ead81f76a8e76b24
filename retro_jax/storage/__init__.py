"""Files written whole or not at all, and addresses that fsspec reads."""
