"""The compiled core: configuration, edge sets and kernels.

Everything here is private; `sparse_mhsa` wraps it. Keep this file in step with `src/python/`
(`make test` runs stubtest).
"""

from collections.abc import Callable
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "TORCH_VERSION",
    "AttentionConfig",
    "ConfigError",
    "Edges",
    "__version__",
    "allocate",
    "backward",
    "backward_edges",
    "cache_step",
    "config_schema",
    "count_edges",
    "decode",
    "dropout_keep",
    "edge_index",
    "force_kernel",
    "forward",
    "forward_edges",
    "instruction_set",
    "load_scores",
    "register_backend",
    "register_mask",
    "registered_masks",
    "save_scores",
    "select_edges",
    "selection_room",
]

__version__: str
TORCH_VERSION: str
"""The torch release this extension was compiled against, for example ``"2.13.0"``."""

class ConfigError(ValueError):
    """A configuration that cannot be honoured.

    Attributes set on every instance: ``source`` (file name or ``None``), ``line`` (1-based or ``None``),
    ``key`` (dotted path such as ``mask_kwargs.window``, or ``None``).
    """

@final
class AttentionConfig:
    """A parsed, range-checked attention configuration. Immutable, hashable, picklable (through its YAML text)."""

    @staticmethod
    def parse(text: str, source: str | None = None) -> AttentionConfig:
        """Parse YAML (or JSON) text. ``source`` names the file in error messages."""
    @property
    def backend(self) -> str: ...
    @property
    def uses_edges(self) -> bool:
        """Attention is softmax over the edges of the mask; otherwise ``backend`` brings its own."""
    @property
    def layers(self) -> list[str]:
        """The regular expressions of the ``layers`` overrides, in order."""
    @property
    def mask(self) -> str: ...
    @property
    def by_content(self) -> bool:
        """The mask chooses keys by the content of queries and keys, so that it has no edges without them."""
    @property
    def scale(self) -> float | None: ...
    @property
    def masked_logits(self) -> str: ...
    @property
    def num_prefix_tokens(self) -> int | None: ...
    @property
    def prefix_dense(self) -> bool: ...
    @property
    def grid(self) -> list[int] | None: ...
    @property
    def on_empty_row(self) -> str: ...
    @property
    def embed_dim(self) -> int | None: ...
    @property
    def num_heads(self) -> int | None: ...
    @property
    def seeds(self) -> list[int | None]:
        """The seeds of what the mask draws at random, in the order of its parameters; None is yet to be drawn."""
    def with_seed(self, seed: int) -> AttentionConfig:
        """The same with every missing seed given: ``seed`` to the first, ``seed + 1`` to the next, and so on."""
    def to_json(self) -> str:
        """Every key, defaults filled in, as JSON: ``mask_kwargs`` and ``backend_kwargs`` are mappings in it."""
    def to_yaml(self) -> str:
        """The same as YAML text that ``parse`` reads back to an equal configuration."""
    def for_layer(self, name: str) -> AttentionConfig:
        """The configuration of the layer whose module name is ``name``: ``layers`` overrides applied."""
    def unmatched_layers(self, names: list[str]) -> list[str]:
        """The ``layers`` expressions that match none of these module names."""
    def spec(
        self,
        num_heads: int,
        layer: int = 0,
        num_layers: int | None = None,
        epoch: int = 0,
        grid: list[int] | None = None,
        num_prefix_tokens: int | None = None,
        head_dim: int | None = None,
    ) -> str:
        """Canonical text of one layer's mask: what the operators take.

        ``grid``, ``num_prefix_tokens`` and ``head_dim`` are what was found in the model; the configuration's own values
        win over them.
        """
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __reduce__(self) -> tuple[Any, ...]: ...

