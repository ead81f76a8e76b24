"""Processes of one run: how they find each other, agree and report progress."""
