"""TODO-DOC text."""
