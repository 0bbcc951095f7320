"""`mnist-dist export`: one file that works without this package."""
