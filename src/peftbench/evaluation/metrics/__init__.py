"""TODO-DOC metrics."""
