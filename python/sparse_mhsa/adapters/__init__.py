"""Swapping the attention of a whole model: `sparsify`, its inverse `densify`, and one adapter per framework.

A swap happens in place: a module stays the same object with the same parameters, submodules and hooks, and
only its class changes. Optimisers, tied weights, wrappers and state dicts do not notice.
"""

import json
import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .._core import AttentionConfig
from ..backends import check_backend
from ..config import ConfigLike, config_error, load_config
from ..layer_mask import LayerMask
from . import timm, torch_nn
from .registry import Adapter, Site, adapters, find_attention, register_adapter, unsupported
from .report import Report, Row
from .timm import SparseTimmAttention
from .verify import sparse_calls

__all__ = [
    "Adapter",
    "Report",
    "Row",
    "Site",
    "SparseTimmAttention",
    "adapters",
    "densify",
    "find_attention",
    "register_adapter",
    "select_sites",
    "sparsify",
    "timm",
    "torch_nn",
]


def sparsify(
    model: nn.Module,
    config: ConfigLike,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    overrides: Mapping[str, Mapping[str, object]] | None = None,
    strict: bool = True,
    verify: bool = False,
    sample: Tensor | Sequence[object] | Mapping[str, object] | None = None,
) -> Report:
    """Make the self-attention of a model sparse, in place.

    Layers are numbered in module order within their stack (``blocks.0.attn``, ``blocks.1.attn``, ...); the
    grid and the number of prefix tokens are read from the model where it tells them. Cross-attention,
    temporal attention and decoders stay dense unless ``include`` names them. Doing it again gives swapped
    layers another configuration.

    Args:
        model: the model; it is changed only if every selected layer can take the configuration.
        config: whatever `load_config` takes; its ``layers`` overrides are matched against module names.
        include: regular expressions; only layers with a matching name are swapped.
        exclude: regular expressions; layers with a matching name are left alone.
        overrides: regular expression on module names -> keys of the configuration to replace there.
        strict: raise if nothing was swapped, an override matches no layer, or the configuration cannot be
            applied to a selected layer; otherwise leave such layers dense and say so in the report.
        verify: run the model once and raise if a layer did not call the sparse operators.
        sample: input for ``verify``: a tensor, positional or keyword arguments. Default is made from the
            model where it tells its input size.

    Returns:
        A table of all attention layers: swapped, or skipped and why.

    Raises:
        ConfigError: the configuration cannot be honoured, or not by a layer it selects.
        ValueError: nothing was swapped, ``include`` or ``exclude`` is no regular expression, an override matches
            no layer, or ``verify`` needs a ``sample``.
        RuntimeError: ``verify`` found a layer that stayed dense.
    """
    parsed = _with_overrides(load_config(config), overrides)
    included, excluded = _patterns("include", include), _patterns("exclude", exclude)
    sites = find_attention(model)
    if strict:
        _refuse_idle_patterns(overrides, parsed, sites)
    plan: list[tuple[Site, LayerMask]] = []
    rows = []
    for site in sites:
        reason = _why_not(site, included, excluded)
        if reason is None:
            try:
                layer_mask, row = _plan(site, parsed)
            except ValueError as error:
                if strict:
                    raise config_error(f"{site.name or '(root)'}: {error}") from error
                reason = f"not applicable: {error}"
            else:
                plan.append((site, layer_mask))
                rows.append(row)
        if reason is not None:
            rows.append(Row(site.name, site.adapter.name, "skipped", reason, layer=site.layer))
    rows += [
        Row(name, "", "skipped", f"no adapter for {type(m).__qualname__}") for name, m in unsupported(model, sites)
    ]
    report = Report(tuple(rows))
    if strict and not plan:
        raise ValueError(f"model: nothing to swap in {type(model).__name__}\n{report}")
    for site, layer_mask in plan:
        site.adapter.sparsify(site.module, layer_mask)
    for adapter in adapters():
        adapter.finish(model)
    if verify:
        _verify(model, plan, sample)
    return report


