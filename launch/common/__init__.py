"""What every command shares: flags, settings and errors."""
