"""RETRO in JAX and Flax: model, training, evaluation and generation."""
