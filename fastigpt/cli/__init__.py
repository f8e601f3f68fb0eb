"""The command line: `fastigpt sample | complete | info | convert | …`. Errors are one line and exit status 2.

No module here imports torch, numpy or PIL before a command runs, so that help and completion answer at once.
"""

from fastigpt.cli.program import app, main

__all__ = ["app", "main"]
