"""TODO-DOC modeling."""
