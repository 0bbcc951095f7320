"""The five documents' networks, two of our own, and a name for any other network."""

from mnist_dist.models.registry import MODELS, build_model, count_parameters, find_builder

__all__ = ["MODELS", "build_model", "count_parameters", "find_builder"]
