"""A process of its own: what one forward and backward add to its peak memory. Prints MiB added and MiB of outputs."""

import resource
import sys

import torch

from sparse_mhsa import Mask, sparse_attention


def _peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def main(config: str, num_tokens: int, num_heads: int, head_dim: int) -> None:
    """Measure once."""
    mask = Mask.from_config(config, num_tokens=num_tokens, num_heads=num_heads)
    small = Mask.from_config(config, num_tokens=64, num_heads=num_heads)
    # The libraries' own first-use memory (thread pools, lazily loaded code) is not what grows with N.
    tiny = [torch.randn(1, num_heads, 64, head_dim, requires_grad=True) for _ in range(3)]
    torch.autograd.backward(sparse_attention(tiny[0], tiny[1], tiny[2], small).sum())
    shape = (1, num_heads, num_tokens, head_dim)
    q, k, v = (torch.randn(shape).requires_grad_() for _ in range(3))
    gradient = torch.ones(()).expand(shape)
    before = _peak_mib()
    out = sparse_attention(q, k, v, mask)
    torch.autograd.backward(out, gradient)
    added = _peak_mib() - before
    lse_bytes = num_heads * num_tokens * 4
    outputs = (4 * q.numel() * 4 + lse_bytes) / (1 << 20)
    sys.stdout.write(f"{added:.1f} {outputs:.1f}\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
