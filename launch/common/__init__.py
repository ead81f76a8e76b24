"""The flags, settings and errors that every command shares."""
