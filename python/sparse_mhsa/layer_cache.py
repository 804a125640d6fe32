"""The keys and values of one layer while it decodes, and what it forgets of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import ops
from .cache_policy import CachePolicy, check_policy, whole_number
from .cache_slots import Entries, Slots
from .config import load_config
from .decoding import check_on_cpu, refuse_gradients
from .functional import autocast, check_qkv, check_scale
from .layer_mask import LayerMask

MOST_COLUMNS = 256
"""More attention sinks than these are not spelled out as columns of a mask."""

Capacity = int | Sequence[int] | NDArray[np.integer]


class CacheUpdate(NamedTuple):
    """What `LayerCache.update` returns: everything that the new tokens attend to, in order of arrival."""

    keys: Tensor
    """(B, Hkv, S, D)"""
    values: Tensor
    """(B, Hkv, S, Dv)"""
    mask: Tensor | None
    """(B, Hkv or 1, N, S) bool, True = keep, for N new tokens; None where every query keeps every key."""


@dataclass(frozen=True)
class CacheMemory:
    """What a cache holds, in entries and bytes."""

    entries: int
    """Entries of all samples, heads and layers."""
    tokens_seen: int
    """Entries that a full cache would hold."""
    bytes_used: int
    """Bytes of the keys and values kept."""
    bytes_allocated: int
    """Bytes of all tensors of the cache, its bookkeeping and its room to grow included."""
    bytes_full: int
    """Bytes of the keys and values that a full cache would hold."""

    @property
    def kept(self) -> float:
        """Share of the tokens seen that is kept; 1 for an empty cache."""
        return self.entries / self.tokens_seen if self.tokens_seen else 1.0

    def __add__(self, other: "CacheMemory") -> "CacheMemory":
        """Of both together."""
        return CacheMemory(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __str__(self) -> str:
        """One line for people."""
        sizes = (self.bytes_used, self.bytes_allocated, self.bytes_full)
        scale, unit = (2**20, "MiB") if max(sizes) >= 2**20 else (2**10, "KiB")
        used, allocated, full = (f"{size / scale:.1f} {unit}" for size in sizes)
        of_entries = f"{self.entries} of {self.tokens_seen} entries kept ({self.kept:.1%})"
        return f"{of_entries}: {used} of {full}, {allocated} allocated"


class LayerCache:
    """The keys and values of one layer.

    Every sample and head keeps entries of its own, as many as its capacity, with the positions their tokens had.
    Tokens that join several at a time join one after the other: the outputs and the cache are those of single steps,
    up to rounding. A query sees what the cache holds when its token joins, itself included, and nothing later.

    Memory is that of the entries; a cache that is not full yet grows by doubling. Sizes, dtype and number of samples
    are those of the first tokens.

    Args:
        policy: what is forgotten.
        capacity: most entries per head: one number, or one per head of k; default is that of the policy.

    Raises:
        ValueError: there is no capacity or one too many, or a capacity does not hold what is never forgotten.
    """

    def __init__(self, policy: CachePolicy, capacity: Capacity | None = None) -> None:
        check_policy(policy)
        self.policy = policy
        self._capacity = _capacities(policy, capacity)
        self._slots: Slots | None = None
        self._interrupted = False

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        token_mask: Tensor | None = None,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Let new tokens join and attend.

        The first tokens of an empty cache that forgets by age attend by the mask that this amounts to
        (``vertical_slash``, causal), with the kernels for many queries; so prefill costs what its edges do.

        Args:
            q: (B, H, N, D) queries of the N new tokens, rotated if the model rotates them.
            k: (B, Hkv, N, D) their keys, likewise; Hkv a divisor of H.
            v: (B, Hkv, N, Dv) their values.
            token_mask: (B, N) bool, False for padding, which neither joins nor attends; positions count real tokens.
            scale: factor of the scores; default 1 / sqrt(D).
            window: queries see none of what is kept that is more than so many tokens back: the half width of a causal
                mask ``local``.

        Returns:
            (B, H, N, Dv); 0 for padding.

        Raises:
            TypeError: an argument has a wrong type or dtype.
            ValueError: an argument has a wrong shape, device or value, or differs from what the cache holds.
            RuntimeError: a gradient is asked for, or an earlier step was interrupted.
        """
        return self.attend_with_lse(q, k, v, token_mask=token_mask, scale=scale, window=window)[0]

    def attend_with_lse(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        token_mask: Tensor | None = None,
        scale: float | None = None,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`attend`, and the log of the sum of the exponentials (B, H, N) in float64; -inf for padding."""
        check_qkv(q, k, v)
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"query and key: expected as many tokens, got {q.shape[2]} and {k.shape[2]}")
        self._check(k, v, token_mask, q)
        window = None if window is None else whole_number(window, "window", 0)
        check_scale(scale)
        q, k, v = autocast(q, k, v)
        scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
        slots = self._slots_for(k, v)
        if token_mask is None and self._has_mask(slots, q.shape[2], window):
            mask = self._mask_of_first_tokens(q.shape[1], slots, q.shape[2], window)
            result = ops.attention(q, k, v, mask.source(q.shape[2]), scale=scale)
            self._join(slots, None, k, v, None, scale)
            return result
        return self._join(slots, q, k, v, token_mask, scale, window)

    def update(self, k: Tensor, v: Tensor, *, token_mask: Tensor | None = None) -> CacheUpdate:
        """Let new tokens join, and return the keys and values that they attend to, for attention by other means.

        Args:
            k: (B, Hkv, N, D).
            v: (B, Hkv, N, Dv).
            token_mask: (B, N) bool, False for padding.

        Returns:
            Rectangular keys and values, and a mask where some query does not see all of them.

        Raises:
            TypeError: as `attend`.
            ValueError: as `attend`; or the policy needs the weights of the attention, or judges several tokens one by
                one: these go through `attend`.
            RuntimeError: as `attend`.
        """
        if self.policy.worth == "attention":
            raise ValueError(f"policy: `{self.policy.name}` needs the weights of the attention; use attend")
        check_qkv(k, k, v)
        self._check(k, v, token_mask, None)
        _, k, v = autocast(k, k, v)
        slots = self._slots_for(k, v)
        tokens = k.shape[2]
        by_age = self.policy.worth == "recency"
        if not by_age and tokens > 1 and slots.appended + tokens > min(slots.capacities.tolist()):
            raise ValueError(
                f"k: the policy `{self.policy.name}` judges {tokens} tokens one by one when the cache is full, so that "
                "each sees other keys; use attend"
            )
        positions = slots.positions_of(tokens, token_mask)
        before = None if by_age and tokens == 1 else slots.entries()
        self._join(slots, None, k, v, token_mask, 1.0)
        if before is None:
            entries = slots.entries()
            keys, values, at = entries.keys, entries.values, entries.positions
        else:
            keys, values = torch.cat((before.keys, k), 2), torch.cat((before.values, v), 2)
            new = positions[:, None].expand(-1, k.shape[1], -1)
            at = torch.cat((before.positions, new), 2)
        return CacheUpdate(keys, values, self._visible(positions, at, slots))

    def _visible(self, queries: Tensor, keys: Tensor, slots: Slots) -> Tensor | None:
        """(B, Hkv or 1, N, S): which key positions (B, Hkv, S) the queries at positions (B, N) see."""
        if bool((slots.capacities == slots.capacities[0]).all()):
            # Heads keep other tokens only where all of what they keep is seen.
            keys = keys[:, :1]
        i, j = queries[:, None, :, None], keys[:, :, None, :]
        mask = (j >= 0) & (j <= i)
        if self.policy.worth == "recency":
            sinks = self.policy.safe_first
            window = (slots.capacities - sinks)[: keys.shape[1], None, None]
            mask = mask & ((j < sinks) | (i - j < window))
        return None if bool(mask.all()) else mask

    def _has_mask(self, slots: Slots, tokens: int, window: int | None) -> bool:
        """Whether the next tokens are the first, and see what a static mask says."""
        # Sinks are columns, which a window cuts short.
        cut = window is not None and window < tokens - 1 and self.policy.safe_first > 0
        return (
            not cut
            and slots.appended == 0
            and tokens > 1
            and self.policy.worth == "recency"
            and self.policy.safe_first <= MOST_COLUMNS
        )

    def _mask_of_first_tokens(self, num_heads: int, slots: Slots, tokens: int, window: int | None) -> LayerMask:
        """Which keys the tokens of an empty cache see, where it forgets by age."""
        sinks = self.policy.safe_first
        most = tokens if window is None else min(tokens, window + 1)
        parts = []
        for capacity in slots.capacities.tolist():
            kwargs = {
                "vertical": list(range(min(sinks, tokens))),
                "window": min(capacity - sinks, most) - 1,
                "causal": True,
            }
            parts.append({"mask": "vertical_slash", "mask_kwargs": kwargs})
        if all(part == parts[0] for part in parts):
            return LayerMask(load_config(parts[0]), num_heads)
        group = num_heads // len(parts)
        masks = [part | {"heads": group} for part in parts]
        return LayerMask(load_config({"mask": "per_head", "mask_kwargs": {"masks": masks}}), num_heads)

    def _join(
        self,
        slots: Slots,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        token_mask: Tensor | None,
        scale: float,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        try:
            return slots.join(self.policy, q, k, v, token_mask, scale, window)
        except (TypeError, ValueError, OverflowError):  # found before anything was written
            raise
        except BaseException:
            self._interrupted = True
            raise

    def _check(self, k: Tensor, v: Tensor, token_mask: Tensor | None, q: Tensor | None) -> None:
        if self._interrupted:
            raise RuntimeError("the cache was interrupted in the middle of a step and holds anything; reset it")
        refuse_gradients(*(tensor for tensor in (q, k, v) if tensor is not None))
        check_on_cpu(k)
        if token_mask is not None:
            if token_mask.dtype != torch.bool:
                raise TypeError(f"token_mask: expected torch.bool, got {token_mask.dtype}")
            if token_mask.shape != (k.shape[0], k.shape[2]):
                expected = (k.shape[0], k.shape[2])
                raise ValueError(f"token_mask: expected shape (B, N) = {expected}, got {tuple(token_mask.shape)}")

    def _slots_for(self, k: Tensor, v: Tensor) -> Slots:
        if self._slots is None:
            heads = k.shape[1]
            if isinstance(self._capacity, tuple) and len(self._capacity) != heads:
                raise ValueError(f"capacity: expected one number per head of k ({heads}), got {len(self._capacity)}")
            capacities = self._capacity if isinstance(self._capacity, tuple) else (self._capacity,) * heads
            self._slots = Slots.empty(self.policy, k, v, capacities)
        self._slots.check_like(k, v)
        return self._slots

    @property
    def capacity(self) -> int | tuple[int, ...] | None:
        """Most entries per head: one number, one per head of k, or None for no bound."""
        return self._capacity

    @property
    def lengths(self) -> Tensor:
        """(B, Hkv) int64: entries of every sample and head; (0, 0) before the first token."""
        return (
            torch.zeros(0, 0, dtype=torch.int64, device="cpu") if self._slots is None else self._slots.lengths.clone()
        )

    @property
    def tokens_seen(self) -> Tensor:
        """(B,) int64: tokens that have joined each sample, which is the position of its next one."""
        return torch.zeros(0, dtype=torch.int64, device="cpu") if self._slots is None else self._slots.seen.clone()

    def entries(self) -> Entries:
        """The entries in order of arrival, padded to the longest head.

        Raises:
            ValueError: nothing has joined yet.
        """
        if self._slots is None:
            raise ValueError("cache: it has no entries, nor sizes, before the first token")
        return self._slots.entries()

    def reset(self) -> None:
        """Forget everything, sizes included."""
        self._slots = None
        self._interrupted = False

    def reorder(self, index: Tensor) -> None:
        """Make sample i what sample ``index[i]`` was, as beam search does; the number of samples may change.

        Args:
            index: (any number,) integers from 0 to B - 1.

        Raises:
            TypeError: it does not hold whole numbers.
            ValueError: it has another shape, or a number is out of range.
        """
        if self._slots is not None:
            self._slots.reorder(index)

    def memory(self) -> CacheMemory:
        """What is held, in entries and bytes."""
        return CacheMemory(0, 0, 0, 0, 0) if self._slots is None else CacheMemory(*self._slots.sizes())

    def state_dict(self) -> dict[str, Tensor]:
        """Everything held, as copies; empty before the first token. Only tensors, as `torch.load` likes best."""
        return {} if self._slots is None else self._slots.state(self.policy)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave a cache of the same policy and capacities.

        Raises:
            TypeError: a tensor has a wrong dtype.
            ValueError: a tensor is missing, unknown, or does not fit the others, the policy or the capacities.
        """
        self.go_on_from(self.slots_of(state))

    def slots_of(self, state: dict[str, Tensor]) -> Slots | None:
        """What `load_state_dict` would hold afterwards; this cache stays as it is.

        Raises:
            TypeError: a tensor has a wrong dtype.
            ValueError: a tensor is missing, unknown, or does not fit the others, the policy or the capacities.
        """
        return Slots.from_state(self.policy, self._capacity, state) if state else None

    def go_on_from(self, slots: Slots | None) -> None:
        """Hold what `slots_of` gave, in place of what is held."""
        self._slots = slots
        self._interrupted = False

    def __repr__(self) -> str:
        """The policy, the capacities and what is held."""
        capacity = "" if self._capacity is None else f", capacity={self._capacity}"
        return f"LayerCache({self.policy.name}{capacity}: {self.memory()})"


def _capacities(policy: CachePolicy, capacity: Capacity | None) -> int | tuple[int, ...] | None:
    """One number, one per head, or None for no bound."""
    if policy.name == "full":
        if capacity is not None:
            raise ValueError(f"capacity: the policy `full` does not take it, got {capacity!r}")
        return None
    given = policy.capacity if capacity is None else capacity
    if given is None:
        raise ValueError(f"capacity: the policy `{policy.name}` needs one, of its own or given to the cache")
    one = is_one_number(given)
    whole = tuple(whole_number(number, "capacity", 1) for number in ([given] if one else given))  # type: ignore[union-attr]
    for number in whole:
        policy.check_capacity(number, "capacity")
    return whole[0] if one else whole


def is_one_number(capacity: object) -> bool:
    """Whether ``capacity`` is no list of numbers, nor an array of more than zero dimensions."""
    return not hasattr(capacity, "__iter__") or getattr(capacity, "ndim", 1) == 0
