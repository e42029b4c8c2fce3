"""Evaluation: held-out loss, generated texts, choices, metrics and confidence intervals."""
