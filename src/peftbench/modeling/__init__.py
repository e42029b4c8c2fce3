"""Models: loading, attention, loss."""
