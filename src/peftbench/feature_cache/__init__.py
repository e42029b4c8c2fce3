"""Stores hidden states above the frozen part of a model on disk, so that later epochs compute only what is trained."""
