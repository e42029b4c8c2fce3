"""Helpers without a subject of their own: files, units, text, console."""
