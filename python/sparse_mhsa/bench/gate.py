"""The gate in front of every measurement: a method that computes the wrong thing has no speed.

The truth is dense masked attention in float64; the yardstick is the error that torch's own dense masked attention
makes in the dtype of the row. Attention without edges is compared with its formula in the same way. Edges that are
chosen by content must be those of the definition. Large sizes are compared in part, as `EXTENT` says: compared in full
they would take several times the memory of what is timed.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from .definitions import formula, kept
from .methods import Attention, Problem

ALL_ROWS, SAMPLED_ROWS = 577, 64
EXTENT = (
    f"up to {ALL_ROWS} tokens in every query of every sample, above it in {SAMPLED_ROWS} queries of every sample and "
    "in those gradients that flow from them in the first one"
)
"""How much of a result is compared, as tables say it."""
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
        batch, heads, _, dim = self.inputs[0].shape
        generator = torch.Generator().manual_seed(1)
        # Of the chosen rows; that of all others is zero.
        self.grad = torch.randn((batch, heads, len(self.rows), dim), generator=generator).to(problem.dtype)
        without_edges = masked and problem.backend is not None
        keep = self._keep(problem) if masked and not without_edges else None
        self.formula = formula(problem) if without_edges else None
        floor, samples = FLOOR.get(problem.dtype, 1e-6), _samples(problem)
        self.exact: dict[tuple[int, int], dict[str, Tensor]] = {}
        usual: dict[str, list[Tensor]] = {name: [] for name in FACTOR}
        sizes: dict[str, list[Tensor]] = {name: [] for name in FACTOR}
        # One head of one sample at a time: what they are computed with, and torch's own results, soon make room again.
        for part in itertools.product(range(batch), range(heads)):
            backward = part[0] < samples
            self.exact[part] = self._dense(part, torch.float64, keep, backward=backward)
            base = self._dense(part, problem.dtype, keep, backward=backward, stepwise=stepwise)
            for name, exact in self.exact[part].items():
                usual[name].append(_largest(exact - base[name]))
                sizes[name].append(_largest(exact))
        self.allowed = {
            name: (factor * torch.stack(usual[name]).max() + floor * torch.stack(sizes[name]).max()).item()
            for name, factor in FACTOR.items()
        }

    def check(self, attend: Attention, *, backward: bool) -> None:
        """Run ``attend`` once and compare.

        Raises:
            WrongResultError: the message names what differs and by how much.
        """
        if backward:
            out = attend(*self.inputs)
            grad = torch.zeros_like(self.inputs[0])
            grad[:, :, self.rows] = self.grad
            results = (out, *torch.autograd.grad(out, self.inputs, grad))
        else:
            with torch.no_grad():
                results = (attend(*(x.detach() for x in self.inputs)),)
        for name, result in zip(FACTOR, results, strict=False):
            errors = []
            for part, exact in self.exact.items():
                if name in exact:
                    got = _of(part, result)
                    errors.append(_largest(exact[name] - (got[:, :, self.rows] if name == "out" else got)))
            error, allowed = torch.stack(errors).max().item(), self.allowed[name]
            if not error <= allowed:  # also for NaN
                raise WrongResultError(f"{name} differs by {error:.2e}, allowed are {allowed:.2e}")

    @staticmethod
    def memory(problem: Problem) -> int:
        """Bytes that it holds and is made with, about, beside the inputs of the problem."""
        case = problem.case
        compared = _samples(problem) * case.num_heads * case.num_tokens * case.head_dim
        rows = case.num_tokens if case.num_tokens <= ALL_ROWS else SAMPLED_ROWS
        # Output and gradients; of one head inputs, gradients, scores, weights and their gradients as well.
        return 8 * (4 * compared + 8 * case.num_tokens * (case.head_dim + rows))

    def _dense(
        self, part: tuple[int, int], dtype: torch.dtype, keep: Tensor | None, *, backward: bool, stepwise: bool = False
    ) -> dict[str, Tensor]:
        """The chosen rows of the output of one head of one sample, and with ``backward`` its gradients."""
        q, k, v = (_of(part, x).to(dtype).requires_grad_(backward) for x in self.inputs)
        keep = None if keep is None else _of((0, part[1]), keep)
        if self.formula is not None:
            out: Tensor = self.formula(q, k, v)[:, :, self.rows]
        elif stepwise:
            scores = q[:, :, self.rows] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            out = (scores if keep is None else scores.masked_fill(~keep, -torch.inf)).softmax(dim=-1) @ v
        else:
            out = F.scaled_dot_product_attention(q[:, :, self.rows], k, v, attn_mask=keep)
        grads = torch.autograd.grad(out, (q, k, v), _of(part, self.grad).to(dtype)) if backward else ()
        return dict(zip(FACTOR, (out.detach(), *grads), strict=False))

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


def _samples(problem: Problem) -> int:
    """How many samples of the batch have their gradients compared."""
    batch = problem.case.batch
    return batch if problem.case.num_tokens <= ALL_ROWS else min(1, batch)


def _of(part: tuple[int, int], x: Tensor) -> Tensor:
    """(1, 1, ...): one head of one sample."""
    sample, head = part
    return x.detach()[sample : sample + 1, head : head + 1]


def _largest(x: Tensor) -> Tensor:
    """The largest absolute value, NaN if there is one, without a copy of all of them."""
    return torch.stack(x.aminmax()).abs().max()
