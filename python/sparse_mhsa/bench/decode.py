"""One decoding step against `scaled_dot_product_attention` over a full cache, behind a correctness gate.

A row is a model's attention and a length of its past. Time is that of one new token in one layer: for SDPA, attention
over all keys, which lie ready in one tensor; for our caches, that the token joins, attends, and another is forgotten.
"""

import copy
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache_policy import CachePolicy
from ..decoding import decode_attention
from ..layer_cache import LayerCache
from ..reference import dense_attention
from ..train.checkpoint import make_folder, write_text
from .cases import select
from .gate import FACTOR, FLOOR, WrongResultError
from .measure import interleave, paired_ratio, spread
from .options import BenchOptions
from .run import exit_code, torch_threads
from .table import made_by, new_report

logger = logging.getLogger("sparse_mhsa")

SCHEMA = "sparse_mhsa-bench-decode-1"
SDPA, FULL = "sdpa", "decode_attention"
SHARE = 8
"""A policy keeps one in so many tokens of the past."""


@dataclass(frozen=True)
class DecodeCase:
    """The attention of one layer and the tokens that it has seen."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int = 1
    quick: bool = False

    @property
    def name(self) -> str:
        """What ``--rows`` selects by."""
        return f"decode-{self.heads}q{self.kv_heads}kv-{self.tokens}" + (f"x{self.batch}" if self.batch > 1 else "")

    def make(self, tokens: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of so many tokens."""
        generator = torch.Generator().manual_seed(seed)
        heads = (self.heads, self.kv_heads, self.kv_heads)
        shapes = [(self.batch, h, tokens, self.head_dim) for h in heads]
        q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        return q, k, v


def all_cases() -> list[DecodeCase]:
    """A small decoder and one with grouped queries, at growing lengths."""
    return [
        *(DecodeCase(tokens, 12, 12, 64, quick=tokens == 4096) for tokens in (1024, 4096, 16384, 65536)),
        *(DecodeCase(tokens, 32, 8, 128, quick=tokens == 4096) for tokens in (4096, 16384, 65536)),
        DecodeCase(4096, 32, 8, 128, batch=8),
    ]


def policies(capacity: int) -> dict[str, CachePolicy]:
    """The caches that are timed, by the name of their column."""
    half = capacity // 2
    return {
        "sliding_window": CachePolicy("sliding_window", capacity),
        "attention_sinks": CachePolicy("attention_sinks", capacity),
        "score_based": CachePolicy("score_based", capacity),
        "combined": CachePolicy("combined", capacity, recent=half),
        "norm_based": CachePolicy("norm_based", capacity, recent=half),
    }


def bench_decode(options: BenchOptions, command: str, cases: Sequence[DecodeCase] | None = None) -> int:
    """Measure the rows that ``options`` select and write ``decode.json`` and ``decode.md``.

    Args:
        options: what the command line says.
        command: what the user typed; the files quote it.
        cases: what to measure; `all_cases` but for tests.

    Returns:
        The exit code: 1 if something computed the wrong thing, else 0.

    Raises:
        UsageError: an option cannot be used as given.
    """
    selected = select(all_cases() if cases is None else cases, options.rows, quick=options.quick)
    make_folder(options.output_dir)
    with torch_threads(options.threads), torch.no_grad():
        report = new_report(SCHEMA, command)
        logger.info("%s", _head())
        for name in options.dtypes:
            for case in selected:
                row = measure(case, getattr(torch, name), options)
                report["rows"].append(row)
                logger.info("%s", _line(row))
                _write(report, options.output_dir)
    logger.info("written: %s", options.output_dir / "decode.md")
    return exit_code(report)


