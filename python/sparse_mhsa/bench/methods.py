"""The ways to compute attention that are timed against each other.

A method turns a `Problem` into a function of q, k and v. It says before it runs how much memory it will need, so that
a row that cannot fit is shown as such and does not take the machine down.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import Backend, build_backend
from ..content import choose_masks
from ..functional import attend, sparse_attention
from ..mask import Mask
from .cases import Case
from .measure import out_of_memory, seconds_of
from .torch_sparse import CsrAttention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(B, H, N, D) queries, keys and values to (B, H, N, D)."""


class UnsupportedError(Exception):
    """A method that does not exist for this row; the message says why."""

    status = "unsupported"


class UnaffordableError(UnsupportedError):
    """A method that would take too long for this row; the message says how long."""

    status = "left_out"


@dataclass(frozen=True)
class Problem:
    """One case in one dtype, with what several methods need.

    Attributes:
        case: mechanism and size.
        dtype: of the inputs.
    """

    case: Case
    dtype: torch.dtype

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, H, N, D) that require gradients: what is timed and what is compared."""
        return self.case.inputs(self.dtype)

    @cached_property
    def mask(self) -> Mask:
        """The edges; those chosen for the inputs of the row where they depend on content.

        Raises:
            ValueError: the mask does not exist for this size, or the backend has no edges.
        """
        case = self.case
        if not self.by_content:
            return case.layer_mask.at(case.num_tokens)
        q, k, _ = (x.detach() for x in self.inputs)
        (mask,) = choose_masks(case.config, q, k)
        return mask

    @property
    def by_content(self) -> bool:
        """Edges are chosen in every call."""
        return self.case.layer_mask.by_content

    @cached_property
    def backend(self) -> Backend | None:
        """Attention without edges, with parameters that are the same every time, or None for attention over edges."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            like = torch.empty(0, dtype=self.dtype)
            backend = build_backend(self.case.layer_mask, self.case.head_dim, 0.0, like)
        return None if backend is None else backend.requires_grad_(False)

    @property
    def work(self) -> int | None:
        """Edges of all samples, or None without edges."""
        return None if self.backend is not None else self.case.batch * self.mask.nnz

    @cached_property
    def edges(self) -> tuple[Tensor, Tensor]:
        """``row_ptr`` (H, N + 1) and ``col`` (nnz of all heads,): row h starts where head h's edges do."""
        row_ptr, col = self.mask.to_csr()
        return torch.as_tensor(row_ptr), torch.as_tensor(col)

    @cached_property
    def degrees(self) -> Tensor:
        """(H, N) keys per query."""
        return self.edges[0].diff(dim=1)

    @property
    def square(self) -> int:
        """Entries of all (B, H, N, N) scores."""
        return self.case.batch * self.case.num_heads * self.case.num_tokens**2

    @property
    def item(self) -> int:
        """Bytes of one number."""
        return self.dtype.itemsize


class Method(ABC):
    """One way to compute attention.

    Attributes:
        name: key in the results.
        title: head of its column.
        masked: whether it applies the mask; dense attention does not.
        stepwise: whether it rounds scores and weights to the dtype, as a chain of separate operators does.
        backward: whether it has gradients.
        quick: whether it takes part in ``--quick``.
    """

    name: str
    title: str
    masked = True
    stepwise = False
    backward = True
    quick = True

    def memory(self, problem: Problem, *, backward: bool) -> int:
        """A lower estimate of the bytes it needs beyond inputs, outputs and gradients."""
        return 0

    @abstractmethod
    def prepare(self, problem: Problem) -> Attention:
        """Everything that is done once per mask.

        Raises:
            UnsupportedError: the method does not exist for this problem.
        """


class Sparse(Method):
    """This package: over edges, over edges chosen in the call, or by a backend without edges."""

    name, title = "sparse_mhsa", "sparse_mhsa"

    def prepare(self, problem: Problem) -> Attention:
        """Nothing to do: the plan is built and cached by the first call."""
        backend, layer_mask = problem.backend, problem.case.layer_mask
        if backend is not None:
            return lambda q, k, v: backend.attend(q, k, v)[0]
        if problem.by_content:
            return lambda q, k, v: attend(q, k, v, layer_mask)[0]
        mask = problem.mask
        return lambda q, k, v: sparse_attention(q, k, v, mask)


class DenseSdpa(Method):
    """`scaled_dot_product_attention` without a mask: what the rows are compared with."""

    name, title, masked = "sdpa", "SDPA", False

    def prepare(self, problem: Problem) -> Attention:
        """Nothing to do."""
        return F.scaled_dot_product_attention


class MaskedSdpa(Method):
    """`scaled_dot_product_attention` with the mask as a boolean matrix."""

    name, title = "sdpa_masked", "SDPA + mask"

    def memory(self, problem: Problem, *, backward: bool) -> int:
        """The (H, N, N) mask, and the additive one that torch makes of it."""
        return problem.square // problem.case.batch * (1 + problem.item)

    def prepare(self, problem: Problem) -> Attention:
        """Make the dense mask."""
        keep = problem.mask.to_dense()[None]
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


