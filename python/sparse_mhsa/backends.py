"""Backends: what turns q, k and v into the output of attention.

Softmax over the kept edges of a mask (``vit``) is the default and lives in `sparse_mhsa.functional`;
`sparse_mhsa.flex` computes the same by other means. The backends here bring attention of their own, linear in the
number of tokens, and take no mask: `Linformer`, `Efficient`, `EfficientLocal`, and what users add with
`register_backend`.

A backend of your own is a function or a `Backend`. Its keywords are the ``backend_kwargs`` of a configuration:

    @sm.register_backend("mean")
    def mean(q, k, v, *, key_mask=None, weight: float = 1.0):
        '''Every query gets the mean of all values.'''
        keep = 1.0 if key_mask is None else key_mask[:, None, :, None].to(v.dtype)
        return weight * ((v * keep).mean(-2, keepdim=True)).expand_as(q)

    sm.SparseMHSA(64, 4, config="{backend: mean, backend_kwargs: {weight: 0.5}}")
"""

import inspect
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _core, flex, functional
from .config import config_error
from .layer_mask import LayerMask
from .mask import Mask

Attention: TypeAlias = Callable[..., Tensor]
"""A function of q, k, v (B, H, N, D) and keywords that returns (B, H, N, Dv)."""

OPTIONS = ("key_mask", "dropout_p", "scale")
"""Keywords that a backend takes from the layer and not from the configuration, each only if it names it."""


@dataclass(frozen=True)
class Place:
    """Where a backend is used."""

    num_heads: int
    head_dim: int
    num_prefix_tokens: int = 1
    """Leading tokens off the patch grid: the configuration's number, else the model's, else one CLS token."""
    scale: float | None = None
    """The ``scale`` of the configuration."""
    layer: int = 0
    num_layers: int | None = None

    @classmethod
    def of(cls, layer_mask: LayerMask, head_dim: int) -> "Place":
        """The place of a layer."""
        prefix = layer_mask.config.num_prefix_tokens
        prefix = layer_mask.num_prefix_tokens if prefix is None else prefix
        return cls(
            layer_mask.num_heads,
            head_dim,
            1 if prefix is None else prefix,
            layer_mask.scale,
            layer_mask.layer,
            layer_mask.num_layers,
        )


