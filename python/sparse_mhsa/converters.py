"""Edges from and to other forms: dense, compressed rows, torch and scipy sparse, callables.

`True` and every stored entry mean *keep this edge*. Only the dense forms take N x N memory.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._core import Edges
from .config import MAX_HEADS, MAX_TOKENS, index, integer

if TYPE_CHECKING:
    import scipy.sparse  # type: ignore[import-untyped]

Array: TypeAlias = Tensor | NDArray[np.generic] | Sequence[object]
_SPARSE_LAYOUTS = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
RowFunction: TypeAlias = Callable[[int, int], Array | Iterable[object]]
"""``keep(head, row)``: the keys of one query, as bool (N,) or as integer indices in any order, also one by one."""


def edges_from_dense(dense: Array, num_heads: int | None = None) -> Edges:
    """Edges of a dense mask.

    Args:
        dense: (N, N), shared by all heads, or (H, N, N); bool, True = keep.
        num_heads: H; default is what ``dense`` has, 1 for two dimensions.

    Returns:
        The edges of H heads.

    Raises:
        TypeError: ``dense`` is not bool.
        ValueError: a shape does not fit.
    """
    cells = _array("dense", dense)
    if cells.dtype != np.bool_:
        raise TypeError(f"dense: expected dtype bool (True = keep), got {cells.dtype}")
    if cells.ndim not in (2, 3) or 0 in cells.shape[:-2] or cells.shape[-2] != cells.shape[-1]:
        raise ValueError(f"dense: expected shape (N, N) or (H, N, N), got {cells.shape}")
    if cells.ndim == 2:
        cells = cells[None]
    edges = Edges.from_dense(cells.view(np.uint8))
    return edges if num_heads is None else edges.with_heads(integer("num_heads", num_heads, 1, MAX_HEADS))


def edges_from_csr(row_ptr: object, col: Array | None = None, num_heads: int | None = None) -> Edges:
    """Edges of compressed rows.

    Args:
        row_ptr: integers (N + 1,), shared by all heads, or (H, N + 1) with absolute offsets into ``col``.
            Or a sparse torch tensor of any layout, (N, N) or (H, N, N), or a scipy sparse matrix: then ``col`` is
            left out. Of block formats (BSR, BSC) explicit zeros inside the stored blocks count as entries: convert with
            ``.tocsr()`` and ``eliminate_zeros()`` first.
        col: (nnz,) key indices, ascending strictly within a row.
        num_heads: H; default is what ``row_ptr`` has.

    Returns:
        The edges of H heads. What values a sparse tensor or matrix stores does not matter, only where.

    Raises:
        TypeError: an argument is of another kind or not integer.
        ValueError: the lists contradict themselves; the message says where.
    """
    if col is None:
        row_ptr, col = _compressed(row_ptr)
    pointers, columns = _integers("row_ptr", row_ptr), _integers("col", col)
    if pointers.ndim == 1:
        pointers = pointers[None]
    if pointers.ndim != 2 or pointers.shape[0] < 1:
        raise ValueError(f"row_ptr: expected shape (N + 1,) or (H, N + 1), got {pointers.shape}")
    if columns.ndim != 1:
        raise ValueError(f"col: expected one dimension, got {columns.shape}")
    edges = Edges.from_csr(pointers, columns)
    return edges if num_heads is None else edges.with_heads(integer("num_heads", num_heads, 1, MAX_HEADS))


def edges_from_function(keep: RowFunction, num_tokens: int, num_heads: int) -> Edges:
    """Edges of a callable that is asked row by row, so that a mask over many tokens never exists as N x N.

    Args:
        keep: ``keep(head, row)`` returns bool (N,), True = keep, or integer key indices in any order.
        num_tokens: N.
        num_heads: H.

    Returns:
        The edges of H heads. Heads that follow one another and are equal share memory.

    Raises:
        TypeError: ``keep`` is no function, or a row is neither bool nor integer.
        ValueError: a row has the wrong shape, or an index that is out of range or given twice.
    """
    if not callable(keep):
        raise TypeError(f"keep: expected a function of (head, row), got {type(keep).__name__}")
    num_tokens = integer("num_tokens", num_tokens, most=MAX_TOKENS)
    num_heads = integer("num_heads", num_heads, 1, MAX_HEADS)
    row_ptr, rows, edges = np.zeros((num_heads, num_tokens + 1), dtype=np.int64), [], 0
    for head in range(num_heads):
        row_ptr[head, 0] = edges
        for row in range(num_tokens):
            keys = _keys(keep(head, row), num_tokens, f"row {row} of head {head}")
            rows.append(keys)
            edges += len(keys)
            row_ptr[head, row + 1] = edges
    return Edges.from_csr(row_ptr, np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64))


def edges_from_rows(rows: Sequence[Array]) -> Edges:
    """Edges of a list with the key indices of each query, shared by all heads.

    Args:
        rows: N sequences of key indices, in any order.

    Returns:
        The edges of one head.

    Raises:
        TypeError: a row is not integer.
        ValueError: an index is out of range or given twice.
    """
    return edges_from_function(lambda _, row: rows[row], len(rows), 1)


def to_torch_sparse(edges: Edges, head: int, dtype: torch.dtype) -> Tensor:
    """(N, N) sparse CSR tensor of one head, ones where edges are kept."""
    row_ptr, col = _one_head(edges, head).to_csr()
    size = (edges.num_tokens, edges.num_tokens)
    pointers, columns = torch.from_numpy(row_ptr[0]), torch.from_numpy(col)
    return torch.sparse_csr_tensor(
        pointers, columns, torch.ones(len(col), dtype=dtype), size, dtype=dtype, check_invariants=False
    )


def to_scipy(edges: Edges, head: int) -> "scipy.sparse.csr_array":
    """(N, N) `scipy.sparse.csr_array` of one head, True where edges are kept.

    Raises:
        ImportError: scipy is not installed.
    """
    try:
        import scipy.sparse
    except ImportError as error:
        raise ImportError("to_scipy needs scipy: pip install scipy") from error
    row_ptr, col = _one_head(edges, head).to_csr()
    size = (edges.num_tokens, edges.num_tokens)
    return scipy.sparse.csr_array((np.ones(len(col), dtype=np.bool_), col, row_ptr[0]), shape=size)


def _one_head(edges: Edges, head: int) -> Edges:
    return Edges.from_heads([(edges, index("head", head, edges.num_heads))])


def _compressed(matrix: object) -> tuple[Array, Array]:
    """``row_ptr`` and ``col`` of a torch or scipy sparse matrix."""
    if isinstance(matrix, Tensor) and matrix.layout in _SPARSE_LAYOUTS and not matrix.is_meta:
        return _compressed_tensor(matrix.detach())
    scipy_sparse = sys.modules.get("scipy.sparse")
    if scipy_sparse is not None and scipy_sparse.issparse(matrix):
        if len(matrix.shape) != 2 or matrix.shape[0] != matrix.shape[1]:  # type: ignore[attr-defined]
            raise ValueError(f"row_ptr: expected a square matrix, got {matrix.shape}")  # type: ignore[attr-defined]
        rows = matrix.copy()  # type: ignore[attr-defined]
        # Conversions read wherever the indices say, and nobody has to have looked at them before.
        if rows.format == "coo":
            for name, indices in (("row", rows.row), ("col", rows.col)):
                if len(indices) and not 0 <= indices.min() <= indices.max() < rows.shape[0]:
                    raise ValueError(f"{name}: expected indices from 0 to {rows.shape[0] - 1}")
        elif rows.format == "dia":
            rows.data = np.ones_like(rows.data)  # conversion would drop stored zeros, which are edges like others
        elif hasattr(rows, "check_format"):
            rows.check_format(full_check=True)
        rows = rows.tocsr()
        rows.sum_duplicates()
        return rows.indptr, rows.indices
    raise TypeError(
        f"row_ptr: without `col`, expected a sparse torch tensor or a scipy sparse matrix, got {type(matrix).__name__}"
    )


def _compressed_tensor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``row_ptr`` and ``col`` of a sparse tensor of any layout."""
    if matrix.dim() not in (2, 3) or matrix.dense_dim() > 0 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"row_ptr: expected a sparse tensor of (N, N) or (H, N, N), got {tuple(matrix.shape)}")
    # Sorted by head, query and key, each triple once.
    *rows, columns = torch.unique(_checked(matrix).to_sparse(layout=torch.sparse_coo)._indices(), dim=1)
    num_tokens, num_heads = matrix.shape[-1], matrix.shape[0] if matrix.dim() == 3 else 1
    row = rows[0] if len(rows) == 1 else rows[0] * num_tokens + rows[1]
    count = torch.bincount(row, minlength=num_heads * num_tokens)
    offsets = torch.cat([count.new_zeros(1), count.cumsum(0)])
    first = torch.arange(num_heads, device=offsets.device)[:, None] * num_tokens
    return offsets[first + torch.arange(num_tokens + 1, device=offsets.device)], columns


