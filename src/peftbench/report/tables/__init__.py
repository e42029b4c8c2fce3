"""Tables over records."""
