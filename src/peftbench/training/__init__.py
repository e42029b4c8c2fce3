"""Training loop and everything that it drives."""
