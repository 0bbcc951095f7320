"""`python -m mnist_dist.compare`: a table and a page of runs."""
