"""What mechanisms without fixed edges should compute, written from their definitions in plain torch and in any dtype.

Only what the rows of the benchmark use: parameters that they leave alone are not looked at.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .methods import Attention, Problem


def kept(problem: Problem, rows: Tensor) -> Tensor:
    """(H, rows, N) bool: the edges of some queries that a mask by content should choose, in float64."""
    q, k, _ = (x.detach()[0].double() for x in problem.inputs)
    prefix, kwargs = problem.mask.num_prefix_tokens, _kwargs(problem, "mask_kwargs")
    keep = torch.ones(q.shape[0], len(rows), q.shape[1], dtype=torch.bool)
    if problem.mask.name == "topk":
        keep[:, rows >= prefix] = _topk(q, k, rows[rows >= prefix], kwargs)
        keep[:, :, :prefix] = True
    else:
        choice = CHOICES[problem.mask.name]
        keep[:, rows >= prefix, prefix:] = choice(q[:, prefix:], k[:, prefix:], rows[rows >= prefix] - prefix, kwargs)
    return keep


def _kwargs(problem: Problem, key: str) -> dict[str, Any]:
    kwargs: dict[str, Any] = json.loads(problem.case.layer_mask.config.to_json())[key]
    return kwargs


def _largest(scores: Tensor, count: int) -> Tensor:
    """True at the ``count`` largest of the last dimension."""
    places = scores.topk(min(count, scores.shape[-1]), dim=-1).indices
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, places, value=True)


def _topk(q: Tensor, k: Tensor, rows: Tensor, kwargs: dict[str, Any]) -> Tensor:
    schedule = kwargs["k_schedule"]
    return _largest(q[:, rows] @ k.transpose(-2, -1), schedule["k_start"] if schedule else kwargs["k"])


def _block_topk(q: Tensor, k: Tensor, rows: Tensor, kwargs: dict[str, Any]) -> Tensor:
    size, tokens = kwargs["block_size"], q.shape[1]
    pooled_q, pooled_k = (torch.stack([block.mean(1) for block in torch.split(x, size, 1)], 1) for x in (q, k))
    blocks = _largest(pooled_q @ pooled_k.transpose(-2, -1), kwargs["k"])
    return blocks[:, rows // size][:, :, torch.arange(tokens) // size]


def _importance(q: Tensor, k: Tensor, rows: Tensor, kwargs: dict[str, Any]) -> Tensor:
    return _largest(k.norm(dim=-1), kwargs["k"])[:, None].expand(-1, len(rows), -1)


def _vertical_slash(q: Tensor, k: Tensor, rows: Tensor, kwargs: dict[str, Any]) -> Tensor:
    heads, tokens, dim = q.shape
    last = torch.arange(max(0, tokens - kwargs["last_queries"]), tokens)
    distance = last[:, None] - torch.arange(tokens)
    scores = (q[:, last] @ k.transpose(-2, -1) * dim**-0.5).masked_fill(distance < 0, -torch.inf)
    weights = scores.softmax(-1)
    # Weights of future keys are 0, wherever they are added.
    places = distance.clamp(min=0).flatten().expand(heads, -1)
    of_distance = torch.zeros(heads, tokens, dtype=q.dtype).scatter_add_(1, places, weights.flatten(1))
    columns, slashes = _largest(weights.sum(1), kwargs["num_vertical"]), _largest(of_distance, kwargs["num_slash"])
    distance = rows[:, None] - torch.arange(tokens)
    near = distance <= (-1 if kwargs["window"] is None else kwargs["window"])
    return (columns[:, None] | slashes[:, distance.clamp(min=0)] | near) & (distance >= 0)


CHOICES: dict[str, Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]] = {
    "block_topk": _block_topk,
    "importance": _importance,
    "vertical_slash": _vertical_slash,
}
"""Of patches: (q, k (H, P, D), queries, mask_kwargs) to (H, queries, P)."""


def formula(problem: Problem) -> Attention:
    """The attention without edges of a problem, for q, k, v in any dtype."""
    assert problem.backend is not None
    kwargs = _kwargs(problem, "backend_kwargs")
    if problem.backend.name == "linformer":
        return partial(_linformer, problem.backend.get_parameter("E_k"))
    if problem.backend.name == "efficient_local":
        return partial(_efficient_local, kwargs["block_size"])
    return _efficient


def _efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v)


def _efficient_local(size: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One class token, and the keys of all patches normalised together."""
    patches = (q[:, :, 1:].softmax(-1), k[:, :, 1:].softmax(-2), v[:, :, 1:])
    blocks = zip(*(torch.split(x, size, 2) for x in patches), strict=True)
    rows = [_efficient(q[:, :, :1], k, v), *(q @ k.transpose(-2, -1) @ v for q, k, v in blocks)]
    return torch.cat(rows, 2)


def _linformer(projection: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One class token beside the projected patches, and one projection for keys and values of all heads."""
    e = projection[: k.shape[2] - 1].to(k.dtype)
    k, v = (torch.cat([x[:, :, :1], e.transpose(-2, -1) @ x[:, :, 1:]], 2) for x in (k, v))
    weights: Tensor = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    return weights @ v
