"""`python -m mnist_dist.export`: one file that stands alone."""
