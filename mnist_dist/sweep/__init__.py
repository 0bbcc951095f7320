"""`python -m mnist_dist.sweep`: hyperparameter search."""
