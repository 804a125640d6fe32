"""The training loop: one `Trainer` per run, resumable after any step."""

import json
import logging
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]  # re-exported without __all__
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..adapters import find_attention
from . import DataError, TrainingError, UsageError
from .checkpoint import first_line, random_state, replacing, set_random_state, write_checkpoint
from .datasets import EpochOrder, ImageData
from .options import TrainOptions
from .resume import check_data, check_model, check_run
from .timing import AttentionClock, synchronize

logger = logging.getLogger("sparse_mhsa")

LAST, BEST, LOG = "checkpoint-last.pth", "checkpoint-best.pth", "log.txt"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the step under way was finished and saved."""


@dataclass
class Meter:
    """Running sums of one epoch."""

    images: int = 0
    loss: float = 0.0
    correct: int = 0
    step_seconds: list[float] = field(default_factory=list)
    attention_seconds: list[float] = field(default_factory=list)


class Trainer:
    """Trains an image classifier and keeps its log and checkpoints.

    Args:
        model: maps (B, C, H, W) images to (B, classes) logits; already on its device.
        data: training and test images.
        options: the recipe.
        attention: the attention configuration as YAML text, or ``None`` for a dense model.
        on_epoch: called with (model, epoch) before each epoch, for masks that change with it.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        options: TrainOptions,
        attention: str | None = None,
        on_epoch: Callable[[nn.Module, int], object] | None = None,
    ) -> None:
        self.model, self.data, self.options, self.attention = model, data, options, attention
        self.on_epoch = on_epoch
        self.device = torch.device(options.device)
        train_size, _ = data.sizes
        self.steps_per_epoch = train_size // options.batch_size
        if self.steps_per_epoch == 0:
            raise UsageError(f"--batch-size must be at most the {train_size} training images, got {options.batch_size}")
        self.order = EpochOrder(train_size, options.seed)
        # A generator of its own: starting a loader must not draw from the generator that dropout uses.
        self.worker_seeds = torch.Generator()
        self.train_loader = self._loader(data.train, sampler=self.order, drop_last=True, generator=self.worker_seeds)
        self.test_loader = self._loader(data.test, generator=torch.Generator())
        self.optimizer = create_optimizer_v2(
            model,
            "adamw",
            lr=options.peak_lr,
            weight_decay=options.weight_decay,
            layer_decay=options.layer_decay,
        )
        warm_up = round(options.resolved_warmup_epochs * self.steps_per_epoch)
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=max(1, options.epochs * self.steps_per_epoch - warm_up),
            lr_min=options.min_lr,
            warmup_t=warm_up,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        self.mixup = self._mixup()
        self.epoch = self.step = 0
        self.meter = Meter()
        self.best_acc1: float | None = None
        self.best: Path | None = None
        """The checkpoint that reached it: in the output folder, or beside the checkpoint this run goes on from."""
        self.history: list[dict[str, Any]] = []

    @property
    def num_parameters(self) -> int:
        """Trainable parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def fit(self) -> None:
        """Train to the last epoch; `history` then holds one mapping per epoch.

        Raises:
            TrainingError: the loss became infinite or NaN, or a file cannot be written.
            DataError: an image cannot be read; `LAST` continues after the last finished step.
            Interrupted: Ctrl-C was pressed; `LAST` continues after the last finished step.
        """
        # Now rather than after an epoch: a folder that cannot be made should cost nothing.
        self.options.output_dir.mkdir(parents=True, exist_ok=True)
        clock = AttentionClock([site.module for site in find_attention(self.model)], self.device)
        try:
            with catch_interrupt() as interrupted:
                while self.epoch < self.options.epochs:
                    if self.on_epoch is not None:
                        self.on_epoch(self.model, self.epoch)
                    for _ in self._train_steps(clock):
                        self._stop_if(interrupted)
                    self._finish_epoch(self.evaluate(lambda: self._stop_if(interrupted)))
                    self._stop_if(interrupted, saved=True)
        except DataError as error:
            if self.epoch == self.step == 0:
                raise
            self.save(LAST)
            path = self.options.output_dir / LAST
            raise DataError(f"{error}; once that is mended, continue with --resume {path}") from error
        finally:
            clock.close()

    @torch.no_grad()
    def evaluate(self, after_batch: Callable[[], object] = lambda: None) -> dict[str, float]:
        """Mean cross-entropy and top-1 and top-5 accuracy in percent over the test images."""
        self.model.eval()
        loss, top1, top5, images = 0.0, 0, 0, 0
        for image, target in self._progress(self.test_loader, "test"):
            image, target = image.to(self.device), target.to(self.device)
            logits = self.model(image)
            loss += F.cross_entropy(logits, target, reduction="sum").item()
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == target[:, None]
            top1 += int(hits[:, 0].sum())
            top5 += int(hits.sum())
            images += len(image)
            after_batch()
        if not math.isfinite(loss):
            raise TrainingError(f"the test loss is {loss} after epoch {self.epoch}; lower --lr or use --clip-grad")
        return {
            "test_loss": loss / images,
            "test_acc1": 100 * top1 / images,
            "test_acc5": 100 * top5 / images,
        }

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint holds; see `checkpoint`."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "meter": asdict(self.meter),
            "best_acc1": self.best_acc1,
            "history": self.history,
            "rng": random_state(),
            "args": self.options.as_dict(),
            "data": {"classes": list(self.data.class_names), "train_images": self.data.sizes[0]},
            "attention": self.attention,
        }

    def load_state(self, state: dict[str, Any], path: Path) -> None:
        """Take over the state of a checkpoint, so that training goes on exactly where it was written.

        With augmentation in worker processes, a run that stopped inside an epoch draws that epoch's remaining
        augmentations anew.

        Raises:
            UsageError: it belongs to another model, data set, attention or run.
        """
        check_data(self, state, path)
        check_model(self, state, path)
        for warning in check_run(self, state, path):
            logger.warning("%s: the result will differ from an uninterrupted run", warning)
        set_random_state(state["rng"], path)
        self.model.load_state_dict(state["model"])
        # The groups hold what this run's options say; the checkpoint has the moments.
        own = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**own, "state": state["optimizer"]["state"]})
        self.meter = Meter(**state["meter"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.scheduler.step_update(max(0, self.epoch * self.steps_per_epoch + self.step - 1))
        self.best_acc1, self.history = state["best_acc1"], list(state["history"])
        beside = path.with_name(BEST)
        self.best = beside if beside.is_file() else None

    def load_weights(self, state: dict[str, Any], path: Path) -> None:
        """Take over only the model of a checkpoint.

        Raises:
            UsageError: it belongs to another model or other classes.
        """
        check_data(self, state, path)
        check_model(self, state, path)
        self.model.load_state_dict(state["model"])

    def _train_steps(self, clock: AttentionClock) -> Iterator[None]:
        """The steps of this epoch that are not done yet, yielding after each."""
        self.model.train()
        self.order.epoch, self.order.start = self.epoch, self.step * self.options.batch_size
        self.worker_seeds.manual_seed(self.order.entropy())
        title = f"epoch {self.epoch + 1}/{self.options.epochs}"
        progress = self._progress(self.train_loader, title, initial=self.step, total=self.steps_per_epoch)
        for image, target in progress:
            clock.lap()
            start = time.perf_counter()
            loss, correct = self._train_step(image.to(self.device), target.to(self.device))
            synchronize(self.device)
            self.meter.step_seconds.append(time.perf_counter() - start)
            self.meter.attention_seconds.append(clock.lap())
            self.meter.images += len(image)
            self.meter.loss += loss * len(image)
            self.meter.correct += correct
            self.step += 1
            progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
            yield

    def _train_step(self, image: Tensor, target: Tensor) -> tuple[float, int]:
        """One update; returns the loss and how many images were classified correctly."""
        self.scheduler.step_update(self.epoch * self.steps_per_epoch + self.step)
        # Mixup's targets are probabilities and already smoothed.
        soft_target, smoothing = target, self.options.smoothing
        if self.mixup is not None:
            image, soft_target = self.mixup(image, target)
            smoothing = 0.0
        logits = self.model(image)
        loss = F.cross_entropy(logits, soft_target, label_smoothing=smoothing)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} in epoch {self.epoch}, step {self.step}; lower --lr or use --clip-grad"
            )
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.options.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_grad)
        self.optimizer.step()
        return value, int((logits.argmax(dim=1) == target).sum())

    def _finish_epoch(self, results: dict[str, float]) -> None:
        meter = self.meter
        entry = {
            "epoch": self.epoch,
            "train_lr": max(group["lr"] for group in self.optimizer.param_groups),
            "train_loss": meter.loss / meter.images,
            "train_acc1": 100 * meter.correct / meter.images,
            **results,
            "n_parameters": self.num_parameters,
            "step_time": statistics.median(meter.step_seconds),
            "attention_time": statistics.median(meter.attention_seconds),
            "train_time": sum(meter.step_seconds),
        }
        self.history.append(entry)
        is_best = self.best_acc1 is None or entry["test_acc1"] > self.best_acc1
        self.best_acc1 = entry["test_acc1"] if is_best else self.best_acc1
        self.epoch, self.step, self.meter = self.epoch + 1, 0, Meter()
        logger.info(
            "epoch %d/%d: loss %.3f, train %.1f %%, test %.1f %%, best %.1f %%, step %.0f ms (%.0f attn)",
            self.epoch,
            self.options.epochs,
            entry["train_loss"],
            entry["train_acc1"],
            entry["test_acc1"],
            self.best_acc1,
            1e3 * entry["step_time"],
            1e3 * entry["attention_time"],
        )
        self.save(LAST, *([BEST] if is_best else []))
        if is_best:
            self.best = self.options.output_dir / BEST

    def save(self, *names: str) -> None:
        """Write the log and the checkpoints of these names into the output folder."""
        folder = self.options.output_dir
        state = self.state()
        for name in names:
            write_checkpoint(folder / name, state)
        # Rewritten from the history, so that a resumed run neither repeats nor loses lines.
        lines = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in self.history)
        with replacing(folder / LOG) as file:
            file.write(lines.encode())

    def _stop_if(self, interrupted: threading.Event, *, saved: bool = False) -> None:
        if not interrupted.is_set():
            return
        if not saved:
            self.save(LAST)
        path = self.options.output_dir / LAST
        raise Interrupted(f"interrupted; continue with --resume {path}")

    def _loader(self, dataset: Any, **kwargs: Any) -> DataLoader[Any]:  # noqa: ANN401
        return DataLoader(
            dataset,
            batch_size=self.options.batch_size,
            num_workers=self.options.num_workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_leave_interrupts_to_parent,
            **kwargs,
        )

    def _mixup(self) -> Mixup | None:
        options = self.options
        if options.mixup == 0 and options.cutmix == 0:
            return None
        return Mixup(  # type: ignore[no-untyped-call]
            mixup_alpha=options.mixup,
            cutmix_alpha=options.cutmix,
            label_smoothing=options.smoothing,
            num_classes=options.nb_classes or self.data.num_classes,
        )

    def _progress(self, loader: DataLoader[Any], title: str, **kwargs: Any) -> Any:  # noqa: ANN401
        # For tqdm, None means: quiet unless the stream is a terminal.
        disable = {"auto": None, "on": False, "off": True}[self.options.progress]
        kwargs.setdefault("total", len(loader))
        return tqdm(_batches(loader), desc=title, unit="step", leave=False, disable=disable, **kwargs)


def _batches(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of a loader, whose processes send their errors back with a traceback in the message.

    Raises:
        DataError: an image cannot be read.
        TrainingError: a loader process ended.
    """
    try:
        yield from loader
    except DataError as error:
        last = str(error).strip().splitlines()[-1]
        raise DataError(last.partition("DataError: ")[2] or last) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TrainingError(f"a process of --num-workers ended: {first_line(error)}") from error


@contextmanager
def catch_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event; a second one interrupts at once, as usual.

    Outside the main thread, where Python delivers no signals, the event never comes.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.getsignal(signal.SIGINT)

    def note(_signal: int, _frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def _leave_interrupts_to_parent(_worker: int) -> None:
    """A terminal sends Ctrl-C to loader processes too; they must live until the step is finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
