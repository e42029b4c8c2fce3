"""TODO-DOC run_dir."""
