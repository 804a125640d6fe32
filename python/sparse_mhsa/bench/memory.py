"""Extra memory and first-call cost, each in a process of its own that has imported everything and done nothing else.

The processes are forked from one that has only imported this module, so that neither the allocations of other rows
nor plans cached by them are seen.
"""

import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .cases import Case
from .layer import Layer, layer_inputs
from .measure import out_of_memory
from .methods import METHODS, Problem

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
GROUP, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
LIMITS = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""By the controllers in a line of `GROUP`, which are "" for version 2: the folder below `GROUPS`, the files with limit
and use, and what files that could be dropped are called in ``memory.stat``."""


@dataclass(frozen=True)
class Footprint:
    """What one call costs a fresh process.

    Attributes:
        extra_bytes: growth of the resident memory beyond inputs, outputs and gradients, at its peak.
        mask_seconds: making the mask, and whatever the method prepares once per mask.
        first_call_seconds: the first call, which builds and caches a plan.
        second_call_seconds: the next, which finds it.
    """

    extra_bytes: int
    mask_seconds: float
    first_call_seconds: float
    second_call_seconds: float


class FootprintError(Exception):
    """No measurement; the message says why."""


def footprint(
    case: Case, method: str, dtype: torch.dtype, *, backward: bool, threads: int, whole_layer: bool = False
) -> Footprint:
    """Measure one method of one case in a fresh process, alone or with the projections of a layer around it.

    Raises:
        FootprintError: the system has no /proc, or the process ended.
    """
    if not CLEAR.exists():
        raise FootprintError("needs /proc (Linux)")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_measure, case, method, dtype, backward, threads, whole_layer).result()
    except BrokenProcessPool as error:
        raise FootprintError("the process ended: out of memory?") from error
    except (MemoryError, RuntimeError, ValueError) as error:
        message = out_of_memory(error)
        if message is None:
            raise
        raise FootprintError(message) from error


def available_memory() -> int:
    """Bytes that can be used without swapping, within ``ulimit -v`` and within what a container may use.

    Half of what the machine has where the system does not say.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        bounds = [free, *_free_in_groups()]
        if limit != resource.RLIM_INFINITY:
            bounds.append(limit - _resident("VmSize"))
        return max(0, min(bounds))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _free_in_groups() -> Iterator[int]:
    """What is left of the memory limit of every control group, of either version, that this process is in."""
    for line in GROUP.read_text().splitlines() if GROUP.exists() else ():
        _, controllers, name = line.split(":", 2)
        if controllers not in LIMITS:
            continue
        folder, limit, use, droppable = LIMITS[controllers]
        root = GROUPS / folder
        inner = root / name.lstrip("/")
        # Inside a container the inner ones may not be there: its own is mounted as the root.
        for group in (inner, *inner.parents):
            if not group.is_relative_to(root):
                break
            try:
                most, used = ((group / file).read_text().strip() for file in (limit, use))
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except OSError:  # the root has no limit, nor has a group whose memory is not controlled
                continue
            if most != "max":
                yield int(most) - int(used) + int(stat.get(droppable, 0))


def _measure(case: Case, name: str, dtype: torch.dtype, backward: bool, threads: int, whole_layer: bool) -> Footprint:
    torch.set_num_threads(threads)
    method = next(method for method in METHODS if method.name == name)

    def given(case: Case) -> tuple[Tensor, ...]:
        return layer_inputs(case, dtype) if whole_layer else case.inputs(dtype)

    def prepare(case: Case) -> Callable[..., Tensor]:
        attend = method.prepare(Problem(case, dtype))
        return Layer(attend, case.num_heads) if whole_layer else attend

    # Pools and libraries come up once per process, whatever they compute first.
    tiny = Case("tiny", {"mask": "local", "mask_kwargs": {"window": 1}}, 8, num_heads=1, head_dim=8)
    inputs = given(tiny)
    _call(prepare(tiny), inputs, torch.ones_like(inputs[0]) if backward else None)
    warm_up = torch.ones(1 << 16)
    warm_up.add_(1)

    inputs = given(case)
    grad = torch.ones_like(inputs[0]) if backward else None
    before = _resident("VmRSS")
    CLEAR.write_text("5", encoding="ascii")  # lowers the high-water mark to what is resident now
    start = time.perf_counter()
    attend = prepare(case)
    prepared = time.perf_counter()
    _call(attend, inputs, grad)
    first = time.perf_counter()
    peak = _resident("VmHWM")
    _call(attend, inputs, grad)
    second = time.perf_counter()
    # The output is as large as the first input.
    results = inputs[0].nbytes + (sum(x.nbytes for x in inputs) if backward else 0)
    return Footprint(max(0, peak - before - results), prepared - start, first - prepared, second - first)


def _call(attend: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor | None) -> object:
    if grad is None:
        with torch.no_grad():
            return attend(*(x.detach() for x in inputs))
    out = attend(*inputs)
    return out, torch.autograd.grad(out, inputs, grad)


def _resident(field: str) -> int:
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
