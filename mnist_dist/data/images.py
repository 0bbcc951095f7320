"""Data sets as uint8 tensors: the MNIST family through torchvision, scikit-learn's digits, and synthetic images.

Files are read straight from the IDX files, packed or not, so a read-only folder serves as well as a downloaded one.
torchvision downloads what is missing and checks the published sums; a packed file carries its own checksum besides.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_dist.data.augment import normalize

SIDE = 28


@dataclass(frozen=True)
class Images:
    """A set of labelled images that knows how it is normalised.

    `images`: uint8 (N, 1, 28, 28), ink bright on dark. `labels`: int64 (N,), positions in `classes`. `mean` and `std`
    are those of the whole training set's grey levels as fractions of 255.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: float = 0.0
    std: float = 1.0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> Images:
        return replace(self, images=self.images[rows], labels=self.labels[rows])

    def to(self, device: torch.device | str) -> Images:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def normalize(self, images: Tensor) -> Tensor:
        """Grey levels 0..255, any dtype, to float32 with the training set's mean 0 and standard deviation 1."""
        return normalize(images, self.mean, self.std)


@dataclass(frozen=True)
class Dataset:
    """A training set, what it is judged on while training (`held_out`), and the test set.

    `held_out` is the validation part of the training set where one was asked for, else the test set itself.
    """

    train: Images
    held_out: Images
    test: Images

    @property
    def has_validation(self) -> bool:
        return self.held_out is not self.test


Splits = tuple[Images, Images]  # training, test
Loader = Callable[[Path, str, bool], Splits]  # of (root, split, download)


def load_dataset(
    name: str,
    *,
    root: str | Path = "data",
    split: str | None = None,
    validation: int = 0,
    limit_train: int | None = None,
    limit_test: int | None = None,
    download: bool = True,
) -> Dataset:
    """Reads a data set whole, downloading it into `root` first if it is missing and `download` allows.

    Args:
        name: one of `DATASETS`.
        root: the folder that holds `MNIST/raw` and its kin, as torchvision lays it out.
        split: EMNIST's split (balanced, byclass, bymerge, letters, digits, mnist).
        validation: the last so many training images are held out to be judged on instead of the test set.
        limit_train, limit_test: keep only the first so many images (after the validation part was taken away).

    Raises:
        ValueError: unknown name or split, sizes that leave nothing, a damaged file.
        FileNotFoundError: files are missing and could not be downloaded.
        ImportError: digits without scikit-learn.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    if split is not None and name != "emnist":
        raise ValueError(f"only emnist has splits; {name} was asked for split {split!r}")
    if validation < 0 or any(limit is not None and limit < 1 for limit in (limit_train, limit_test)):
        raise ValueError(f"{validation=} is at least 0, {limit_train=} and {limit_test=} are at least 1")
    train, test = DATASETS[name](Path(root), split or "balanced", download)
    if validation >= len(train):
        raise ValueError(f"validation={validation} leaves nothing of the {len(train):,} training images")
    # Before anything is cut away: a smaller training set must not mean another normalisation.
    mean, std = grey_level_statistics(train.images)
    train, test = (replace(part, mean=mean, std=std) for part in (train, test))
    test = test[slice(limit_test)]
    held_out = train[slice(len(train) - validation, None)] if validation else test
    train = train[slice(len(train) - validation)][slice(limit_train)]
    return Dataset(train, held_out, test)


def grey_level_statistics(images: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of uint8 images as fractions of 255, to the four decimals the field quotes.

    For MNIST's training set these are the customary 0.1307 and 0.3081.
    """
    counts = torch.bincount(images.flatten(), minlength=256).double()
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = float((counts * levels).sum() / counts.sum())
    variance = float((counts * (levels - mean) ** 2).sum() / counts.sum())
    return round(mean, 4), round(variance**0.5, 4)


# --- the MNIST family ---------------------------------------------------------------------------------------------


def read_idx(path: Path) -> Tensor:
    """Reads an IDX file, plain or gzip-packed: uint8 or int32 of any shape.

    Raises:
        ValueError: the file is damaged: not IDX, packed data broken, or longer or shorter than its header says.
    """
    data = path.read_bytes()
    try:
        content = gzip.decompress(data) if path.suffix == ".gz" else data
        zero, kind, dimensions = int.from_bytes(content[:2], "big"), content[2], content[3]
        dtype = np.dtype({0x08: "u1", 0x0C: ">i4"}[kind])
        shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
        values = np.frombuffer(content, dtype, offset=4 + 4 * dimensions)
        if zero != 0 or not 1 <= dimensions <= 3:
            raise ValueError("no IDX header")
        return torch.from_numpy(values.reshape(shape).astype(dtype.newbyteorder("=")))
    except (ValueError, KeyError, IndexError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to have it downloaded again") from error


def _locate(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)


def _load_idx_family(
    root: Path, folder_name: str, stems: list[str], download_with: Callable[[], object], download: bool
) -> list[Tensor]:
    """The tensors of four IDX files: training images and labels, test images and labels."""
    folder = root / folder_name / "raw"
    if download and not all(_locate(folder, stem) for stem in stems):
        new = [place for place in (folder, folder.parent, root) if not place.exists()]
        try:
            download_with()
        except (OSError, RuntimeError) as error:
            for place in new:  # torchvision makes its folders before it downloads
                with suppress(OSError):
                    place.rmdir()
            raise FileNotFoundError(
                f"{folder} lacks some of {', '.join(stems)} (plain or .gz), and the download failed: {error}"
            ) from error
    paths = [_locate(folder, stem) for stem in stems]
    missing = [stem for stem, path in zip(stems, paths, strict=True) if path is None]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)} (plain or .gz)")
    return [read_idx(path) for path in paths if path is not None]


