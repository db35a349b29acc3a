"""What the model sees: text as token rows, hidden states on disk, per-linear sums."""
