"""Memory estimates before a run, from a simulated training step on torch's meta device."""
