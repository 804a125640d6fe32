"""Several processes that train one model together, as `torchrun` starts them; one alone is the simplest case."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.parallel import DistributedDataParallel

from . import TrainingError, UsageError
from .checkpoint import first_line
from .recipes import RunOptions

_OPEN_MPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
}


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this is."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """This process writes the files."""
        return self.rank == 0

    def sums(self, values: Sequence[float]) -> list[float]:
        """Sum of every value over the processes, the same on each."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        result: list[float] = total.tolist()
        return result

    def any(self, flag: bool) -> bool:
        """Whether some process says yes."""
        return self.sums([float(flag)])[0] > 0

    def share(self, error: TrainingError | UsageError | None) -> None:
        """Raise the error of one process in every process, so that all stop at the same place and none waits for it."""
        if not self.any(error is not None):
            return
        found = [each for each in self.gather(error) if each is not None]
        raise found[0]

    def gather(self, value: Any) -> list[Any]:  # noqa: ANN401
        """The value of every process, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


@contextmanager
def world_of(options: RunOptions) -> Iterator[World]:
    """The processes of a run, connected for as long as it lasts.

    Raises:
        UsageError: ``--dist`` without several processes, several processes without ``--dist``, or options that
            contradict what started them.
    """
    names = _OPEN_MPI if options.dist_on_itp else {name: name for name in _OPEN_MPI}
    started = {name: os.environ.get(variable) for name, variable in names.items()}
    if not options.dist:
        if int(started["WORLD_SIZE"] or 1) > 1:
            raise UsageError(f"{names['WORLD_SIZE']} is {started['WORLD_SIZE']}, but --dist is not given")
        yield World(device=torch.device(options.device))
        return
    if started["RANK"] is None or started["WORLD_SIZE"] is None:
        how = "mpirun" if options.dist_on_itp else "torchrun --nproc-per-node N -m sparse_mhsa"
        raise UsageError(f"--dist: {names['RANK']} is not set; start the processes with: {how} finetune --dist ...")
    rank, size, local = int(started["RANK"]), int(started["WORLD_SIZE"]), int(started["LOCAL_RANK"] or 0)
    for flag, given, actual in (
        ("--world-size", options.world_size, size),
        ("--local-rank", options.local_rank, local),
    ):
        if given not in (1, -1, actual):
            raise UsageError(f"{flag} {given} contradicts the {actual} of what started this process")
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, init_method=options.dist_url, rank=rank, world_size=size)
    except (ValueError, RuntimeError) as error:  # a variable that env:// reads is missing, or nobody listens there
        where = f"--dist-url {options.dist_url}: {first_line(error)}"
        raise UsageError(f"{where}; mpirun sets no address: give --dist-url tcp://HOST:PORT") from error
    try:
        yield World(rank, size, device)
    finally:
        dist.destroy_process_group()


@contextmanager
def averaged(model: nn.Module, world: World) -> Iterator[nn.Module]:
    """``model`` with its gradients averaged over the processes, for as long as the block lasts."""
    if world.size == 1:
        yield model
        return
    parallel = DistributedDataParallel(model, device_ids=[world.device.index] if world.device.type == "cuda" else None)
    try:
        yield parallel
    finally:
        # Before the processes part: the last owner of their connection joins its threads, and this one would hold the
        # GIL while a thread waits for it.
        del parallel.reducer, parallel.logger


class _SumOfAll(Function):
    """The sum over all processes; what any of them makes of it flows back to each of its parts."""

    @staticmethod
    def forward(_ctx: Any, part: Tensor) -> Tensor:  # noqa: ANN401
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:  # noqa: ANN401
        return _SumOfAll.forward(None, grad)


class GatheredBatchNorm(nn.BatchNorm1d):
    """Normalisation over the batches of all processes, as one process with the same global batch would do it.

    It has no weights of its own. torch's `SyncBatchNorm` does the same on GPUs alone.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, features: int, eps: float) -> None:
        super().__init__(features, eps=eps, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, features) of any B, normalised by mean and variance of all processes, or in evaluation by the tracked."""
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return super().forward(x)
        # In float64, where the variance may be taken as the difference of two sums; one exchange is enough for both.
        wide = x.double()
        own = torch.cat([wide.new_tensor([len(x)]), wide.sum(dim=0), wide.square().sum(dim=0)])
        everything: Tensor = _SumOfAll.apply(own)  # type: ignore[no-untyped-call]
        count, total, squares = torch.split(everything, [1, self.num_features, self.num_features])
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        with torch.no_grad():
            self.num_batches_tracked += 1
            unbiased = variance * count / (count - 1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return ((wide - mean) / (variance + self.eps).sqrt()).to(x.dtype)
