"""The training loop: one `Trainer` per run, resumable after any step."""

import itertools
import json
import logging
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3  # type: ignore[attr-defined]  # re-exported without __all__
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..adapters import find_attention
from ..layer import set_epoch
from . import DataError, LoaderError, TrainingError, UsageError
from .checkpoint import (
    make_folder,
    random_state,
    remove,
    replacing,
    set_random_state,
    trained_epoch,
    write_checkpoint,
)
from .datasets import ImageData, fingerprint
from .distributed import World, averaged
from .events import Events
from .interrupt import Interrupted, catch_interrupt
from .loading import Loaders
from .lock import locked
from .recipes import RunOptions
from .resume import check_data, check_model, check_run
from .schedule import learning_rate, set_learning_rate
from .tasks import Task
from .timing import AttentionClock, peak_memory, synchronize

logger = logging.getLogger("sparse_mhsa")

LAST, BEST, LOG, PAGE = "checkpoint-last.pth", "checkpoint-best.pth", "log.txt", "report.html"
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(amp: str, device: torch.device) -> AbstractContextManager[object]:
    """The mixed precision that ``--amp`` names."""
    dtype = AMP_DTYPES.get(amp)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def checkpoint_of(folder: Path) -> Path | None:
    """The checkpoint that a run in a folder goes on from: `BEST` where the disk was full for its first `LAST`."""
    # Not Path.is_file, which raises where the folder may not be read; what speaks against that is said elsewhere.
    there = (folder / name for name in (LAST, BEST) if os.path.isfile(folder / name))  # noqa: PTH113
    return next(there, None)


def occupied(options: RunOptions) -> str | None:
    """What speaks against starting a run in its output folder: another run there, whose files it would replace."""
    folder, resume = options.output_dir, getattr(options, "resume", None)
    goes_on = resume is not None and resume.parent.resolve() == folder.resolve()
    checkpoint = checkpoint_of(folder)
    if goes_on or checkpoint is None:
        return None
    if resume is None:
        holds = f"holds a run: continue it with --resume {checkpoint}"
    else:
        holds = f"holds another run than --resume continues: continue that one with --output-dir {resume.parent}"
    return f"--output-dir: '{folder}' {holds}, give a new folder, or start over in this one with --overwrite"


@dataclass
class Meter:
    """Running sums of one epoch, over all processes."""

    images: int = 0
    loss: float = 0.0
    correct: int = 0
    step_seconds: list[float] = field(default_factory=list)
    attention_seconds: list[float] = field(default_factory=list)