@final
class Edges:
    """The edges of every head of one mask. Memory grows with the segments that describe them, never with N x N."""

    @staticmethod
    def from_spec(spec: str, num_tokens: int, *, tried_out: bool = False) -> Edges:
        """The edges of a mask; ``tried_out`` without warnings of clamped parameters."""
    @staticmethod
    def from_csr(row_ptr: NDArray[np.int64], col: NDArray[np.int64]) -> Edges:
        """From contiguous ``row_ptr`` (H, N + 1) with absolute offsets into ``col`` (nnz,), ascending within a row."""
    @staticmethod
    def from_dense(cells: NDArray[np.uint8]) -> Edges:
        """From (H, N, N), nonzero = keep."""
    @staticmethod
    def from_heads(heads: list[tuple[Edges, int]]) -> Edges:
        """Heads picked from several."""
    @staticmethod
    def from_parts(num_tokens: int, sets: list[tuple[list[int], ...]], heads: list[int]) -> Edges:
        """What `to_parts` returned."""
    def to_parts(self) -> tuple[int, list[tuple[list[int], ...]], list[int]]:
        """Plain data for pickles: N, the distinct edge sets, and which of them each head has."""
    def with_prefix(self, num_prefix_tokens: int) -> Edges:
        """The same edges, of which the first tokens count as prefix."""
    def with_heads(self, num_heads: int) -> Edges:
        """One head shared by ``num_heads``."""
    def combine(self, name: str, other: Edges) -> Edges:
        """``union``, ``intersection`` or ``difference``, head by head; one head is shared by all."""
    def complement(self) -> Edges: ...
    def overlap(self) -> NDArray[np.float64]:
        """(H, H) Jaccard index of each pair of heads."""
    def same_edges(self, other: Edges) -> bool:
        """Whether both keep the same pairs, however they hold them."""
    def describe(self, head: int, head_dim: int | None = None) -> dict[str, Any]:
        """How the edges of a head are held: counts of segments by kind, edges in each, bytes.

        With ``head_dim`` also the kernel that the cost model chooses, and the seconds it predicts.
        """
    @property
    def num_heads(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_prefix_tokens(self) -> int:
        """Leading tokens that are off the patch grid (CLS, registers), as the mask resolved them."""
    def nnz(self) -> list[int]:
        """Edges kept, per head, over the whole N x N matrix."""
    def nnz_patches(self) -> list[int]:
        """Edges kept, per head, whose query and key are both patches."""
    def degrees(self, head: int) -> NDArray[np.int64]:
        """(N,) keys kept per query."""
    def to_csr(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``row_ptr`` (H, N + 1) with absolute offsets into ``col`` (nnz,), columns ascending within a row."""
    def to_dense(self) -> NDArray[np.bool_]:
        """(H, N, N), True = keep."""
    def density_image(self, head: int, size: int) -> NDArray[np.float32]:
        """(s, s), s = min(size, N): the share of kept entries in each cell of the mask, in O(edges)."""

def force_kernel(name: str | None) -> None:
    """Compute every head that it can with the kernel ``edges``, ``lines`` or ``panels``, in the whole process and until
    it is called with None: to measure and to test kernels where another one would be chosen."""

def instruction_set() -> Literal["scalar", "avx2", "avx512", "avx512bf16", "amx"]:
    """What the kernels compute with in this process: the fastest of the machine, or what ``SPARSE_MHSA_SIMD`` names.

    Raises a ValueError where the variable names no set, or one that the machine lacks.
    """

def registered_masks() -> list[dict[str, Any]]:
    """One mapping per mask: ``name``, ``aliases``, ``about``, ``keys`` (its mask_kwargs), ``budget_keys`` (those
    that set how many pairs are kept: a list for each quantity, with its other names after the preferred one),
    ``budget_unordered`` (those of them of which more may mean fewer pairs),
    ``default_prefix`` (None if it depends on parameters), ``schema`` (JSON Schema of the mask_kwargs, as text)."""

def allocate(total: int, weights: list[float], minimum: list[int], maximum: list[int]) -> list[int]:
    """``total`` split in proportion to ``weights`` within bounds, by largest remainder; see `sparse_mhsa.budget`."""

def save_scores(
    path: str,
    keys: NDArray[np.uint32],
    scores: NDArray[np.float32],
    importance: NDArray[np.float64],
    bound: NDArray[np.float64],
    about: str,
) -> None:
    """Write a file of calibration scores; see `sparse_mhsa.scores.Scores`. ``about`` is JSON."""

def load_scores(
    path: str,
) -> tuple[NDArray[np.uint32], NDArray[np.float32], NDArray[np.float64], NDArray[np.float64], str]:
    """What `save_scores` was given, checked."""

def config_schema() -> str:
    """JSON Schema (draft 2020-12) of a configuration document, as text; `cli.SCHEMA_LIMITS` is what it cannot say."""

def register_backend(name: str, about: str, parameters: list[str], replace: bool = False) -> None:
    """Make a backend known to configurations. Each parameter is a JSON mapping ``{name, types, default}``; without
    ``default`` it is required."""

def register_mask(
    name: str,
    about: str,
    keys: list[str],
    required: list[str],
    uses_layer: bool,
    uses_epoch: bool,
    edges: Callable[[dict[str, Any], str], Edges],
) -> None:
    """Make a mask known to configurations, or replace one of the same name. ``edges`` takes the context and the
    ``mask_kwargs`` as JSON text and returns the edges over the patches, of one head or of all."""

def count_edges(spec: str, num_tokens: int) -> list[tuple[float, float]]:
    """Edges and patch-to-patch edges of each head, without warnings of clamped parameters; of a mask by content in the
    mean over normal noise."""

def selection_room(spec: str) -> tuple[int, int] | None:
    """``(a, b)`` such that a head of N tokens has at most ``N * (min(a, N) + b)`` edges, or None for a mask that
    does not choose by content."""

def select_edges(
    q: Tensor,
    k: Tensor,
    spec: str,
    key_mask: Tensor | None,
    bias: Tensor | None,
    importance: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``row_ptr`` (B * H, N + 1) and ``col``, whose end is -1 where fewer edges were chosen than there is room for."""

def edge_index(spec: str, num_queries: int, num_keys: int) -> tuple[Tensor, Tensor]:
    """``row_ptr`` (H, num_queries + 1) int64 with absolute offsets into ``col`` (nnz of all heads,) int64."""

def dropout_keep(row_ptr: Tensor, col: Tensor, batch: int, num_heads: int, seed: Tensor, dropout_p: float) -> Tensor:
    """(batch, len(col)) float64 of 0 or 1 / (1 - p): the factor that the kernels apply to each edge. ``row_ptr`` is
    (H, N + 1) as `edge_index` returns it."""

def forward(
    engine: Literal["cpu", "aten"],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: str,
    key_mask: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``out`` (B, H, N, Dv), in memory (B, N, H, Dv), and contiguous ``lse`` (B, H, N); any strides in.

    ``engine`` is ``cpu`` (kernels for CPU tensors) or ``aten`` (ATen operators, tensors of any device).
    ``key_mask`` (B, S) bool, True = keep; ``bias`` broadcasts to (B, H, N, S) and is added to the scaled scores;
    ``seed`` is an int64 scalar tensor. k (B, Hkv, S, D) and v (B, Hkv, S, Dv) with H a multiple of Hkv. lse is float64
    (on MPS, which has none, float32).
    """

def backward(
    engine: Literal["cpu", "aten"],
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: str,
    key_mask: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq``, ``dk``, ``dv`` in the dtypes and shapes of q, k, v, in memory with the heads of a token side by side."""

def forward_edges(
    engine: Literal["cpu", "aten"],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_ptr: Tensor,
    col: Tensor,
    key_mask: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
    background: bool = False,
) -> tuple[Tensor, Tensor]:
    """`forward` over edges given as tensors: ``row_ptr`` (P, N + 1) int64 with absolute offsets into the flat ``col``
    int64, P = 1 (shared), H (per head) or B * H (per batch and head). Columns ascend strictly within a row. With a
    ``background``, visible keys that are no edge keep the logit 0."""

def backward_edges(
    engine: Literal["cpu", "aten"],
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    row_ptr: Tensor,
    col: Tensor,
    key_mask: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
    background: bool = False,
) -> tuple[Tensor, Tensor, Tensor]: ...
def decode(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, causal: bool, needs_weights: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``out`` (B, H, N, Dv), ``lse`` (B, H, N) float64 and ``weights`` (B, Hkv, S), empty unless asked for.

    k (B, Hkv, S, D) and v (B, Hkv, S, Dv) hold ``lengths`` (B, Hkv) int64 entries each. With ``causal`` query i is
    token ``length - N + i``.
    """

def cache_step(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    token_positions: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    worths: Tensor,
    lengths: Tensor,
    starts: Tensor,
    capacities: Tensor,
    worth: str,
    sinks: int,
    recent: int,
    scale: float,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``out`` (B, H, N, Dv) and ``lse`` (B, H, N) of tokens that join a cache one after the other; empty without q.

    ``keys`` (B, S, D), ``values`` (B, S, Dv), ``positions`` (B, S) int64, ``worths`` (B, S, or 0 where ``worth`` is
    ``recency``) in accumulator precision and ``lengths`` (B, Hkv) int64 change in place; all are contiguous. Head h
    owns slots ``starts[h]`` to ``starts[h + 1]``. Entries more than ``window`` tokens back are not seen.
    """
