"""How tests compare tensors: NaN and infinities first, then finite entries."""

import torch

from sparse_mhsa.reference import dense_attention

FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def assert_same(got, expected, *, rtol=0.0, atol=0.0, what="tensor"):
    """Equal NaN, +inf and -inf places, and finite entries within tolerance; shapes and dtypes equal."""
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    assert got.dtype == expected.dtype, f"{what}: dtype {got.dtype}, expected {expected.dtype}"
    for kind, where in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        assert torch.equal(where(got), where(expected)), f"{what}: {kind} in different places"
    finite = torch.isfinite(expected)
    error = (got.double() - expected.double())[finite].abs()
    allowed = atol + rtol * expected.double()[finite].abs()
    assert (error <= allowed).all(), f"{what}: largest error {error.max():.3e}"


def assert_as_good_as_dense(got, in_same_dtype, in_float64, *, factor, what):
    """The tolerance rule: no worse than ``factor`` times plain torch in the same dtype, against float64.

    Float64 itself is held to 1e-12 of the largest entry.
    """
    assert_same(torch.isfinite(got), torch.isfinite(in_float64), what=f"{what} (finite places)")
    assert not torch.isnan(got).any(), f"{what}: NaN"
    if got.numel() == 0:
        return
    finite = torch.isfinite(in_float64)
    if not finite.any():
        return
    scale = max(1.0, float(in_float64[finite].abs().max()))
    error = float((got.double() - in_float64)[finite].abs().max())
    base = float((in_same_dtype.double() - in_float64)[finite].abs().max())
    # What rounding one exact result to the dtype may cost, where plain torch happens to be luckier than that.
    rounding = torch.finfo(got.dtype).eps * scale
    allowed = 1e-12 * scale if got.dtype == torch.float64 else factor * base + FLOOR[got.dtype] * scale + rounding
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e} (plain torch {base:.3e})"


def oracle_with_grads(q, k, v, grad_out, mask, dtype, **options):
    """Outputs and gradients of dense masked attention computed in ``dtype``."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out, lse = dense_attention(*leaves, mask, **options)
    grads = torch.autograd.grad(out, leaves, grad_out.to(dtype))
    return out.detach(), lse, *grads
