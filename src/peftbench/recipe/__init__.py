"""The recipe of a run: its schema, and its files."""
