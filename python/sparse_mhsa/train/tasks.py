"""What a run trains for: its loss, its test, and the number that says which epoch was best."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from .checkpoint import TASKS
from .distributed import World
from .recipes import RunOptions, TrainOptions
from .schedule import parameter_groups


class Task(ABC):
    """A kind of training."""

    name: ClassVar[str]
    """Key of `checkpoint.TASKS`, which says what its log holds."""
    shares_test: bool = False
    """Every process tests a part of the images."""

    @property
    def best(self) -> str:
        """The measure that says which epoch was best."""
        return TASKS[self.name].best

    def is_better(self, value: float, than: float | None) -> bool:
        """Whether an epoch with ``value`` is better than the best so far."""
        return than is None or (value < than if TASKS[self.name].lower_is_better else value > than)

    @abstractmethod
    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser of a run."""

    @abstractmethod
    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        """The loss of one batch, and how many images were classified correctly (0 where nothing is)."""

    @abstractmethod
    def test(self, model: nn.Module, batches: Iterable[Any], world: World) -> dict[str, float]:
        """The test measures of a model, which is in evaluation mode.

        Args:
            model: the model.
            batches: batches of images and targets, on their device.
            world: whose sums the measures are, if `shares_test`.

        Returns:
            One finite or infinite number per measure.
        """


def adamw(
    model: nn.Module, options: RunOptions, layer_decay: float | None = None, beta2: float = 0.999
) -> torch.optim.Optimizer:
    """AdamW as in the MAE recipes."""
    groups = parameter_groups(model, weight_decay=options.weight_decay, layer_decay=layer_decay)
    return torch.optim.AdamW(groups, lr=options.peak_lr, betas=(0.9, beta2))


class Classification(Task):
    """Cross-entropy, with mixup and random erasing.

    Args:
        options: the recipe.
        num_classes: outputs of the model.
    """

    name = "finetune"
    smoothing: float
    mixup: "_Mixup | None"
    erase: RandomErasing | None

    def __init__(self, options: TrainOptions, num_classes: int) -> None:
        self.options, self.smoothing = options, options.smoothing
        self.shares_test = options.dist_eval
        self.mixup = _mixup(options, num_classes)
        self.erase = None
        if options.reprob > 0:
            self.erase = RandomErasing(  # type: ignore[no-untyped-call]
                options.reprob, mode=options.remode, max_count=options.recount, device=options.device
            )

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW, with layer decay if asked for."""
        return adamw(model, self.options, self.options.layer_decay)

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        """Cross-entropy with smoothed or mixed targets."""
        soft_targets, smoothing = targets, self.smoothing
        if self.erase is not None:
            images = self.erase(images.clone())
        if self.mixup is not None:
            # Mixup's targets are probabilities and already smoothed.
            images, soft_targets = self.mixup(images, targets)
            smoothing = 0.0
        logits = model(images)
        loss = F.cross_entropy(logits, soft_targets, label_smoothing=smoothing)
        return loss, int((logits.argmax(dim=1) == targets).sum())

    def test(self, model: nn.Module, batches: Iterable[Any], world: World) -> dict[str, float]:
        """Mean cross-entropy, and top-1 and top-5 accuracy in percent."""
        loss, top1, top5, images = 0.0, 0, 0, 0
        for image, target in batches:
            logits = self.logits(model, image).float()
            loss += F.cross_entropy(logits, target, reduction="sum").item()
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == target[:, None]
            top1 += int(hits[:, 0].sum())
            top5 += int(hits.sum())
            images += len(image)
        if self.shares_test:
            loss, top1, top5, images = (  # type: ignore[assignment]
                number if place == 0 else round(number)
                for place, number in enumerate(world.sums([loss, top1, top5, images]))
            )
        return {"test_loss": loss / images, "test_acc1": 100 * top1 / images, "test_acc5": 100 * top5 / images}

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """(B, classes)."""
        result: Tensor = model(images)
        return result


class TwoBranch(Classification):
    """Classification of the whole image and reconstruction of a masked one, with the same encoder.

    The loss is ``0.9 * classification + 0.1 * reconstruction``.
    """

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        """The weighted sum of both branches."""
        if self.erase is not None:
            images = self.erase(images.clone())
        logits, reconstruction = model(images, both=True)
        loss = F.cross_entropy(logits, targets, label_smoothing=self.smoothing)
        return 0.9 * loss + 0.1 * reconstruction, int((logits.argmax(dim=1) == targets).sum())

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """(B, classes) of the classification branch."""
        logits: Tensor = model.classify(images)  # type: ignore[operator]
        return logits


class _Mixup(Mixup):
    """timm's, which draws a side from those between both shares in whole pixels and stops where there is none."""

    def __init__(self, shares: tuple[float, float] | None, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(cutmix_minmax=shares, **kwargs)  # type: ignore[no-untyped-call]
        self.shares = shares

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self.shares is not None:
            side = images.shape[-1]
            least, end = (int(side * share) for share in self.shares)
            least = max(1, least)
            # Half a pixel more, so that timm, which rounds down, comes to these very numbers.
            self.cutmix_minmax = tuple((pixels + 0.5) / side for pixels in (least, max(least + 1, end)))
        mixed: tuple[Tensor, Tensor] = super().__call__(images, targets)  # type: ignore[no-untyped-call]
        return mixed


def _mixup(options: TrainOptions, num_classes: int) -> _Mixup | None:
    if options.mixup == 0 and options.cutmix == 0 and options.cutmix_minmax is None:
        return None
    return _Mixup(
        options.cutmix_minmax,
        mixup_alpha=options.mixup,
        cutmix_alpha=options.cutmix,
        prob=options.mixup_prob,
        switch_prob=options.mixup_switch_prob,
        mode=options.mixup_mode,
        label_smoothing=options.smoothing,
        num_classes=num_classes,
    )
