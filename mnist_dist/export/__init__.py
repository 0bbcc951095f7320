"""`mnist-dist export`: writes a trained network as one file that works without this package."""
