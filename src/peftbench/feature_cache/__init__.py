"""TODO-DOC feature_cache."""
