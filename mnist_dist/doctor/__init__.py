"""`python -m mnist_dist.doctor`: is this machine fit to train?"""
