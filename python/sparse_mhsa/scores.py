"""Calibration scores for `pruning`: how much each query looks at its best keys, in the mean over data.

`collect_scores` reads a loader twice and never holds an N x N array. The first reading finds the candidates of every
query: a Misra-Gries summary of C counters per row, to which every batch adds its attention and from which the
(C + 1)-th largest sum is then subtracted (Agarwal et al., 2012, "Mergeable Summaries"). The second measures the
candidates exactly. So the scores in the file are exact means, and every pair outside it has a mean score of at most
`Scores.bound`, which for attention is below 1 / (C + 1); with C = P candidates nothing is outside, and one reading
is enough. Memory is 8 bytes per candidate, layer and head, besides one tile of rows.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import _core
from .adapters import Site, adapters, select_sites
from .config import load_config
from .layer_mask import LayerMask
from .mask import Mask

Kind: TypeAlias = Literal["attention", "magnitude"]

_TILE = 1 << 22
"""Attention weights that are held at a time."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Mean scores of candidate pairs in a stack of L layers with H heads over P patches, C candidates per patch."""

    kind: Kind
    """``attention``: the mean weight after softmax; ``magnitude``: the mean magnitude of the scaled score before it."""
    samples: int
    """Samples that the means are over."""
    num_prefix_tokens: int
    """Leading tokens that were left out; softmax was over them too."""
    keys: NDArray[np.uint32]
    """(L, H, P, C) candidates, ascending within a row."""
    scores: NDArray[np.float32]
    """(L, H, P, C) their mean scores."""
    importance: NDArray[np.float64]
    """(L, H) keys that a query looks at: the exponential of the entropy of its attention, in the mean."""
    bound: NDArray[np.float64]
    """(L, H) what the mean score of a pair outside ``keys`` can be at most."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file for the key ``scores`` of the mask `pruning`.

        Args:
            path: the file; an existing one is replaced.

        Raises:
            ValueError: the arrays contradict each other, or the file cannot be written.
        """
        about = {"kind": self.kind, "samples": self.samples, "num_prefix_tokens": self.num_prefix_tokens}
        _core.save_scores(
            os.fspath(path),
            np.ascontiguousarray(self.keys),
            np.ascontiguousarray(self.scores),
            np.ascontiguousarray(self.importance),
            np.ascontiguousarray(self.bound),
            json.dumps(about),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Scores":
        """Read what `save` wrote.

        Args:
            path: the file.

        Raises:
            ConfigError: there is no such file, or it does not hold scores.
        """
        keys, scores, importance, bound, about = _core.load_scores(os.fspath(path))
        of = json.loads(about)
        return cls(of["kind"], of["samples"], of["num_prefix_tokens"], keys, scores, importance, bound)


def collect_scores(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    method: Kind = "attention",
    candidates: int = 64,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    num_prefix_tokens: int | None = None,
    call: Callable[[nn.Module, Any], object] | None = None,
) -> Scores:
    """Measure how much each query attends to its best keys, over a data loader, with dense attention.

    The model is evaluated without gradients; training flags and masks are as before afterwards.

    Args:
        model: a model whose attention `sparsify` knows, in one stack of layers of equal sizes.
        loader: batches, all with the same number of tokens; it is read twice and must give the same samples again
            (once, if ``candidates`` is at least the number of patches).
        method: ``attention`` or ``magnitude``.
        candidates: C, pairs that are measured per query; at least the keys per query that the budget is for.
        include: regular expressions on module names, as in `sparsify`.
        exclude: likewise.
        num_prefix_tokens: leading tokens off the grid; default is what the model tells, else 0.
        call: runs the model on a batch. Default: a tensor is the argument, of a tuple or list the first entry is, a
            mapping has keyword arguments; tensors are moved to the device of the model.

    Returns:
        The scores; `Scores.save` writes them for ``mask_kwargs: {scores: path}``.

    Raises:
        ValueError: an argument is out of range, the layers are not one stack, a layer has no attention weights, the
            number of tokens changes, or the loader gives nothing or other samples the second time.
    """
    if method not in get_args(Kind):
        raise ValueError(f"method: expected {' or '.join(get_args(Kind))}, got {method!r}")
    if candidates < 1:
        raise ValueError(f"candidates: expected at least 1, got {candidates}")
    sites = _one_stack(select_sites(model, include, exclude))
    prefix = (sites[0].num_prefix_tokens or 0) if num_prefix_tokens is None else num_prefix_tokens
    layers = [_Layer(site.name, method, candidates, prefix) for site in sites]
    call = _call if call is None else call
    with _dense(model, sites):
        for reading in ("find", "measure"):
            for site, layer in zip(sites, layers, strict=True):
                site.module.__dict__["forward"] = _recorded(type(site.module).forward, site.module, layer, reading)
            with torch.no_grad():
                for batch in loader:
                    call(model, batch)
            for layer in layers:
                layer.check(reading)
            if all(layer.exact for layer in layers):
                break
    return Scores(
        kind=method,
        samples=layers[0].samples["find"],
        num_prefix_tokens=prefix,
        keys=np.stack([layer.keys.cpu().numpy().astype(np.uint32) for layer in layers]),
        scores=np.stack([(layer.sums / layer.samples["find"]).cpu().numpy().astype(np.float32) for layer in layers]),
        importance=np.stack([layer.importance().cpu().numpy() for layer in layers]),
        bound=np.stack([layer.bound().cpu().numpy() for layer in layers]),
    )


def _one_stack(sites: Sequence[Site]) -> list[Site]:
    """The sites by layer."""
    if not sites:
        raise ValueError("model: no self-attention layer was selected")
    ordered = sorted(sites, key=lambda site: site.layer)
    names = ", ".join(site.name or "(root)" for site in ordered[:4])
    if [site.layer for site in ordered] != list(range(ordered[0].num_layers)):
        raise ValueError(
            f"model: expected one whole stack of attention layers, got {names}, ...; use include or exclude"
        )
    shapes = {(*site.adapter.heads(site.module), site.num_prefix_tokens) for site in ordered}
    if len(shapes) > 1:
        raise ValueError(f"model: expected layers of equal (heads, head_dim, prefix tokens), got {sorted(shapes)}")
    for site in ordered:
        if site.backend is not None:
            raise ValueError(f"{site.name}: the backend `{site.backend.name}` has no attention weights")
    return ordered


@contextmanager
def _dense(model: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
    """Every pair is kept, by a mask: dense attention by its own name would not call our operators."""
    config = load_config({"mask": "block", "mask_kwargs": {"block_size": 1 << 40, "layout": "full"}})
    before = [site.layer_mask for site in sites]
    modes = {module: module.training for module in model.modules()}
    try:
        for site in sites:
            site.adapter.sparsify(site.module, LayerMask(config, site.num_heads, num_prefix_tokens=0))
        _finish(model)
        model.eval()
        yield
    finally:
        for site, layer_mask in zip(sites, before, strict=True):
            site.module.__dict__.pop("forward", None)
            _restore(site, layer_mask)
        _finish(model)
        for module, training in modes.items():
            module.training = training


def _restore(site: Site, layer_mask: LayerMask | Mask | None) -> None:
    if layer_mask is None:
        site.adapter.densify(site.module)
    else:
        site.adapter.sparsify(site.module, layer_mask)


def _finish(model: nn.Module) -> None:
    for adapter in adapters():
        adapter.finish(model)


def _call(model: nn.Module, batch: Any) -> object:  # noqa: ANN401
    like = next((x for x in (*model.parameters(), *model.buffers())), None)

    def moved(x: object) -> object:
        return x.to(like.device) if isinstance(x, Tensor) and like is not None else x

    if isinstance(batch, Mapping):
        return model(**{key: moved(value) for key, value in batch.items()})
    return model(moved(batch[0] if isinstance(batch, (tuple, list)) else batch))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows a layer what the forward operator is given."""

    def __init__(self, see: Callable[..., None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.see = see

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        if func is torch.ops.sparse_mhsa.forward.default:
            q, k, _, _, key_mask, bias, _, _, scale = args
            self.see(q, k, key_mask, bias, scale)
        return func(*args, **(kwargs or {}))


def _recorded(
    forward: Callable[..., object], module: nn.Module, layer: "_Layer", reading: str
) -> Callable[..., object]:
    def recorded(*args: object, **kwargs: object) -> object:
        with _Recorder(getattr(layer, reading)):
            return forward(module, *args, **kwargs)

    return recorded


class _Layer:
    """Sums of one layer."""

    def __init__(self, name: str, kind: Kind, candidates: int, prefix: int) -> None:
        self.name, self.kind, self.candidates, self.prefix = name, kind, candidates, prefix
        self.samples = {"find": 0, "measure": 0}
        self.num_tokens: int | None = None
        self.keys = self.sums = self.removed = self.looked_at = torch.empty(0)

    @property
    def exact(self) -> bool:
        """Every pair is a candidate."""
        return self.keys.shape[1] == self.keys.shape[2]

    def find(self, q: Tensor, k: Tensor, key_mask: Tensor | None, bias: Tensor | None, scale: float) -> None:
        """Add a batch to the summary of every row."""
        patches = q.shape[2] - self.prefix
        if self.num_tokens is None:
            self._begin(q.shape[1], q.shape[2], q.device)
        self._count("find", q)
        kept = self.keys.shape[2]
        for rows, scores, looked_at in self._tiles(q, k, key_mask, bias, scale):
            self.looked_at += looked_at
            scores.scatter_add_(-1, self.keys[:, rows], self.sums[:, rows])
            if kept == patches:
                self.sums[:, rows] = scores
                continue
            bar = scores.topk(kept + 1, dim=-1).values[..., -1:]
            self.keys[:, rows] = keys = _first_best(scores, bar, kept)
            self.sums[:, rows] = (scores.gather(-1, keys) - bar).clamp(min=0)
            self.removed[:, rows] += bar.squeeze(-1).double()

    def measure(self, q: Tensor, k: Tensor, key_mask: Tensor | None, bias: Tensor | None, scale: float) -> None:
        """Add a batch to the sums of the candidates."""
        if self.samples["measure"] == 0:
            self.sums.zero_()
        self._count("measure", q)
        for rows, scores, _ in self._tiles(q, k, key_mask, bias, scale):
            self.sums[:, rows] += scores.gather(-1, self.keys[:, rows])

    def check(self, reading: str) -> None:
        """Every reading sees the same samples."""
        if self.samples["find"] == 0:
            raise ValueError(f"loader: gave no batch, or the model did not call its layer `{self.name}`")
        if self.samples[reading] != self.samples["find"]:
            raise ValueError(
                f"loader: gave {self.samples['find']} samples at first, and then {self.samples[reading]}; expected "
                "something that can be read twice, such as a DataLoader without shuffling or a list of batches"
            )

    def importance(self) -> Tensor:
        """(H,) keys that a query looks at."""
        return self.looked_at / (self.samples["find"] * self.keys.shape[1])

    def bound(self) -> Tensor:
        """(H,) mean score of a pair that is no candidate, at most."""
        return self.removed.amax(-1) / self.samples["find"]

    def _begin(self, heads: int, num_tokens: int, device: torch.device) -> None:
        patches = num_tokens - self.prefix
        if patches < 1:
            raise ValueError(f"model: expected tokens beside the {self.prefix} prefix tokens, got {num_tokens} in all")
        kept = min(self.candidates, patches)
        self.num_tokens = num_tokens
        self.keys = torch.arange(kept, device=device).expand(heads, patches, kept).contiguous()
        self.sums = torch.zeros(heads, patches, kept, device=device)
        self.removed = torch.zeros(heads, patches, dtype=torch.float64, device=device)
        self.looked_at = torch.zeros(heads, dtype=torch.float64, device=device)

    def _count(self, reading: str, q: Tensor) -> None:
        if q.shape[2] != self.num_tokens:
            raise ValueError(
                f"loader: scores are for one number of tokens, but the layer `{self.name}` saw {self.num_tokens} and "
                f"then {q.shape[2]}"
            )
        self.samples[reading] += q.shape[0]

    def _tiles(
        self, q: Tensor, k: Tensor, key_mask: Tensor | None, bias: Tensor | None, scale: float
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Patch rows, their scores (H, R, P) summed over the batch, and what their queries look at (H,).

        Padding is no key, and its queries count as looking at nothing.
        """
        batch, heads, num_tokens, _ = q.shape
        k = k.float().repeat_interleave(heads // k.shape[1], dim=1).transpose(-1, -2)
        keep = None if key_mask is None else key_mask.bool()[:, None]
        if bias is not None and bias.shape[2] == 1 and keep is None:
            keep = (bias[:, :, 0] != -torch.inf).expand(
                batch, -1, num_tokens
            )  # padding as torch's own layers pass it on
        step = max(1, _TILE // (batch * heads * num_tokens))
        for start in range(self.prefix, num_tokens, step):
            tokens = slice(start, min(start + step, num_tokens))
            logits = q[:, :, tokens].float() @ k * scale
            if bias is not None:
                logits = logits + bias.expand(-1, -1, num_tokens, -1)[:, :, tokens].float()
            valid = logits.new_ones(())
            if keep is not None:
                logits = logits.masked_fill(~keep[:, :, None, :], -torch.inf)
                valid = keep[:, :, tokens, None].float()
            weights = logits.softmax(-1).nan_to_num(0.0) * valid
            looked_at = torch.special.entr(weights).sum(-1).exp() * valid.squeeze(-1)
            if self.kind == "magnitude":
                weights = logits.abs().masked_fill(logits == -torch.inf, 0.0) * valid
            rows = slice(tokens.start - self.prefix, tokens.stop - self.prefix)
            yield rows, weights[..., self.prefix :].sum(0), looked_at.double().sum((0, -1))


def _first_best(scores: Tensor, bar: Tensor, count: int) -> Tensor:
    """The ``count`` places of each row whose score is above ``bar``, filled up from the left with those equal to it."""
    above, equal = scores > bar, scores == bar
    missing = count - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= missing))
    return chosen.nonzero()[:, -1].view(*scores.shape[:-1], count)
