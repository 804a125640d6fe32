"""One mask as an object: which keys each query keeps, combined, counted, converted and shown."""

import base64
import html
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from . import explore, handover, viz
from ._core import AttentionConfig, Edges
from .block_mask import to_block_mask
from .config import MAX_TOKENS, ConfigLike, config_error, index, integer, integers, load_config
from .converters import (
    Array,
    RowFunction,
    edges_from_csr,
    edges_from_dense,
    edges_from_function,
    to_scipy,
    to_torch_sparse,
)
from .edges import EdgeSource
from .explain import Explanation, explain
from .flops import Unit, attention_macs, in_unit
from .layer_mask import LayerMask, check_grid
from .register import replacements

if TYPE_CHECKING:
    import scipy.sparse  # type: ignore[import-untyped]
    from matplotlib.axes import Axes
    from torch.nn.attention.flex_attention import BlockMask

_KEYS = itertools.count()


class MaskOptions(NamedTuple):
    """What a mask has besides edges."""

    head_dim: int | None = None
    scale: float | None = None
    on_empty_row: str = "zero"


class Mask:
    """The edges of every head of one mask in one layer, for one number of tokens. Immutable.

    Made from a configuration (`from_config`, the functions of this module), from edges (`from_dense`,
    `from_csr`, `from_function`, `per_head`), or from other masks by the set operations ``|``, ``&``, ``-`` and
    ``~``, which speak of whole N x N sets, prefix rows and columns included. A mask is also a configuration:
    `SparseMHSA` takes one for exactly its heads and tokens.

    Memory and time grow with the segments that describe the edges, never with N x N; only `to_dense`, `to_csr`
    and its relatives are larger. Masks are equal, with equal hashes, if they keep the same edges and treat them
    alike (prefix, scale, masked logits, empty rows).

    Args:
        layer_mask: definition of the mask.
        num_tokens: N, all tokens, prefix included.
        head_dim: default of `flops`.

    Raises:
        ConfigError: the mask does not exist for ``num_tokens``.
    """

    __slots__ = (
        "_edges",
        "_head_dim",
        "_key",
        "_layer_mask",
        "_lists",
        "_name",
        "_on_empty_row",
        "_replacements",
        "_scale",
    )
    _layer_mask: LayerMask | None
    _key: str
    """Different for every mask. Reading it makes Dynamo compile anew for another mask."""
    _lists: Callable[[str], tuple[Tensor, Tensor]]
    """`to_csr`, called when attention first needs it: an intermediate ``~mask`` never pays for its lists."""

    def __init__(self, layer_mask: LayerMask, num_tokens: int, head_dim: int | None = None) -> None:
        num_tokens = integer("num_tokens", num_tokens, most=MAX_TOKENS)
        head_dim = None if head_dim is None else integer("head_dim", head_dim, 1)
        if not layer_mask.config.uses_edges:
            raise config_error(f"backend: `{layer_mask.name}` has no edges, and so no mask", key="backend")
        prefix = layer_mask.num_prefix_tokens_used
        if prefix > num_tokens and layer_mask.config.num_prefix_tokens is not None:
            message = f"num_prefix_tokens: expected at most the {num_tokens} tokens there are, got {prefix}"
            raise config_error(message, key="num_prefix_tokens")
        options = MaskOptions(head_dim, layer_mask.scale, layer_mask.on_empty_row)
        self._set(Edges.from_spec(layer_mask.spec, num_tokens), layer_mask.name, options, layer_mask)

    def _set(self, edges: Edges, name: str, options: MaskOptions, layer_mask: LayerMask | None = None) -> None:
        self._edges, self._name, self._layer_mask = edges, name, layer_mask
        self._head_dim, self._scale, self._on_empty_row = options
        self._replacements = replacements()
        self._key = f"mask {next(_KEYS)}"
        self._lists = _once(edges)

    @classmethod
    def _of(
        cls, edges: Edges, name: str, options: MaskOptions | None = None, num_prefix_tokens: int | None = None
    ) -> "Mask":
        """A mask that no configuration describes."""
        if num_prefix_tokens is not None:
            if integer("num_prefix_tokens", num_prefix_tokens) > edges.num_tokens:
                raise ValueError(f"num_prefix_tokens: expected 0 to {edges.num_tokens}, got {num_prefix_tokens}")
            edges = edges.with_prefix(num_prefix_tokens)
        mask = cls.__new__(cls)
        mask._set(edges, name, MaskOptions() if options is None else options)
        return mask

    @classmethod
    def from_config(
        cls,
        config: ConfigLike,
        num_tokens: int,
        num_heads: int,
        layer: int = 0,
        num_layers: int | None = None,
        epoch: int = 0,
        head_dim: int | None = None,
        grid: Sequence[int] | None = None,
        num_prefix_tokens: int | None = None,
    ) -> "Mask":
        """The mask that a configuration describes.

        Args:
            config: whatever `load_config` takes.
            num_tokens: N, all tokens.
            num_heads: H.
            layer: zero-based depth, for masks that depend on it.
            num_layers: number of layers, for masks that depend on it.
            epoch: training epoch, for masks that change with it.
            head_dim: D, default of `flops`, and for masks that fit a budget of operations.
            grid: [H, W] or [T, H, W] of the tokens after the prefix; the configuration's own value wins.
            num_prefix_tokens: leading tokens off the grid; the configuration's own value wins.

        Returns:
            The mask.

        Raises:
            ConfigError: the configuration cannot be honoured, or not for these sizes.
            ValueError: ``grid`` does not have as many cells as there are tokens after the prefix.
        """
        sides = None if grid is None else integers("grid", grid)
        place = (layer, num_layers, epoch, sides, num_prefix_tokens)
        layer_mask = LayerMask(load_config(config), num_heads, *place, head_dim)
        mask = cls(layer_mask, num_tokens, head_dim)
        if sides is not None:
            check_grid(sides, num_tokens, mask.num_prefix_tokens)
        return mask

    @classmethod
    def from_dense(cls, dense: Array, *, num_heads: int | None = None, num_prefix_tokens: int = 0) -> "Mask":
        """The mask of a dense array.

        Args:
            dense: (N, N), shared by all heads, or (H, N, N); bool, True = keep; tensor or array.
            num_heads: H; default is what ``dense`` has, 1 for two dimensions.
            num_prefix_tokens: leading tokens that `pruning_ratio` leaves out.

        Returns:
            The mask.

        Raises:
            TypeError: ``dense`` is not bool.
            ValueError: a shape does not fit.
        """
        return cls._of(edges_from_dense(dense, num_heads), "from_dense", num_prefix_tokens=num_prefix_tokens)

    @classmethod
    def from_csr(
        cls,
        row_ptr: object,
        col: Array | None = None,
        *,
        num_heads: int | None = None,
        num_prefix_tokens: int = 0,
    ) -> "Mask":
        """The mask of compressed rows, as `to_csr` returns them, or of a sparse matrix.

        Args:
            row_ptr: (N + 1,), shared by all heads, or (H, N + 1) with absolute offsets into ``col``; or a sparse
                torch tensor or scipy sparse matrix, whose stored entries are the edges, and no ``col``. Of block
                formats (BSR, BSC) explicit zeros inside the stored blocks count as entries: convert with ``.tocsr()``
                and ``eliminate_zeros()`` first.
            col: (nnz,) key indices, ascending strictly within a row.
            num_heads: H; default is what ``row_ptr`` has.
            num_prefix_tokens: leading tokens that `pruning_ratio` leaves out.

        Returns:
            The mask.

        Raises:
            TypeError: an argument is of another kind or not integer.
            ValueError: the lists contradict themselves; the message says where.
        """
        return cls._of(edges_from_csr(row_ptr, col, num_heads), "from_csr", num_prefix_tokens=num_prefix_tokens)

    @classmethod
    def from_function(cls, keep: RowFunction, num_tokens: int, num_heads: int, *, num_prefix_tokens: int = 0) -> "Mask":
        """The mask of a callable, which is asked once per head and query and needs O(N) memory at a time.

        Args:
            keep: ``keep(head, row)`` returns the keys of one query: bool (N,), True = keep, or integer indices in
                any order.
            num_tokens: N.
            num_heads: H.
            num_prefix_tokens: leading tokens that `pruning_ratio` leaves out.

        Returns:
            The mask.

        Raises:
            TypeError: a row is neither bool nor integer.
            ValueError: a row has the wrong shape, or an index that is out of range or given twice.
        """
        edges = edges_from_function(keep, num_tokens, num_heads)
        name = getattr(keep, "__name__", "from_function")
        return cls._of(edges, name, num_prefix_tokens=num_prefix_tokens)

    @classmethod
    def per_head(cls, masks: "Sequence[Mask]") -> "Mask":
        """One mask whose heads come from several.

        Args:
            masks: H masks over the same tokens; head h takes head h of the mask at h, or its only head if it has one.

        Returns:
            The mask, of H heads.

        Raises:
            TypeError: something is no mask.
            ValueError: there is none, they differ in tokens or options, or one has neither 1 nor H heads.
        """
        if not isinstance(masks, Iterable):
            raise TypeError(f"masks: expected a list of masks, one for each head, got {type(masks).__name__}")
        masks = list(masks)
        for head, mask in enumerate(masks):
            if not isinstance(mask, Mask):
                raise TypeError(f"masks: expected a Mask at {head}, got {type(mask).__name__}")
            if mask.num_heads not in (1, len(masks)):
                allowed = "1 head" if len(masks) == 1 else f"1 or {len(masks)} heads"
                raise ValueError(f"masks: expected {allowed} in mask {head}, got {mask.num_heads}")
        heads = [(mask._edges, head if mask.num_heads > 1 else 0) for head, mask in enumerate(masks)]
        edges = Edges.from_heads(heads)
        prefixes = {mask.num_prefix_tokens for mask in masks}
        name = f"per_head({', '.join(dict.fromkeys(mask.name for mask in masks))})"
        prefix = prefixes.pop() if len(prefixes) == 1 else 0
        return cls._of(edges, name, _common_options(*masks), prefix)

    def __or__(self, other: "Mask") -> "Mask":
        """Edges of either mask."""
        return self._combined("union", "|", other)

    def __and__(self, other: "Mask") -> "Mask":
        """Edges of both masks."""
        return self._combined("intersection", "&", other)

    def __sub__(self, other: "Mask") -> "Mask":
        """Edges of this mask that the other does not keep."""
        return self._combined("difference", "-", other)

    def __invert__(self) -> "Mask":
        """Every pair that is no edge. It is held as a few runs per query, but attention over it costs N x N."""
        return Mask._of(self._edges.complement(), f"~{self.name}", _common_options(self))

    def _combined(self, operation: str, sign: str, other: "Mask") -> "Mask":
        if not isinstance(other, Mask):
            raise TypeError(f"mask {sign} other: expected a sparse_mhsa.Mask, got {type(other).__name__}")
        if self.num_tokens != other.num_tokens:
            sizes = f"{self.num_tokens} and {other.num_tokens}"
            raise ValueError(f"mask {sign} mask: expected the same number of tokens, got {sizes}")
        if self.num_heads != other.num_heads and 1 not in (self.num_heads, other.num_heads):
            sizes = f"{self.num_heads} and {other.num_heads}"
            raise ValueError(f"mask {sign} mask: expected the same number of heads, or one, got {sizes}")
        edges = self._edges.combine(operation, other._edges)
        return Mask._of(edges, f"({self.name} {sign} {other.name})", _common_options(self, other))

    @property
    def layer_mask(self) -> LayerMask | None:
        """The definition, without a number of tokens, or None for a mask that no configuration describes."""
        return self._layer_mask

    @property
    def config(self) -> AttentionConfig | None:
        """The configuration the mask was made from, or None."""
        return None if self._layer_mask is None else self._layer_mask.config

    @property
    def spec(self) -> str | None:
        """Canonical text of the mask, or None for a mask that no configuration describes."""
        return None if self._layer_mask is None else self._layer_mask.spec

    @property
    def name(self) -> str:
        """Registered name, or how the mask was made."""
        return self._name

    @property
    def layer(self) -> int:
        """Zero-based depth that the mask was made for."""
        return 0 if self._layer_mask is None else self._layer_mask.layer

    @property
    def backend(self) -> str:
        """What computes attention: the configuration's, and our kernels for a mask that was made from edges."""
        return "vit" if self._layer_mask is None else self._layer_mask.backend

    @property
    def scale(self) -> float | None:
        """Factor of the scores, None for 1 / sqrt(head_dim)."""
        return self._scale

    @property
    def on_empty_row(self) -> str:
        """``zero`` or ``error``."""
        return self._on_empty_row

    @property
    def masked_logits(self) -> str:
        """``neg_inf`` or ``zero``."""
        return "neg_inf" if self._layer_mask is None else self._layer_mask.masked_logits

    @property
    def by_content(self) -> bool:
        """Never: a `Mask` has edges."""
        return False

    @property
    def needs_embeddings(self) -> bool:
        """Never."""
        return False

    @property
    def is_dense(self) -> bool:
        """The mask is ``none``: every query keeps every key."""
        return self._layer_mask is not None and self._layer_mask.is_dense

    @property
    def is_causal(self) -> bool:
        """It is known that no query keeps a later key."""
        return self._layer_mask is not None and self._layer_mask.is_causal

    def source(self, num_tokens: int) -> EdgeSource:
        """The edges as the operators take them.

        Raises:
            ValueError: the mask is for another number of tokens.
        """
        self._check_tokens(num_tokens)
        if self._layer_mask is not None and self._replacements == replacements():
            return self._layer_mask.source(num_tokens)
        return EdgeSource(None, *self._lists(self._key), self.masked_logits == "zero")

    def at(self, num_tokens: int, head_dim: int | None = None) -> "Mask":
        """The mask itself, which exists for one number of tokens only.

        Raises:
            ValueError: that number is another.
        """
        self._check_tokens(num_tokens)
        return self

    def at_epoch(self, epoch: int) -> "Mask":
        """The mask itself: its edges are fixed."""
        return self

    def _check_tokens(self, num_tokens: int) -> None:
        if num_tokens != self.num_tokens:
            raise ValueError(f"mask: `{self.name}` was made for {self.num_tokens} tokens, but there are {num_tokens}")

    @property
    def num_tokens(self) -> int:
        """N, all tokens."""
        return self._edges.num_tokens

    @property
    def num_heads(self) -> int:
        """H."""
        return self._edges.num_heads

    @property
    def num_prefix_tokens(self) -> int:
        """Leading tokens off the patch grid, as the mask resolved them."""
        return self._edges.num_prefix_tokens

    @property
    def grid(self) -> tuple[int, ...] | None:
        """Sides of the patch grid, where configuration or model told it."""
        return None if self._layer_mask is None else self._layer_mask.grid_used

    @property
    def head_dim(self) -> int | None:
        """Head dimension that `flops` uses by default."""
        return self._head_dim

    @property
    def nnz_per_head(self) -> list[int]:
        """Edges kept by each head, over the whole N x N matrix."""
        return self._edges.nnz()

    @property
    def nnz(self) -> int:
        """Edges kept, over all heads."""
        return sum(self.nnz_per_head)

    @property
    def nnz_patches_per_head(self) -> list[int]:
        """Edges kept by each head whose query and key are both patches."""
        return self._edges.nnz_patches()

    @property
    def nnz_patches(self) -> int:
        """Edges kept whose query and key are both patches, over all heads."""
        return sum(self.nnz_patches_per_head)

    @property
    def density(self) -> float:
        """Share of the H x N x N entries that is kept."""
        return self.nnz / max(1, self.num_heads * self.num_tokens**2)

    @property
    def pruning_ratio(self) -> float:
        """1 - density over the patch-to-patch entries, as published tables have it; 0 without patches."""
        patches = self.num_tokens - self.num_prefix_tokens
        return 1.0 - self.nnz_patches / (self.num_heads * patches**2) if patches > 0 else 0.0

    def to_dense(self) -> Tensor:
        """(H, N, N) bool, True = keep."""
        return torch.from_numpy(self._edges.to_dense())

    def to_csr(self) -> tuple[Tensor, Tensor]:
        """Edges as the operator ``forward_edges`` takes them.

        Returns:
            ``row_ptr`` (H, N + 1) int64 with absolute offsets into ``col`` (nnz,) int64, columns ascending
            within a row.
        """
        row_ptr, col = self._edges.to_csr()
        return torch.from_numpy(row_ptr), torch.from_numpy(col)

    def to_torch_sparse(self, head: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, N) torch sparse CSR tensor of one head, ones where edges are kept."""
        return to_torch_sparse(self._edges, head, dtype)

    def to_scipy(self, head: int) -> "scipy.sparse.csr_array":
        """(N, N) bool `scipy.sparse.csr_array` of one head, True where edges are kept; needs scipy."""
        return to_scipy(self._edges, head)

    def to_block_mask(self, block_size: int = 128, device: torch.device | str | None = None) -> "BlockMask":
        """The edges as a FlexAttention `BlockMask`, made without N x N.

        See `block_mask.to_block_mask`.

        Raises:
            ValueError: as there, or the mask has ``masked_logits: zero``, which a `BlockMask` cannot say.
        """
        if self.masked_logits != "neg_inf":
            raise ValueError(f"masked_logits: `{self.name}` has `{self.masked_logits}`, which a BlockMask cannot keep")
        return to_block_mask(self._edges, block_size, device)

    def overlap(self) -> Tensor:
        """(H, H) float64 Jaccard index of each pair of heads: edges of both over edges of either."""
        return torch.from_numpy(self._edges.overlap())

    def explain(self, head_dim: int | None = None) -> Explanation:
        """How the edges of each head are held and what attention over them costs; ``print`` it.

        Args:
            head_dim: D; default is the one the mask was made with.

        Returns:
            A table: segments by kind, edges, bytes, and where D is known GMACs, kernel and predicted time. It says
            which calls are handed over to PyTorch's dense attention.
        """
        handed_over = handover.EXPLAINED if self.is_dense else None
        return explain(self._edges, self.name, self._head_dim if head_dim is None else head_dim, handed_over)

    def degrees(self, head: int) -> Tensor:
        """(N,) int64: keys kept by each query of a head."""
        return torch.from_numpy(self._edges.degrees(index("head", head, self.num_heads)))

    @property
    def num_empty_rows(self) -> tuple[int, ...]:
        """Queries that keep no key, per head. Their context is 0, or an error with ``on_empty_row: error``."""
        return tuple(int((self.degrees(head) == 0).sum()) for head in range(self.num_heads))

    def keys(self, head: int, query: int) -> Tensor:
        """(k,) int64: the keys that one query of a head keeps, ascending, without the lists of the others.

        Raises:
            ValueError: there is no such head or query.
        """
        head, query = index("head", head, self.num_heads), index("query", query, self.num_tokens)
        row_ptr = np.zeros((1, self.num_tokens + 1), dtype=np.int64)
        row_ptr[:, query + 1 :] = self.num_tokens
        row = Edges.from_csr(row_ptr, np.arange(self.num_tokens))
        one = Edges.from_heads([(self._edges, head)])
        return torch.from_numpy(one.combine("intersection", row).to_csr()[1])

    def density_image(self, head: int, size: int = 512) -> NDArray[np.float32]:
        """(s, s) share of kept entries in each cell of a head's mask, s = min(size, N), in O(edges)."""
        return self._edges.density_image(index("head", head, self.num_heads), integer("size", size, 1))

    def flops(self, head_dim: int | None = None, unit: Unit = "GMACs") -> float:
        """Cost of attention over this mask for one sample: 2 * nnz * head_dim multiply-accumulates.

        Args:
            head_dim: D; default is the one the mask was made with.
            unit: a multiply-accumulate counts as one in GMACs and as two in GFLOPs.

        Returns:
            The cost in billions.

        Raises:
            ValueError: no head dimension is known, or ``unit`` is neither.
        """
        head_dim = self._head_dim if head_dim is None else integer("head_dim", head_dim, 1)
        if head_dim is None:
            raise ValueError("head_dim: expected a number, because the mask was made without one; got None")
        return in_unit(attention_macs(self.nnz, head_dim), unit)

    def plot(self, heads: Sequence[int] | None = None, ax: "Axes | None" = None, size: int = 512) -> "list[Axes]":
        """Draw the mask with matplotlib; see `sparse_mhsa.viz.plot`."""
        return viz.plot(self, heads=heads, ax=ax, size=size)

    def overlay(
        self,
        image: ArrayLike | None,
        query: explore.Query,
        heads: Sequence[int] | None = None,
        grid: Sequence[int] | None = None,
    ) -> "list[Axes]":
        """Draw which patches of an image a query sees, per head; see `sparse_mhsa.explore.overlay`."""
        return explore.overlay(self, image, query, heads, grid)

    def explore(
        self,
        image: ArrayLike | None = None,
        grid: Sequence[int] | None = None,
        query: explore.Query | None = None,
    ) -> "explore.Explorer":
        """Look around in a notebook, over an image if there is one; see `sparse_mhsa.explore.Explorer`."""
        return explore.Explorer(self, image, grid, query)

    def __repr__(self) -> str:
        return (
            f"Mask({self.name}, num_tokens={self.num_tokens}, num_heads={self.num_heads}, "
            f"nnz={self.nnz}, density={self.density:.4f}, pruning_ratio={self.pruning_ratio:.4f})"
        )

    def _repr_png_(self) -> bytes:
        return viz.png(self)

    def _repr_html_(self) -> str:
        per_head = self.nnz_per_head
        rows = {
            "mask": self.name,
            "tokens": f"{self.num_tokens} ({self.num_prefix_tokens} prefix)",
            "heads": str(self.num_heads),
            "edges": f"{self.nnz} ({min(per_head)} to {max(per_head)} per head)",
            "density": f"{self.density:.2%}",
            "pruning ratio (patches)": f"{self.pruning_ratio:.2%}",
        }
        if self._head_dim is not None:
            rows["attention"] = f"{self.flops():.4g} GMACs, {self.flops(unit='GFLOPs'):.4g} GFLOPs"
        cells = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
        picture = base64.b64encode(viz.png(self)).decode("ascii")
        return f'<table>{cells}</table><img alt="mask of each head" src="data:image/png;base64,{picture}">'

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        if self.spec is not None and (self.spec, self._options) == (other.spec, other._options):
            return True
        return self._options == other._options and self._edges.same_edges(other._edges)

    @property
    def _options(self) -> tuple[object, ...]:
        """Everything besides the edges in which masks may differ."""
        sizes = (self.num_tokens, self.num_heads, self.num_prefix_tokens)
        return (*sizes, self._scale, self._on_empty_row, self.masked_logits)

    def __hash__(self) -> int:
        return hash((self._options, *self.nnz_per_head))

    def __copy__(self) -> "Mask":
        return self

    def __deepcopy__(self, memo: object) -> "Mask":
        return self

    def __reduce__(self) -> tuple[Callable[..., "Mask"], tuple[object, ...]]:
        if self._layer_mask is not None:
            return Mask, (self._layer_mask, self.num_tokens, self._head_dim)
        options = (self._name, self._head_dim, self._scale, self._on_empty_row)
        return _from_parts, (self._edges.to_parts(), self.num_prefix_tokens, *options)


