"""Images that come inside no package: CIFAR, Tiny-ImageNet, ImageNet and any folder, with timm's transforms."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from . import DataError, UsageError, require_packages
from .checkpoint import first_line
from .datasets import ImageData
from .recipes import PUBLISHED, ImageOptions, PretrainOptions

logger = logging.getLogger("sparse_mhsa")

CIFAR_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
"""Mean and standard deviation per channel of the training images."""

UNLABELLED_TEST = 10
"""One of so many images of a folder without ``train/`` and ``val/`` is held out."""

_CIFAR_ARCHIVES = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


def load_folder(options: ImageOptions) -> ImageData:
    """Load the data set ``options.dataset`` from ``options.data_path``.

    Raises:
        UsageError: a package, a folder or an image is missing, or the folder holds something else.
    """
    require_packages("timm", "torchvision")
    assert options.data_path is not None
    root = options.data_path
    if not root.is_dir() and not options.download:
        raise UsageError(f"--data-path: no such folder: '{root}'")
    load: dict[str, Callable[[Path, Transforms, ImageOptions], ImageData]] = {
        "cifar10": _cifar,
        "cifar100": _cifar,
        "tinyimagenet": _tiny_imagenet,
        "imagenet": _image_folder,
        "imagefolder": _image_folder,
    }
    return load[options.dataset](root, Transforms(options), options)


def planned_folder(options: ImageOptions) -> ImageData:
    """The data set to plan with: where it is not there, black images in the numbers of the published one.

    Raises:
        UsageError: as `load_folder`, for a data set whose size only its folder tells.
    """
    why = "--data-path is not given"
    if options.data_path is not None:
        try:
            return load_folder(replace(options, download=False))
        except UsageError as error:
            if options.dataset not in PUBLISHED:
                raise
            why = str(error)
    require_packages("timm", "torchvision")
    transforms = Transforms(options)
    train, test, classes = PUBLISHED[options.dataset]
    logger.info("%s; the plan takes the published %s", why, options.dataset)
    seen, held_out = (_Black(number, transforms.size) for number in (train, test))
    return transforms.data(seen, held_out, tuple(map(str, range(classes))))


class _Black(Dataset[Any]):
    """As many black images of the first class."""

    def __init__(self, number: int, size: int) -> None:
        self.number, self.size = number, size

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, _index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(3, self.size, self.size), 0


class Transforms:
    """What timm makes of an image: augmented to train on, resized and cropped to test.

    Args:
        options: the recipe; its model says the image size and the normalisation.
    """

    def __init__(self, options: ImageOptions) -> None:
        import timm
        from timm.data.auto_augment import posterize
        from timm.data.transforms_factory import create_transform
        from timm.models import PretrainedCfg

        from . import models  # noqa: F401  (registers the built-in models with timm)

        own = timm.get_pretrained_cfg(options.model) or PretrainedCfg()
        self.size: int = options.input_size or own.input_size[-1]
        self.mean, self.std = CIFAR_STATISTICS.get(options.dataset, (tuple(own.mean), tuple(own.std)))
        shared: dict[str, Any] = {
            "input_size": self.size,
            "mean": self.mean,
            "std": self.std,
            "interpolation": "bicubic",
        }
        policy = getattr(options, "aa", None)
        try:
            self.augment = create_transform(
                **shared,
                is_training=True,
                auto_augment=policy,
                color_jitter=getattr(options, "color_jitter", None) or 0.0,
                re_prob=0.0,  # random erasing works on batches: see `tasks`
            )
        except Exception as error:  # timm asserts, indexes and converts what it takes apart
            if policy is None:
                raise
            raise UsageError(
                f"--aa '{policy}': timm does not know this policy ({first_line(error)}); "
                "allowed: rand-..., augmix-..., original, originalr, v0, v0r, 3a"
            ) from error
        for operation in _operations(self.augment):
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize
        # As in MAE: the shorter side is resized to size / 0.875, the centre is kept.
        self.plain = create_transform(**shared, is_training=False, crop_pct=0.875)

    def data(self, train: Dataset[Any], test: Dataset[Any], classes: tuple[str, ...]) -> ImageData:
        """The data set made of these two halves."""
        return ImageData(train, test, classes, 3, self.size, None, self.mean, self.std)


def _operations(transform: Any) -> Iterator[Any]:  # noqa: ANN401  (timm's transforms)
    """The operations on images that the policy of ``--aa`` draws from."""
    from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment

    for part in transform.transforms:
        if isinstance(part, (RandAugment, AugMixAugment)):
            yield from part.ops
        elif isinstance(part, AutoAugment):
            yield from chain.from_iterable(part.policy)


def _posterize(image: Any, bits_to_keep: int, **_: object) -> Any:  # noqa: ANN401  (a PIL image)
    """timm's: at its strongest it keeps 0 bits, which Pillow made black and now refuses."""
    from timm.data.auto_augment import posterize

    return posterize(image, bits_to_keep) if bits_to_keep > 0 else image.point(lambda _: 0)  # type: ignore[no-untyped-call]


