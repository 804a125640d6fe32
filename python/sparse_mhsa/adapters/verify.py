"""Dry runs of a model: in which order its attention layers are called, and whether they compute sparsely."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..layer import SparseLayer

Sample: TypeAlias = Tensor | Sequence[object] | Mapping[str, object]
"""What a model is called with: a tensor, positional or keyword arguments."""


looking: ContextVar[bool] = ContextVar("looking", default=False)
"""Whether a run only looks at the order of the layers, so that each may attend densely."""


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


def call_order(model: nn.Module, layers: Mapping[str, nn.Module], sample: Sample) -> list[str]:
    """Run a model once in evaluation and note when each layer is first called.

    Layers that are swapped already attend densely in this run: what they are configured for may not fit the sample.

    Args:
        model: the model; training flags are restored.
        layers: the layers to watch, by name.
        sample: what the model is called with.

    Returns:
        The names, in the order of their first calls; layers that were not called follow in their own order.
    """
    called: dict[str, None] = {}
    swapped = [layer for layer in layers.values() if isinstance(layer, SparseLayer)]
    # A hook on an attention layer also keeps torch's encoder layers from computing it without calling it.
    handles = [
        layer.register_forward_pre_hook(lambda _module, _args, name=name: called.setdefault(name))
        for name, layer in layers.items()
    ]
    try:
        with ExitStack() as stack:
            for layer in swapped:
                stack.enter_context(layer.densely())
            token = looking.set(True)
            stack.callback(looking.reset, token)
            _run(model, sample)
    finally:
        for handle in handles:
            handle.remove()
    return [*called, *(name for name in layers if name not in called)]


def sparse_calls(model: nn.Module, layers: Mapping[str, nn.Module], sample: Sample) -> dict[str, int]:
    """Run a model once in evaluation and count, per layer, the calls of sparse operators and of backends.

    Nothing is hooked: hooks would change which path torch's own transformer layers take, which is the very
    thing to find out. Training flags are restored.

    Args:
        model: the model.
        layers: the swapped layers to watch, by name.
        sample: what the model is called with.

    Returns:
        Number of calls by name of layer.
    """
    calls = dict.fromkeys(layers, 0)
    with _shadowed(layers, calls):
        _run(model, sample)
    return calls


def _run(model: nn.Module, sample: Sample) -> None:
    modes = {module: module.training for module in model.modules()}
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
        for module, training in modes.items():
            module.training = training


@contextmanager
def _shadowed(layers: Mapping[str, nn.Module], calls: dict[str, int]) -> Iterator[None]:
    """Every layer counts into ``calls`` what happens during its ``forward``."""
    before = {name: layer.__dict__.get("forward") for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.__dict__["forward"] = _counted(layer, name, calls)
    try:
        yield
    finally:
        for name, layer in layers.items():
            del layer.__dict__["forward"]
            if before[name] is not None:
                layer.__dict__["forward"] = before[name]


def _counted(layer: nn.Module, name: str, calls: dict[str, int]) -> Callable[..., object]:
    forward, backend = layer.forward, getattr(layer, "backend", None)

    def count(*_: object) -> None:
        calls[name] += 1

    @functools.wraps(forward)
    def counted(*args: object, **kwargs: object) -> object:
        # A backend is a module of ours, on which a hook changes nothing.
        handle = backend.register_forward_pre_hook(count) if isinstance(backend, nn.Module) else None
        try:
            with _SparseCalls() as mode:
                result = forward(*args, **kwargs)
        finally:
            if handle is not None:
                handle.remove()
        calls[name] += mode.count
        return result

    return counted
