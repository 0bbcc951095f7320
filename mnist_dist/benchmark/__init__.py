"""`python -m mnist_dist.benchmark`: training speed."""
