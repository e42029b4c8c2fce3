"""TODO-DOC recipe."""
