"""Seconds of an optimizer step, predicted from its simulated operations."""
