"""Data: images as one uint8 tensor, batches as index arithmetic, augmentation as one batched warp."""

from mnist_dist.data.augment import Augmentation
from mnist_dist.data.batches import Batch, Batches, EpochPlan, derive_seed
from mnist_dist.data.images import Dataset, Images, describe_shape, normalize
from mnist_dist.data.loader import Loader
from mnist_dist.data.sources import DATASETS, find_source, load_dataset
from mnist_dist.data.sources.arrays import is_data_code

__all__ = [
    "DATASETS",
    "Augmentation",
    "Batch",
    "Batches",
    "Dataset",
    "EpochPlan",
    "Images",
    "Loader",
    "derive_seed",
    "describe_shape",
    "find_source",
    "is_data_code",
    "load_dataset",
    "normalize",
]
