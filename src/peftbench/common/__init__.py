"""Foundations without any domain knowledge: schemas, files, units, text, console."""
