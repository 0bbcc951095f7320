"""Chooses the kernels of this process: deterministic or fast, TF32 or fp32. The choice holds for the whole process."""

from __future__ import annotations

import os

import torch

from mnist_dist.recipe.schema import Recipe


def set_determinism(deterministic: bool) -> None:
    """Sets whether PyTorch uses deterministic kernels; PyTorch then warns of operations without one."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # Filling uninitialized memory is a debugging aid that costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # torch declares it nowhere


def set_kernels(recipe: Recipe) -> None:
    """Sets whether cuDNN times its kernels and uses the fastest, and which GPU operations may use TF32."""
    torch.backends.cudnn.benchmark = recipe.engine.cudnn_benchmark and not recipe.deterministic
    torch.backends.cudnn.allow_tf32 = recipe.engine.tf32 != "off"
    torch.backends.cuda.matmul.allow_tf32 = recipe.engine.tf32 == "on"
