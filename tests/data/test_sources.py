"""Every data set is complete, upright, labelled from 0 and normalised; an error names the damaged or missing file."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from accelerate import PartialState
from torch import Tensor

from mnist_dist import load_recipe
from mnist_dist.data import DATASETS, Dataset, Images, load_dataset
from mnist_dist.data.sources import OWN, TORCHVISION, is_sorted_by_class
from mnist_dist.data.sources.idx import read_idx
from mnist_dist.data.sources.mnist import MNIST_TEST
from mnist_dist.run.data import load_data

TRAIN, TEST = 30, 12
MNIST_LIKE = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}


@pytest.fixture(scope="module")
def mnist(mnist_root) -> Dataset:
    return load_dataset("mnist", root=mnist_root, download=False)


# --- IDX files ----------------------------------------------------------------------------------------------------


def idx_bytes(array: np.ndarray) -> bytes:
    kinds = {"uint8": 0x08, "int8": 0x09, "int16": 0x0B, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}
    kind = kinds[array.dtype.name]
    header = struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = idx_bytes(array)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "float32", "float64"])
@pytest.mark.parametrize("shape", [(7,), (5, 8), (3, 4, 6), (2, 3, 4, 5)])
def test_read_idx_returns_what_was_written(tmp_path, shape, dtype, suffix):
    random = np.random.default_rng(0)
    limits = np.iinfo(dtype) if "int" in dtype else None
    values = random.integers(limits.min, limits.max, shape, dtype, True) if limits else random.random(shape, dtype)
    path = tmp_path / f"values{suffix}"
    write_idx(path, values)
    found = read_idx(path)
    assert found.dtype == getattr(torch, dtype)
    assert torch.equal(found, torch.from_numpy(values))


FILE = idx_bytes(np.arange(60, dtype=np.uint8).reshape(3, 4, 5))
INT32_FILE = idx_bytes(np.arange(60, dtype=np.int32).reshape(12, 5))
PACKED_FILE = gzip.compress(FILE)


def replaced(content: bytes, position: int, value: int) -> bytes:
    return content[:position] + bytes([value]) + content[position + 1 :]


DAMAGED = {
    "empty": b"",
    "only_two_bytes": FILE[:2],
    "header_cut": FILE[:9],
    "header_alone": FILE[:16],
    "not_idx": b"<html>404 Not Found</html>" * 4,
    "first_byte_not_zero": replaced(FILE, 0, 1),
    "unknown_type": replaced(FILE, 2, 0x0D),
    "no_dimensions": replaced(FILE, 3, 0),
    "five_dimensions": idx_bytes(np.zeros((1, 2, 3, 4, 5), np.uint8)),
    "a_byte_short": FILE[:-1],
    "a_byte_long": FILE + b"\0",
    "more_images_than_bytes": replaced(FILE, 7, 4),
    "a_great_many_images": replaced(FILE, 4, 0xFF),
    "int32_a_byte_short": INT32_FILE[:-1],
    "int32_a_number_short": INT32_FILE[:-4],
    "packed_empty.gz": b"",
    "packed_cut.gz": PACKED_FILE[: len(PACKED_FILE) // 2],
    "packed_without_sum.gz": PACKED_FILE[:-8],
    "packed_wrong_sum.gz": replaced(PACKED_FILE, len(PACKED_FILE) - 8, PACKED_FILE[-8] ^ 1),
    "packed_stream_broken.gz": replaced(PACKED_FILE, 10, 0xFF),
    "packed_but_not_idx.gz": gzip.compress(b"hello" * 10),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_the_error_names_the_damaged_file(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(DAMAGED[name])
    with pytest.raises(ValueError, match="damaged") as caught:
        read_idx(path)
    assert str(path) in str(caught.value)
    assert "delete" not in str(caught.value), "the file may be the user's own"


@pytest.mark.parametrize(
    ("name", "content"),
    [("plain_named_packed.gz", FILE), ("packed_named_plain", PACKED_FILE)],
    ids=["plain", "packed"],  # the packed bytes hold the time
)
def test_the_content_and_not_the_name_says_whether_a_file_is_packed(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert torch.equal(read_idx(path).flatten(), torch.arange(60, dtype=torch.uint8))


def test_any_changed_byte_of_a_packed_file_is_detected(tmp_path):
    path = tmp_path / "values.gz"
    # Bytes 3 to 9 of a gzip header are flags, time and system, not data.
    for position in [0, 1, 2, *range(10, len(PACKED_FILE))]:
        path.write_bytes(replaced(PACKED_FILE, position, PACKED_FILE[position] ^ 0xFF))
        with pytest.raises(ValueError, match="damaged"):
            read_idx(path)


# --- the MNIST family ---------------------------------------------------------------------------------------------


def grey_images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28), np.uint8)


def labels(count: int, classes: int, *, first: int = 0) -> np.ndarray:
    """Labels of a data set; the lowest and the highest class occur."""
    return (np.linspace(classes - 1, 0, count).round() + first).astype(np.uint8)


def family_files(name: str, split: str | None = None) -> dict[str, np.ndarray]:
    """File name -> content of the four files in their published form, training images and labels first."""
    parts = (TRAIN, TEST)
    if name == "qmnist":
        stems = [f"QMNIST/raw/qmnist-{part}" for part in ("train", "test")]
        columns = [np.stack([labels(n, 10), *[np.full(n, 70_000 + k) for k in range(7)]], 1) for n in parts]
        truth = [column.astype(np.int32) for column in columns]
        kinds = ("images-idx3-ubyte", "labels-idx2-int")
    else:
        kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
        if name == "emnist":
            stems = [f"EMNIST/raw/emnist-{split}-{part}" for part in ("train", "test")]
            classes, first = {"letters": (26, 1), "balanced": (47, 0)}[split or "balanced"]
        else:
            stems = [f"{MNIST_LIKE[name]}/raw/{part}" for part in ("train", "t10k")]
            classes, first = 10, 0
        truth = [labels(n, classes, first=first) for n in parts]
    files = {}
    for seed, stem in enumerate(stems):
        files[f"{stem}-{kinds[0]}"] = grey_images(parts[seed], seed)
        files[f"{stem}-{kinds[1]}"] = truth[seed]
    return files


def write_family(root: Path, files: dict[str, np.ndarray], suffix: str = "") -> None:
    for stem, array in files.items():
        write_idx(root / f"{stem}{suffix}", array)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", [*MNIST_LIKE, "qmnist"])
def test_idx_files_become_images_and_labels(tmp_path, name, suffix):
    files = family_files(name)
    write_family(tmp_path, files, suffix)
    dataset = load_dataset(name, root=tmp_path, download=False)
    train_images, train_labels, test_images, test_labels = files.values()
    for part, images, expected in [
        (dataset.train, train_images, train_labels),
        (dataset.test, test_images, test_labels),
    ]:
        assert part.images.dtype == torch.uint8
        assert part.labels.dtype == torch.int64
        assert part.images.shape == (len(images), 1, 28, 28)
        assert np.array_equal(part.images[:, 0].numpy(), images)
        assert np.array_equal(part.labels.numpy(), expected[:, 0] if name == "qmnist" else expected)
        assert len(part.classes) == 10


@pytest.mark.parametrize(
    ("name", "classes"),
    [("mnist", ("0", "9")), ("fashion_mnist", ("T-shirt/top", "Ankle boot")), ("kmnist", ("o", "wo"))],
)
def test_classes_have_names(tmp_path, name, classes):
    write_family(tmp_path, family_files(name))
    found = load_dataset(name, root=tmp_path, download=False).test.classes
    assert (found[0], found[9]) == classes


@pytest.mark.parametrize(("split", "count", "ends"), [("letters", 26, ("a", "z")), ("balanced", 47, ("0", "t"))])
def test_emnist_images_are_upright_and_labels_start_at_0(tmp_path, split, count, ends):
    files = family_files("emnist", split)
    upright = np.zeros((28, 28), np.uint8)
    upright[2, 3:20] = 250  # a bar near the top
    for array in files.values():
        if array.ndim == 3:
            array[0] = upright.T  # EMNIST's files are transposed
    write_family(tmp_path, files)
    dataset = load_dataset("emnist", root=tmp_path, split=split, download=False)
    for part in (dataset.train, dataset.test):
        assert np.array_equal(part.images[0, 0].numpy(), upright)
        assert part.images.is_contiguous()
        assert len(part.classes) == count
        assert (int(part.labels.min()), int(part.labels.max())) == (0, count - 1)
        assert (part.classes[part.labels.min()], part.classes[part.labels.max()]) == ends


def test_the_default_split_of_emnist_is_balanced(tmp_path):
    write_family(tmp_path, family_files("emnist", "balanced"))
    assert len(load_dataset("emnist", root=tmp_path, download=False).train.classes) == 47


def wrong_files() -> dict[str, tuple[str, np.ndarray]]:
    """Fault -> (name of the file, its content)."""
    images, truth = "MNIST/raw/train-images-idx3-ubyte", "MNIST/raw/train-labels-idx1-ubyte"
    return {
        "narrow images": (images, np.zeros((TRAIN, 28, 27), np.uint8)),
        "images of 12 bits": (images, np.full((TRAIN, 28, 28), 4095, np.int16)),
        "images below 0": (images, np.full((TRAIN, 28, 28), -1, np.int8)),
        "images that are not whole": (images, np.full((TRAIN, 28, 28), 100.5, np.float32)),
        "images that are not numbers": (images, np.full((TRAIN, 28, 28), np.nan, np.float32)),
        "images in colour": (images, np.random.default_rng(0).integers(0, 256, (TRAIN, 28, 28, 3), np.uint8)),
        "images of two channels": (images, np.zeros((TRAIN, 2, 28, 28), np.uint8)),
        "labels that are not whole": (truth, labels(TRAIN, 10) + np.float32(0.5)),
        "labels in the image file": (images, labels(TRAIN, 10)),
        "images in the label file": (truth, grey_images(TRAIN, 0)),
        "a black image instead of each label": (truth, np.zeros((TRAIN, 28, 28), np.uint8)),
        "one label missing": (truth, labels(TRAIN - 1, 10)),
        "a label too high": (truth, labels(TRAIN, 11)),
        "a label below 0": (truth, labels(TRAIN, 10).astype(np.int32) - 1),
    }


@pytest.mark.parametrize("fault", wrong_files())
def test_files_that_do_not_match_are_refused(tmp_path, fault):
    stem, content = wrong_files()[fault]
    write_family(tmp_path, family_files("mnist") | {stem: content})
    with pytest.raises(ValueError, match="MNIST") as caught:
        load_dataset("mnist", root=tmp_path, download=False)
    if "images" in fault and content.ndim > 2 and "label" not in fault:
        message = str(caught.value)
        assert str(tmp_path / stem) in message and content.dtype.name in message and str(content.shape) in message


def forms(images: np.ndarray) -> dict[str, np.ndarray]:
    """Name -> the same images in another form."""
    return {
        "int16": images.astype(np.int16),
        "int32": images.astype(np.int32),
        "float32": images.astype(np.float32),
        "float64": images.astype(np.float64),
        "fractions": images.astype(np.float32) / 255,
        "a channel first": images[:, None],
        "a channel last": images[..., None],
        "three equal channels": images[..., None].repeat(3, axis=3),
        "rows of pixels": images.reshape(len(images), 784),
        "float32 with a channel": images[:, None].astype(np.float32),
    }


@pytest.mark.parametrize("form", forms(grey_images(1, 0)))
@pytest.mark.parametrize("name", ["mnist", "emnist"])
def test_images_of_another_type_or_shape_are_read(tmp_path, name, form):
    files = family_files(name, "balanced" if name == "emnist" else None)
    write_family(tmp_path, files)
    expected = load_dataset(name, root=tmp_path, download=False)
    write_family(tmp_path, {stem: forms(array)[form] if array.ndim == 3 else array for stem, array in files.items()})
    found = load_dataset(name, root=tmp_path, download=False)
    assert torch.equal(found.train.images, expected.train.images)
    assert torch.equal(found.test.images, expected.test.images)
    assert (found.train.mean, found.train.std) == (expected.train.mean, expected.train.std)


@pytest.mark.parametrize("form", ["int32", "float32", "column"])
def test_labels_of_another_type_or_shape_are_read(tmp_path, form):
    files = family_files("mnist")
    for stem, array in files.items():
        if array.ndim == 1:
            files[stem] = array[:, None] if form == "column" else array.astype(form)
    write_family(tmp_path, files)
    assert load_dataset("mnist", root=tmp_path, download=False).train.labels.tolist() == labels(TRAIN, 10).tolist()


def test_qmnist_labels_without_columns_are_refused(tmp_path):
    write_family(tmp_path, family_files("qmnist") | {"QMNIST/raw/qmnist-test-labels-idx2-int": labels(TEST, 10)})
    with pytest.raises(ValueError, match="QMNIST"):
        load_dataset("qmnist", root=tmp_path, download=False)


def write_recovered_digits(root: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Writes QMNIST's test files: as many images as MNIST's test set has, and `count` recovered ones."""
    images, truth = grey_images(MNIST_TEST + count, 5), labels(MNIST_TEST + count, 10)
    write_idx(root / "QMNIST/raw/qmnist-test-images-idx3-ubyte", images)
    write_idx(root / "QMNIST/raw/qmnist-test-labels-idx2-int", truth.astype(np.int32)[:, None].repeat(8, axis=1))
    return images[MNIST_TEST:], truth[MNIST_TEST:]


