"""The gate in front of every measurement: a method that computes the wrong thing has no speed.

The truth is dense masked attention in float64; the yardstick is the error that torch's own dense masked attention
makes in the dtype of the row. Attention without edges is compared with its formula in the same way. Edges that are
chosen by content must be those of the definition. Up to `ALL_ROWS` tokens every query is compared, above it
`SAMPLED_ROWS` of them, with all gradients that flow from them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .definitions import formula, kept
from .methods import Attention, Problem

ALL_ROWS, SAMPLED_ROWS = 577, 64
FACTOR = {"out": 2.0, "dq": 3.0, "dk": 3.0, "dv": 3.0}
"""How much larger than torch's own error in the same dtype an error may be."""
FLOOR = {torch.float64: 1e-12}
"""Absolute allowance, in units of the largest value; 1e-6 for all narrower dtypes."""
NEAR_TIES = 1e-3
"""Share of the chosen edges that may be others than in float64: scores closer than rounding have no order."""


class WrongResultError(Exception):
    """A method's result differs from dense masked attention by more than its dtype explains."""


class Gate:
    """The expected results of one problem, computed once for all methods.

    Args:
        problem: the case and its mask.
        masked: compare with the mask of the problem, or with attention without a mask.
        stepwise: take the errors of separate operators as the yardstick, not those of torch's fused one.
    """

    def __init__(self, problem: Problem, *, masked: bool, stepwise: bool = False) -> None:
        tokens = problem.case.num_tokens
        step = 1 if tokens <= ALL_ROWS else (tokens - 1) / (SAMPLED_ROWS - 1)
        self.rows = torch.unique((torch.arange(min(tokens, int(tokens / step) + 1)) * step).round().long())
        self.rows = self.rows[self.rows < tokens]
        self.inputs = problem.case.inputs(problem.dtype)
        grad = torch.zeros(self.inputs[0].shape, dtype=problem.dtype)
        generator = torch.Generator().manual_seed(1)
        grad[:, :, self.rows] = torch.randn((*grad.shape[:2], len(self.rows), grad.shape[-1]), generator=generator).to(
            problem.dtype
        )
        self.grad = grad
        without_edges = masked and problem.backend is not None
        keep = self._keep(problem) if masked and not without_edges else None
        self.formula = formula(problem) if without_edges else None
        self.exact = self._dense(torch.float64, keep)
        self.base = self._dense(problem.dtype, keep, stepwise=stepwise)
        self.floor = FLOOR.get(problem.dtype, 1e-6)

    def check(self, attend: Attention, *, backward: bool) -> None:
        """Run ``attend`` once and compare.

        Raises:
            WrongResultError: the message names what differs and by how much.
        """
        if backward:
            out = attend(*self.inputs)
            results = (out, *torch.autograd.grad(out, self.inputs, self.grad))
        else:
            with torch.no_grad():
                results = (attend(*(x.detach() for x in self.inputs)),)
        for (name, factor), result, exact, base in zip(FACTOR.items(), results, self.exact, self.base, strict=False):
            got = result.detach()
            if name == "out":
                got = got[:, :, self.rows]
            error = (got.double() - exact).abs().max().item()
            usual = (base.double() - exact).abs().max().item()
            allowed = factor * usual + self.floor * exact.abs().max().item()
            if not error <= allowed:  # also for NaN
                raise WrongResultError(f"{name} differs by {error:.2e}, allowed are {allowed:.2e}")

    def _dense(self, dtype: torch.dtype, keep: Tensor | None, *, stepwise: bool = False) -> tuple[Tensor, ...]:
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in self.inputs)
        if self.formula is not None:
            out = self.formula(q, k, v)[:, :, self.rows]
        elif stepwise:
            scores = q[:, :, self.rows] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            out = (scores if keep is None else scores.masked_fill(~keep, -torch.inf)).softmax(dim=-1) @ v
        else:
            out = F.scaled_dot_product_attention(q[:, :, self.rows], k, v, attn_mask=keep)
        grads = torch.autograd.grad(out, (q, k, v), self.grad[:, :, self.rows].to(dtype))
        return out.detach(), *grads

    def _keep(self, problem: Problem) -> Tensor:
        """(1, H, rows, N) of the mask, from its edges: never N x N above `ALL_ROWS`."""
        row_ptr, col = problem.edges
        keep = torch.zeros(row_ptr.shape[0], len(self.rows), problem.case.num_tokens, dtype=torch.bool)
        for head in range(row_ptr.shape[0]):
            for position, row in enumerate(self.rows.tolist()):
                keep[head, position, col[row_ptr[head, row] : row_ptr[head, row + 1]]] = True
        if problem.by_content:
            expected = kept(problem, self.rows)
            wrong, total = int((keep != expected).sum()), int(expected.sum())
            if wrong > NEAR_TIES * total:
                raise WrongResultError(f"the choice differs from its definition in {wrong} of {total} edges")
        return keep[None]
