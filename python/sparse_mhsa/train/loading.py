"""Batches: their order, which depends on seed and epoch alone, and the processes that load them."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from tqdm.auto import tqdm

from . import DataError, LoaderError
from .checkpoint import first_line
from .distributed import World
from .interrupt import leave_interrupts_to_parent, without_sigchld, without_sigterm
from .recipes import RunOptions


class EpochOrder(Sampler[int]):
    """Shuffles by (seed, epoch) alone and can start in the middle: a resumed run sees the same images.

    Several processes take consecutive batches of the one order, so that together they see what one process with the
    same number of images per step sees.

    Args:
        size: number of images.
        seed: of the run.
        batch_size: images per batch and process.
        rank: which process this is.
        world_size: number of processes.
    """

    def __init__(self, size: int, seed: int, batch_size: int = 1, rank: int = 0, world_size: int = 1) -> None:
        self.size, self.seed = size, seed
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        left = self.size - self.start
        return left if self.world_size == 1 else left // (self.batch_size * self.world_size) * self.batch_size

    def entropy(self) -> int:
        """A 63-bit seed for this epoch; neighbouring seeds and epochs have unrelated ones."""
        return int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)[0] >> 1)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.entropy())
        order = torch.randperm(self.size, generator=generator)[self.start :]
        if self.world_size > 1:
            order = order[: len(self) * self.world_size].view(-1, self.world_size, self.batch_size)[:, self.rank]
        yield from order.flatten().tolist()


class Augmented(Dataset[Any]):
    """Training images whose augmentation depends on seed, epoch and image alone.

    A run that goes on inside an epoch sees what an uninterrupted one sees, however many processes load the images. What
    they draw is drawn apart: the generators of the process are left as they were.

    Args:
        images: the images, augmented as they are taken.
    """

    def __init__(self, images: Dataset[Any]) -> None:
        self.images, self.entropy = images, 0

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:  # noqa: ANN401
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        own, legacy, python = torch.get_rng_state(), np.random.get_state(), random.getstate()
        try:
            return [self._drawn(index) for index in indices]
        finally:
            torch.set_rng_state(own)
            np.random.set_state(legacy)
            random.setstate(python)

    def _drawn(self, index: int) -> Any:  # noqa: ANN401
        seed = self.entropy + index
        # Not torch.manual_seed, which would also seed the GPU that dropout draws on.
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        return self.images[index]


class Loaders:
    """The training and the test batches of a run.

    Args:
        train: training images.
        test: test images.
        options: the recipe.
        world: the processes that share the training images.
        shares_test: they share the test images too.
    """

    def __init__(
        self, train: Dataset[Any], test: Dataset[Any], options: RunOptions, world: World, *, shares_test: bool = False
    ) -> None:
        self.options, self.world = options, world
        self.order = EpochOrder(len(train), options.seed, options.batch_size, world.rank, world.size)  # type: ignore[arg-type]
        self.augmented = Augmented(train)
        # Generators of their own: starting a loader must not draw from the generator that dropout uses.
        self.train = self._loader(self.augmented, sampler=self.order, drop_last=True, generator=torch.Generator())
        if shares_test and world.size > 1:
            test = Subset(test, range(world.rank, len(test), world.size))  # type: ignore[arg-type]
        self.test = self._loader(test, generator=torch.Generator())

    def begin(self, epoch: int, start: int) -> None:
        """Let the next pass over `train` be ``epoch``, after its first ``start`` images."""
        self.order.epoch, self.order.start = epoch, start
        self.augmented.entropy = self.order.entropy()

    def batches(self, loader: DataLoader[Any], title: str, **kwargs: Any) -> Any:  # noqa: ANN401
        """The batches of a loader, with a progress bar."""
        # For tqdm, None means: quiet unless the stream is a terminal.
        disable = {"auto": None, "on": False, "off": True}[self.options.progress]
        disable = disable if self.world.is_first else True
        kwargs.setdefault("total", len(loader))
        return tqdm(_translated(loader), desc=title, unit="batch", leave=False, disable=disable, **kwargs)

    def _loader(self, dataset: Any, **kwargs: Any) -> DataLoader[Any]:  # noqa: ANN401
        pin = self.options.pin_mem or self.world.device.type == "cuda"
        return DataLoader(
            dataset,
            batch_size=self.options.batch_size,
            num_workers=self.options.num_workers,
            pin_memory=pin and not self.options.no_pin_mem and torch.cuda.is_available(),
            worker_init_fn=leave_interrupts_to_parent,
            **kwargs,
        )


def _translated(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of a loader, whose processes send their errors back with a traceback in the message.

    Raises:
        DataError: an image cannot be read.
        LoaderError: a loader process ended.
    """
    try:
        with without_sigterm():
            batches = iter(loader)
        for batch in batches:
            with without_sigchld():
                yield batch
    except DataError as error:
        last = str(error).strip().splitlines()[-1]
        raise DataError(last.partition("DataError: ")[2] or last) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise LoaderError(f"a process of --num-workers ended: {first_line(error)}") from error
