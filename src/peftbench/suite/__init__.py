"""Several runs: recipes times axes, each in a fresh process."""
