"""Simulate a training step on torch's meta device and record every storage. See README.md."""
