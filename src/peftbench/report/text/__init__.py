"""Text formatting and escaping."""
