"""Recipes: schema, files, loading, checks, changes, and the reference of all keys."""
