"""TODO-DOC simulation."""
