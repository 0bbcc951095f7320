"""Exact and fast distributed training of image classifiers from one YAML recipe; a killed run resumes exactly.

From Python: `train(load_recipe("simple_cnn", "epochs=1"))`, `build_model("ms_ran")`, `load_run(folder)`.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

# `accelerate launch mnist_dist/train.py` puts this folder first on the path. Its command `profile` would then replace
# the module `profile` of the standard library, which torch imports.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

# Must be set before torch is imported. Threads of GNU OpenMP spin for milliseconds at every barrier while they wait for
# each other. With other load on the cores, this made two threads 14 to 18 times slower; without other load, shorter
# spinning costs nothing.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if TYPE_CHECKING:
    from mnist_dist.explain import get_feature_maps
    from mnist_dist.models import build_model
    from mnist_dist.predict import predict_digit
    from mnist_dist.recipe.loading import load_recipe
    from mnist_dist.run.reader import load_run
    from mnist_dist.train import train

__version__ = "0.1.0"
__all__ = ["build_model", "get_feature_maps", "load_recipe", "load_run", "predict_digit", "train"]


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use, so that `python -m mnist_dist.train` does not import itself twice."""
    from importlib import import_module

    modules = {
        "build_model": "models",
        "get_feature_maps": "explain",
        "load_recipe": "recipe.loading",
        "load_run": "run.reader",
        "predict_digit": "predict",
        "train": "train",
    }
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{modules[name]}"), name)
