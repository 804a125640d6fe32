"""`SparseMHSA`: `torch.nn.MultiheadAttention` over the edges of a mask."""

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends import Backend, check_backend
from .config import ConfigLike, config_error, load_config
from .content import edges_of
from .edges import EdgeSource, append_visible_keys
from .functional import (
    MANY_TOKENS,
    attend,
    autocast,
    bias_as,
    causal_bias,
    check_beside,
    check_qkv,
    check_square,
    dense_mask,
    draw_seed,
    warn_of_dense_weights,
    weights_of,
)
from .layer import SparseLayer
from .layer_mask import LayerMask, check_sizes
from .mask import Mask
from .positions import check_positions


class SparseMHSA(nn.MultiheadAttention, SparseLayer):
    """`torch.nn.MultiheadAttention` that computes and stores only the edges of a mask.

    Parameters, initial values, state dict and the contract of `forward` are those of the parent. Two things
    are better: a query without any key gives zero weights and zero context instead of NaN, and keys that no
    query keeps are never read. Nested tensors and TorchScript are not supported.

    Polarity, as in the parent and unlike the rest of this package: **True means drop** in the ``attn_mask``
    and ``key_padding_mask`` of `forward`. Both intersect with the mask.

    Args:
        embed_dim: E, a multiple of ``num_heads``.
        num_heads: H.
        dropout: probability that an attention weight is dropped in training.
        bias: add biases to the projections.
        add_bias_kv: append a learned key and value that every query keeps.
        add_zero_attn: append a zero key and value that every query keeps.
        kdim: features of keys; default E.
        vdim: features of values; default E.
        batch_first: tensors are (B, L, E) instead of (L, B, E).
        device: of the parameters.
        dtype: of the parameters.
        config: whatever `load_config` takes; a `Mask`, for exactly its heads and tokens; None for dense attention.
        layer: zero-based depth of this layer.
        num_layers: number of layers of the model.
        grid: [H, W] or [T, H, W] of the tokens after the prefix; the configuration's own value wins.
        num_prefix_tokens: leading tokens off the grid; the configuration's own value wins, and so does the
            ``add_class_token: false`` of its mask, which is ``num_prefix_tokens: 0``.

    Raises:
        ConfigError: the configuration cannot be honoured.
        ValueError: a size is out of range.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        config: ConfigLike | Mask | None = None,
        layer: int = 0,
        num_layers: int | None = None,
        grid: Sequence[int] | None = None,
        num_prefix_tokens: int | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        place = (layer, num_layers, grid, num_prefix_tokens)
        self._adopt(_layer_mask(num_heads, config, *place, self.head_dim))

    @classmethod
    def from_yaml(
        cls, path: Path | str, embed_dim: int | None = None, num_heads: int | None = None, **kwargs: object
    ) -> "SparseMHSA":
        """Build a layer from a configuration file.

        Args:
            path: the file, or anything else that `load_config` takes.
            embed_dim: E; default is ``embed_dim`` of the configuration.
            num_heads: H; default is ``num_heads`` of the configuration.
            **kwargs: further arguments of the constructor.

        Returns:
            The layer.

        Raises:
            ConfigError: the configuration cannot be honoured.
            FileNotFoundError: there is no such file.
            ValueError: a size is given neither here nor in the configuration.
        """
        config = load_config(path)
        embed_dim = config.embed_dim if embed_dim is None else embed_dim
        num_heads = config.num_heads if num_heads is None else num_heads
        for name, size in (("embed_dim", embed_dim), ("num_heads", num_heads)):
            if size is None:
                raise ValueError(f"{name}: expected a number, because the configuration has none; got None")
        return cls(embed_dim, num_heads, config=config, **kwargs)  # type: ignore[arg-type]

    @classmethod
    def from_dense(
        cls,
        mha: nn.MultiheadAttention,
        config: ConfigLike | Mask | None,
        *,
        layer: int = 0,
        num_layers: int | None = None,
        grid: Sequence[int] | None = None,
        num_prefix_tokens: int | None = None,
    ) -> "SparseMHSA":
        """A sparse layer that shares the Parameter objects, training flag and hooks of a dense one.

        Args:
            mha: the dense layer; it stays as it is.
            config: whatever `load_config` takes; a `Mask`, for exactly its heads and tokens; None for dense attention.
            layer: zero-based depth of this layer.
            num_layers: number of layers of the model.
            grid: as in the constructor.
            num_prefix_tokens: as in the constructor.

        Returns:
            The sparse layer.

        Raises:
            TypeError: ``mha`` is no `torch.nn.MultiheadAttention`.
        """
        if not isinstance(mha, nn.MultiheadAttention):
            raise TypeError(f"mha: expected a torch.nn.MultiheadAttention, got {type(mha).__name__}")
        place = (layer, num_layers, grid, num_prefix_tokens)
        layer_mask = _layer_mask(mha.num_heads, config, *place, mha.head_dim)
        # The containers of parameters, submodules and hooks are copied one level deep: same objects, own
        # registry.
        twin = nn.MultiheadAttention.__new__(nn.MultiheadAttention)
        for name, value in mha.__dict__.items():
            twin.__dict__[name] = copy.copy(value) if isinstance(value, (dict, set)) else value
        return cls.convert(twin, layer_mask)

    @classmethod
    def convert(cls, mha: nn.MultiheadAttention, layer_mask: LayerMask | Mask) -> "SparseMHSA":
        """Make a dense layer sparse in place, or give a sparse one another mask; `revert` undoes it.

        Args:
            mha: the layer; its class changes, everything else stays.
            layer_mask: the mask, for the number of heads of ``mha``.

        Returns:
            The same object.

        Raises:
            ValueError: the layer cannot honour the mask; it stays as it was.
        """
        check_layer(mha, layer_mask)
        mha.__class__ = cls
        assert isinstance(mha, SparseMHSA)
        mha._adopt(layer_mask)
        return mha

    def revert(self) -> nn.MultiheadAttention:
        """Make the layer a dense `torch.nn.MultiheadAttention` again, in place."""
        dense: nn.MultiheadAttention = self
        for key, hook in list(self._forward_pre_hooks.items()):
            if hook is stay_off_fast_path:
                del self._forward_pre_hooks[key]
        self._remove_mechanism()
        dense.__class__ = nn.MultiheadAttention
        return dense

    def _adopt(self, layer_mask: LayerMask | Mask) -> None:
        check_layer(self, layer_mask)
        self._set_mechanism(layer_mask, self.head_dim, self.dropout, self.out_proj.weight)
        if stay_off_fast_path not in self._forward_pre_hooks.values():
            self.register_forward_pre_hook(stay_off_fast_path)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        token_positions: Tensor | None = None,
        num_tokens: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over the edges of the mask. The contract is that of `torch.nn.MultiheadAttention.forward`.

        What the parent refuses is refused in its order and its words, with three exceptions. Shapes are those of the
        caller, where the parent shows (L, B, E) whatever the layout, and counts the keys that it appended. Nested
        tensors are told what to do instead. And where the parent has no words, because an operator inside it fails
        (another batch size, features or dtype), the argument is named, or the operator's words may be others.

        Args:
            query: (L, E) unbatched, (L, B, E), or (B, L, E) with ``batch_first``.
            key: (S, kdim) unbatched, (S, B, kdim), or (B, S, kdim).
            value: (S, vdim) unbatched, (S, B, vdim), or (B, S, vdim).
            key_padding_mask: (B, S), or (S,) unbatched; bool (**True = ignore the key**) or floating (added).
            need_weights: also return the dense attention weights, which takes O(L x S) memory.
            attn_mask: (L, S) or (B * H, L, S); bool (**True = do not attend**) or floating (added). A floating mask may
                have any precision; the parent raises for most that are not that of the layer.
            average_attn_weights: average the weights over the heads.
            is_causal: hint that ``attn_mask`` is causal. As in the parent, it needs ``attn_mask`` and stands
                in for it where there is neither ``key_padding_mask`` nor ``need_weights``: query i then keeps
                keys 0 to i, appended keys included.
            token_positions: (B, L) int64, or (L,) unbatched, for L tokens picked out of a longer sequence: where in
                it each stands, in the order in which they arrive. The mask applies at those places.
            num_tokens: length of the whole sequence, if the grid and the prefix of the layer do not tell it.

        Returns:
            The output in the layout of ``query``, and the weights after dropout, (B, L, S) or (B, H, L, S)
            and without B if unbatched, or None.

        Raises:
            AssertionError: a shape or the dtype of a mask does not fit.
            RuntimeError: the shape of ``attn_mask`` does not fit, ``is_causal`` comes without it, batch sizes, features
                or dtypes differ, or a query has no key and the configuration says ``on_empty_row: error``.
            ValueError: the mask is square and L differs from S.
        """
        self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        batched = query.dim() == 3
        batch_first = self.batch_first or not batched
        if not batched:
            query, key, value = _unsqueeze_alike(query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
            if token_positions is not None:
                check_positions(token_positions, (query.shape[1],))
                token_positions = token_positions.unsqueeze(0)
        q, k, v = self._project(query, key, value, batch_first)
        causal = is_causal and key_padding_mask is None and not need_weights
        _check_projected(q, k, key_padding_mask, None if causal else attn_mask)
        at_positions = self._edges_at(token_positions, num_tokens, self.num_heads, (q.shape[0], q.shape[2]))
        if self.backend is not None:
            context, weights = self._run(self.backend, q, k, v, key_padding_mask, attn_mask, need_weights)
            out = self._merge(context, batch_first)
            if weights is not None and average_attn_weights:
                weights = weights.mean(1)
            return (out, weights) if batched else (out.squeeze(0), None if weights is None else weights.squeeze(0))
        key_mask, bias = keep_mask_and_bias(q, k, key_padding_mask, None if causal else attn_mask)
        k, v, key_mask, bias, edges = self._append_keys(q, k, v, key_mask, bias, at_positions)
        check_qkv(q, k, v)
        if causal:
            bias = causal_bias(q, k)

        q, k, v = autocast(q, k, v)
        dropout_p = self.dropout if self.training else 0.0
        seed = draw_seed() if dropout_p > 0.0 else None
        bias = None if bias is None else bias_as(q.dtype, bias)
        if edges is None and self.layer_mask.by_content:
            check_square(self.layer_mask, q.shape[2], k.shape[2])
            embeddings = query if batch_first else query.transpose(0, 1)
            edges = edges_of(q, k, self.layer_mask, key_mask=key_mask, bias=bias, embeddings=embeddings)
        context, lse = attend(
            q,
            k,
            v,
            self.layer_mask,
            edges,
            key_mask=key_mask,
            bias=bias,
            dropout_p=dropout_p,
            seed=seed,
            needs_lse=need_weights,
        )
        out = self._merge(context, batch_first)
        weights = None
        if need_weights:
            scale = self.layer_mask.scale
            weights = weights_of(
                q,
                k,
                lse,
                self.layer_mask.source(q.shape[2]) if edges is None else edges,
                key_mask=key_mask,
                bias=bias,
                dropout_p=dropout_p,
                seed=seed,
                scale=self.head_dim**-0.5 if scale is None else scale,
                averaged=average_attn_weights,
            )
        if not batched:
            out, weights = out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out, weights

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        """The checks of the parent before it projects."""
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is None:
                continue
            check_beside(mask, name, query)
            if mask.dtype != torch.bool and not mask.is_floating_point():
                raise AssertionError(f"only bool and floating types of {name} are supported")
        if key_padding_mask is not None and attn_mask is not None and key_padding_mask.dtype != attn_mask.dtype:
            warnings.warn(
                "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead.",
                stacklevel=3,
            )
        if query.is_nested or key.is_nested or value.is_nested:
            raise AssertionError(
                "MultiheadAttention does not support NestedTensor outside of its fast path. "
                "The fast path was not hit because attention is sparse; pass padded tensors with "
                "key_padding_mask, and build nn.TransformerEncoder with enable_nested_tensor=False (or set "
                "use_nested_tensor = False on it)"
            )
        F._mha_shape_check(  # type: ignore[attr-defined]
            query, key, value, key_padding_mask, attn_mask, self.num_heads
        )
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
                "`generate_square_subsequent_mask` to create this mask."
            )
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(f"was expecting embedding dimension of {self.embed_dim}, but got {query.shape[-1]}")
        if self._qkv_same_embed_dim and key.shape != value.shape:
            raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}")
        if key.shape[:-1] != value.shape[:-1]:
            raise AssertionError(
                f"key's sequence and batch dims {key.shape[:-1]} do not match value's {value.shape[:-1]}"
            )
        if self._qkv_same_embed_dim:
            if key.shape[-1] != self.embed_dim:
                raise RuntimeError(f"key: expected embedding dimension {self.embed_dim}, got {key.shape[-1]}")
            return
        for name, tensor, size in (("key", key, self.kdim), ("value", value, self.vdim)):
            if tensor.shape[-1] != size:
                raise AssertionError(
                    f"expecting {name} weights shape of {(self.embed_dim, tensor.shape[-1])}, "
                    f"but got {torch.Size((self.embed_dim, size))}"
                )

    def _project(self, query: Tensor, key: Tensor, value: Tensor, batch_first: bool) -> tuple[Tensor, ...]:
        """q, k and v as (B, H, L or S, D) views of the projections, without copies."""

        def heads(projected: Tensor) -> Tensor:
            split = projected.view(*projected.shape[:2], self.num_heads, self.head_dim)
            return split.permute(0, 2, 1, 3) if batch_first else split.permute(1, 2, 0, 3)

        weight, bias = self.in_proj_weight, None
        if self.in_proj_bias is not None:
            # The parent takes a bias of another precision than the weights.
            bias = self.in_proj_bias.to((self.q_proj_weight if weight is None else weight).dtype)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        if weight is None:
            weights: tuple[Tensor, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return tuple(heads(x) for x in F.linear(query, weight, bias).chunk(3, dim=-1))
        elif key is value:
            q = F.linear(query, weight[: self.embed_dim], biases[0])
            rest = F.linear(key, weight[self.embed_dim :], None if bias is None else bias[self.embed_dim :])
            return heads(q), *(heads(x) for x in rest.chunk(2, dim=-1))
        else:
            weights = weight.chunk(3)
        inputs = (query, key, value)
        return tuple(heads(F.linear(x, w, b)) for x, w, b in zip(inputs, weights, biases, strict=True))

    def _merge(self, context: Tensor, batch_first: bool) -> Tensor:
        """The output projection of (B, H, L, Dv)."""
        merged = context.permute(0, 2, 1, 3) if batch_first else context.permute(2, 0, 1, 3)
        return F.linear(merged.flatten(2), self.out_proj.weight, self.out_proj.bias)

    def _run(
        self,
        backend: Backend,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        needs_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention without edges: context (B, H, L, Dv), and weights (B, H, L, S) or None."""
        if needs_weights and k.shape[2] > MANY_TOKENS:
            warn_of_dense_weights(k.shape[2])
        q, k, v = autocast(q, k, v)
        return backend.attend(
            q,
            k,
            v,
            key_mask=None if key_padding_mask is None else _keys_kept(key_padding_mask, backend),
            bias=attn_mask,
            dropout_p=self.dropout if self.training else 0.0,
            needs_weights=needs_weights,
        )

    def _append_keys(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        bias: Tensor | None,
        edges: EdgeSource | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, EdgeSource | None]:
        """The keys of add_bias_kv and add_zero_attn, which every query keeps, at the end."""
        batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
        extra = []
        if self.bias_k is not None and self.bias_v is not None:
            extra.append(tuple(b.to(k.dtype).view(1, self.num_heads, 1, -1) for b in (self.bias_k, self.bias_v)))
        if self.add_zero_attn:
            extra.append((k.new_zeros(1, self.num_heads, 1, self.head_dim),) * 2)
        if not extra:
            return k, v, key_mask, bias, edges
        if edges is not None:
            raise ValueError("token_positions: cannot be combined with add_bias_kv or add_zero_attn")
        new_k, new_v = ([x.expand(batch, -1, -1, -1) for x in parts] for parts in zip(*extra, strict=True))
        k, v = torch.cat([k, *new_k], dim=2), torch.cat([v, *new_v], dim=2)
        key_mask = None if key_mask is None else F.pad(key_mask, (0, len(extra)), value=True)
        bias = None if bias is None else F.pad(bias, (0, len(extra)))
        layer_mask = self.layer_mask
        if layer_mask.is_dense:
            return k, v, key_mask, bias, None
        check_square(layer_mask, queries, keys)
        ((_, row_ptr, col),) = layer_mask.source(queries).per_head(batch, self.num_heads, queries, keys, k.device)
        return k, v, key_mask, bias, append_visible_keys(row_ptr, col, keys, len(extra))

    def extra_repr(self) -> str:
        """Sizes and mask, with the density where the number of tokens is known."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, {self._mask_repr()}"


def check_layer(mha: nn.MultiheadAttention, layer_mask: LayerMask | Mask) -> None:
    """Raise, without changing anything, what keeps a layer from attending by a mask.

    Args:
        mha: the layer, dense or sparse.
        layer_mask: the mask, for its number of heads.

    Raises:
        ConfigError: the backend cannot be used there.
        ValueError: the sizes, the dropout or the appended keys of ``mha`` do not go with the mask.
    """
    check_sizes(layer_mask.config, mha.num_heads, mha.embed_dim)
    if mha.bias_k is not None or mha.add_zero_attn:
        if layer_mask.config is not None and not layer_mask.config.uses_edges:
            raise config_error(
                f"backend: `{layer_mask.name}` cannot be combined with add_bias_kv or add_zero_attn", key="backend"
            )
        if layer_mask.by_content:
            raise ValueError(f"mask: `{layer_mask.name}` cannot be combined with add_bias_kv or add_zero_attn")
        if layer_mask.masked_logits == "zero" and not layer_mask.is_dense:
            raise ValueError("masked_logits: `zero` cannot be combined with add_bias_kv or add_zero_attn")
    check_backend(layer_mask, mha.head_dim, mha.dropout, None)


def stay_off_fast_path(module: nn.Module, args: object) -> None:
    """A forward pre-hook that does nothing.

    In evaluation, `torch.nn.TransformerEncoderLayer` reads the weights of its attention and never calls it,
    which would be silently dense; a hook on the attention is what makes it call.
    """


def _layer_mask(
    num_heads: int,
    config: ConfigLike | Mask | None,
    layer: int,
    num_layers: int | None,
    grid: Sequence[int] | None,
    num_prefix_tokens: int | None,
    head_dim: int,
) -> LayerMask | Mask:
    if config is None:
        return dense_mask(num_heads)
    if isinstance(config, Mask):
        if config.num_heads != num_heads:
            raise ValueError(f"config: expected a mask of {num_heads} heads, got one of {config.num_heads}")
        return config
    sides = None if grid is None else tuple(grid)
    return LayerMask(load_config(config), num_heads, layer, num_layers, 0, sides, num_prefix_tokens, head_dim)


def _check_projected(q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> None:
    """The checks of the parent after it has projected; its own of the padding cannot be traced by `torch.compile`."""
    batch, num_heads, queries, _ = q.shape
    keys = k.shape[2]
    if attn_mask is not None:
        expected = (queries, keys) if attn_mask.dim() == 2 else (batch * num_heads, queries, keys)
        if attn_mask.shape != expected:
            raise RuntimeError(
                f"The shape of the {attn_mask.dim()}D attn_mask is {attn_mask.shape}, but should be {expected}."
            )
    if k.shape[0] != batch:
        raise RuntimeError(f"key: expected batch size {batch} like query, got {k.shape[0]}")
    if key_padding_mask is not None:
        for dim, size in enumerate((batch, keys)):
            if key_padding_mask.shape[dim] != size:
                raise AssertionError(
                    f"Expected key_padded_mask.shape[{dim}] to be {size}, but got {key_padding_mask.shape[dim]}"
                )


def keep_mask_and_bias(
    q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The parent's inverted masks as a (B, S) keep-mask and a (B or 1, H or 1, L or 1, S) bias."""
    key_mask = bias = None
    if attn_mask is not None:
        bias = attn_mask
        if attn_mask.dtype == torch.bool:
            bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(attn_mask, -torch.inf)
        bias = bias.view(*((1, 1) if attn_mask.dim() == 2 else q.shape[:2]), q.shape[2], k.shape[2])
    if key_padding_mask is not None:
        if key_padding_mask.dtype == torch.bool:
            key_mask = ~key_padding_mask
        else:
            of_keys = key_padding_mask[:, None, None, :]
            bias = of_keys if bias is None else bias + of_keys
    return key_mask, bias


def _keys_kept(key_padding_mask: Tensor, backend: Backend) -> Tensor:
    """The parent's padding mask as a keep-mask; torch's own layers turn a bool one into 0 and -inf."""
    if key_padding_mask.dtype == torch.bool:
        return ~key_padding_mask
    either = ((key_padding_mask == 0) | (key_padding_mask == -torch.inf)).all()
    message = f"key_padding_mask: the backend `{backend.name}` has no scores: expected bool, or 0 and -inf only"
    if torch.compiler.is_compiling():
        torch._assert_async(either, message)
    elif not either:
        raise ValueError(message)
    return key_padding_mask == 0


def _unsqueeze_alike(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Add a batch dimension and keep which inputs are the same tensor."""
    q = query.unsqueeze(0)
    k = q if key is query else key.unsqueeze(0)
    return q, k, k if value is key else value.unsqueeze(0)
