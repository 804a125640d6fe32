"""The gate in front of every measurement: a method that computes the wrong thing has no speed.

The truth is dense masked attention in float64; the yardstick is the error that torch's own dense masked attention
makes in the dtype of the row. Attention without edges is compared with its formula in the same way. Edges that are
chosen by content must be those of the definition. Up to `ALL_ROWS` tokens every query of every sample is compared,
above it `SAMPLED_ROWS` queries of each, with all gradients that flow from them in one sample.
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
        self.inputs = problem.inputs
        # Gradients are compared for so many: in float64, those of all would take several times the memory of inputs.
        self.samples = problem.case.batch if tokens <= ALL_ROWS else min(1, problem.case.batch)
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
            got = got[:, :, self.rows] if name == "out" else got[: self.samples]
            error = (got.double() - exact).abs().max().item()
            usual = (base.double() - exact).abs().max().item()
            allowed = factor * usual + self.floor * exact.abs().max().item()
            if not error <= allowed:  # also for NaN
                raise WrongResultError(f"{name} differs by {error:.2e}, allowed are {allowed:.2e}")

    @staticmethod
    def memory(problem: Problem) -> int:
        """Bytes that it holds and computes with, about, beside the inputs of the problem."""
        case = problem.case
        sample = case.num_heads * case.num_tokens * case.head_dim
        samples = case.batch if case.num_tokens <= ALL_ROWS else min(1, case.batch)
        # Gradients that it gives and gets; in float64 and in the dtype of the row inputs and gradients.
        return case.batch * sample * problem.item + samples * sample * (6 * 8 + 6 * problem.item)

    def _dense(self, dtype: torch.dtype, keep: Tensor | None, *, stepwise: bool = False) -> tuple[Tensor, ...]:
        """The chosen rows of the outputs of all samples, and the gradients of the first ones."""
        q, k, v = (x.detach()[: self.samples].to(dtype).requires_grad_() for x in self.inputs)
        out = self._rows_of(q, k, v, keep, stepwise=stepwise)
        grads = torch.autograd.grad(out, (q, k, v), self.grad[: self.samples, :, self.rows].to(dtype))
        outs = [out.detach()]
        for sample in range(self.samples, len(self.inputs[0])):
            q, k, v = (x.detach()[sample : sample + 1].to(dtype) for x in self.inputs)
            outs.append(self._rows_of(q, k, v, keep, stepwise=stepwise))
        return torch.cat(outs), *grads

    def _rows_of(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, *, stepwise: bool) -> Tensor:
        if self.formula is not None:
            out: Tensor = self.formula(q, k, v)[:, :, self.rows]
        elif stepwise:
            scores = q[:, :, self.rows] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            out = (scores if keep is None else scores.masked_fill(~keep, -torch.inf)).softmax(dim=-1) @ v
        else:
            out = F.scaled_dot_product_attention(q[:, :, self.rows], k, v, attn_mask=keep)
        return out

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
