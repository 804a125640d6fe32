"""Proof that swapped layers really compute sparsely."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class _SparseCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts calls of our forward operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        self.count += func.namespace == "sparse_mhsa"
        return func(*args, **(kwargs or {}))


def sparse_calls(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    sample: Tensor | Sequence[object] | Mapping[str, object],
) -> dict[str, int]:
    """Run a model once in evaluation and count the sparse operator calls of each layer.

    Nothing is hooked: hooks would change which path torch's own transformer layers take, which is the very
    thing to find out. Training flags are restored.

    Args:
        model: the model.
        layers: the layers to watch, by name.
        sample: what the model is called with: a tensor, positional or keyword arguments.

    Returns:
        Number of operator calls by name of layer.
    """
    calls = dict.fromkeys(layers, 0)
    modes = {module: module.training for module in model.modules()}
    shadowed = {name: layer.__dict__.get("forward") for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.__dict__["forward"] = _counted(layer.forward, name, calls)
    try:
        model.eval()
        with torch.no_grad():
            if isinstance(sample, Mapping):
                model(**sample)
            elif isinstance(sample, Sequence):
                model(*sample)
            else:
                model(sample)
    finally:
        for name, layer in layers.items():
            del layer.__dict__["forward"]
            if shadowed[name] is not None:
                layer.__dict__["forward"] = shadowed[name]
        for module, training in modes.items():
            module.training = training
    return calls


def _counted(forward: Callable[..., object], name: str, calls: dict[str, int]) -> Callable[..., object]:
    @functools.wraps(forward)
    def counted(*args: object, **kwargs: object) -> object:
        with _SparseCalls() as mode:
            result = forward(*args, **kwargs)
        calls[name] += mode.count
        return result

    return counted
