"""Exports: a native checkpoint in the formats of other runtimes."""
