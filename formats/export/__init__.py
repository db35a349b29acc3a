"""Native checkpoints in other programs' formats: a module per kind writes and reads them back."""
