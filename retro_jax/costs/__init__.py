"""The operations of a compiled program, and the limits of the chips."""
