"""The networks, and the registry that builds one by its name.

The recipes in configs/ reproduce five public documents about MNIST classifiers. The networks' docstrings number them:
1 MS-RAN, 2 ResNet and its comparison table, 3 SimpleCNN, 4 MNISTNet, 5 Models V1 to V3.
"""

from mnist_dist.models.rebuilding import CodeRefused, check_description, is_code, rebuild_model, refuse_code
from mnist_dist.models.registry import FILLED_IN, MODELS, build_model, count_parameters, find_builder, set_by_trainer

__all__ = [
    "FILLED_IN",
    "MODELS",
    "CodeRefused",
    "build_model",
    "check_description",
    "count_parameters",
    "find_builder",
    "is_code",
    "rebuild_model",
    "refuse_code",
    "set_by_trainer",
]