def select_sites(
    model: nn.Module, include: str | Sequence[str] | None = None, exclude: str | Sequence[str] | None = None
) -> list[Site]:
    """The self-attention layers that `sparsify` would swap, in module order.

    Args:
        model: the model.
        include: as in `sparsify`.
        exclude: as in `sparsify`.

    Raises:
        ValueError: ``include`` or ``exclude`` is no regular expression.
    """
    included, excluded = _patterns("include", include), _patterns("exclude", exclude)
    return [site for site in find_attention(model) if _why_not(site, included, excluded) is None]


def densify(model: nn.Module) -> None:
    """Undo `sparsify`: every swapped layer becomes the class it was, with the same parameters.

    Args:
        model: the model, changed in place; layers that are dense already are left alone.
    """
    for site in find_attention(model):
        if site.layer_mask is not None:
            site.adapter.densify(site.module)
    for adapter in adapters():
        adapter.finish(model)


def _patterns(name: str, patterns: str | Sequence[str] | None) -> list[re.Pattern[str]] | None:
    if patterns is None:
        return None
    return [_pattern(name, pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns)]


def _pattern(name: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}: `{pattern}` is not a regular expression: {error}") from error


def _why_not(
    site: Site, include: Sequence[re.Pattern[str]] | None, exclude: Sequence[re.Pattern[str]] | None
) -> str | None:
    """Why a layer is not selected, or None if it is."""
    if exclude is not None and any(pattern.search(site.name) for pattern in exclude):
        return "excluded"
    if include is not None:
        return None if any(pattern.search(site.name) for pattern in include) else "not included"
    return site.dense_by_design


def _plan(site: Site, config: AttentionConfig) -> tuple[LayerMask, Row]:
    """The mask of a layer, built once where its number of tokens is known, to see that it can be."""
    num_heads, head_dim = site.adapter.heads(site.module)
    layer_mask = LayerMask(
        config.for_layer(site.name),
        num_heads,
        site.layer,
        site.num_layers,
        grid=site.grid,
        num_prefix_tokens=site.num_prefix_tokens,
        head_dim=head_dim,
    )
    check_backend(layer_mask, head_dim, site.adapter.dropout(site.module), site.num_tokens)
    density = nnz = None
    if site.num_tokens is not None and layer_mask.config.uses_edges and not layer_mask.by_content:
        mask = layer_mask.at(site.num_tokens)
        density, nnz = mask.density, mask.nnz
    row = Row(
        site.name,
        site.adapter.name,
        "swapped",
        mask=layer_mask.name,
        layer=site.layer,
        num_tokens=site.num_tokens,
        density=density,
        nnz=nnz,
    )
    return layer_mask, row


def _with_overrides(config: AttentionConfig, overrides: Mapping[str, Mapping[str, object]] | None) -> AttentionConfig:
    if not overrides:
        return config
    document = json.loads(config.to_json())
    document["layers"] = {
        **document.get("layers", {}),
        **{key: dict(value) for key, value in overrides.items()},
    }
    return load_config(document)


def _refuse_idle_patterns(
    overrides: Mapping[str, Mapping[str, object]] | None, config: AttentionConfig, sites: Sequence[Site]
) -> None:
    names = [site.name for site in sites]
    for pattern in config.unmatched_layers(names):
        key = "overrides" if pattern in (overrides or ()) else "layers"
        raise config_error(f"{key}: `{pattern}` matches none of the attention layers {names}", key=key)


def _verify(
    model: nn.Module,
    plan: Sequence[tuple[Site, LayerMask]],
    sample: Tensor | Sequence[object] | Mapping[str, object] | None,
) -> None:
    if sample is None:
        sample = next((x for x in (adapter.sample(model) for adapter in adapters()) if x is not None), None)
    if sample is None:
        raise ValueError(
            f"sample: expected an input for {type(model).__name__}, which does not tell its size; got None"
        )
    watched = {site.name: site.module for site, layer_mask in plan if layer_mask.is_sparse}
    idle = [name for name, calls in sparse_calls(model, watched, sample).items() if calls == 0]
    if idle:
        raise RuntimeError(f"verify: stayed dense, no sparse operator was called in: {', '.join(idle)}")
