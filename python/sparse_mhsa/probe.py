"""Measuring what a model would lose: dense attention that watches itself while the model runs."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ._core import AttentionConfig
from .adapters import Site, adapters, find_attention, sparsify
from .adapters.selection import matches_none
from .backends import Backend, Place
from .calibration import Calibration, Kept
from .config import ConfigLike, config_error, integer, load_config
from .content import edges_of
from .functional import attend, bias_as, dense_mask
from .layer import SparseLayer
from .layer_mask import LayerMask, draw_seed
from .module import SparseMHSA, keep_mask_and_bias

P = TypeVar("P", bound="Probe")


def calibrate(
    model: nn.Module,
    loader: Iterable[object],
    configs: Mapping[str, ConfigLike] | Sequence[ConfigLike],
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    num_batches: int | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> Calibration:
    """Measure, per layer and head, what masks would keep of the dense attention of a model on some data.

    The model runs once over the data, dense and in evaluation, and is left as it was. Wherever it attends, every
    candidate attends to the same queries and keys: the mass that it keeps in row i is ``exp(lse_i of its edges - lse_i
    of all keys)``, so that no N x N array is ever made, and memory is that of the tensors and edges of one layer.

    Args:
        model: any model that `sparsify` can swap; layers that it has swapped already are measured as dense ones.
        loader: batches: a tensor, a tuple or list whose first entry is the input, or a mapping of keyword arguments.
        configs: candidates by name, or a list of them (named by file or mask); each is whatever `load_config` takes.
        include: regular expressions; only layers with a matching name are measured.
        exclude: regular expressions; layers with a matching name are left alone.
        num_batches: stop after so many batches; default is all of them.
        forward: how to run a batch of another kind: ``forward(model, batch)``.

    Returns:
        The measurements, as data, table, heat map and recommendation.

    Raises:
        ConfigError: a candidate cannot be honoured, or has no mass to measure (a backend without edges,
            ``masked_logits: zero``, a ``scale`` of its own).
        ValueError: there are no candidates, no layers or no batches, a layer was never called, or its attention is
            not finite.
    """
    if num_batches is not None:
        num_batches = integer("num_batches", num_batches, 1)
    candidates = _candidates(configs)
    names = [site.name for site in find_attention(model)]
    for name, config in candidates.items():
        for pattern in config.unmatched_layers(names):
            raise config_error(f"configs: {name}: layers: {matches_none(pattern, names)}", key="layers")

    def probe_of(site: Site) -> _Candidates:
        return _Candidates(site, {name: _layer_mask(name, config, site) for name, config in candidates.items()})

    with probed(model, probe_of, include, exclude) as probes:
        seen = 0
        for batch in loader if num_batches is None else itertools.islice(loader, num_batches):
            for probe in probes:
                probe.batch = seen
            run_batch(model, batch, forward)
            seen += 1
    if seen == 0:
        raise ValueError("loader: expected at least one batch, got none")
    idle = [probe.site.name for probe in probes if not probe.called]
    if idle:
        raise ValueError(f"model: these layers were never called: {', '.join(idle)}")
    layer_configs = {
        (name, probe.site.name): mask.config for probe in probes for name, mask in probe.candidates.items()
    }
    return Calibration(candidates, tuple(row for probe in probes for row in probe.rows()), seen, layer_configs)


@dataclass
class _Sums:
    """Sums over queries and samples, per head."""

    mass: Tensor
    error: Tensor
    norm: Tensor
    queries: Tensor
    edges: Tensor
    pairs: int = 0


@dataclass(frozen=True)
class Seen:
    """What a layer attended to, in float32 or float64, and what came of it."""

    q: Tensor
    """(B, H, N, D)"""
    k: Tensor
    """(B, Hkv, N, D)"""
    v: Tensor
    """(B, Hkv, N, Dv)"""
    out: Tensor
    """(B, H, N, Dv)"""
    lse: Tensor
    """(B, H, N)"""
    key_mask: Tensor | None
    """(B, N) bool, True = keep."""
    bias: Tensor | None
    """Broadcastable to (B, H, N, N), added to the scaled scores."""
    scale: float
    embeddings: Tensor | None
    """(B, N, E) input of the layer."""


class Probe(Backend, ABC):
    """Dense attention that watches itself.

    Args:
        site: the layer.
    """

    def __init__(self, site: Site) -> None:
        num_heads, head_dim = site.adapter.heads(site.module)
        super().__init__(Place(num_heads, head_dim))
        self.name, self.site = "probe", site
        self.called = False
        self.batch = 0
        """Which of the loader's batches the model sees."""
        self.embeddings: Tensor | None = None

    @abstractmethod
    def observe(self, seen: Seen) -> None:
        """Look at one call of the layer."""

    def see_input(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """A forward pre-hook: keep the layer's input for masks that choose by its norms."""
        x = args[0] if args else kwargs.get("query", kwargs.get("x"))
        if isinstance(x, Tensor) and x.dim() == 3:
            batch_first = not isinstance(module, SparseMHSA) or module.batch_first
            self.embeddings = x if batch_first else x.transpose(0, 1)

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
        """As `Backend.attend`, but with any bias."""
        module, dtype = self.site.module, v.dtype
        if isinstance(module, SparseMHSA):
            bias = keep_mask_and_bias(q, k, None, bias)[1]
        scale = getattr(module, "scale", None)
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        with torch.autocast(q.device.type, enabled=False):
            # lse of half types is no better than theirs.
            q, k, v = (x if x.dtype == torch.float64 else x.float() for x in (q, k, v))
            bias = None if bias is None else bias_as(q.dtype, bias)
            options: dict[str, Any] = {"key_mask": key_mask, "bias": bias, "scale": scale}
            dense, lse = attend(q, k, v, dense_mask(q.shape[1]), needs_lse=True, **options)
            seen = Seen(q, k, v, dense, lse, **options, embeddings=self.embeddings)
            self._refuse_what_is_not_finite(seen)
            self.observe(seen)
            weights = self._weights(q, k, lse, **options) if needs_weights else None
        self.called = True
        return dense.to(dtype), None if weights is None else weights.to(dtype)

    def _refuse_what_is_not_finite(self, seen: Seen) -> None:
        """Raise where shares of attention would mean nothing, instead of counting nothing."""
        if not _real(seen).any():
            raise ValueError(
                f"loader: batch {self.batch} (the first is 0) gave the layer `{self.site.name or '(root)'}` no sample, "
                "or padding alone"
            )
        finite = seen.lse.isfinite() & seen.out.isfinite().all(-1)
        spoiled = (_real(seen) & ~finite).any(2).any(1)
        if spoiled.any():
            samples = ", ".join(map(str, spoiled.nonzero().flatten().tolist()))
            raise ValueError(
                f"loader: batch {self.batch} (the first is 0) gave the layer `{self.site.name or '(root)'}` attention "
                f"that is not finite, samples {samples}; expected data and weights without NaN and infinity"
            )

    @staticmethod
    def _weights(
        q: Tensor, k: Tensor, lse: Tensor, key_mask: Tensor | None, bias: Tensor | None, scale: float
    ) -> Tensor:
        """The (B, H, N, N) weights, for a model that asks for them."""
        scores = scale * (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-2, -1))
        scores = scores if bias is None else scores + bias
        scores = scores if key_mask is None else scores.masked_fill(~key_mask[:, None, None, :], -math.inf)
        return (scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()


class _Candidates(Probe):
    """What every candidate would keep of dense attention."""

    def __init__(self, site: Site, candidates: Mapping[str, LayerMask]) -> None:
        super().__init__(site)
        self.candidates = dict(candidates)
        self.sums = {name: _Sums(*torch.zeros(5, site.num_heads, dtype=torch.float64)) for name in candidates}

    def observe(self, seen: Seen) -> None:
        """Attend by every candidate."""
        real = _real(seen)
        options: dict[str, Any] = {"key_mask": seen.key_mask, "bias": seen.bias, "scale": seen.scale}
        for name, layer_mask in self.candidates.items():
            edges = edges_of(seen.q, seen.k, layer_mask, embeddings=seen.embeddings, **options)
            out, kept_lse = attend(seen.q, seen.k, seen.v, layer_mask, edges, needs_lse=True, **options)
            count = _edge_counts(layer_mask, edges.row_ptr, seen.q)
            self._add(self.sums[name], (out, kept_lse), (seen.out, seen.lse), count, real)

    def _add(
        self,
        sums: _Sums,
        kept: tuple[Tensor, Tensor],
        dense: tuple[Tensor, Tensor],
        edges: Tensor,
        real: Tensor,
    ) -> None:
        (out, kept_lse), (dense_out, lse) = kept, dense
        mass = torch.where(real, (kept_lse - lse).double().exp().clamp(max=1.0), 0.0)
        difference = torch.where(real[..., None], (out - dense_out).double(), 0.0)
        sums.mass += mass.sum((0, 2)).cpu()
        sums.error += difference.square().sum((0, 2, 3)).cpu()
        sums.norm += torch.where(real[..., None], dense_out.double(), 0.0).square().sum((0, 2, 3)).cpu()
        sums.queries += real.sum((0, 2)).cpu()
        sums.edges += edges.cpu()
        sums.pairs += out.shape[0] * out.shape[2] ** 2

    def rows(self) -> Iterator[Kept]:
        """The means."""
        for name, sums in self.sums.items():
            for head in range(self.place.num_heads):
                norm, queries = float(sums.norm[head]), max(1.0, float(sums.queries[head]))
                error = math.sqrt(float(sums.error[head]) / norm) if norm > 0 else 0.0
                density = float(sums.edges[head]) / max(1, sums.pairs)
                yield Kept(name, self.site.name, head, float(sums.mass[head]) / queries, error, density)


def _real(seen: Seen) -> Tensor:
    """(B, H, N) bool: queries that have attention to keep: neither padding nor without any key."""
    real = seen.lse != -math.inf  # of NaN as well
    return real if seen.key_mask is None else real & seen.key_mask[:, None, :]


def _edge_counts(layer_mask: LayerMask, row_ptr: Tensor | None, q: Tensor) -> Tensor:
    """(H,) edges over all samples."""
    batch, heads = q.shape[:2]
    if row_ptr is None:
        return batch * torch.tensor(layer_mask.at(q.shape[2]).nnz_per_head, dtype=torch.float64)
    return (row_ptr[:, -1] - row_ptr[:, 0]).view(batch, heads).sum(0)


@contextmanager
def probed(
    model: nn.Module,
    probe_of: Callable[[Site], P],
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
) -> Iterator[list[P]]:
    """The model in evaluation, without gradients, with a probe in every selected layer; as it was, afterwards."""
    training = {module: module.training for module in model.modules()}
    before = {
        site.name: (site, site.module.layer_mask, site.module.backend, site.module.__dict__.get("unplaced"))
        for site in find_attention(model)
        if isinstance(site.module, SparseLayer)
    }
    probes: list[P] = []
    hooks = []
    try:
        report = sparsify(model, "mask: none", include=include, exclude=exclude)
        selected = {row.module for row in report.swapped}
        for site in find_attention(model):
            if site.name not in selected:
                continue
            if isinstance(site.module, SparseMHSA) and (site.module.bias_k is not None or site.module.add_zero_attn):
                raise ValueError(f"{site.name}: layers with add_bias_kv or add_zero_attn cannot be calibrated")
            probe = probe_of(site)
            assert isinstance(site.module, SparseLayer)
            # Not as a submodule: neither `model.modules()` nor a state dict should see it.
            site.module.__dict__["backend"] = probe
            site.module._modules.pop("backend", None)
            hooks.append(site.module.register_forward_pre_hook(probe.see_input, with_kwargs=True))
            probes.append(probe)
        model.eval()
        with torch.no_grad():
            yield probes
    finally:
        for hook in hooks:
            hook.remove()
        for site in find_attention(model):
            if site.layer_mask is not None and site.name not in before:
                site.adapter.densify(site.module)
        for site, layer_mask, backend, unplaced in before.values():
            site.adapter.sparsify(site.module, layer_mask)
            assert isinstance(site.module, SparseLayer)
            site.module.backend = backend
            if unplaced is not None:
                site.module.__dict__["unplaced"] = unplaced
        for adapter in adapters():
            adapter.finish(model)
        for module, mode in training.items():
            module.training = mode


def _candidates(configs: Mapping[str, ConfigLike] | Sequence[ConfigLike]) -> dict[str, AttentionConfig]:
    if isinstance(configs, (str, Path, AttentionConfig)):
        raise TypeError("configs: expected a list of configurations or a mapping of names to them, got a single one")
    if isinstance(configs, Mapping):
        named = [(name, load_config(config)) for name, config in configs.items()]
    else:
        named = []
        for config in configs:
            parsed = load_config(config)
            is_path = isinstance(config, Path) or (isinstance(config, str) and config.endswith((".yaml", ".yml")))
            name = Path(config).stem if is_path else parsed.mask  # type: ignore[arg-type]
            same = sum(other.partition(" #")[0] == name for other, _ in named)
            named.append((f"{name} #{same + 1}" if same else name, parsed))
    if not named:
        raise ValueError("configs: expected at least one configuration, got none")
    return {name: _measurable(name, config) for name, config in named}


def _measurable(name: str, config: AttentionConfig) -> AttentionConfig:
    """The configuration with its random seeds drawn, so that all layers and the recommendation share them."""
    if not config.uses_edges:
        raise config_error(f"configs: {name}: backend: `{config.backend}` has no edges whose mass could be measured")
    if config.masked_logits != "neg_inf":
        raise config_error(f"configs: {name}: masked_logits: expected neg_inf, got {config.masked_logits}")
    if config.scale is not None:
        raise config_error(f"configs: {name}: scale: expected null, because the dense model has its own scale")
    return config.with_seed(draw_seed()) if None in config.seeds else config


def _layer_mask(name: str, config: AttentionConfig, site: Site) -> LayerMask:
    """A candidate in a layer, built once where its number of tokens is known, to see that it can be."""
    try:
        of_layer = _measurable(name, config.for_layer(site.name))
        num_heads, head_dim = site.adapter.heads(site.module)
        place = (site.layer, site.num_layers, 0, site.grid, site.num_prefix_tokens, head_dim)
        layer_mask = LayerMask(of_layer, num_heads, *place)
        if site.num_tokens is not None and not layer_mask.by_content:
            layer_mask.at(site.num_tokens)
    except ValueError as error:
        raise config_error(f"{site.name or '(root)'}: {name}: {error}") from error
    return layer_mask


def run_batch(model: nn.Module, batch: object, forward: Callable[[nn.Module, Any], object] | None) -> None:
    """Call ``model`` on a batch of a loader: a tensor, a tuple whose first entry is one, or keyword arguments."""
    if forward is not None:
        forward(model, batch)
        return
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Mapping):
        model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
        return
    x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(x, Tensor):
        raise TypeError(f"loader: expected tensors, tuples or mappings of them, got {type(x).__name__}; pass `forward`")
    model(x.to(device))
