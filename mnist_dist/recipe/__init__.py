"""Recipes: schema, checks, files."""