def _once(edges: Edges) -> Callable[[str], tuple[Tensor, Tensor]]:
    """A function that makes the lists of `Mask.to_csr` the first time and returns the same ever after."""
    made: list[tuple[Tensor, Tensor]] = []

    def once(key: str) -> tuple[Tensor, Tensor]:
        if not made:
            row_ptr, col = edges.to_csr()
            made.append((torch.from_numpy(row_ptr), torch.from_numpy(col)))
        return made[0]

    # What `torch.compiler.assume_constant_result` sets, which would import the whole compiler: Dynamo calls it while
    # tracing, because it cannot see into the compiled core.
    once._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return once


def _from_parts(
    parts: tuple[Any, ...],
    num_prefix_tokens: int,
    name: str,
    head_dim: int | None,
    scale: float | None,
    on_empty_row: str,
) -> Mask:
    """A pickled mask."""
    options = MaskOptions(head_dim, scale, on_empty_row)
    return Mask._of(Edges.from_parts(*parts), name, options, num_prefix_tokens)


def _common_options(*masks: Mask) -> MaskOptions:
    """The options of a mask made from others, which must agree."""
    first = masks[0]
    for mask in masks:
        if mask.masked_logits != "neg_inf":
            raise ValueError(
                f"masked_logits: `{mask.name}` has `{mask.masked_logits}`, which a mask made from it cannot keep"
            )
        for option in ("scale", "on_empty_row"):
            if getattr(mask, option) != getattr(first, option):
                values = f"{getattr(first, option)} and {getattr(mask, option)}"
                raise ValueError(f"{option}: expected the same in every mask, got {values}")
    head_dims = {mask.head_dim for mask in masks}
    return MaskOptions(head_dims.pop() if len(head_dims) == 1 else None, first.scale, first.on_empty_row)