class Backend(nn.Module):
    """Attention without edges.

    A subclass takes ``place`` and its own keywords in the constructor, and q, k, v of shape (B, H, N, D) in
    `forward`, which returns (B, H, N, Dv). Parameters registered in it are trained, saved and moved with the
    layer. `forward` may name the keywords ``key_mask`` ((B, N) bool, True = keep, or None), ``dropout_p``
    (0 outside training) and ``scale`` (float or None); what it does not name cannot be honoured, and asking
    the layer for it is an error.

    Args:
        place: where the backend is used.
    """

    linear_in_values: ClassVar[bool] = False
    """The output is a matrix of weights times v: ``need_weights`` can then be answered."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place
        self.name = ""
        self.kwargs: Mapping[str, object] = {}

    def options(self) -> frozenset[str]:
        """Which of `OPTIONS` are honoured."""
        return frozenset(inspect.signature(self.forward).parameters) & frozenset(OPTIONS)

    def check_num_tokens(self, num_tokens: int) -> None:
        """Raise a ValueError if ``num_tokens`` cannot be attended to."""

    def macs(self, num_tokens: int) -> int | None:
        """Multiply-accumulates of all heads for one sample of ``num_tokens`` tokens, or None if unknown."""
        return None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
        dropout_p: float = 0.0,
        needs_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Run `forward` with the options it honours.

        Args:
            q: (B, H, N, D).
            k: (B, H, N, D).
            v: (B, H, N, Dv).
            key_mask: (B, N) bool, True = keep.
            bias: must be None; attention without scores has nothing to add it to.
            dropout_p: probability that a weight is dropped.
            needs_weights: also return the (B, H, N, N) matrix by which the values were multiplied.

        Returns:
            out (B, H, N, Dv), and the weights or None.

        Raises:
            ValueError: the backend cannot honour an option, or there are too many tokens.
        """
        if q.shape[2] != k.shape[2]:
            raise ValueError(
                f"key: the backend `{self.name}` relates the tokens of one sequence, but query has {q.shape[2]} "
                f"tokens and key has {k.shape[2]}"
            )
        if bias is not None:
            raise ValueError(f"attn_mask: the backend `{self.name}` has no scores and cannot apply it")
        given = {"key_mask": key_mask, "dropout_p": dropout_p or None, "scale": self.place.scale}
        options, honoured = {}, self.options()
        for option, value in given.items():
            if option in honoured:
                options[option] = 0.0 if option == "dropout_p" and value is None else value
            elif value is not None:
                raise ValueError(f"{_ASKED_AS[option]}: the backend `{self.name}` cannot honour it")
        self.check_num_tokens(q.shape[2])
        if not needs_weights:
            return self._checked(self(q, k, v, **options), v), None
        if not self.linear_in_values:
            raise ValueError(f"need_weights: the backend `{self.name}` has no attention weights; pass False")
        # The weights are what the values 1, 0, 0, ... to 0, ..., 0, 1 are taken to; in one call, so that they are
        # the dropped-out weights of this very output.
        ones = torch.eye(v.shape[2], dtype=v.dtype, device=v.device).expand(*v.shape[:2], -1, -1)
        values = torch.cat([v, ones], dim=-1)
        both = self._checked(self(q, k, values, **options), values)
        return both[..., : v.shape[3]], both[..., v.shape[3] :]

    def _checked(self, out: Tensor, v: Tensor) -> Tensor:
        """What the backend returned, if it has the shape and the dtype of ``v``."""
        if not isinstance(out, Tensor):
            raise TypeError(f"backend `{self.name}`: expected a torch.Tensor, got {type(out).__name__}")
        if out.shape != v.shape:
            raise ValueError(
                f"backend `{self.name}`: expected (B, H, N, Dv) = {tuple(v.shape)}, got {tuple(out.shape)}"
            )
        if out.dtype != v.dtype and not torch.is_autocast_enabled(v.device.type):
            raise TypeError(f"backend `{self.name}`: expected {v.dtype} like the values, got {out.dtype}")
        return out.to(v.dtype)

    def take_parameters(self, other: "Backend") -> None:
        """Share the parameters and buffers of ``other`` if it is the same backend with tensors of the same shapes."""

        def shapes(backend: Backend) -> dict[str, torch.Size]:
            return {name: tensor.shape for name, tensor in backend.state_dict().items()}

        if (self.name, self.kwargs) == (other.name, other.kwargs) and shapes(self) == shapes(other):
            for mine, theirs in zip(self.modules(), other.modules(), strict=True):
                mine._parameters, mine._buffers = theirs._parameters, theirs._buffers

    def extra_repr(self) -> str:
        """Name and parameters."""
        return ", ".join([self.name, *(f"{key}={value}" for key, value in self.kwargs.items())])


_ASKED_AS = {"key_mask": "key_padding_mask", "dropout_p": "dropout", "scale": "scale"}
"""What a user calls the options."""


class FunctionBackend(Backend):
    """A registered function as a `Backend`.

    Args:
        place: where it is used.
        function: name under which the function is registered.
        kwargs: its own keywords.
    """

    def __init__(self, place: Place, function: str, kwargs: Mapping[str, object]) -> None:
        super().__init__(place)
        self._function = function
        self._kwargs = dict(kwargs)

    def options(self) -> frozenset[str]:
        """Which of `OPTIONS` the function names."""
        return frozenset(inspect.signature(_implementation(self._function)).parameters) & frozenset(OPTIONS)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        """Call the function."""
        function = typing.cast(Attention, _implementation(self._function))
        return function(q, k, v, **options, **self._kwargs)


