"""One run: stages, outcome, checkpointing, record."""
