"""Data pipeline: sources, the docstring corpus, encoding and batches."""