def _check_pairs(images: Tensor, labels: Tensor, classes: tuple[str, ...], folder: Path) -> Images:
    if images.ndim != 3 or images.shape[1:] != (SIDE, SIDE) or images.dtype != torch.uint8:
        raise ValueError(f"{folder}: expected uint8 images of {SIDE}×{SIDE}, found {tuple(images.shape)}")
    if labels.ndim != 1:
        raise ValueError(f"{folder}: expected one label an image, found a table of {tuple(labels.shape)}")
    if not len(labels):
        raise ValueError(f"{folder}: a file holds no labels")
    if len(images) != len(labels):
        raise ValueError(f"{folder}: {len(images)} images but {len(labels)} labels")
    if not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise ValueError(
            f"{folder}: labels run from {labels.min()} to {labels.max()}, not from 0 to {len(classes) - 1}"
        )
    return Images(images[:, None].contiguous(), labels.long(), classes)


def _both_parts(tensors: list[Tensor], classes: tuple[str, ...], folder: Path) -> Splits:
    train, test = (_check_pairs(tensors[i], tensors[i + 1], classes, folder) for i in (0, 2))
    return train, test


DIGITS = tuple("0123456789")


def _mnist_like(class_name: str) -> Loader:
    def load(root: Path, split: str, download: bool) -> Splits:
        def torchvision_class():  # its import costs a second, which MNIST at hand need not pay
            from torchvision import datasets

            return getattr(datasets, class_name)

        stems = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
        tensors = _load_idx_family(root, class_name, stems, lambda: torchvision_class()(root, download=True), download)
        folder = root / class_name / "raw"
        classes = DIGITS if class_name == "MNIST" else tuple(torchvision_class().classes)
        return _both_parts(tensors, classes, folder)

    return load


def _qmnist(root: Path, split: str, download: bool) -> Splits:
    from torchvision import datasets

    stems = [f"qmnist-{part}-{what}" for part in ("train", "test") for what in ("images-idx3-ubyte", "labels-idx2-int")]

    def fetch() -> None:
        for what in ("train", "test"):
            datasets.QMNIST(root, what=what, download=True)

    tensors = _load_idx_family(root, "QMNIST", stems, fetch, download)
    folder = root / "QMNIST" / "raw"
    # Its label files carry eight columns about the writer; the first is the digit.
    if any(tensors[i].ndim != 2 or not tensors[i].shape[1] for i in (1, 3)):
        raise ValueError(f"{folder}: QMNIST's labels are a table, the digit in its first column; these are not")
    return _both_parts([tensors[0], tensors[1][:, 0], tensors[2], tensors[3][:, 0]], DIGITS, folder)


def _emnist(root: Path, split: str, download: bool) -> Splits:
    from torchvision import datasets

    if split not in datasets.EMNIST.splits:
        raise ValueError(f"unknown EMNIST split {split!r}; known: {', '.join(datasets.EMNIST.splits)}")
    stems = [
        f"emnist-{split}-{part}-{what}-ubyte" for part in ("train", "test") for what in ("images-idx3", "labels-idx1")
    ]
    tensors = _load_idx_family(
        root, "EMNIST", stems, lambda: datasets.EMNIST(root, split=split, download=True), download
    )
    folder = root / "EMNIST" / "raw"
    # EMNIST stores its images transposed, and counts its letters from 1.
    classes = tuple(kind for kind in datasets.EMNIST.classes_split_dict[split] if kind != "N/A")
    first = 1 if split == "letters" else 0
    train_images, train_labels, test_images, test_labels = tensors
    upright = [train_images.mT, train_labels.long() - first, test_images.mT, test_labels.long() - first]
    return _both_parts(upright, classes, folder)


# --- without files ------------------------------------------------------------------------------------------------


def _digits(root: Path, split: str, download: bool) -> Splits:
    """scikit-learn's 1,797 handwritten digits of 8×8, resized to 28×28; every fifth image of each class is the test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the digits come with scikit-learn: pip install "mnist_dist[demo]"') from error
    source = load_digits()
    images = torch.from_numpy(source.images).float()[:, None] * (255 / 16)
    images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    images, labels = images.round().to(torch.uint8), torch.from_numpy(source.target).long()
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        is_test[(labels == digit).nonzero()[4::5]] = True
    train, test = (Images(images[chosen], labels[chosen], DIGITS) for chosen in (~is_test, is_test))
    return train, test


def _synthetic(root: Path, split: str, download: bool) -> Splits:
    """Ten fixed smooth patterns under noise: no file, learnable, equal on every machine (4,096 and 1,024 images)."""
    generator = torch.Generator().manual_seed(20_231)
    coarse = torch.randint(0, 256, (10, 1, 7, 7), generator=generator).float()
    patterns = coarse.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)

    def draw(count: int) -> Images:
        labels = torch.randint(0, 10, (count,), generator=generator)
        noise = torch.randint(-127, 128, (count, 1, SIDE, SIDE), generator=generator)
        return Images((patterns[labels] / 2 + noise + 64).clamp(0, 255).to(torch.uint8), labels, DIGITS)

    return draw(4096), draw(1024)


DATASETS: dict[str, Loader] = {
    "mnist": _mnist_like("MNIST"),
    "fashion_mnist": _mnist_like("FashionMNIST"),
    "kmnist": _mnist_like("KMNIST"),
    "qmnist": _qmnist,
    "emnist": _emnist,
    "digits": _digits,
    "synthetic": _synthetic,
}
