"""Caches of keys and values for decoding, that forget by a policy.

`KVCache` holds one `LayerCache` per layer. Plain tensors go in and out; nothing here knows a framework.
"""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from .budget import Weights, allocate, numbers
from .cache_policy import CachePolicy, check_policy, whole_number
from .config import index
from .layer_cache import CacheMemory, CacheUpdate, Capacity, LayerCache, is_one_number


class KVCache:
    """The keys and values of all layers of a decoder.

    Example:
        >>> cache = KVCache(CachePolicy("combined", recent=64), num_layers=2, capacity=256)
        >>> prompt = [torch.randn(1, heads, 5, 16) for heads in (4, 2, 2)]
        >>> cache.attend(0, *prompt).shape
        torch.Size([1, 4, 5, 16])

    Args:
        policy: what is forgotten.
        num_layers: number of layers.
        capacity: most entries per head: one number; one per layer, (num_layers,); or one per layer and head of k,
            (num_layers, Hkv). Default is that of the policy.

    Raises:
        TypeError: a number is not whole.
        ValueError: the capacities have another shape, or do not hold what is never forgotten.
    """

    def __init__(
        self, policy: CachePolicy, num_layers: int, *, capacity: Capacity | Sequence[Sequence[int]] | None = None
    ) -> None:
        num_layers = whole_number(num_layers, "num_layers", 1)
        shared = is_one_number(capacity)
        of_layers = [capacity] * num_layers if shared else list(capacity)  # type: ignore[arg-type]
        if len(of_layers) != num_layers:
            raise ValueError(f"capacity: expected one entry per layer ({num_layers}), got {len(of_layers)}")
        self.policy = policy
        self.layers = [LayerCache(policy, of_layer) for of_layer in of_layers]  # type: ignore[arg-type]

    @classmethod
    def with_budget(cls, policy: CachePolicy, total: int, weights: Weights, minimum: int = 1) -> "KVCache":
        """Share a number of entries among layers and heads: equally for equal weights, else in their proportion.

        Args:
            policy: what is forgotten; without a capacity, which is what the budget gives.
            total: entries of all layers and heads of one sample.
            weights: (num_layers, Hkv) importance of every head, at least 0.
            minimum: least entries of a head; never less than the policy needs.

        Returns:
            A cache whose capacities sum to ``total``, by `budget.allocate`.

        Raises:
            ValueError: the budget is less than the minimum of all heads together, the weights have another shape, or
                the policy has a capacity of its own.
        """
        check_policy(policy)
        if policy.capacity is not None:
            raise ValueError(
                f"capacity: the policy `{policy.name}` has {policy.capacity} and total is {total}; give one of them, "
                "because a budget sets the capacity of every head"
            )
        wanted = numbers("weights", weights)
        if wanted.ndim != 2:
            raise ValueError(f"weights: expected shape (num_layers, Hkv), got {wanted.shape}")
        least = max(whole_number(minimum, "minimum", 0), policy.least_capacity)
        return cls(policy, len(wanted), capacity=allocate(total, wanted, minimum=least))

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        token_mask: Tensor | None = None,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """`LayerCache.attend` of one layer."""
        return self._at(layer).attend(q, k, v, token_mask=token_mask, scale=scale, window=window)

    def update(self, layer: int, k: Tensor, v: Tensor, *, token_mask: Tensor | None = None) -> CacheUpdate:
        """`LayerCache.update` of one layer."""
        return self._at(layer).update(k, v, token_mask=token_mask)

    def _at(self, layer: int) -> LayerCache:
        return self.layers[index("layer", layer, len(self.layers))]

    def reset(self) -> None:
        """Forget everything."""
        for layer in self.layers:
            layer.reset()

    def reorder(self, index: Tensor) -> None:
        """`LayerCache.reorder` of every layer."""
        for layer in self.layers:
            layer.reorder(index)

    def memory(self) -> CacheMemory:
        """What all layers hold together."""
        return sum((layer.memory() for layer in self.layers), CacheMemory(0, 0, 0, 0, 0))

    def state_dict(self) -> dict[str, Tensor]:
        """Everything held, as copies, by names such as ``0.keys``."""
        return {
            f"{index}.{name}": tensor
            for index, layer in enumerate(self.layers)
            for name, tensor in layer.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave a cache of the same policy and capacities, or of smaller ones.

        A layer of which nothing is in ``state`` is empty afterwards.

        Raises:
            TypeError: the state is no mapping of names to tensors, or a tensor has a wrong dtype.
            ValueError: a tensor is missing, unknown, or does not fit the others, the policy or the capacities.
        """
        of_layers: list[dict[str, Tensor]] = [{} for _ in self.layers]
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a mapping of names to tensors, got {type(state).__name__}")
        for name, tensor in state.items():
            if not isinstance(name, str):
                raise TypeError(f"state: expected names '<layer>.<tensor>', got {name!r}")
            index, _, rest = name.partition(".")
            if not index.isdecimal() or int(index) >= len(self.layers):
                raise ValueError(
                    f"state: unknown name {name!r}; expected '<layer>.<tensor>' of {len(self.layers)} layers"
                )
            of_layers[int(index)][rest] = tensor
        # All are read before one is changed: a state that is refused leaves every layer as it was.
        slots = [layer.slots_of(of_layer) for layer, of_layer in zip(self.layers, of_layers, strict=True)]
        for layer, of_layer in zip(self.layers, slots, strict=True):
            layer.go_on_from(of_layer)

    def __len__(self) -> int:
        """Number of layers."""
        return len(self.layers)

    def __getitem__(self, layer: int) -> LayerCache:
        """The cache of one layer."""
        return self.layers[layer]

    def __iter__(self) -> Iterator[LayerCache]:
        """The caches of the layers, in order."""
        return iter(self.layers)

    def __repr__(self) -> str:
        """The policy and what is held."""
        return f"KVCache({self.policy.name}, {len(self)} layers: {self.memory()})"
