"""Decisions, and the streaming loop that carries them out."""
