"""The `rilq` command: parse, call one function, render. Results on stdout, the rest on stderr.

A command's module imports torch, and what needs it, inside the command: `--help` is quick.
"""

# In the order of `rilq --help`; a command is there once its module is imported.
from rilq.cli import convert, evaluate, compare, runs, report, analyze, batch, export, push  # isort: skip
from rilq.cli.app import app, main

__all__ = [
    "analyze",
    "app",
    "batch",
    "compare",
    "convert",
    "evaluate",
    "export",
    "main",
    "push",
    "report",
    "runs",
]
