"""Caches that forget, written down token by token in numpy lists, each policy from its own definition."""

import math
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Token:
    """What a head remembers of a token."""

    position: int
    key: np.ndarray
    value: np.ndarray
    score: float = 0.0


def sliding_window(tokens, capacity):
    return tokens[-capacity:]


def attention_sinks(tokens, capacity, sinks=4):
    first = [token for token in tokens if token.position < sinks]
    rest = [token for token in tokens if token.position >= sinks]
    return first + rest[max(0, len(rest) - (capacity - sinks)) :]


def _best(tokens, count, worth):
    chosen = sorted(tokens, key=lambda token: (-worth(token), token.position))[:count]
    return sorted(chosen, key=lambda token: token.position)


def score_based(tokens, capacity):
    return _best(tokens, capacity, lambda token: token.score)


def _with_safe(tokens, capacity, recent, sinks, worth):
    if len(tokens) <= capacity:
        return tokens
    newest = tokens[-1].position
    safe = [t for t in tokens if t.position < sinks or t.position > newest - recent]
    others = [t for t in tokens if t not in safe]
    return sorted(safe + _best(others, capacity - len(safe), worth), key=lambda token: token.position)


def combined(tokens, capacity, recent, sinks=0):
    return _with_safe(tokens, capacity, recent, sinks, lambda token: token.score)


def norm_based(tokens, capacity, recent=0, sinks=0, keep="low"):
    sign = -1.0 if keep == "low" else 1.0
    return _with_safe(tokens, capacity, recent, sinks, lambda token: sign * float(np.sum(token.key**2)))


SURVIVORS = {f.__name__: f for f in (sliding_window, attention_sinks, score_based, combined, norm_based)}
BY_AGE = ("sliding_window", "attention_sinks")


@dataclass
class Head:
    """One head of k of one sample, and the heads of q that share it."""

    name: str
    capacity: int | None
    options: dict
    window: int | None = None
    tokens: list = field(default_factory=list)
    seen: int = 0

    def forget(self):
        if self.name != "full":
            self.tokens = SURVIVORS[self.name](self.tokens, self.capacity, **self.options)

    def step(self, queries, key, value, scale):
        """Outputs (G, Dv) and lse (G,) of the queries (G, D) of one token."""
        self.tokens = [*self.tokens, Token(self.seen, key, value)]
        self.seen += 1
        if self.name in BY_AGE:
            self.forget()
        newest = self.tokens[-1].position
        seen = [token for token in self.tokens if self.window is None or newest - token.position <= self.window]
        outs, lses = [], []
        for query in queries:
            scores = np.array([scale * float(query @ token.key) for token in seen])
            lse = math.log(np.exp(scores - scores.max()).sum()) + scores.max()
            weights = np.exp(scores - lse)
            outs.append(sum(weight * token.value for weight, token in zip(weights, seen, strict=True)))
            lses.append(lse)
            for weight, token in zip(weights, seen, strict=True):
                token.score += float(weight)
        if self.name not in BY_AGE:
            self.forget()
        return np.array(outs), np.array(lses)


class CacheOracle:
    """All samples and heads of one layer."""

    def __init__(self, name, capacities, batch, window=None, **options):
        self.heads = [[Head(name, capacity, options, window) for capacity in capacities] for _ in range(batch)]

    def attend(self, q, k, v, real=None, scale=None):
        """(B, H, N, D), (B, Hkv, N, D) and (B, Hkv, N, Dv) to (B, H, N, Dv) and (B, H, N)."""
        batch, num_heads, tokens, dim = q.shape
        group = num_heads // k.shape[1]
        scale = 1 / math.sqrt(dim) if scale is None else scale
        out, lse = np.zeros((batch, num_heads, tokens, v.shape[3])), np.full((batch, num_heads, tokens), -np.inf)
        for b in range(batch):
            for t in range(tokens):
                if real is not None and not real[b, t]:
                    continue
                for h, head in enumerate(self.heads[b]):
                    rows = slice(h * group, (h + 1) * group)
                    out[b, rows, t], lse[b, rows, t] = head.step(q[b, rows, t], k[b, h, t], v[b, h, t], scale)
        return out, lse