def test_the_recovered_digits_of_qmnist_replace_the_test_images(tmp_path):
    write_family(tmp_path, family_files("mnist"))
    own = load_dataset("mnist", root=tmp_path, download=False)
    images, truth = write_recovered_digits(tmp_path, 20)  # without QMNIST's training set
    dataset = load_dataset("mnist", root=tmp_path, download=False, test="qmnist50k")
    assert np.array_equal(dataset.test.images[:, 0].numpy(), images)
    assert np.array_equal(dataset.test.labels.numpy(), truth)
    assert torch.equal(dataset.train.images, own.train.images)
    assert (dataset.test.mean, dataset.test.std) == (own.train.mean, own.train.std)
    recipe = load_recipe("lenet5", f"data.root={tmp_path}", "data.test=qmnist50k", "data.limit_test=7")
    assert len(load_data(recipe, PartialState()).test) == 7


def test_files_of_qmnist_without_recovered_digits_are_refused(tmp_path):
    write_family(tmp_path, family_files("mnist"))
    write_recovered_digits(tmp_path, 0)
    with pytest.raises(ValueError, match="QMNIST"):
        load_dataset("mnist", root=tmp_path, download=False, test="qmnist50k")


# --- finding files ------------------------------------------------------------------------------------------------

OTHER_NAMES = {
    "a dot": lambda stem: stem.replace("-idx", ".idx"),
    "a dot, packed": lambda stem: stem.replace("-idx", ".idx") + ".gz",
    "capitals": lambda stem: stem.upper(),
    "without the type": lambda stem: stem.removesuffix("-ubyte"),
    "a folder gzip": lambda stem: f"gzip/{stem}.gz",
}


