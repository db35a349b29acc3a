"""Measure checkpoints: perplexity, divergence from a base."""
