"""Stores a frozen backbone's hidden states on disk, so that later epochs compute the output head alone."""
