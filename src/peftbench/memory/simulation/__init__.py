"""One training step simulated on the meta device."""
