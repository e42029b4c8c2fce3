"""TODO-DOC common."""
