"""TODO-DOC analysis."""
