"""Recipes: schema, loading, fingerprints."""
