"""`rilq batch`: many conversions from one file, each in a process of its own."""
