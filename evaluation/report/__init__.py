"""The report: one self-contained page of what is known and measured of checkpoints."""
