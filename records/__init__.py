"""What was run, kept in a local SQLite database; see docs/runs.md."""
