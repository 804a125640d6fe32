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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import _core
from .adapters import Site
from .config import integer
from .probe import Probe, Seen, probed, run_batch

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
    forward: Callable[[nn.Module, Any], object] | None = None,
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
        forward: how to run a batch that is neither a tensor, nor a tuple or list whose first entry is the input, nor a
            mapping of keyword arguments: ``forward(model, batch)``.

    Returns:
        The scores; `Scores.save` writes them for ``mask_kwargs: {scores: path}``.

    Raises:
        TypeError: a count is no integer.
        ValueError: an argument is out of range, the layers are not one stack, the number of tokens changes, attention
            is not finite, or the loader gives nothing or other samples the second time.
    """
    if method not in get_args(Kind):
        raise ValueError(f"method: expected {' or '.join(get_args(Kind))}, got {method!r}")
    candidates = integer("candidates", candidates, 1)
    if num_prefix_tokens is not None:
        num_prefix_tokens = integer("num_prefix_tokens", num_prefix_tokens)
    with probed(model, lambda site: _Layer(site, method, candidates, num_prefix_tokens), include, exclude) as layers:
        layers.sort(key=lambda layer: layer.site.layer)
        _check_stack(layers)
        for reading in ("find", "measure"):
            for layer in layers:
                layer.reading = reading
            for place, batch in enumerate(loader):
                for layer in layers:
                    layer.batch = place
                run_batch(model, batch, forward)
            for layer in layers:
                layer.check()
            if all(layer.exact for layer in layers):
                break
    return Scores(
        kind=method,
        samples=layers[0].samples["find"],
        num_prefix_tokens=layers[0].prefix,
        keys=np.stack([layer.keys.cpu().numpy().astype(np.uint32) for layer in layers]),
        scores=np.stack([(layer.sums / layer.samples["find"]).cpu().numpy().astype(np.float32) for layer in layers]),
        importance=np.stack([layer.importance().cpu().numpy() for layer in layers]),
        bound=np.stack([layer.bound().cpu().numpy() for layer in layers]),
    )


def _check_stack(layers: Sequence["_Layer"]) -> None:
    """Raise a ValueError unless the layers are all of one stack, of equal sizes."""
    if not layers:
        raise ValueError("model: no self-attention layer was selected")
    sites = [layer.site for layer in layers]
    if [site.layer for site in sites] != list(range(sites[0].num_layers)):
        names = [site.name or "(root)" for site in sites]
        first = ", ".join(names if len(names) <= 4 else [*names[:4], "..."])
        raise ValueError(f"model: expected one whole stack of attention layers, got {first}; use `include`")
    shapes = {(site.num_heads, site.num_prefix_tokens) for site in sites}
    if len(shapes) > 1:
        raise ValueError(f"model: expected layers of equal (heads, prefix tokens), got {sorted(shapes, key=str)}")


class _Layer(Probe):
    """Sums of one layer."""

    def __init__(self, site: Site, kind: Kind, candidates: int, prefix: int | None) -> None:
        super().__init__(site)
        self.kind, self.candidates = kind, candidates
        self.prefix = (site.num_prefix_tokens or 0) if prefix is None else prefix
        self.samples = {"find": 0, "measure": 0}
        self.reading = "find"
        self.num_tokens: int | None = None
        self.keys = self.sums = self.removed = self.looked_at = torch.empty(0)

    def observe(self, seen: Seen) -> None:
        """Find candidates, or measure them."""
        if self.num_tokens is None:
            self._begin(seen.q)
        if seen.q.shape[2] != self.num_tokens:
            raise ValueError(
                f"loader: scores are for one number of tokens, but the layer `{self.site.name}` saw {self.num_tokens} "
                f"and then {seen.q.shape[2]}"
            )
        if self.samples[self.reading] == 0 and self.reading == "measure":
            self.sums.zero_()
        self.samples[self.reading] += seen.q.shape[0]
        for rows, scores, looked_at in self._tiles(seen):
            if self.reading == "measure":
                self.sums[:, rows] += scores.gather(-1, self.keys[:, rows])
            else:
                self.looked_at += looked_at
                self._find(rows, scores)

    @property
    def exact(self) -> bool:
        """Every pair is a candidate."""
        return self.keys.shape[1] == self.keys.shape[2]

    def _find(self, rows: slice, scores: Tensor) -> None:
        """Add (H, R, P) scores to the summaries of their rows."""
        kept = self.keys.shape[2]
        scores.scatter_add_(-1, self.keys[:, rows], self.sums[:, rows])
        if self.exact:
            self.sums[:, rows] = scores
            return
        bar = scores.topk(kept + 1, dim=-1).values[..., -1:]
        self.keys[:, rows] = keys = _first_best(scores, bar, kept)
        self.sums[:, rows] = (scores.gather(-1, keys) - bar).clamp(min=0)
        self.removed[:, rows] += bar.squeeze(-1).double()

    def check(self) -> None:
        """Raise a ValueError unless every reading saw the same samples, and some."""
        if self.samples["find"] == 0:
            raise ValueError(f"loader: gave no batch, or the model did not call its layer `{self.site.name}`")
        if self.samples[self.reading] != self.samples["find"]:
            raise ValueError(
                f"loader: gave {self.samples['find']} samples at first, and then {self.samples[self.reading]}; "
                "expected something that can be read twice, such as a DataLoader without shuffling or a list of batches"
            )

    def importance(self) -> Tensor:
        """(H,) keys that a query looks at."""
        return self.looked_at / (self.samples["find"] * self.keys.shape[1])

    def bound(self) -> Tensor:
        """(H,) mean score of a pair that is no candidate, at most."""
        return self.removed.amax(-1) / self.samples["find"]

    def _begin(self, q: Tensor) -> None:
        _, heads, num_tokens, _ = q.shape
        patches = num_tokens - self.prefix
        if patches < 1:
            raise ValueError(f"model: expected tokens beside the {self.prefix} prefix tokens, got {num_tokens} in all")
        kept = min(self.candidates, patches)
        self.num_tokens = num_tokens
        self.keys = torch.arange(kept, device=q.device).expand(heads, patches, kept).contiguous()
        self.sums = torch.zeros(heads, patches, kept, device=q.device)
        self.removed = torch.zeros(heads, patches, dtype=torch.float64, device=q.device)
        self.looked_at = torch.zeros(heads, dtype=torch.float64, device=q.device)

    def _tiles(self, seen: Seen) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Patch rows, their scores (H, R, P) summed over the batch, and what their queries look at (H,).

        Padding is no key, and its queries count as looking at nothing.
        """
        batch, heads, num_tokens, _ = seen.q.shape
        k = seen.k.repeat_interleave(heads // seen.k.shape[1], dim=1).transpose(-1, -2)
        step = max(1, _TILE // (batch * heads * num_tokens))
        for start in range(self.prefix, num_tokens, step):
            tokens = slice(start, min(start + step, num_tokens))
            logits = seen.q[:, :, tokens] @ k * seen.scale
            if seen.bias is not None:
                logits = logits + seen.bias.expand(-1, -1, num_tokens, -1)[:, :, tokens]
            valid = logits.new_ones(())
            if seen.key_mask is not None:
                valid = seen.key_mask[:, None, tokens]
                logits = logits.masked_fill(~(valid[..., None] & seen.key_mask[:, None, None, :]), -torch.inf)
            weights = logits.softmax(-1).nan_to_num(0.0)  # NaN is a row without keys: others are finite, the probe saw
            looked_at = torch.special.entr(weights).sum(-1).exp() * valid
            if self.kind == "magnitude":
                weights = logits.abs().masked_fill(logits == -torch.inf, 0.0)
            rows = slice(tokens.start - self.prefix, tokens.stop - self.prefix)
            yield rows, weights[..., self.prefix :].sum(0).float(), looked_at.double().sum((0, -1))


def _first_best(scores: Tensor, bar: Tensor, count: int) -> Tensor:
    """The ``count`` places of each row whose score is above ``bar``, filled up from the left with those equal to it."""
    above, equal = scores > bar, scores == bar
    missing = count - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= missing))
    return chosen.nonzero()[:, -1].view(*scores.shape[:-1], count)