def _checked(matrix: Tensor) -> Tensor:
    """The same tensor, of which torch has looked at every index: it does not of its own accord, but reads by them."""
    try:
        if matrix.layout == torch.sparse_coo:
            return torch.sparse_coo_tensor(matrix._indices(), matrix._values(), matrix.shape, check_invariants=True)
        if matrix.layout in (torch.sparse_csr, torch.sparse_bsr):
            indices = matrix.crow_indices(), matrix.col_indices()
        else:
            indices = matrix.ccol_indices(), matrix.row_indices()
        return torch.sparse_compressed_tensor(
            *indices, matrix.values(), matrix.shape, layout=matrix.layout, check_invariants=True
        )
    except RuntimeError as error:
        raise ValueError(f"row_ptr: {error}") from error


def _keys(row: object, num_tokens: int, where: str) -> NDArray[np.int64]:
    """One row as ascending key indices."""
    # What NumPy would take for a single object: a set, a generator, the keys of a dictionary.
    if (
        isinstance(row, Iterable)
        and not isinstance(row, (Sequence, Tensor, np.ndarray))
        and not hasattr(row, "__array__")
    ):
        row = list(row)
    cells = _array(where, row)
    if cells.dtype == np.bool_:
        if cells.shape != (num_tokens,):
            raise ValueError(f"{where}: expected {num_tokens} bools, got shape {cells.shape}")
        return np.flatnonzero(cells)
    if cells.size == 0:
        return np.zeros(0, dtype=np.int64)
    keys = np.sort(_integers(where, cells).ravel())
    if cells.ndim != 1:
        raise ValueError(f"{where}: expected key indices in one dimension, got shape {cells.shape}")
    if keys[0] < 0 or keys[-1] >= num_tokens:
        wrong = keys[0] if keys[0] < 0 else keys[-1]
        raise ValueError(f"{where}: expected key indices from 0 to {num_tokens - 1}, got {wrong}")
    twice = np.flatnonzero(keys[1:] == keys[:-1])
    if len(twice):
        raise ValueError(f"{where}: expected every key index once, got {keys[twice[0]]} twice")
    return keys


def _integers(name: str, values: object) -> NDArray[np.int64]:
    array = _array(name, values)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got dtype {array.dtype}")
    if array.dtype == np.uint64 and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name}: expected numbers below 2**63, got {array.max()}")
    return np.asarray(array, dtype=np.int64, order="C")


def _array(name: str, values: object) -> NDArray[np.generic]:
    if isinstance(values, Tensor):
        if values.layout != torch.strided or values.is_meta or values.is_nested:
            raise TypeError(f"{name}: expected a dense tensor with values, got {values.layout} on {values.device}")
        values = values.detach().cpu().numpy()
    try:
        return np.asarray(values)
    except ValueError as error:
        raise TypeError(f"{name}: expected an array, got {type(values).__name__}: {error}") from error