@pytest.mark.parametrize("spelling", OTHER_NAMES)
def test_files_of_other_spellings_are_found(tmp_path, spelling):
    for path, array in family_files("mnist").items():
        folder, _, stem = path.rpartition("/")
        write_idx(tmp_path / folder / OTHER_NAMES[spelling](stem), array)
    assert len(load_dataset("mnist", root=tmp_path, download=False).train) == TRAIN


@pytest.mark.parametrize("root", ["", "data", "data/MNIST", "data/MNIST/raw"])
def test_a_root_too_high_or_too_deep_is_found(tmp_path, monkeypatch, root):
    def refuse(*args, **keywords):
        raise AssertionError("a download was started")

    monkeypatch.setattr(torchvision.datasets, "MNIST", refuse)
    write_family(tmp_path / "data", family_files("mnist"))
    assert len(load_dataset("mnist", root=tmp_path / root).train) == TRAIN


@pytest.mark.parametrize("folder", ["mnist", "MNIST", "fashion-mnist", "FashionMNIST/raw"])
def test_a_folder_with_the_name_of_the_data_set_is_found_whatever_its_spelling(tmp_path, folder):
    name = "fashion_mnist" if "ashion" in folder else "mnist"
    for stem, array in family_files("mnist").items():
        write_idx(tmp_path / folder / stem.rpartition("/")[2], array)
    assert len(load_dataset(name, root=tmp_path, download=False).train) == TRAIN
    assert len(load_dataset(name, root=tmp_path / folder, download=False).train) == TRAIN