class ReferenceMasked(Method):
    """The reference's plain backend: all scores, -1e9 where the mask is 0, softmax."""

    name, title, stepwise = "reference_masked", "masked dense (reference)", True

    def memory(self, problem: Problem, *, backward: bool) -> int:
        """The mask, scores, shifted scores and weights; the backward pass adds two of them."""
        return problem.square * problem.item * (5 if backward else 3)

    def prepare(self, problem: Problem) -> Attention:
        """Make the dense mask."""
        keep = problem.mask.to_dense()[None].to(problem.dtype)
        scale = problem.case.head_dim**-0.5

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            logits = (q @ k.transpose(-2, -1)) * scale + (1 - keep) * -1e9
            out: Tensor = logits.softmax(dim=-1) @ v
            return out

        return attend


class ReferenceGather(Method):
    """The reference's gather backend: keys and values of every query copied side by side, padded to the longest row.

    The rows of prefix tokens, which keep every key, are computed densely.
    """

    name, title, stepwise = "reference_gather", "gather (reference)", True

    def memory(self, problem: Problem, *, backward: bool) -> int:
        """Gathered keys and values, and their gradients."""
        widest = int(problem.degrees[:, problem.mask.num_prefix_tokens :].max()) if problem.case.num_tokens > 1 else 1
        case = problem.case
        gathered = case.batch * case.num_heads * case.num_tokens * widest * case.head_dim * problem.item
        return gathered * (4 if backward else 2)

    def prepare(self, problem: Problem) -> Attention:
        """Make the padded index."""
        prefix, (row_ptr, col) = problem.mask.num_prefix_tokens, problem.edges
        heads, rows = row_ptr.shape[0], row_ptr.shape[1] - 1
        if prefix and bool((problem.degrees[:, :prefix] != rows).any()):
            raise UnsupportedError("prefix rows are not dense")
        degrees = problem.degrees[:, prefix:]
        slot = torch.arange(int(degrees.max()))
        valid = slot < degrees[..., None]
        index = col[(row_ptr[:, prefix:-1, None] + slot).clamp(max=len(col) - 1)].masked_fill(~valid, 0)
        scale = problem.case.head_dim**-0.5

        def gather(x: Tensor) -> Tensor:
            flat = index.reshape(1, heads, -1, 1).expand(x.shape[0], -1, -1, x.shape[-1])
            return x.gather(2, flat).view(*x.shape[:2], *index.shape[1:], x.shape[-1])

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = (q[:, :, prefix:, None] * gather(k)).sum(-1) * scale
            weights = scores.masked_fill(~valid, -torch.inf).softmax(dim=-1)
            patches: Tensor = (weights[..., None] * gather(v)).sum(-2)
            if prefix == 0:
                return patches
            dense = ((q[:, :, :prefix] @ k.transpose(-2, -1)) * scale).softmax(dim=-1) @ v
            return torch.cat((dense, patches), dim=2)

        return attend


class TorchSparse(Method):
    """torch.sparse: sampled products of CSR matrices, softmax over their rows, and sparse times dense."""

    name, title = "torch_sparse", "torch.sparse"

    def prepare(self, problem: Problem) -> Attention:
        """Make the CSR pattern of every head and of its transpose."""
        if problem.dtype not in (torch.float32, torch.float64):
            raise UnsupportedError(f"no {str(problem.dtype).removeprefix('torch.')} kernels")
        if bool((problem.degrees == 0).any()):
            raise UnsupportedError("rows without a key")
        return CsrAttention(*problem.edges, scale=problem.case.head_dim**-0.5)


class Flex(Method):
    """FlexAttention, compiled, with the faster of several block sizes."""

    name, title, backward, quick = "flex", "FlexAttention", False, False
    block_sizes = (64, 128)

    def memory(self, problem: Problem, *, backward: bool) -> int:
        """The dense mask, and what making the block mask of it takes: up to 12.8 bytes per pair were seen."""
        return problem.square // problem.case.batch * 14

    def prepare(self, problem: Problem) -> Attention:
        """Compile for every block size and keep the fastest."""
        shape = (problem.case.batch, problem.case.num_heads, problem.case.num_tokens, problem.case.head_dim)
        inputs = tuple(torch.randn(shape).to(problem.dtype) for _ in range(3))
        keep = problem.mask.to_dense()
        # Kernels of other masks count towards a limit beyond which nothing more is compiled.
        torch.compiler.reset()
        try:
            with torch.no_grad():
                attends = [self._compile(keep, size) for size in self.block_sizes]
                for attend in attends:
                    attend(*inputs)
                return min(attends, key=lambda attend: min(seconds_of(partial(attend, *inputs)) for _ in range(3)))
        except Exception as error:  # no C++ compiler, or whatever else the compiler stack raises
            if (message := out_of_memory(error)) is not None:
                raise MemoryError(message.removeprefix("out of memory: ")) from error
            raise UnsupportedError(" ".join(str(error).split())[:200] or type(error).__name__) from error

    @staticmethod
    def _compile(keep: Tensor, block_size: int) -> Attention:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        heads, tokens, _ = keep.shape

        def kept(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return keep[h, i, j]

        block_mask = create_block_mask(kept, None, heads, tokens, tokens, device="cpu", BLOCK_SIZE=block_size)
        # What cannot be compiled is an error with fullgraph; as plain Python it would make all N x N scores.
        compiled = torch.compile(partial(flex_attention, block_mask=block_mask), dynamic=False, fullgraph=True)
        return lambda q, k, v: compiled(q, k, v)


OURS, DENSE = Sparse.name, DenseSdpa.name
METHODS: tuple[Method, ...] = (
    Sparse(),
    DenseSdpa(),
    MaskedSdpa(),
    Flex(),
    TorchSparse(),
    ReferenceMasked(),
    ReferenceGather(),
)
