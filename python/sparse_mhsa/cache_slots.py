"""The tensors of one layer's cache: where entries are, how room for them grows, and their order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from .cache_policy import CachePolicy
from .decoding import worth_dtype

UNBOUNDED = 1 << 62
"""The capacity of a cache that forgets nothing."""

_INTEGERS = ("positions", "lengths", "seen", "starts")


class Entries(NamedTuple):
    """Entries in order of arrival, padded to the longest head with zeros at position -1."""

    keys: Tensor
    """(B, Hkv, S, D)"""
    values: Tensor
    """(B, Hkv, S, Dv)"""
    positions: Tensor
    """(B, Hkv, S) int64: which token of its sample each entry was."""
    worths: Tensor | None
    """(B, Hkv, S): sums of weights received, or squares of the keys' norms (negative where small ones are kept);
    None for policies by age."""
    lengths: Tensor
    """(B, Hkv) int64"""


@dataclass
class Slots:
    """Head h of every sample owns slots ``starts[h]`` to ``starts[h + 1]`` and fills the first ``lengths`` of them.

    So heads of different capacities waste nothing. A token that joins a full head takes the slot of the one that
    goes: slots are in no order, positions say which token is where.
    """

    keys: Tensor
    """(B, S, D)"""
    values: Tensor
    """(B, S, Dv)"""
    positions: Tensor
    """(B, S)"""
    worths: Tensor
    """(B, S), or (B, 0) for policies by age."""
    lengths: Tensor
    """(B, Hkv)"""
    seen: Tensor
    """(B,) tokens that have joined."""
    starts: Tensor
    """(Hkv + 1,)"""
    capacities: Tensor
    """(Hkv,)"""
    appended: int = 0
    """No head of any sample has more entries than this."""
    fits: int = 0
    """So many may be appended in all before there is need to grow."""

    @classmethod
    def empty(cls, policy: CachePolicy, k: Tensor, v: Tensor, capacities: Sequence[int | None]) -> "Slots":
        """Room for nothing, in the dtype and sizes of (B, Hkv, N, D) keys and (B, Hkv, N, Dv) values."""
        batch, heads = k.shape[:2]
        of_heads = [UNBOUNDED if capacity is None else capacity for capacity in capacities]
        return cls(
            keys=torch.zeros(batch, 0, k.shape[3], dtype=k.dtype, device="cpu"),
            values=torch.zeros(batch, 0, v.shape[3], dtype=v.dtype, device="cpu"),
            positions=torch.zeros(batch, 0, dtype=torch.int64, device="cpu"),
            worths=torch.zeros(batch, 0, dtype=worth_dtype(k.dtype), device="cpu"),
            lengths=torch.zeros(batch, heads, dtype=torch.int64, device="cpu"),
            seen=torch.zeros(batch, dtype=torch.int64, device="cpu"),
            starts=torch.zeros(heads + 1, dtype=torch.int64, device="cpu"),
            capacities=torch.tensor(of_heads, dtype=torch.int64, device="cpu"),
        )

    def check_like(self, k: Tensor, v: Tensor) -> None:
        """Raise unless new keys and values are of the kind that is held."""
        held = (*self.lengths.shape, self.keys.shape[2])
        if (*k.shape[:2], k.shape[3]) != held:
            raise ValueError(f"key: expected (B, Hkv, D) = {held} as in the cache, got {(*k.shape[:2], k.shape[3])}")
        if v.shape[3] != self.values.shape[2]:
            raise ValueError(f"value: expected {self.values.shape[2]} channels as in the cache, got {v.shape[3]}")
        if k.dtype != self.keys.dtype:
            raise TypeError(f"key: expected {self.keys.dtype} as in the cache, got {k.dtype}")

    def positions_of(self, tokens: int, token_mask: Tensor | None) -> Tensor:
        """(B, N) int64 positions of the next tokens, -1 for padding."""
        if token_mask is None and tokens == 1:
            return self.seen[:, None]
        if token_mask is None:
            return self.seen[:, None] + torch.arange(tokens, device="cpu")
        return (self.seen[:, None] + token_mask.cumsum(1) - 1).masked_fill(~token_mask, -1)

    def join(
        self,
        policy: CachePolicy,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        token_mask: Tensor | None,
        scale: float,
        window: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Let tokens join one after the other; output and lse of their queries, if there are any."""
        tokens = k.shape[2]
        positions = self.positions_of(tokens, token_mask)
        new = tokens if token_mask is None else token_mask.sum(1)
        if q is None and token_mask is None and policy.worth == "recency":
            # Of a long prompt, only what remains of it has to join.
            first, last = policy.safe_first, int(self.capacities.max())
            if first + last < tokens:
                k, v = (torch.cat((x[:, :, :first], x[:, :, tokens - last :]), 2) for x in (k, v))
                positions = torch.cat((positions[:, :first], positions[:, tokens - last :]), 1)
        self._make_room(policy, k.shape[2])
        result: tuple[Tensor, Tensor] = torch.ops.sparse_mhsa.cache_step.default(
            q,
            k,
            v,
            positions,
            self.keys,
            self.values,
            self.positions,
            self.worths,
            self.lengths,
            self.starts,
            self.capacities,
            policy.worth,
            policy.safe_first,
            policy.safe_last,
            scale,
            window,
        )
        self.seen = self.seen + new  # not in place: it may have been made in inference mode
        self.appended += tokens
        return result

    def _make_room(self, policy: CachePolicy, tokens: int) -> None:
        """Grow, by doubling, to what ``tokens`` more may need."""
        if self.appended + tokens <= self.fits:
            return
        spare = _spare(policy)
        most = [capacity + spare for capacity in self.capacities.tolist()]
        rooms = self.starts.diff().tolist()
        needed = [min(self.appended + tokens, bound) for bound in most]
        wanted = [
            room if room >= need else min(max(need, 2 * room), bound)
            for room, need, bound in zip(rooms, needed, most, strict=True)
        ]
        self.fits = min((room for room, bound in zip(wanted, most, strict=True) if room < bound), default=2 * UNBOUNDED)
        if wanted == rooms:
            return
        starts = torch.tensor([0, *wanted], dtype=torch.int64, device="cpu").cumsum(0)
        old, new, size = self.starts.tolist(), starts.tolist(), sum(wanted)
        for name in ("keys", "values", "positions", "worths"):
            tensor = getattr(self, name)
            if name == "worths" and policy.worth == "recency":
                continue
            grown = tensor.new_zeros(tensor.shape[0], size, *tensor.shape[2:])
            for head, room in enumerate(rooms):
                grown[:, new[head] : new[head] + room] = tensor[:, old[head] : old[head] + room]
            setattr(self, name, grown)
        self.starts = starts

    def entries(self) -> Entries:
        """The entries in order of arrival."""
        batch = self.lengths.shape[0]
        longest = int(self.lengths.max()) if self.lengths.numel() else 0
        places = torch.arange(longest, device="cpu")
        exists = places < self.lengths[:, :, None]
        slots = (self.starts[:-1, None] + places).expand(batch, -1, -1)
        slots = slots.masked_fill(~exists, 0)
        positions = _gather(self.positions, slots).masked_fill(~exists, UNBOUNDED)
        order = positions.argsort(-1)
        # Those that do not exist are last in any order.
        slots = slots.gather(-1, order)
        return Entries(
            _gather(self.keys, slots).masked_fill(~exists[..., None], 0),
            _gather(self.values, slots).masked_fill(~exists[..., None], 0),
            positions.gather(-1, order).masked_fill(~exists, -1),
            _gather(self.worths, slots).masked_fill(~exists, 0) if self.worths.shape[1] else None,
            self.lengths.clone(),
        )

    def reorder(self, index: Tensor) -> None:
        """Make sample i what sample ``index[i]`` was."""
        if index.is_floating_point() or index.dtype == torch.bool:
            raise TypeError(f"index: expected whole numbers, got {index.dtype}")
        batch = self.lengths.shape[0]
        if index.dim() != 1:
            raise ValueError(f"index: expected one dimension, got shape {tuple(index.shape)}")
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < batch:
            raise ValueError(f"index: expected 0 to {batch - 1}, got {int(index.min())} to {int(index.max())}")
        for name in ("keys", "values", "positions", "worths", "lengths", "seen"):
            setattr(self, name, getattr(self, name)[index])

    def sizes(self) -> tuple[int, int, int, int, int]:
        """Entries, tokens seen times heads, and bytes of the former, of all tensors, and of the latter."""
        heads = self.lengths.shape[1]
        per_entry = self.keys.shape[2] * self.keys.element_size() + self.values.shape[2] * self.values.element_size()
        entries, seen = int(self.lengths.sum()), int(self.seen.sum()) * heads
        allocated = sum(tensor.nbytes for tensor in self._tensors().values())
        return entries, seen, entries * per_entry, allocated, seen * per_entry

    def _tensors(self) -> dict[str, Tensor]:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def state(self, policy: CachePolicy) -> dict[str, Tensor]:
        """Copies of all tensors but the capacities, which belong to the cache, and the rule of the policy."""
        held = {name: tensor.clone() for name, tensor in self._tensors().items() if name != "capacities"}
        return held | {"policy": _bytes(policy.rule)}

    @classmethod
    def from_state(
        cls, policy: CachePolicy, capacity: int | tuple[int, ...] | None, state: Mapping[str, Tensor]
    ) -> "Slots":
        """What `state` gave, whose names, dtypes, shapes, bounds and order are checked: a step reads by them."""
        names = [item.name for item in fields(cls) if item.name not in ("capacities", "appended", "fits")]
        if set(state) != {*names, "policy"}:
            expected = ", ".join([*names, "policy"])
            raise ValueError(f"state: expected {expected}, got {', '.join(map(str, state)) or 'nothing'}")
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if not torch.equal(state["policy"].cpu(), _bytes(policy.rule)):
            raise ValueError(
                f"policy: expected a state of `{policy.rule}` as of the cache, got {_text(state['policy'])}"
            )
        parts = {name: state[name].detach().to("cpu").contiguous().clone() for name in names}
        for name, ndim in (
            ("keys", 3),
            ("values", 3),
            ("positions", 2),
            ("worths", 2),
            ("lengths", 2),
            ("seen", 1),
            ("starts", 1),
        ):
            if parts[name].dim() != ndim:
                raise ValueError(f"{name}: expected {ndim} dimensions, got shape {tuple(parts[name].shape)}")
        for name in _INTEGERS:
            if parts[name].dtype != torch.int64:
                raise TypeError(f"{name}: expected torch.int64, got {parts[name].dtype}")
        keys, lengths, starts = parts["keys"], parts["lengths"], parts["starts"]
        (batch, heads), size = lengths.shape, keys.shape[1]
        capacities = capacity if isinstance(capacity, tuple) else (capacity,) * heads
        if len(capacities) != heads:
            raise ValueError(f"lengths: expected {len(capacities)} heads as the cache has capacities, got {heads}")
        bounds = torch.tensor(
            [UNBOUNDED if bound is None else bound for bound in capacities], dtype=torch.int64, device="cpu"
        )
        ranked = 0 if policy.worth == "recency" else size
        shapes = {
            "keys": (batch, size, keys.shape[2]),
            "values": (batch, size, parts["values"].shape[2]),
            "positions": (batch, size),
            "worths": (batch, ranked),
            "seen": (batch,),
            "starts": (heads + 1,),
        }
        for name, shape in shapes.items():
            if tuple(parts[name].shape) != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(parts[name].shape)}")
        if parts["values"].dtype != keys.dtype:
            raise TypeError(f"values: expected {keys.dtype} like keys, got {parts['values'].dtype}")
        if parts["worths"].dtype != worth_dtype(keys.dtype):
            raise TypeError(f"worths: expected {worth_dtype(keys.dtype)}, got {parts['worths'].dtype}")
        # One of the wrong sign would be worth more, or less, than whatever is still to come.
        sign, bound = (-1, "at most 0") if policy.worth == "low_norm" else (1, "at least 0")
        wrong = parts["worths"][parts["worths"] * sign < 0]
        if len(wrong):
            raise ValueError(f"worths: the policy `{policy.rule}` expects {bound}, got {float(wrong[0])}")
        rooms = starts.diff()
        if int(starts[0]) != 0 or int(starts[-1]) != size or bool((rooms < 0).any()):
            raise ValueError(f"starts: expected ascending offsets from 0 to {size}, got {starts.tolist()}")
        if bool(((lengths < 0) | (lengths > rooms) | (lengths > bounds) | (lengths > parts["seen"][:, None])).any()):
            raise ValueError("lengths: expected at most the slots, the capacity and the tokens seen of every head")
        slots = cls(**parts, capacities=bounds, appended=int(lengths.max()) if lengths.numel() else 0, fits=0)
        positions = slots.entries().positions
        ascending = (positions.diff(dim=-1) > 0) | (positions[..., 1:] < 0)
        outside = (positions >= parts["seen"][:, None, None]).any() or ((positions >= 0).sum(-1) != lengths).any()
        if not bool(ascending.all()) or bool(outside):
            raise ValueError("positions: expected different tokens among those seen in every head")
        return slots


def _spare(policy: CachePolicy) -> int:
    """Entries beyond the capacity while a step lasts: a token must be attended to before it can be judged."""
    return 0 if policy.worth == "recency" else 1


def _bytes(text: str) -> Tensor:
    """Text in a tensor, because a state holds nothing else."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")


def _text(encoded: Tensor) -> str:
    """What `_bytes` was given, or what there is instead."""
    if encoded.dtype != torch.uint8 or encoded.dim() != 1:
        return f"{encoded.dtype} of shape {tuple(encoded.shape)}"
    return f"`{bytes(encoded[:80].tolist()).decode(errors='replace')}`"


def _gather(tensor: Tensor, slots: Tensor) -> Tensor:
    """(B, S, ...) at (B, Hkv, n) slots."""
    if tensor.shape[1] == 0:
        return tensor.new_zeros(*slots.shape, *tensor.shape[2:])
    samples = torch.arange(tensor.shape[0], device="cpu")[:, None, None]
    return tensor[samples, slots]
