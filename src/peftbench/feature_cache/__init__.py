"""Stores the hidden states of a model's frozen part on disk, so that later epochs skip that part."""
