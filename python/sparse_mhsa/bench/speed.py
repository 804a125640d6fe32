"""Attention alone, sparse against dense `scaled_dot_product_attention`, in turn so that a noisy machine slows both.

Every row first compares the sparse result with dense masked attention (every query up to 2,305 tokens, 64 sampled
queries above) and is not timed if they differ.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import sparse_attention
from ..masks import Mask

_DENSE_GATE_TOKENS = 2305


class Row(NamedTuple):
    """One size: medians in milliseconds, ratios dense / sparse."""

    num_tokens: int
    batch: int
    density: float
    forward_ms: float
    forward_ratio: float
    step_ms: float
    step_ratio: float


def _inputs(batch: int, num_heads: int, num_tokens: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, num_heads, num_tokens, head_dim)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def check(qkv: Sequence[Tensor], mask: Mask) -> None:
    """Compare one forward with dense masked attention.

    Raises:
        RuntimeError: if they differ by more than the dtype explains; no speed is reported then.
    """
    q, k, v = (x.detach() for x in qkv)
    out = sparse_attention(q, k, v, mask)
    n = mask.num_tokens
    rows = torch.arange(n) if n <= _DENSE_GATE_TOKENS else torch.linspace(0, n - 1, 64).long()
    keep = torch.zeros(mask.num_heads, len(rows), n, dtype=torch.bool)
    row_ptr, col = mask.to_csr()
    for head in range(mask.num_heads):
        for position, row in enumerate(rows.tolist()):
            keep[head, position, col[row_ptr[head, row] : row_ptr[head, row + 1]]] = True
    expected = F.scaled_dot_product_attention(q[:, :, rows].double(), k.double(), v.double(), attn_mask=keep)
    error = (out[:, :, rows].double() - expected).abs().max().item()
    allowed = 16 * torch.finfo(q.dtype).eps * max(1.0, expected.abs().max().item())
    if not error <= allowed:
        raise RuntimeError(f"N = {n}: sparse and dense masked attention differ by {error:.2e} (allowed {allowed:.2e})")


def _interleaved(first: Callable[[], object], second: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Median time of each in milliseconds, measured in turn for about ``seconds`` and at least five rounds."""
    first(), second()
    times: tuple[list[float], list[float]] = ([], [])
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times[0]) < 5:
        for call, record in zip((first, second), times, strict=True):
            start = time.perf_counter()
            call()
            record.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[0]), 1e3 * statistics.median(times[1])


def measure(
    config: str,
    num_tokens: int,
    batch: int,
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    seconds: float,
) -> Row:
    """Time forward, and forward + backward, of the mask of ``config`` against dense attention without a mask."""
    mask = Mask.from_config(config, num_tokens=num_tokens, num_heads=num_heads)
    qkv = _inputs(batch, num_heads, num_tokens, head_dim, dtype)
    check(qkv, mask)
    gradient = torch.randn(qkv[0].shape).to(dtype)

    def sparse() -> Tensor:
        return sparse_attention(qkv[0], qkv[1], qkv[2], mask)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])

    def step(attend: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attend(), qkv, gradient)

    with torch.no_grad():
        sparse_forward, dense_forward = _interleaved(sparse, dense, seconds)
    sparse_step, dense_step = _interleaved(step(sparse), step(dense), seconds)
    forward, whole = dense_forward / sparse_forward, dense_step / sparse_step
    return Row(num_tokens, batch, mask.density, sparse_forward, forward, sparse_step, whole)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m sparse_mhsa.bench", description=__doc__)
    parser.add_argument("--attn-cfg", default="configs/attention/vit_fibottention.yaml")
    parser.add_argument("--tokens", type=int, nargs="+", default=[197, 577, 1025, 2305, 4097])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--seconds", type=float, default=2.0, help="per measurement")
    options = parser.parse_args(argv)
    dtype = getattr(torch, options.dtype)
    sys.stdout.write(f"{options.attn_cfg}, {options.heads} heads of {options.head_dim}, {options.dtype}, ")
    sys.stdout.write(f"{torch.get_num_threads()} threads; ratios are dense / sparse\n\n")
    sys.stdout.write("| tokens x batch | density | forward ms | ratio | forward + backward ms | ratio |\n")
    sys.stdout.write("|---|---|---|---|---|---|\n")
    for num_tokens in options.tokens:
        batch = max(1, 1576 // num_tokens)
        row = measure(options.attn_cfg, num_tokens, batch, options.heads, options.head_dim, dtype, options.seconds)
        sys.stdout.write(
            f"| {row.num_tokens} x {row.batch} | {row.density:.2%} | {row.forward_ms:.2f} | {row.forward_ratio:.1f} x "
            f"| {row.step_ms:.2f} | {row.step_ratio:.1f} x |\n"
        )
        sys.stdout.flush()
    return 0
