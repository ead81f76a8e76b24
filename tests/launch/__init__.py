"""Tests of the entry points and of what they share."""
