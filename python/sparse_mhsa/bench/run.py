"""Running the benchmark: gate, time, relate to the machine's limits, measure memory."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..content import edges_of
from ..train import require_packages
from ..train.checkpoint import make_folder, write_text
from .cases import Case, all_cases, select
from .gate import Gate, WrongResultError
from .limits import Bandwidth, peak_flops
from .measure import Call, interleave, memory_for, out_of_memory, paired_ratio, spread
from .memory import FootprintError, available_memory, footprint
from .methods import DENSE, METHODS, OURS, Attention, Method, Problem, UnsupportedError
from .options import BenchOptions
from .plots import plot
from .table import markdown, new_report, row_line, table_head

logger = logging.getLogger("sparse_mhsa")

SCHEMA = "sparse_mhsa-bench-1"
CHOICE = "choice"
"""What is timed besides the methods: choosing the edges, where that is part of a call."""
FLOPS = {"forward": 4, "step": 14}
"""Operations per edge and channel: two matrix products forward, five more (with the scores again) backward."""
ROWS_READ = {"forward": 2, "step": 8}
"""Rows of keys, values, queries or gradients that an edge needs, if none is shared with a neighbouring edge."""


def bench(options: BenchOptions, command: str, methods: Sequence[Method] = METHODS) -> int:
    """Measure the rows that ``options`` select and write ``kernels.json``, ``kernels.md`` and the plots.

    Args:
        options: what the command line says.
        command: what the user typed; the files quote it.
        methods: what to compare; `METHODS` but for tests.

    Returns:
        The exit code: 1 if a method computed the wrong thing, else 0.

    Raises:
        UsageError: an option cannot be used as given.
    """
    if options.plots:
        require_packages("matplotlib")
    cases = select(all_cases(), options.rows, quick=options.quick)
    methods = [method for method in methods if method.quick or not options.quick]
    make_folder(options.output_dir)
    with torch_threads(options.threads):
        report = new_report(SCHEMA, command) | {
            "limits": {"bandwidth": {}, "flops": {}},
            "methods": {method.name: method.title for method in methods},
        }
        start = time.perf_counter()
        bandwidth = Bandwidth()
        report["limits"]["bandwidth"].update({str(size): rate for size, rate in bandwidth.rates.items()})
        for name in options.dtypes:
            dtype = getattr(torch, name)
            peak = report["limits"]["flops"][name] = peak_flops(dtype)
            logger.info("%s", table_head(report, name))
            for case in cases:
                for row in measure_case(case, dtype, methods, options, peak, bandwidth):
                    report["rows"].append(row)
                    logger.info("%s", row_line(row, report))
                write(report, options.output_dir)  # what is measured survives a Ctrl-C
        report["seconds"] = time.perf_counter() - start
    write(report, options.output_dir)
    if options.plots:
        plot(report, options.output_dir)
    logger.info("written: %s", options.output_dir / "kernels.md")
    return exit_code(report)


def exit_code(report: dict[str, Any]) -> int:
    """1 if a method of some row failed, 0 otherwise; what failed is logged."""
    failed = 0
    for row in report["rows"]:
        for name, result in row["methods"].items():
            if result["status"] == "failed":
                where = " ".join(row[key] for key in ("case", "dtype", "direction") if key in row)
                logger.error("FAILED %s %s: %s", where, name, result["reason"])
                failed = 1
    return failed


def write(report: dict[str, Any], folder: Path) -> None:
    """Write ``kernels.json`` and ``kernels.md``."""
    write_text(folder / "kernels.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    write_text(folder / "kernels.md", markdown(report))


def measure_case(
    case: Case,
    dtype: torch.dtype,
    methods: Sequence[Method],
    options: BenchOptions,
    peak: float,
    bandwidth: Bandwidth,
) -> Iterator[dict[str, Any]]:
    """The rows of one case and dtype: forward, then forward and backward."""
    problem = Problem(case, dtype)
    gates: dict[tuple[bool, bool], Gate] = {}
    prepared: dict[str, Attention | dict[str, Any]] = {}
    refusal: dict[str, Any] | None = None
    for direction in ("forward", "step"):
        backward = direction == "step"
        results: dict[str, dict[str, Any]] = {}
        calls: dict[str, Call] = {}
        numbers = problem.item * case.batch * case.num_heads * case.num_tokens * case.head_dim
        # The output, its gradients for gate and clock, and those of q, k and v; what was made for the forward pass is
        # there already.
        need = 6 * numbers if backward else 4 * numbers + Gate.memory(problem)
        refusal = refusal or no_room(need)
        if refusal is not None:
            yield _row(problem, direction, {method.name: refusal for method in methods})
            continue
        try:
            inputs = problem.inputs
            shape = inputs[0].shape if backward else torch.Size()
            grad = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        except (MemoryError, RuntimeError) as error:
            yield _row(problem, direction, {method.name: short_of_memory(error) for method in methods})
            continue
        for method in methods:
            if (why_not := admit(method, problem, gates, prepared, backward=backward)) is not None:
                results[method.name] = why_not
                continue
            attend: Any = prepared[method.name]
            calls[method.name] = partial(step, attend, inputs, grad) if backward else partial(forward, attend, inputs)
        if problem.by_content and OURS in calls:
            q, k, _ = (x.detach() for x in inputs)
            calls[CHOICE] = partial(edges_of, q, k, case.layer_mask)
        turns = interleave(calls, repeat=options.repeat, budget=options.budget)
        seconds = turns.seconds
        results |= {name: refused("oom", message) for name, message in turns.short.items() if name != CHOICE}
        choice = seconds.pop(CHOICE, None)
        for name, times in seconds.items():
            measured = spread(times)
            result: dict[str, Any] = {"status": "ok", "seconds": asdict(measured)}
            if DENSE in seconds:
                result["speedup_over_sdpa"] = asdict(paired_ratio(seconds[DENSE], times))
            if name != OURS and OURS in seconds:
                result["speedup_of_ours"] = asdict(paired_ratio(times, seconds[OURS]))
            work = problem.square if name == DENSE else problem.work
            if work is not None:
                result["ns_per_edge"] = 1e9 * measured.median / work
                result["flops_share"] = FLOPS[direction] * work * case.head_dim / measured.median / peak
            results[name] = result
        if choice is not None and OURS in seconds:
            results[OURS]["choice"] = {"seconds": asdict(spread(choice))}
            if DENSE in seconds and direction == "forward":
                # Half of what dense attention multiplies is q k^T.
                half = [None if value is None else value / 2 for value in seconds[DENSE]]
                results[OURS]["choice"]["over_qkt"] = asdict(paired_ratio(choice, half))
        if OURS in seconds:
            results[OURS]["bandwidth"] = traffic(problem, direction, results[OURS]["seconds"]["median"], bandwidth)
        if options.memory:
            for name in seconds:
                if name == OURS or (not options.quick and name != "flex"):
                    results[name].update(extra_memory(case, name, dtype, backward=backward))
        yield _row(problem, direction, {method.name: results[method.name] for method in methods})


def no_room(need: int) -> dict[str, Any] | None:
    """The result of all methods where a row needs more bytes than there are: what the system promises beyond, kills."""
    free = available_memory()
    if need <= free:
        return None
    sizes = (
        f"{need / 2**30:.1f} GiB for inputs, results and what they are compared with, {free / 2**30:.1f} GiB are free"
    )
    return refused("oom", f"out of memory: needs {sizes}")


def _row(problem: Problem, direction: str, methods: dict[str, dict[str, Any]]) -> dict[str, Any]:
    case = problem.case
    try:
        mask = None if problem.work is None else problem.mask
    except (MemoryError, RuntimeError, ValueError) as error:
        short_of_memory(error)
        mask = None
    return {
        "case": case.name,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "direction": direction,
        "batch": case.batch,
        "heads": case.num_heads,
        "head_dim": case.head_dim,
        "tokens": case.num_tokens,
        "edges": None if mask is None else mask.nnz,
        "density": None if mask is None else mask.density,
        "methods": methods,
    }


def admit(
    method: Method,
    problem: Problem,
    gates: dict[tuple[bool, bool], Gate],
    prepared: dict[str, Attention | dict[str, Any]],
    *,
    backward: bool,
) -> dict[str, Any] | None:
    """Prepare a method and send it through the gate of its kind, which is made when first needed.

    Returns:
        ``None`` if it may be timed (its function is in ``prepared``), else its result: why it may not.
    """
    if backward and not method.backward:
        return refused("unsupported", "has no backward pass on this device")
    if problem.backend is not None and method.masked and method.name != OURS:
        return refused("unsupported", f"computes attention over edges, which `{problem.backend.name}` does not have")
    need, free = method.memory(problem, backward=backward), available_memory()
    if need > free // 2:
        sizes = f"{need / 2**30:.1f} GiB or more, {free / 2**30:.1f} GiB are free, half of it for one method"
        return refused("oom", f"out of memory: needs {sizes}")
    try:
        if method.name not in prepared:
            try:
                prepared[method.name] = method.prepare(problem)
            except UnsupportedError as error:
                prepared[method.name] = refused(error.status, str(error))
        attend = prepared[method.name]
        if isinstance(attend, dict):
            return attend
        kind = (method.masked, method.stepwise)
        if kind not in gates:
            if (refusal := no_room(Gate.memory(problem))) is not None:
                return refusal
            gates[kind] = _gate(method, problem)
        gates[kind].check(attend, backward=backward)
    except WrongResultError as error:
        return refused("failed", str(error))
    except (MemoryError, RuntimeError, ValueError) as error:
        return failure(method.name, error)
    return None


def failure(method: str, error: MemoryError | RuntimeError | ValueError) -> dict[str, Any]:
    """The result of a method whose call raised ``error``; one about values that it was given is raised again."""
    if (message := out_of_memory(error)) is not None:
        return refused("oom", message)
    if isinstance(error, ValueError):
        raise error
    # Ours has no excuse: an error of it is a wrong result.
    return refused("failed" if method == OURS else "unsupported", " ".join(str(error).split())[:200])


def _gate(method: Method, problem: Problem) -> Gate:
    with memory_for("computing what it is compared with"):
        return Gate(problem, masked=method.masked, stepwise=method.stepwise)


def traffic(problem: Problem, direction: str, seconds: float, bandwidth: Bandwidth) -> dict[str, float]:
    """How close our kernel comes to the memory's limits.

    Returns:
        ``compulsory_share``: time to move every input and output once at the bandwidth of a working set of their size,
        over the time taken; no kernel passes 1. ``gather_share``: the same for reading a row of every operand per edge
        from the cache that holds one head; above 1 where neighbouring edges share what they read. Not without edges.
    """
    case, item = problem.case, problem.item
    one = case.num_tokens * case.head_dim * item
    tensors = {"forward": 4, "step": 4 + 8}[direction]
    every = one * case.batch * case.num_heads * tensors
    threads = torch.get_num_threads()
    compulsory = every / bandwidth.at(every // threads)
    shares = {"compulsory_share": compulsory / seconds}
    if problem.work is not None:
        rows = problem.work * ROWS_READ[direction] * case.head_dim * item
        gather = rows / bandwidth.at(one * (2 if direction == "forward" else 4))
        shares["gather_share"] = gather / seconds
    return shares


def forward(attend: Callable[..., Tensor], inputs: Sequence[Tensor]) -> object:
    """What the rows call forward."""
    with torch.no_grad():
        return attend(*(x.detach() for x in inputs))


def step(attend: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> object:
    """Forward and backward to every input."""
    return torch.autograd.grad(attend(*inputs), inputs, grad)


def extra_memory(
    case: Case, method: str, dtype: torch.dtype, *, backward: bool, whole_layer: bool = False
) -> dict[str, Any]:
    """The fields of a `Footprint`, or ``footprint_missing``, which says why there are none."""
    threads = torch.get_num_threads()
    try:
        return asdict(footprint(case, method, dtype, backward=backward, threads=threads, whole_layer=whole_layer))
    except FootprintError as error:
        return {"footprint_missing": str(error)}


def refused(status: str, reason: str) -> dict[str, Any]:
    """The result of a method that was not timed."""
    return {"status": status, "reason": reason}


def short_of_memory(error: Exception) -> dict[str, Any]:
    """The result of a method that memory did not suffice for; an error about something else is raised again."""
    message = out_of_memory(error)
    if message is None:
        raise error
    return refused("oom", message)


@contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """So many of torch's threads inside the block; as they are if ``None``."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
