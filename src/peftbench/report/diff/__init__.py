"""TODO-DOC diff."""
