"""Swapping the attention of a whole model: `sparsify`, its inverse `densify`, and one adapter per framework.

A swap happens in place: a module stays the same object with the same parameters, submodules and hooks, and
only its class changes. Optimisers, tied weights, wrappers and state dicts do not notice.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from .._core import AttentionConfig, ConfigError
from ..backends import check_backend
from ..config import ConfigLike, config_error, load_config
from ..layer import SparseLayer
from ..layer_mask import LayerMask, check_sizes
from . import timesformer, timm, torch_nn, transformers
from .dropped_tokens import follow_dropped_tokens
from .mixing import Mixed
from .registry import Adapter, Site, adapters, find_attention, register_adapter, unsupported, why_unsupported
from .report import Report, Row
from .selection import Selection, matches_none
from .timm import SparseTimmAttention
from .verify import Sample, sparse_calls

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
    "sparsify",
    "timesformer",
    "timm",
    "torch_nn",
    "transformers",
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
    sample: Sample | None = None,
) -> Report:
    """Make the self-attention of a model sparse, in place.

    Layers are numbered within their stack (``blocks.0.attn``, ``blocks.1.attn``, ...) in the order in which the
    model calls them: seen in a run on ``sample``, or without one taken from the order in which the modules are
    registered, which is the same in torch's, torchvision's and timm's models. The
    grid and the number of prefix tokens are read from the model where it tells them. Cross-attention,
    temporal attention and decoders stay dense unless ``include`` names them. Temporal attention has no prefix
    tokens, whatever the configuration says of the model; an override may give it some. Doing it again gives
    swapped layers another configuration.

    Args:
        model: the model; it is changed only if every selected layer can take the configuration.
        config: whatever `load_config` takes; its ``layers`` overrides are matched against module names.
        include: regular expressions; only layers with a matching name are swapped, decoders and the like too.
        exclude: regular expressions; layers with a matching name are left alone.
        overrides: regular expression on module names -> keys of the configuration to replace there.
        strict: raise if nothing was swapped, ``include`` or an override matches no layer, or the configuration
            cannot be applied to a selected layer; otherwise leave such layers dense and say so in the report.
        verify: run the swapped model once and raise if a layer called neither the sparse operators nor its backend.
        sample: an input of the model, a tensor, positional or keyword arguments: to see the order of the layers,
            and for ``verify``, whose default is made from the model where it tells its input size.

    Returns:
        A table of all attention layers: swapped, or skipped and why; a skipped one keeps what it had.

    Raises:
        ConfigError: the configuration cannot be honoured, or not by a layer it selects.
        ValueError: nothing was swapped, ``include`` or ``exclude`` is no regular expression, an override matches
            no layer, or ``verify`` needs a ``sample``.
        TypeError: ``model``, ``include``, ``exclude``, ``overrides``, ``verify`` or ``sample`` is of the wrong type.
        RuntimeError: ``verify`` found a layer that stayed dense.

    Warns:
        UserWarning: a mask leaves queries without a key, such as Fibottention's among a few frames without a class
            token; attention gives them 0.
    """
    _check_model(model)
    parsed = _with_overrides(load_config(config), overrides)
    selection = Selection.of(include, exclude)
    sample = _checked_sample(model, verify, sample)
    sites = find_attention(model, sample)
    if strict and sites:
        selection.refuse_idle([site.name for site in sites])
        _refuse_idle_overrides(overrides, parsed, sites)
    plan: list[tuple[Site, LayerMask]] = []
    rows = []
    for site in sites:
        reason = selection.why_not(site)
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
            rows.append(_skipped(site, reason))
    rows += [Row(name, "", "skipped", why_unsupported(module)) for name, module in unsupported(model, sites)]
    report = Report(tuple(rows))
    if strict and not plan:
        raise ValueError(f"model: nothing to swap in {type(model).__name__}\n{report}")
    _warn_of_empty_rows(report)
    for site, layer_mask in plan:
        site.adapter.sparsify(site.module, layer_mask)
    _finish(model)
    if verify and sample is not None:
        _verify(model, plan, sample)
    return report


def densify(model: nn.Module) -> Report:
    """Undo `sparsify`: every swapped layer becomes the class it was, with the same parameters.

    Args:
        model: the model, changed in place; layers that are dense already are left alone.

    Returns:
        What was restored, from which mask, and what was dense already; prints as a table.

    Raises:
        TypeError: ``model`` is no `torch.nn.Module`.
        RuntimeError: a swapped module was sharded or parametrized since, which would get lost.
    """
    _check_model(model)
    _refuse_classes_of_torch(model)
    rows = []
    for site in find_attention(model):
        place = (site.name, site.adapter.name)
        if site.layer_mask is None:
            rows.append(Row(*place, "skipped", "dense already"))
            continue
        rows.append(Row(*place, "restored", mask=site.layer_mask.name, layer=site.layer, num_tokens=site.num_tokens))
        site.adapter.densify(site.module)
    _finish(model)
    return Report(tuple(rows))


def _check_model(model: object) -> None:
    if isinstance(model, nn.Module):
        return
    got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
    raise TypeError(f"model: expected a torch.nn.Module, got {got}")


def _refuse_classes_of_torch(model: nn.Module) -> None:
    """Raise if torch has derived the class of a swapped module, of which nothing would be left."""
    for name, module in model.named_modules():
        made = type(module)
        if isinstance(module, (SparseLayer, Mixed)) and made.__module__.startswith("torch."):
            raise RuntimeError(
                f"{name or '(root)'}: torch has made it a {made.__name__} since the swap, by sharding or by a "
                "parametrization; densify the model before that, or undo that first"
            )


def _finish(model: nn.Module) -> None:
    """Adjust what surrounds the layers, after a swap in either direction."""
    for adapter in adapters():
        adapter.finish(model)
    follow_dropped_tokens(model)


def _plan(site: Site, config: AttentionConfig) -> tuple[LayerMask, Row]:
    """The mask of a layer, built once where its number of tokens is known, to see that it can be."""
    num_heads, head_dim = site.adapter.heads(site.module)
    check_sizes(config, num_heads, site.adapter.embed_dim(site.module))
    config = _without_prefix(config) if site.is_temporal else config
    layer_mask = LayerMask(
        _ordered(config.for_layer(site.name), site.token_order),
        num_heads,
        site.layer,
        site.num_layers,
        grid=site.grid,
        num_prefix_tokens=site.num_prefix_tokens,
        head_dim=head_dim,
    )
    site.adapter.check(site.module, layer_mask)
    check_backend(layer_mask, head_dim, site.adapter.dropout(site.module), site.num_tokens)
    density = nnz = empty_rows = None
    if site.num_tokens is not None and layer_mask.config.uses_edges and not layer_mask.by_content:
        mask = layer_mask.at(site.num_tokens)
        density, nnz, empty_rows = mask.density, mask.nnz, sum(mask.num_empty_rows)
    row = Row(
        site.name,
        site.adapter.name,
        "swapped",
        mask=layer_mask.name,
        layer=site.layer,
        num_tokens=site.num_tokens,
        density=density,
        nnz=nnz,
        empty_rows=empty_rows,
    )
    return layer_mask, row


def _warn_of_empty_rows(report: Report) -> None:
    layers = [row.module or "(root)" for row in report.swapped if row.empty_rows]
    if layers:
        warnings.warn(
            f"{', '.join(layers)}: some queries keep no key, so that attention gives them 0; the report counts them. "
            "Keys can be had by other parameters (`include_self`, where the mask has it), or in a `union` with "
            "{mask: local, mask_kwargs: {window: 0}}, which is every query's own key; `on_empty_row: error` refuses "
            "to run",
            stacklevel=3,
        )


def _skipped(site: Site, reason: str) -> Row:
    """A layer that stays as it is: dense, or with the mask of an earlier swap."""
    if site.layer_mask is None:
        return Row(site.name, site.adapter.name, "skipped", reason, layer=site.layer)
    mask = site.layer_mask.name
    return Row(site.name, site.adapter.name, "skipped", f"{reason}, keeps `{mask}`", mask, site.layer)


def _ordered(config: AttentionConfig, token_order: str) -> AttentionConfig:
    """The configuration with the order of tokens that the model has, unless it names another."""
    document = json.loads(config.to_json())
    if document["token_order"] != "row_major" or token_order == "row_major":
        return config
    try:
        return load_config({**document, "token_order": token_order})
    except ConfigError:  # the mask does not look at the grid
        return config


def _without_prefix(config: AttentionConfig) -> AttentionConfig:
    """The configuration with only those prefix tokens that it gives to layers by name."""
    return load_config({**json.loads(config.to_json()), "num_prefix_tokens": None})


def _with_overrides(config: AttentionConfig, overrides: Mapping[str, Mapping[str, object]] | None) -> AttentionConfig:
    if not overrides:
        return config
    if not isinstance(overrides, Mapping) or not all(isinstance(keys, Mapping) for keys in overrides.values()):
        raise TypeError(f"overrides: expected a mapping of regular expressions to mappings, got {overrides!r:.60}")
    document = json.loads(config.to_json())
    document["layers"] = {
        **document.get("layers", {}),
        **{key: dict(value) for key, value in overrides.items()},
    }
    return load_config(document)


def _refuse_idle_overrides(
    overrides: Mapping[str, Mapping[str, object]] | None, config: AttentionConfig, sites: Sequence[Site]
) -> None:
    names = [site.name for site in sites]
    for pattern in config.unmatched_layers(names):
        key = "overrides" if pattern in (overrides or ()) else "layers"
        raise config_error(f"{key}: {matches_none(pattern, names)}", key=key)


def _checked_sample(model: nn.Module, verify: bool, sample: Sample | None) -> Sample | None:
    """The input to run the model on, or None if it is not to be run."""
    if not isinstance(verify, bool):
        raise TypeError(f"verify: expected True or False, got {type(verify).__name__}; an input is passed as sample=")
    if sample is not None and (isinstance(sample, str) or not isinstance(sample, (Tensor, Sequence, Mapping))):
        raise TypeError(
            f"sample: expected a tensor, positional arguments or keyword arguments, got {type(sample).__name__}"
        )
    if verify and sample is None:
        parts = (adapter.sample(part) for part in _unwrapped(model) for adapter in adapters())
        sample = next((x for x in parts if x is not None), None)
        if sample is None:
            raise ValueError(
                f"sample: expected an input for {type(model).__name__}, which does not tell its size; got None"
            )
    return sample


def _unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and while there is nothing but one module in it that one, which takes what the model takes."""
    yield model
    children = list(model.children())
    if len(children) == 1:
        yield from _unwrapped(children[0])


def _verify(model: nn.Module, plan: Sequence[tuple[Site, LayerMask]], sample: Sample) -> None:
    # A layer with the mask `none` and no backend is dense as asked for.
    watched = {
        site.name: site.module for site, layer_mask in plan if layer_mask.is_sparse or not layer_mask.config.uses_edges
    }
    idle = [name for name, calls in sparse_calls(model, watched, sample).items() if calls == 0]
    if idle:
        raise RuntimeError(f"verify: stayed dense, no sparse operator and no backend was called in: {', '.join(idle)}")
