"""Cached hidden states of a frozen backbone."""
