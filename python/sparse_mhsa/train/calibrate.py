"""``sparse-mhsa calibrate``: what masks would keep of a classifier's attention on its own images."""

# `option` is `dataclasses.field` with metadata, so it makes no shared default.
# ruff: noqa: RUF009

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import UsageError, require_packages
from .options import SEEDS, Options, option
from .recipes import Dataset, TrainOptions

if TYPE_CHECKING:
    from ..calibration import Calibration

logger = logging.getLogger("sparse_mhsa")


def _same(name: str) -> Any:  # noqa: ANN401
    """An option that means what it means in training."""
    (found,) = (item for item in fields(TrainOptions) if item.name == name)
    return field(default=found.default, metadata=found.metadata)


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(Options):
    """Which model, which images, how many of them, and what to recommend."""

    dataset: Dataset = _same("dataset")
    data_path: Path | None = _same("data_path")
    model: str = _same("model")
    finetune: Path | None = _same("finetune")
    nb_classes: int | None = _same("nb_classes")
    input_size: int | None = _same("input_size")
    patch_size: int | None = _same("patch_size")
    batch_size: int = option(16, "images per batch", at_least=1)
    batches: int = option(4, "batches of held-out images to look at")
    mass: float = option(0.9, "share of every layer's attention that the recommendation keeps")
    seed: int = option(0, "seed of fresh weights, of which images, and of random masks", at_least=0, below=SEEDS)
    device: str = _same("device")
    no_plots: bool = option(False, "draw no heat map")
    output_dir: Path = option(
        Path("runs/calibrate"),
        "where calibration.json, calibration.txt, calibration.png and recommended.yaml go",
        metavar="DIR",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batches < 1:
            raise UsageError(f"--batches must be at least 1, got {self.batches}")
        if not 0.0 < self.mass <= 1.0:
            raise UsageError(f"--mass must be above 0 and at most 1, got {self.mass}")
        self.as_training()

    def as_training(self) -> TrainOptions:
        """The model and the images of a training run with these options."""
        shared = {item.name for item in fields(TrainOptions)} & {item.name for item in fields(self)}
        return TrainOptions(**{name: getattr(self, name) for name in shared - {"output_dir"}})


def calibrate(configs: Sequence[Path], options: CalibrateOptions) -> "Calibration":
    """Measure what the configurations in some files would keep, and write it down.

    Raises:
        UsageError: an option, path, data set or weights cannot be used as given.
        ConfigError: a configuration cannot be honoured, or not by this model.
    """
    require_packages("timm", "torchvision", *([] if options.no_plots else ["matplotlib"]))
    import torch
    from torch.utils.data import DataLoader, Subset

    from .. import ConfigError
    from .. import calibrate as measure
    from .checkpoint import seed_everything
    from .datasets import load_data
    from .finetune import check_device
    from .models import build_model

    training = options.as_training()
    check_device(options.device)
    seed_everything(options.seed)
    data = load_data(training)
    if options.finetune is None:
        logger.warning("--finetune is not given: the weights are random, and so is what they attend to")
    model = build_model(training, data)
    # Held-out images: they are not augmented. In any order, because folders are sorted by class.
    order = torch.randperm(data.sizes[1], generator=torch.Generator().manual_seed(options.seed)).tolist()
    images = Subset(data.test, order[: options.batches * options.batch_size])
    try:
        result = measure(model, DataLoader(images, options.batch_size), list(configs))
    except ConfigError:
        raise
    except ValueError as error:
        raise UsageError(f"--model {options.model}: {error}") from error
    write(result, options)
    return result


def write(result: "Calibration", options: CalibrateOptions) -> None:
    """The result as data, text, heat map and configuration, and the text to the log."""
    from .checkpoint import make_folder, replacing, write_text

    folder = options.output_dir
    make_folder(folder)
    text, recommended = f"{result}\n", result.recommend(options.mass)
    write_text(folder / "calibration.json", json.dumps(result.to_dict(), indent=2) + "\n")
    write_text(folder / "calibration.txt", text)
    write_text(folder / "recommended.yaml", recommended)
    if not options.no_plots:
        import matplotlib

        matplotlib.use("agg")
        figure = result.plot()[0].get_figure(root=True)
        assert figure is not None
        with replacing(folder / "calibration.png") as file:
            figure.savefig(file, dpi=150)
    logger.info("%s\n%s", text, recommended)
    logger.info("written: %s", folder / "recommended.yaml")
