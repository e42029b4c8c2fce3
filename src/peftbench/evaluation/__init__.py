"""Evaluation: held-out loss, generated summaries, metrics and confidence intervals."""