class Efficient(Backend):
    """Efficient Attention: ``softmax_d(q) (softmax_n(k)^T v)``.

    Queries are normalised over their channels and keys over the tokens, so that the implied weights are
    positive, each row sums to 1, and time and memory are O(N D^2). ``scale`` multiplies q; the paper has none.

    Source: Shen et al., 2018 (arXiv 1812.01243).
    """

    linear_in_values = True

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Attend; q, k (B, H, N, D), v (B, H, N, Dv)."""
        keys, v = _over_tokens(k, v, None if key_mask is None else key_mask[:, None, :, None])
        return _over_channels(q, scale) @ (keys.transpose(-2, -1) @ v)

    def macs(self, num_tokens: int) -> int:
        """Both products, N D^2 each."""
        return 2 * self.place.num_heads * num_tokens * self.place.head_dim**2


class EfficientLocal(Backend):
    """Efficient Attention inside blocks of consecutive patches.

    Prefix tokens, unless ``keep_cls_global`` is false, are no part of the blocks: their rows are those of
    `Efficient` over all tokens, and patches do not see them. With ``normalize: reference`` the keys of a
    block are normalised over the whole sequence, as published, and the weights of a row sum to less than 1;
    with ``blockwise`` they are normalised over their block and sum to 1.

    Source: the vision benchmark's local baseline, after Efficient Attention (arXiv 1812.01243); ``blockwise`` is ours.

    Args:
        place: where it is used.
        block_size: patches in a block; the last may be shorter.
        keep_cls_global: prefix tokens attend to everything.
        normalize: ``reference`` or ``blockwise``.
    """

    linear_in_values = True

    def __init__(
        self, place: Place, *, block_size: int = 4, keep_cls_global: bool = True, normalize: str = "reference"
    ) -> None:
        super().__init__(place)
        self.block_size = block_size
        self.blockwise = normalize == "blockwise"
        self.num_global = place.num_prefix_tokens if keep_cls_global else 0

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Attend; q, k (B, H, N, D), v (B, H, N, Dv)."""
        num_global, tokens = min(self.num_global, q.shape[2]), q.shape[2]
        queries = _over_channels(q, scale)
        keep = None if key_mask is None else key_mask[:, None, :, None]
        patches_keep = None if keep is None else keep[:, :, num_global:]
        out = self._blocks(queries[:, :, num_global:], k[:, :, num_global:], v[:, :, num_global:], patches_keep)
        if num_global == 0 or tokens == 0:
            return out
        keys, values = _over_tokens(k, v, keep)
        rows = queries[:, :, :num_global] @ (keys.transpose(-2, -1) @ values)
        return torch.cat([rows, out], dim=2)

    def _blocks(self, queries: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        patches = k.shape[2]
        size = min(self.block_size, max(1, patches))
        fill = -patches % size

        def split(x: Tensor) -> Tensor:
            padded = F.pad(x, (0, 0, 0, fill)) if fill else x
            return padded.reshape(*x.shape[:2], -1, size, x.shape[3])

        if patches == 0:
            return queries @ (k.transpose(-2, -1) @ v)
        if self.blockwise:
            if keep is None and fill:
                keep = k.new_ones((1, 1, patches, 1), dtype=torch.bool)
            keys, v = _over_tokens(split(k), split(v), None if keep is None else split(keep))
        else:
            keys, v = (split(x) for x in _over_tokens(k, v, keep))
        queries, keys = split(queries), keys.transpose(-2, -1)
        # Both orders give the same; the cheaper one has the smaller matrix in the middle.
        out = queries @ keys @ v if self._by_pairs(size) else queries @ (keys @ v)
        return out.flatten(2, 3)[:, :, :patches]

    def _by_pairs(self, size: int) -> bool:
        return size < self.place.head_dim

    def macs(self, num_tokens: int) -> int:
        """Both products of every block, and the rows of the prefix."""
        width, num_global = self.place.head_dim, min(self.num_global, num_tokens)
        patches = num_tokens - num_global
        size = min(self.block_size, max(1, patches))
        middle = size if self._by_pairs(size) else width
        of_prefix = (num_tokens + num_global) * width**2 if num_global else 0
        return self.place.num_heads * (2 * patches * middle * width + of_prefix)


class Linformer(Backend):
    """Linformer: ``softmax(scale q (E_k^T k)^T) (E_v^T v)``, attention to r projected tokens.

    The projections ``E_k`` and, unless shared, ``E_v`` of shape (max_seq_len - P, r), or (H, max_seq_len - P, r)
    without ``shared_heads``, are parameters of the layer; P is the number of prefix tokens. A sequence of n
    tokens uses the first n rows. Prefix tokens are kept beside the r projected ones unless ``separate_cls`` is
    false; they are then projected too, and N tokens need ``max_seq_len`` of at least N + P. A key that is
    masked is left out of the projection, so that a padded sequence gives what the shorter one gives.

    Source: Wang et al., 2020 (arXiv 2006.04768).

    Args:
        place: where it is used.
        projector: ``max_seq_len``, ``r``, ``num_heads``, ``shared_heads``, ``share_kv``, ``separate_cls``.

    Raises:
        ConfigError: ``max_seq_len`` leaves no patch, or ``num_heads`` is not that of the layer.
    """

    linear_in_values = True

    def __init__(self, place: Place, *, projector: Mapping[str, int | None]) -> None:
        super().__init__(place)
        num_heads, max_seq_len, r = projector.get("num_heads"), projector["max_seq_len"], projector["r"]
        assert max_seq_len is not None
        assert r is not None
        if num_heads not in (None, place.num_heads):
            raise config_error(
                f"backend_kwargs.projector.num_heads: expected {place.num_heads}, the heads of the layer, "
                f"or null; got {num_heads}",
                key="backend_kwargs.projector.num_heads",
            )
        rows = max_seq_len - place.num_prefix_tokens
        if rows < 1:
            raise config_error(
                f"backend_kwargs.projector.max_seq_len: expected more than the {place.num_prefix_tokens} prefix "
                f"tokens, got {max_seq_len}",
                key="backend_kwargs.projector.max_seq_len",
            )
        self.max_seq_len = max_seq_len
        self.separate_cls = bool(projector.get("separate_cls", True))
        shape = (rows, r) if projector.get("shared_heads", True) else (place.num_heads, rows, r)
        self.E_k = nn.Parameter(nn.init.xavier_uniform_(torch.empty(shape)))
        if projector.get("share_kv", True):
            self.register_parameter("E_v", None)
        else:
            self.E_v = nn.Parameter(nn.init.xavier_uniform_(torch.empty(shape)))

    def _num_separate(self, num_tokens: int) -> int:
        return min(self.place.num_prefix_tokens, num_tokens) if self.separate_cls else 0

    def check_num_tokens(self, num_tokens: int) -> None:
        """At most as many as the projections have rows for."""
        surplus = num_tokens - self._num_separate(num_tokens) - self.E_k.shape[-2]
        if surplus > 0:
            raise ValueError(
                f"query: {num_tokens} tokens need backend_kwargs.projector.max_seq_len of at least "
                f"{self.max_seq_len + surplus}, got {self.max_seq_len}"
            )

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
    ) -> Tensor:
        """Attend; q, k (B, H, N, D), v (B, H, N, Dv)."""
        separate = self._num_separate(k.shape[2])
        if key_mask is not None:
            drop = ~key_mask[:, None, :, None]
            k, v = k.masked_fill(drop, 0.0), v.masked_fill(drop, 0.0)
        short_k = self._projected(self.E_k, k, separate)
        short_v = self._projected(self.E_k if self.E_v is None else self.E_v, v, separate)
        scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ short_k.transpose(-2, -1)
        if key_mask is not None and separate:
            dropped = F.pad(~key_mask[:, :separate], (0, self.E_k.shape[-1]), value=False)
            scores = scores.masked_fill(dropped[:, None, None, :], -math.inf)
        weights = F.dropout(torch.softmax(scores, dim=-1), dropout_p, training=dropout_p > 0.0)
        return weights.to(short_v.dtype) @ short_v

    @staticmethod
    def _projected(projection: Tensor, x: Tensor, separate: int) -> Tensor:
        """The separate tokens of ``x`` and then its r projected ones."""
        rows = projection[..., : x.shape[2] - separate, :].to(x.dtype)
        return torch.cat([x[:, :, :separate], rows.transpose(-2, -1) @ x[:, :, separate:]], dim=2)

    def macs(self, num_tokens: int) -> int:
        """Two projections, and attention to r projected and the separate tokens."""
        separate, r = self._num_separate(num_tokens), self.E_k.shape[-1]
        projected = (num_tokens - separate) * r
        attended = num_tokens * (r + separate)
        return 2 * self.place.num_heads * self.place.head_dim * (projected + attended)


