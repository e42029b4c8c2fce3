"""How good: held-out loss, generated summaries, ROUGE, baselines, intervals."""
