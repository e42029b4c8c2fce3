"""TODO-DOC tables."""
