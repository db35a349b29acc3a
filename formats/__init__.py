"""Bytes on disk to tensors and back; no policy lives here."""
