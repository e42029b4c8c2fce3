"""Comparison of two result folders."""