@pytest.mark.parametrize("name", ["mnist", "kmnist"])
def test_files_that_may_be_another_data_set_are_named_and_not_read(tmp_path, name):
    for stem, array in family_files("mnist").items():
        write_idx(tmp_path / "mine" / stem.rpartition("/")[2], array)
    with pytest.raises(FileNotFoundError) as caught:
        load_dataset(name, root=tmp_path / "mine", download=False)
    assert f"{tmp_path / 'mine'} holds" in str(caught.value)
    assert str(tmp_path / "mine" / MNIST_LIKE[name] / "raw") in str(caught.value)


def test_another_data_set_of_equal_file_names_is_not_read(tmp_path):
    write_family(tmp_path, family_files("fashion_mnist"))
    for root in (tmp_path, tmp_path / "FashionMNIST", tmp_path / "FashionMNIST" / "raw"):
        with pytest.raises(FileNotFoundError):
            load_dataset("mnist", root=root, download=False)


# --- downloading --------------------------------------------------------------------------------------------------


def test_existing_files_are_not_downloaded_again(tmp_path, monkeypatch):
    def refuse(*args, **keywords):
        raise AssertionError("a download was started")

    monkeypatch.setattr(torchvision.datasets, "MNIST", refuse)
    write_family(tmp_path, family_files("mnist"), suffix=".gz")
    assert len(load_dataset("mnist", root=tmp_path).train) == TRAIN