def _over_channels(q: Tensor, scale: float | None) -> Tensor:
    return torch.softmax(q if scale is None else q * scale, dim=-1).to(q.dtype)


def _over_tokens(k: Tensor, v: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys normalised over the tokens kept, and values that are zero elsewhere; all zero where none is kept."""
    if keep is None:
        return torch.softmax(k, dim=-2).to(k.dtype), v
    k, v = k.masked_fill(~keep, 0.0), v.masked_fill(~keep, 0.0)
    # Without any key nothing is set to -inf: the softmax stays finite, and is then zeroed all the same.
    scores = k.masked_fill(~keep & keep.any(dim=-2, keepdim=True), -math.inf)
    return torch.softmax(scores, dim=-2).masked_fill(~keep, 0.0).to(k.dtype), v


_IMPLEMENTATIONS: dict[str, type[Backend] | Attention] = {
    "efficient": Efficient,
    "efficient_local": EfficientLocal,
    "linformer": Linformer,
}

_Implementation = TypeVar("_Implementation", bound="type[Backend] | Attention")


def register_backend(name: str, *, replace: bool = False) -> Callable[[_Implementation], _Implementation]:
    """Decorator: make a function or a `Backend` usable as ``backend: name`` in every configuration.

    The keywords of the function after q, k, v, or of the class's constructor after ``place``, are the
    ``backend_kwargs``: their names, which of them are required, and the types ``int``, ``float``, ``bool``,
    ``str``, ``list``, ``dict``, ``None`` and unions of these are checked when a configuration is read. The
    keywords ``key_mask``, ``dropout_p`` and ``scale`` come from the layer instead; see `Backend`.

    Args:
        name: lower-case letters, digits and underscores.
        replace: allow a name that is registered already.

    Returns:
        A decorator that returns what it decorates.

    Raises:
        ValueError: the name is taken or malformed.
        TypeError: what is decorated does not fulfil the contract.
    """

    def decorate(implementation: _Implementation) -> _Implementation:
        if isinstance(implementation, type):
            if not issubclass(implementation, Backend):
                raise TypeError(f"backend: expected a function or a subclass of Backend, got {implementation}")
            parameters = _parameters(name, implementation.__init__, ["self", "place"])
        else:
            parameters = _parameters(name, implementation, ["q", "k", "v"])
        about = (inspect.getdoc(implementation) or "").partition("\n")[0]
        _core.register_backend(name, about, [json.dumps(parameter) for parameter in parameters], replace)
        _IMPLEMENTATIONS[name] = implementation
        return implementation

    return decorate


def _parameters(name: str, function: Callable[..., object], first: Sequence[str]) -> list[dict[str, object]]:
    """The keywords of ``function`` after its first arguments, as the configuration loader takes them."""
    signature = list(inspect.signature(function).parameters.values())
    if len(signature) < len(first):
        raise TypeError(f"backend `{name}`: expected to be called with {', '.join(first)}")
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError):  # annotations that cannot be evaluated are no promise
        hints = {}
    parameters: list[dict[str, object]] = []
    for parameter in signature[len(first) :]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise TypeError(f"backend `{name}`: expected named keywords, got `{parameter}`")
        if parameter.name in OPTIONS:
            continue
        entry: dict[str, object] = {"name": parameter.name, "types": _json_types(hints.get(parameter.name))}
        if parameter.default is not parameter.empty:
            try:
                entry["default"] = json.loads(json.dumps(parameter.default, allow_nan=False))
            except (TypeError, ValueError) as error:
                raise TypeError(f"backend `{name}`: the default of `{parameter.name}` is no YAML: {error}") from error
        parameters.append(entry)
    return parameters


_JSON_TYPES = {
    int: "integer",
    float: "number",
    bool: "boolean",
    str: "string",
    list: "array",
    tuple: "array",
    Sequence: "array",
    dict: "object",
    Mapping: "object",
    type(None): "null",
}


def _json_types(hint: object) -> list[str]:
    """JSON types of an annotation; none for one that is not understood, which allows everything."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [_json_types(member) for member in typing.get_args(hint)]
        return [kind for member in members for kind in member] if all(members) else []
    kind = _JSON_TYPES.get(typing.cast(type, typing.get_origin(hint) or hint))
    return [] if kind is None else [kind]


def _implementation(name: str) -> type[Backend] | Attention:
    try:
        return _IMPLEMENTATIONS[name]
    except KeyError:
        raise config_error(f"backend: `{name}` is not registered in this process", key="backend") from None


def documentation(name: str) -> str:
    """The docstring of what computes the backend ``name``, without its sections of arguments and errors."""
    if name == flex.NAME:
        of: object = flex
    else:
        of = _IMPLEMENTATIONS.get(name, functional.sparse_attention)
    return re.split(r"^(?:Args|Raises|Returns):$", inspect.getdoc(of) or "", maxsplit=1, flags=re.MULTILINE)[0].strip()


def has_attention_of_its_own(name: str) -> bool:
    """The backend is none of those that take softmax over the edges of a mask."""
    return name in _IMPLEMENTATIONS


def check_backend(layer_mask: LayerMask | Mask, head_dim: int, dropout: float, num_tokens: int | None) -> None:
    """Raise, without allocating anything, what `build_backend` or the first forward pass would raise."""
    backend = build_backend(layer_mask, head_dim, dropout, torch.empty(0, device="meta"))
    if backend is not None and num_tokens is not None:
        backend.check_num_tokens(num_tokens)


def build_backend(layer_mask: LayerMask | Mask, head_dim: int, dropout: float, like: Tensor) -> Backend | None:
    """The backend of a layer.

    Args:
        layer_mask: configuration and place of the layer.
        head_dim: D.
        dropout: probability that the layer drops attention weights in training.
        like: a tensor of the device and dtype that parameters shall have.

    Returns:
        The backend; None for softmax over edges.

    Raises:
        ConfigError: the backend cannot be used there.
        ValueError: it cannot honour the dropout or the scale, or ``masked_logits: zero`` meets dropout.
    """
    if layer_mask.backend == flex.NAME and dropout > 0.0:
        raise ValueError(f"dropout: expected 0, because the backend `{flex.NAME}` drops no weights; got {dropout}")
    if layer_mask.masked_logits == "zero" and dropout > 0.0:
        raise ValueError(
            f"dropout: expected 0 with `masked_logits: zero`, which has no meaning with dropout; got {dropout}"
        )
    if isinstance(layer_mask, Mask) or layer_mask.config.uses_edges:
        return None
    config = layer_mask.config
    place = Place.of(layer_mask, head_dim)
    kwargs = json.loads(config.to_json())["backend_kwargs"]
    implementation = _implementation(config.backend)
    with torch.device(like.device):
        backend: Backend
        if isinstance(implementation, type):
            backend = implementation(place, **kwargs)
        else:
            backend = FunctionBackend(place, config.backend, kwargs)
    backend.name, backend.kwargs = config.backend, kwargs
    honoured = backend.options()
    if dropout > 0.0 and "dropout_p" not in honoured:
        raise ValueError(f"dropout: expected 0, because the backend `{backend.name}` drops no weights; got {dropout}")
    if place.scale is not None and "scale" not in honoured:
        raise config_error(f"scale: the backend `{backend.name}` has none; got {place.scale}", key="scale")
    if like.is_floating_point():
        backend.to(like.dtype)
    return backend