def _cifar(root: Path, transforms: Transforms, options: ImageOptions) -> ImageData:
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[options.dataset]
    try:
        train = kind(str(root), train=True, transform=transforms.augment, download=options.download)
        test = kind(str(root), train=False, transform=transforms.plain, download=options.download)
    except (RuntimeError, OSError) as error:
        raise UsageError(
            f"--data-path '{root}': {options.dataset} needs the folder {_CIFAR_ARCHIVES[options.dataset]} of its "
            f"archive there; unpack it, or give --download: {first_line(error)}"
        ) from error
    return transforms.data(train, test, tuple(train.classes))


def _image_folder(root: Path, transforms: Transforms, options: ImageOptions) -> ImageData:
    from torchvision.datasets import ImageFolder

    if isinstance(options, PretrainOptions) and not (root / "train").is_dir():
        return _unlabelled(root, transforms)
    for folder in (root / "train", root / "val"):
        if not folder.is_dir():
            raise UsageError(f"--data-path: no such folder: '{folder}'")
    try:
        train = ImageFolder(str(root / "train"), transforms.augment, loader=_read_image)
        test = ImageFolder(str(root / "val"), transforms.plain, loader=_read_image)
    except FileNotFoundError as error:  # a class folder without images, or no class folder at all
        raise UsageError(f"--data-path '{root}': {error}") from error
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise UsageError(f"--data-path '{root}': classes that are not in both train/ and val/: {', '.join(odd)}")
    # Pretraining looks at no labels.
    if len(train.classes) < 2 and not isinstance(options, PretrainOptions):
        raise UsageError(f"--data-path '{root}': expected two classes or more, got {', '.join(train.classes)}")
    return transforms.data(train, test, tuple(train.classes))


def _unlabelled(root: Path, transforms: Transforms) -> ImageData:
    """All images of a folder and those inside it, in the order of their paths; every tenth is held out."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    if len(paths) < 2:
        raise UsageError(
            f"--data-path '{root}': expected two images or more ({', '.join(IMG_EXTENSIONS)}), got {len(paths)}"
        )
    test = paths[::UNLABELLED_TEST]
    train = [path for place, path in enumerate(paths) if place % UNLABELLED_TEST]
    labelled = ([(path, 0) for path in part] for part in (train, test))
    halves = [_Annotated(part, f) for part, f in zip(labelled, (transforms.augment, transforms.plain), strict=True)]
    return transforms.data(halves[0], halves[1], ("image",))


def _tiny_imagenet(root: Path, transforms: Transforms, options: ImageOptions) -> ImageData:
    """Either as published, with ``val/val_annotations.txt``, or sorted into class folders."""
    from torchvision.datasets import ImageFolder

    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        return _image_folder(root, transforms, options)
    if not (root / "train").is_dir():
        raise UsageError(f"--data-path: no such folder: '{root / 'train'}'")
    train = ImageFolder(str(root / "train"), transforms.augment, loader=_read_image)
    samples = []
    for number, line in enumerate(annotations.read_text(encoding="utf-8").splitlines(), start=1):
        name, _, rest = line.partition("\t")
        label = rest.partition("\t")[0]
        if label not in train.class_to_idx:
            raise UsageError(f"{annotations}:{number}: expected an image and a class of train/, got {line!r:.80}")
        samples.append((root / "val" / "images" / name, train.class_to_idx[label]))
    return transforms.data(train, _Annotated(samples, transforms.plain), tuple(train.classes))


class _Annotated(Dataset[Any]):
    """Images with labels from a list."""

    def __init__(self, samples: list[tuple[Path, int]], transform: Callable[[Any], Any]) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return self.transform(_read_image(str(path))), label


def _read_image(path: str) -> Any:  # noqa: ANN401  (a PIL image)
    from PIL import Image

    try:
        with Image.open(path) as image:
            return _eight_bits(image).convert("RGB")
    except Exception as error:  # the decoders raise whatever the damaged part of the file leads to
        raise DataError(f"{path}: not a readable image: {first_line(error)}") from error


def _eight_bits(image: Any) -> Any:  # noqa: ANN401
    """The image with 8 bits per channel: PIL would cut wider ones off at 255 and make them white, or black."""
    from PIL import Image

    # PNG and PGM have 16 bits at most, which PIL may hold in 32.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"expected 8 or 16 bits per channel, got 32 (mode {image.mode})")
    return image