@pytest.mark.parametrize("existing", [0, 3])
def test_missing_files_are_downloaded(tmp_path, monkeypatch, existing):
    files = family_files("mnist")
    write_family(tmp_path, dict(list(files.items())[:existing]))
    monkeypatch.setattr(torchvision.datasets, "MNIST", lambda root, download: write_family(Path(root), files))
    assert len(load_dataset("mnist", root=tmp_path).test) == TEST


@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("no route to host")])
def test_a_failed_download_names_files_folder_and_reason(tmp_path, monkeypatch, error):
    def fail(*args, **keywords):
        raise error

    monkeypatch.setattr(torchvision.datasets, "MNIST", fail)
    with pytest.raises(FileNotFoundError, match="no route to host") as caught:
        load_dataset("mnist", root=tmp_path)
    assert str(tmp_path / "MNIST" / "raw") in str(caught.value)
    assert "t10k-labels-idx1-ubyte" in str(caught.value)


def test_no_other_process_sees_a_download_before_it_is_complete(tmp_path, monkeypatch):
    files = family_files("mnist")
    names, seen = list(files), []

    def download(root, download):
        for count in range(1, len(names) + 1):
            write_family(Path(root), {name: files[name] for name in names[:count]})
            seen.append(list((tmp_path / "MNIST").rglob("*")))

    monkeypatch.setattr(torchvision.datasets, "MNIST", download)
    assert len(load_dataset("mnist", root=tmp_path).test) == TEST
    assert seen == [[], [], [], []]
    assert [path.name for path in tmp_path.iterdir()] == ["MNIST"]


def test_an_interrupted_download_leaves_nothing(tmp_path, monkeypatch):
    def download(root, download):
        write_family(Path(root), dict(list(family_files("mnist").items())[:2]))
        raise OSError("connection reset")

    monkeypatch.setattr(torchvision.datasets, "MNIST", download)
    with pytest.raises(FileNotFoundError, match="connection reset"):
        load_dataset("mnist", root=tmp_path / "data")
    assert not list(tmp_path.iterdir())


