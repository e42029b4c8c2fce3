"""From text to batches: sources, the docstring corpus, encoding, batches."""