def measure(case: DecodeCase, dtype: torch.dtype, options: BenchOptions) -> dict[str, Any]:
    """One row."""
    q, k, v = case.make(case.tokens, dtype)
    q = q[:, :, -1:].contiguous()
    lengths = torch.full((case.batch, case.kv_heads), case.tokens)
    grouped = case.heads != case.kv_heads
    calls: dict[str, Callable[[], object]] = {
        SDPA: lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped),
        FULL: lambda: decode_attention(q, k, v, lengths),
    }
    results: dict[str, dict[str, Any]] = {}
    try:
        check(decode_attention(q, k, v, lengths), q, k, v, FULL)
    except WrongResultError as error:
        results[FULL] = {"status": "failed", "reason": str(error)}
    capacity = case.tokens // SHARE
    token = case.make(1, dtype, seed=1)
    for name, policy in policies(capacity).items():
        cache = LayerCache(policy)
        # Its cost depends on what it holds, not on what it has seen.
        cache.attend(*case.make(capacity, dtype, seed=2))
        try:
            check_step(cache, token, name)
        except WrongResultError as error:
            results[name] = {"status": "failed", "reason": str(error)}
            continue
        calls[name] = lambda cache=cache: cache.attend(*token)  # type: ignore[misc]
    turns = interleave(
        {name: call for name, call in calls.items() if name not in results},
        repeat=options.repeat,
        budget=options.budget,
    )
    seconds = turns.seconds
    results |= {name: {"status": "oom", "reason": message} for name, message in turns.short.items()}
    for name, times in seconds.items():
        results[name] = {
            "status": "ok",
            "seconds": asdict(spread(times)),
            **({"speedup_over_sdpa": asdict(paired_ratio(seconds[SDPA], times))} if SDPA in seconds else {}),
        }
    return {
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        **asdict(case),
        "capacity": capacity,
        "methods": {name: results[name] for name in calls | results},
    }


def check(got: Tensor, q: Tensor, k: Tensor, v: Tensor, what: str) -> None:
    """Compare with dense attention in float64; the yardstick is torch's own error in the dtype.

    Raises:
        WrongResultError: it differs by more.
    """
    exact = dense_attention(q, k, v, dtype=torch.float64)[0]
    base = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
    error, usual = ((x.double() - exact).abs().max().item() for x in (got, base))
    allowed = FACTOR["out"] * usual + FLOOR.get(q.dtype, 1e-6) * exact.abs().max().item()
    if not error <= allowed:  # also for NaN
        raise WrongResultError(f"{what} differs by {error:.2e}, allowed are {allowed:.2e}")


def check_step(cache: LayerCache, token: tuple[Tensor, Tensor, Tensor], what: str) -> None:
    """Compare a step of a full cache with attention over the entries that the token must see.

    Raises:
        WrongResultError: it differs, or the cache does not hold as many entries as before.
    """
    trial = copy.deepcopy(cache)
    before = trial.entries()
    got = trial.attend(*token)
    q, k, v = token
    first = 0
    if cache.policy.worth == "recency":
        first = cache.policy.safe_first  # the oldest entry that may go has gone
    keys, values = (
        torch.cat((old[:, :, :first], old[:, :, first + (cache.policy.worth == "recency") :], new), 2)
        for old, new in ((before.keys, k), (before.values, v))
    )
    check(got, q, keys, values, what)
    if not torch.equal(trial.lengths, before.lengths):
        raise WrongResultError(f"{what} holds {trial.lengths.tolist()} entries, expected {before.lengths.tolist()}")


def _write(report: dict[str, Any], folder: Path) -> None:
    write_text(folder / "decode.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    page = [
        "# Decoding\n",
        made_by(report),
        "One new token in one layer. `SDPA ms` is torch's attention over all keys; the other columns say how many "
        f"times longer that takes than `decode_attention` over the same keys, and than caches that keep one in {SHARE} "
        "of them: median over turns and quartiles, each behind a comparison with dense attention in float64.\n",
        _head(),
        *(_line(row) for row in report["rows"]),
    ]
    write_text(folder / "decode.md", "\n".join(page) + "\n")


def _head() -> str:
    columns = ["row", "dtype", "SDPA ms", FULL, *policies(2 * SHARE)]
    return "\n".join(("| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)))


def _line(row: dict[str, Any]) -> str:
    cells = [row["case"], row["dtype"], f"{1e3 * row['methods'][SDPA]['seconds']['median']:.3f}"]
    for name, result in row["methods"].items():
        if name == SDPA:
            continue
        if result["status"] == "failed":
            cells.append("FAILED")
            continue
        ratio = result["speedup_over_sdpa"]
        cells.append(f"{ratio['median']:.2f} ({ratio['lower_quartile']:.2f}-{ratio['upper_quartile']:.2f})")
    return "| " + " | ".join(cells) + " |"