def test_without_download_the_error_names_exactly_the_missing_files(tmp_path):
    files = family_files("mnist")
    del files["MNIST/raw/t10k-images-idx3-ubyte"]
    write_family(tmp_path, files)
    with pytest.raises(FileNotFoundError, match="t10k-images-idx3-ubyte") as caught:
        load_dataset("mnist", root=tmp_path, download=False)
    assert "train-images" not in str(caught.value)


# --- validation, limits and normalisation -------------------------------------------------------------------------


def same(one: Images, other: Images) -> bool:
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


@pytest.fixture(scope="module")
def synthetic() -> Dataset:
    return load_dataset("synthetic")


def test_without_validation_the_held_out_set_is_the_test_set(synthetic):
    assert synthetic.held_out is synthetic.test
    assert not synthetic.has_validation


def test_validation_is_the_last_part_of_the_training_set(synthetic):
    dataset = load_dataset("synthetic", validation=96)
    assert dataset.has_validation
    assert same(dataset.train, synthetic.train[:4000])
    assert same(dataset.held_out, synthetic.train[4000:])
    assert same(dataset.test, synthetic.test)


def test_limits_keep_the_first_images_and_do_not_change_validation(synthetic):
    dataset = load_dataset("synthetic", validation=96, limit_train=200, limit_test=50)
    assert same(dataset.train, synthetic.train[:200])
    assert same(dataset.held_out, synthetic.train[4000:])
    assert same(dataset.test, synthetic.test[:50])
    limited = load_dataset("synthetic", limit_train=5000, limit_test=50)
    assert same(limited.train, synthetic.train)
    assert same(limited.held_out, synthetic.test[:50])


def sorted_by_class(name: str = "mnist") -> dict[str, np.ndarray]:
    """Files of 600 and 200 images, sorted by class; class k has k + 1 shares."""
    files = {}
    for stem, count in (("train", 600), ("t10k", 200)):
        truth = np.sort(np.random.default_rng(0).choice(10, count, p=np.arange(1, 11) / 55)).astype(np.uint8)
        files[f"MNIST/raw/{stem}-images-idx3-ubyte"] = grey_images(count, 1)
        files[f"MNIST/raw/{stem}-labels-idx1-ubyte"] = truth
    return files


@pytest.mark.parametrize("direction", [1, -1])
def test_parts_of_a_set_sorted_by_class_hold_every_class_in_its_share(tmp_path, direction):
    write_family(tmp_path, {stem: array[::direction] for stem, array in sorted_by_class().items()})
    whole = load_dataset("mnist", root=tmp_path, download=False)
    parts = load_dataset("mnist", root=tmp_path, validation=110, limit_train=220, limit_test=55, download=False)
    for part, of in [(parts.train, whole.train), (parts.held_out, whole.train), (parts.test, whole.test)]:
        expected = torch.bincount(of.labels).double() * len(part) / len(of)
        assert (torch.bincount(part.labels, minlength=10) - expected).abs().max() <= 2
        pairs = {(image.numpy().tobytes(), int(label)) for image, label in zip(of.images, of.labels, strict=True)}
        assert all((i.numpy().tobytes(), int(y)) in pairs for i, y in zip(part.images, part.labels, strict=True))
    held_out = {image.numpy().tobytes() for image in parts.held_out.images}
    assert len(held_out) == 110 and not [i for i in parts.train.images if i.numpy().tobytes() in held_out]
    again = load_dataset("mnist", root=tmp_path, validation=110, limit_train=220, limit_test=55, download=False)
    assert same(parts.train, again.train) and same(parts.held_out, again.held_out) and same(parts.test, again.test)


def test_a_complete_set_sorted_by_class_keeps_its_order(tmp_path):
    files = sorted_by_class()
    write_family(tmp_path, files)
    dataset = load_dataset("mnist", root=tmp_path, download=False)
    assert np.array_equal(dataset.train.images[:, 0].numpy(), files["MNIST/raw/train-images-idx3-ubyte"])
    assert np.array_equal(dataset.test.labels.numpy(), files["MNIST/raw/t10k-labels-idx1-ubyte"])