class Trainer:
    """Trains a model and keeps its log and checkpoints.

    Args:
        model: what ``task`` trains; already on its device.
        data: training and test images.
        options: the recipe.
        task: the loss, the test and the optimiser.
        attention: the attention configurations as YAML text, by field of the checkpoint.
        world: the processes that train together.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        options: RunOptions,
        task: Task,
        attention: dict[str, str | None] | None = None,
        world: World | None = None,
    ) -> None:
        self.model, self.data, self.options, self.task = model, data, options, task
        self.attention = {"attention": None, "decoder_attention": None, **(attention or {})}
        self.world = World(device=torch.device(options.device)) if world is None else world
        self.device = self.world.device
        train_size, _ = data.sizes
        self.steps_per_epoch = train_size // options.images_per_step
        if self.steps_per_epoch == 0:
            samples = f"{options.sample_name}s"
            what = f"{samples} per step (--batch-size * --accum-iter * processes)"
            if options.images_per_step == options.batch_size:
                what = "--batch-size"
            raise UsageError(
                f"{what} must be at most the {train_size} training {samples}, got {options.images_per_step}"
            )
        self.loaders = Loaders(data.train, data.test, options, self.world, shares_test=task.shares_test)
        self.optimizer = task.optimizer(model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp == "fp16")
        self.ema = None if options.model_ema is None else ModelEmaV3(model, decay=options.model_ema)
        self.parallel = model
        """The model, while it trains with gradients averaged over the processes."""
        self.epoch, self.step = options.start_epoch, 0
        self.meter = Meter()
        self.best_value: float | None = None
        self.best: Path | None = None
        """The checkpoint that reached it: in the output folder, or beside the checkpoint this run goes on from."""
        self.last: Path | None = None
        """The latest checkpoint of this run: in the output folder, or the one that it goes on from."""
        self.history: list[dict[str, Any]] = []
        self.replaces = occupied(options) is not None
        """The output folder still holds the files of another run."""

    @property
    def num_parameters(self) -> int:
        """Trainable parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def fit(self) -> None:
        """Train to the last epoch; `history` then holds one mapping per epoch.

        Raises:
            UsageError: another run is going on in the output folder, or it cannot be made or written.
            TrainingError: the loss became infinite or NaN, or a file cannot be written.
            DataError: an image cannot be read; `LAST` continues after the last finished step.
            LoaderError: a process of ``--num-workers`` ended; likewise.
            Interrupted: Ctrl-C was pressed or SIGTERM came; `LAST` continues after the last finished step.
        """
        with self._own_folder():
            self._fit()

    @contextmanager
    def _own_folder(self) -> Iterator[None]:
        """Make the output folder and keep it to this run; what speaks against it in one process is raised in all."""
        with ExitStack() as stack:
            error = None
            try:
                # Now rather than after an epoch: a folder that cannot be made should cost nothing.
                make_folder(self.options.output_dir)
                if self.world.is_first:
                    stack.enter_context(locked(self.options.output_dir))
            except UsageError as caught:
                error = caught
            self.world.share(error)
            yield

    def _fit(self) -> None:
        clock = AttentionClock([site.module for site in find_attention(self.model)], self.device)
        try:
            with ExitStack() as stack:
                stack.callback(clock.close)
                before = random_state()
                events = stack.enter_context(Events(self.options.log_dir if self.world.is_first else None))
                interrupted = stack.enter_context(catch_interrupt())
                stack.callback(setattr, self, "parallel", self.model)
                self.parallel = stack.enter_context(averaged(self.model, self.world))
                # What the writer imports may draw from Python's generator.
                set_random_state(before, self.options.output_dir / LAST)
                while self.epoch < self.options.epochs:
                    self._set_epoch(self.epoch)
                    for loss in self._train_steps(clock):
                        events.step(self.epoch + self.step / self.steps_per_epoch, loss, self._rate(self.step - 1))
                        self._stop_if(interrupted)
                    self._finish_epoch(self.evaluate(lambda: self._stop_if(interrupted, alone=True)), events)
                    self._stop_if(interrupted, saved=True)
                if self.world.any(not (self.options.output_dir / LOG).is_file()):
                    self.save(LAST)  # of a finished run for whose last files there was no room, and now is
        except (DataError, LoaderError) as error:
            if self.epoch == self.step == 0:
                raise
            self.save(LAST)
            path = self.options.output_dir / LAST
            mend = "once that is mended,"
            if isinstance(error, DataError):
                mend = "put a readable one in its place (without it, the data are others and the run starts anew) and"
            raise type(error)(f"{error}; {mend} continue with --resume {path}") from error

    @torch.no_grad()
    def evaluate(self, after_batch: Callable[[], object] = lambda: None) -> dict[str, float]:
        """The task's test measures, and with ``--model-ema`` those of the averaged weights."""
        results = self._test(self.model, after_batch)
        if self.ema is not None:
            averaged = self._test(self.ema.module, after_batch)
            results |= {f"ema_{name}": value for name, value in averaged.items()}
        for name, value in results.items():
            if not math.isfinite(value):
                raise TrainingError(f"{name} is {value} after epoch {self.epoch}; lower --lr or use --clip-grad")
        return results

    def _test(self, model: nn.Module, after_batch: Callable[[], object]) -> dict[str, float]:
        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            error: DataError | LoaderError | None = None
            try:
                for image, target in self.loaders.batches(self.loaders.test, "test"):
                    yield image.to(self.device), target.to(self.device)
                    after_batch()
            except (DataError, LoaderError) as caught:
                error = caught
            self.world.share(error)

        model.eval()
        with self.autocast():
            return self.task.test(model, batches(), self.world)

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint holds; see `checkpoint`."""
        return {
            "task": self.task.name,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "meter": asdict(self.meter),
            "best": self.best_value,
            "history": self.history,
            "rng": self.world.gather(random_state()),
            "args": self.options.as_dict(),
            "data": {
                "classes": list(self.data.class_names),
                "train_images": self.data.sizes[0],
                "sets": {"training": fingerprint(self.data.train), "test": fingerprint(self.data.test)},
            },
            **self.attention,
        }

    def load_state(self, state: dict[str, Any], path: Path) -> None:
        """Take over the state of a checkpoint, so that training goes on exactly where it was written.

        Raises:
            UsageError: it belongs to another model, data set, attention or run.
        """
        check_data(self, state, path)
        check_model(self, state, path)
        for warning in check_run(self, state, path):
            logger.warning("%s: the result will differ from an uninterrupted run", warning)
        set_random_state(state["rng"][self.world.rank], path, f"rng[{self.world.rank}]")
        self._load_models(state)
        self.scaler.load_state_dict(state["scaler"])
        # The groups hold what this run's options say; the checkpoint has the moments.
        own = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**own, "state": state["optimizer"]["state"]})
        self.meter = Meter(**state["meter"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.best_value, self.history = state["best"], list(state["history"])
        beside = path.with_name(BEST)
        self.best = beside if beside.is_file() else None
        self.last = path

    def load_weights(self, state: dict[str, Any], path: Path) -> None:
        """Take over only the model of a checkpoint, with the masks of the epoch that it was last trained in.

        Raises:
            UsageError: it belongs to another model or other classes.
        """
        check_data(self, state, path)
        check_model(self, state, path)
        self._load_models(state)

    def _load_models(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self._set_epoch(trained_epoch(state))

    def _set_epoch(self, epoch: int) -> None:
        """Tell masks that change with the epoch, those of the averaged weights too."""
        set_epoch(self.model, epoch)
        if self.ema is not None:
            set_epoch(self.ema.module, epoch)

    def _train_steps(self, clock: AttentionClock) -> Iterator[float]:
        """The steps of this epoch that are not done yet; yields the loss of each."""
        self.parallel.train()
        accumulated = self.options.accum_iter
        self.loaders.begin(self.epoch, self.step * self.options.images_per_step)
        title = f"epoch {self.epoch + 1}/{self.options.epochs}"
        done = self.step * accumulated
        total = self.steps_per_epoch * accumulated
        with self.loaders.batches(self.loaders.train, title, initial=done, total=total) as progress:
            batches = iter(progress)
            while self.step < self.steps_per_epoch:
                batch = self._load(batches, accumulated)
                clock.lap()
                start = time.perf_counter()
                loss, correct = self._train_step([(x.to(self.device), y.to(self.device)) for x, y in batch])
                synchronize(self.device)
                self.meter.step_seconds.append(time.perf_counter() - start)
                self.meter.attention_seconds.append(clock.lap())
                self.meter.images += self.options.images_per_step
                self.meter.loss += loss * self.options.images_per_step
                self.meter.correct += correct
                self.step += 1
                progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
                yield loss

    def _load(self, batches: Iterator[Any], count: int) -> list[Any]:
        """The next ``count`` batches, or an error in every process where one of them has none."""
        batch, error = [], None
        try:
            batch = list(itertools.islice(batches, count))
        except (DataError, LoaderError) as caught:
            error = caught
        self.world.share(error)
        return batch

    def _train_step(self, batches: list[tuple[Tensor, Tensor]]) -> tuple[float, int]:
        """One update from the mean gradient of some batches.

        Returns:
            The mean loss, and how many images were classified correctly, over all processes.
        """
        set_learning_rate(self.optimizer, self._rate(self.step))
        self.optimizer.zero_grad()
        losses, correct = 0.0, 0
        for place, (image, target) in enumerate(batches):
            last = place == len(batches) - 1
            with nullcontext() if last else self._without_sync():
                with self.autocast():
                    loss, hits = self.task.loss(self.parallel, image, target)
                self.scaler.scale(loss / len(batches)).backward()  # type: ignore[no-untyped-call]
            losses, correct = losses + loss.item() / len(batches), correct + hits
        total, correct_sum = self.world.sums([losses, correct])
        value = total / self.world.size
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} in epoch {self.epoch}, step {self.step}; lower --lr or use --clip-grad"
            )
        if self.options.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.model)
        return value, round(correct_sum)

    def _rate(self, step: int) -> float:
        """The learning rate of a step of this epoch."""
        options = self.options
        return learning_rate(
            self.epoch + step / self.steps_per_epoch,
            peak=options.peak_lr,
            least=options.min_lr,
            warmup_epochs=options.resolved_warmup_epochs,
            epochs=options.epochs,
        )

    def autocast(self) -> AbstractContextManager[object]:
        """The mixed precision of the run."""
        return autocast(self.options.amp, self.device)

    def _without_sync(self) -> Any:  # noqa: ANN401
        return self.parallel.no_sync() if isinstance(self.parallel, DistributedDataParallel) else nullcontext()

    def _finish_epoch(self, results: dict[str, float], events: Events | None = None) -> None:
        meter, task = self.meter, self.task
        classified = {"train_acc1": 100 * meter.correct / meter.images} if "test_acc1" in results else {}
        entry = {
            "epoch": self.epoch,
            "train_lr": self._rate(self.step - 1),
            "train_loss": meter.loss / meter.images,
            **classified,
            **results,
            "n_parameters": self.num_parameters,
            "step_time": statistics.median(meter.step_seconds),
            "attention_time": statistics.median(meter.attention_seconds),
            "train_time": sum(meter.step_seconds),
            "peak_memory": peak_memory(self.device),
        }
        self.history.append(entry)
        is_best = task.is_better(entry[task.best], self.best_value)
        self.best_value = entry[task.best] if is_best else self.best_value
        self.epoch, self.step, self.meter = self.epoch + 1, 0, Meter()
        logger.info("%s", self._line(entry))
        if events is not None:
            events.epoch(self.epoch, entry)
        # The best first: a run that ends between the two goes on from the epoch before, and finds the same best again.
        self.save(*([BEST] if is_best else []), LAST)
        if is_best:
            self.best = self.options.output_dir / BEST

    def _line(self, entry: dict[str, Any]) -> str:
        """One finished epoch in words."""
        if "test_acc1" in entry:
            shown = f"train {entry['train_acc1']:.1f} %, test {entry['test_acc1']:.1f} %, best {self.best_value:.1f} %"
        else:
            shown = f"test loss {entry['test_loss']:.4f}, best {self.best_value:.4f}"
        times = f"step {1e3 * entry['step_time']:.0f} ms ({1e3 * entry['attention_time']:.0f} attn)"
        return f"epoch {self.epoch}/{self.options.epochs}: loss {entry['train_loss']:.3f}, {shown}, {times}"

    def save(self, *names: str) -> None:
        """Write the log and the checkpoints of these names into the output folder.

        Raises:
            TrainingError: the first process cannot write them; raised in all.
        """
        state, error = self.state(), None
        try:
            if self.world.is_first:
                self._write(state, names)
        except TrainingError as caught:
            hint = "" if self.last is None else f"; once that is mended, continue with --resume {self.last}"
            error = TrainingError(f"{caught}{hint}")
        # Together, because torchrun ends them all once one has ended: the first must have written by then.
        self.world.share(error)

    def _write(self, state: dict[str, Any], names: Sequence[str]) -> None:
        folder = self.options.output_dir
        if self.replaces:  # not before there is something to replace it by
            for name in (LAST, BEST, LOG, PAGE):
                remove(folder / name)
            self.replaces = False
        for name in names:
            write_checkpoint(folder / name, state)
            self.last = folder / name  # one named BEST is as good to go on from, where there is no room for LAST
        # Rewritten from the history, so that a resumed run neither repeats nor loses lines.
        lines = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in self.history)
        with replacing(folder / LOG) as file:
            file.write(lines.encode())

    def _stop_if(self, interrupted: threading.Event, *, saved: bool = False, alone: bool = False) -> None:
        """Stop after a signal to any process; between the test batches (``alone``) only a single process stops."""
        if alone and self.world.size > 1:
            return
        if not self.world.any(interrupted.is_set()):
            return
        if not saved:
            self.save(LAST)
        path = self.options.output_dir / LAST
        raise Interrupted(f"interrupted; continue with --resume {path}")
