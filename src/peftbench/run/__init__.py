"""TODO-DOC run."""