@pytest.mark.parametrize("name", ["digits", "synthetic", "mnist"])
def test_the_parts_of_the_published_sets_are_their_last_and_first_rows(request, name):
    if name == "digits":
        pytest.importorskip("sklearn", reason="scikit-learn, which contains the digits, is not installed")
    root = request.getfixturevalue("mnist_root") if name == "mnist" else "data"
    whole = load_dataset(name, root=root, download=False)
    for part in (whole.train, whole.test):
        assert not is_sorted_by_class(part.labels)


@pytest.mark.parametrize("sizes", [{}, {"limit_train": 5}, {"validation": 4000}, {"limit_test": 3}])
def test_mean_and_deviation_are_those_of_the_complete_training_set(synthetic, sizes):
    dataset = load_dataset("synthetic", **sizes)
    fractions = synthetic.train.images.double() / 255
    expected = (round(float(fractions.mean()), 4),), (round(float(fractions.std(correction=0)), 4),)
    for part in (dataset.train, dataset.held_out, dataset.test):
        assert (part.mean, part.std) == expected


@pytest.mark.parametrize(
    "sizes",
    [{"validation": 4096}, {"validation": 5000}, {"validation": -1}, {"limit_train": 0}, {"limit_test": 0}],
)
def test_sizes_that_leave_no_images_are_refused(sizes):
    with pytest.raises(ValueError, match=next(iter(sizes))):
        load_dataset("synthetic", **sizes)


@pytest.mark.parametrize(
    ("name", "split", "named"),
    [
        ("mnits", None, "'mnits'.*\\n.*fashion_mnist"),
        ("mnist", "letters", "'letters'"),
        ("emnist", "leters", "'leters'.*bymerge"),
    ],
)
def test_the_error_names_an_unknown_data_set_or_split(tmp_path, name, split, named):
    with pytest.raises(ValueError, match=named):
        load_dataset(name, root=tmp_path, split=split, download=False)


# --- generated data sets ------------------------------------------------------------------------------------------


def test_digits_are_divided_into_disjoint_sets_with_a_fifth_of_each_class_for_testing():
    pytest.importorskip("sklearn", reason="scikit-learn, which contains the digits, is not installed")
    dataset = load_dataset("digits")
    train, test = dataset.train, dataset.test
    assert len(train) + len(test) == 1797
    in_all = torch.bincount(torch.cat([train.labels, test.labels]), minlength=10)
    assert torch.bincount(test.labels, minlength=10).tolist() == (in_all // 5).tolist()
    known = {image.numpy().tobytes() for image in train.images}
    assert not [image for image in test.images if image.numpy().tobytes() in known]
    for part in (train, test):
        assert part.images.shape[1:] == (1, 28, 28)
        assert part.images.dtype == torch.uint8
        assert int(part.images.max()) == 255


def digest(*tensors: Tensor) -> str:
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(tensor.numpy().tobytes())
    return content.hexdigest()


def test_synthetic_images_have_the_same_bytes_on_every_machine(synthetic):
    assert (len(synthetic.train), len(synthetic.test)) == (4096, 1024)
    found = digest(synthetic.train.images, synthetic.train.labels, synthetic.test.images, synthetic.test.labels)
    assert found == "4f9a6ed33cae36f679d6bd6742d20a76099fe71ffe3dbcad1293952a8546b18f"


# --- the real MNIST -----------------------------------------------------------------------------------------------


def test_mnist_has_its_published_sizes_and_label_counts(mnist):
    assert mnist.train.images.shape == (60_000, 1, 28, 28)
    assert mnist.test.images.shape == (10_000, 1, 28, 28)
    assert (mnist.train.mean, mnist.train.std) == ((0.1307,), (0.3081,))
    train_counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    test_counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert torch.bincount(mnist.train.labels).tolist() == train_counts
    assert torch.bincount(mnist.test.labels).tolist() == test_counts
    assert mnist.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]


def test_these_tests_cover_every_data_set():
    tested_elsewhere = {*OWN, *TORCHVISION}  # in test_own_images.py
    assert set(DATASETS) == {*MNIST_LIKE, "qmnist", "emnist", "digits", "synthetic"} | tested_elsewhere
