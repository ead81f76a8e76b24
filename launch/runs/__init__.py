"""The record that a training run leaves about itself, and how it is opened again."""
