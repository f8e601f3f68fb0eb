"""Model families: published checkpoints, with their names and formats, to what engines know (fastigpt/spec.py)."""
