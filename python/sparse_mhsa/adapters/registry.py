"""The adapters and what they find in a model."""

import math
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..backends import Backend
from ..layer import SparseLayer
from ..layer_mask import LayerMask
from ..mask import Mask
from .verify import Sample, call_order

_ADAPTERS: "list[Adapter]" = []


class Adapter(ABC):
    """How to recognise and swap the attention of one framework."""

    name: str
    """Shown in reports."""

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether ``module`` is self-attention, dense or already swapped, that this adapter handles."""

    @abstractmethod
    def heads(self, module: nn.Module) -> tuple[int, int]:
        """Number of heads and head dimension."""

    def embed_dim(self, module: nn.Module) -> int | None:
        """Width of the tokens that ``module`` takes, or None if it does not tell."""
        return None

    @abstractmethod
    def sparsify(self, module: nn.Module, layer_mask: LayerMask | Mask) -> None:
        """Swap ``module`` in place, or give an already swapped one another mask."""

    def check(self, module: nn.Module, layer_mask: LayerMask | Mask) -> None:  # noqa: B027  (optional)
        """Raise, without changing anything, what would keep `sparsify` from swapping ``module``."""

    def dropout(self, module: nn.Module) -> float:
        """Probability that ``module`` drops an attention weight in training."""
        return 0.0

    @abstractmethod
    def densify(self, module: nn.Module) -> None:
        """Undo `sparsify`."""

    def dense_by_design(self, parent: nn.Module | None, name: str) -> str | None:
        """Why the attention ``name`` inside ``parent`` stays dense unless asked for, or None."""
        return None

    def layout(self, module: nn.Module) -> "Layout | None":
        """How tokens are arranged in ``module``, a model or a part of one, or None if it does not tell."""
        return None

    def finish(self, model: nn.Module) -> None:  # noqa: B027  (optional)
        """Adjust what surrounds the swapped layers of a model, after a swap in either direction."""

    def sample(self, model: nn.Module) -> Tensor | None:
        """An input that ``model`` takes, or None if it cannot be told from the model."""
        return None


def register_adapter(adapter: type[Adapter]) -> type[Adapter]:
    """Class decorator: try this adapter after those registered before it."""
    _ADAPTERS.append(adapter())
    return adapter


def adapters() -> tuple[Adapter, ...]:
    """Every registered adapter."""
    return tuple(_ADAPTERS)


@dataclass(frozen=True)
class Site:
    """One attention layer in a model, with what the model tells about it."""

    name: str
    module: nn.Module
    adapter: Adapter
    layer: int
    num_layers: int
    num_tokens: int | None
    grid: tuple[int, ...] | None
    num_prefix_tokens: int | None
    token_order: str
    dense_by_design: str | None

    @property
    def is_temporal(self) -> bool:
        """The layer attends between the frames of one patch."""
        return _is_temporal(self.name)

    @property
    def num_heads(self) -> int:
        """H."""
        return self.adapter.heads(self.module)[0]

    @property
    def layer_mask(self) -> LayerMask | Mask | None:
        """The mask of an already swapped layer."""
        return self.module.layer_mask if isinstance(self.module, SparseLayer) else None

    @property
    def backend(self) -> Backend | None:
        """The backend of an already swapped layer, if it is not softmax over edges."""
        return self.module.backend if isinstance(self.module, SparseLayer) else None


@dataclass(frozen=True)
class Layout:
    """How tokens are arranged: prefix tokens, then a grid of patches. None where the model does not tell."""

    grid: tuple[int, ...] | None = None
    num_prefix_tokens: int | None = None
    token_order: str = "row_major"
    """Of a grid of frames; as in the configuration."""
    num_frames: int | None = None
    """Of the clips that the model is made for; they are all tokens of temporal attention, which has no grid."""

    @property
    def num_tokens(self) -> int | None:
        """N."""
        if self.grid is None and self.num_frames is not None:
            return self.num_frames
        if self.grid is None or self.num_prefix_tokens is None:
            return None
        return math.prod(self.grid) + self.num_prefix_tokens


def find_attention(model: nn.Module, sample: Sample | None = None) -> list[Site]:
    """Every self-attention layer that some adapter knows.

    Layers are numbered within their stack, the modules whose names differ in numbers only, such as
    ``blocks.0.attn`` to ``blocks.11.attn``, in the order in which the model calls them.

    Args:
        model: the model.
        sample: an input; the model is run on it once to see the order. None takes the order in which the
            modules are registered, which is the one in which torch's, torchvision's and timm's models call them.

    Returns:
        The layers in that order.
    """
    found = []
    for name, module in model.named_modules():
        adapter = next((adapter for adapter in _ADAPTERS if adapter.matches(module)), None)
        if adapter is not None:
            found.append((name, module, adapter))
    if sample is not None:
        order = call_order(model, {name: module for name, module, _ in found}, sample)
        found.sort(key=lambda entry: order.index(entry[0]))
    stacks = _stacks(model, [(name, module) for name, module, _ in found])
    sites = []
    for name, module, adapter in found:
        stack = stacks[id(module)]
        layout = _layout(model, name)
        # PEFT puts a layer inside one of its own, in the place that the layer had.
        place = name.removesuffix(".base_layer")
        parent = model.get_submodule(place.rpartition(".")[0]) if place else None
        sites.append(
            Site(
                name=name,
                module=module,
                adapter=adapter,
                layer=stack.index(id(module)),
                num_layers=len(stack),
                num_tokens=layout.num_tokens,
                grid=layout.grid,
                num_prefix_tokens=layout.num_prefix_tokens,
                token_order=layout.token_order,
                dense_by_design=_by_name(name) or adapter.dense_by_design(parent, place),
            )
        )
    return sites


def _stacks(model: nn.Module, layers: list[tuple[str, nn.Module]]) -> dict[int, list[int]]:
    """The layers of the stack that each layer is in, in their order, all by `id`.

    Of a layer of a stack that is also known, and found, by a name of its own, it is the larger one.
    """
    other_names: dict[int, list[str]] = {}
    for prefix, parent in model.named_modules():
        for child, module in parent._modules.items():
            other_names.setdefault(id(module), []).append(f"{prefix}.{child}".removeprefix("."))
    members: dict[str, list[int]] = {}
    names: dict[int, list[str]] = {}
    for name, module in layers:
        names[id(module)] = list(dict.fromkeys(map(_stack, [name, *other_names.get(id(module), [])])))
        for stack in names[id(module)]:
            members.setdefault(stack, []).append(id(module))
    return {layer: max((members[stack] for stack in stacks), key=len) for layer, stacks in names.items()}


def unsupported(model: nn.Module, sites: list[Site]) -> Iterator[tuple[str, nn.Module]]:
    """Modules that call themselves attention, but are not handled and do not contain what is."""
    known = [site.name for site in sites]

    def contains(name: str, others: list[str]) -> bool:
        return any(other == name or other.startswith(f"{name}.") or not name for other in others)

    # A subclass of torch's layer is not swapped, because it may compute something else, whatever it is called.
    named = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) or re.search(r"Attention|Attn", type(module).__name__)
    ]
    for name, module in model.named_modules():
        by_name = name in named
        inside = any(name.startswith(f"{other}.") for other in [*named, *known] if other)
        if (by_name or (_projects_queries(module) and not inside and not contains(name, named))) and not contains(
            name, known
        ):
            yield name, module


def _projects_queries(module: nn.Module) -> bool:
    """Whether a module looks like attention by what is in it, whatever its name."""
    parts = dict(module.named_children()).keys()
    several_heads = isinstance(getattr(module, "num_heads", None), int)
    return not parts.isdisjoint({"qkv", "to_qkv", "qk"}) or (several_heads and "in_proj" in parts)


def why_unsupported(module: nn.Module) -> str:
    """What is known of the reason why no adapter handles an attention module."""
    kind = f"no adapter for {type(module).__qualname__}"
    if is_parametrized(module):
        return f"{kind}, whose own weights are parametrized: swap it first"
    if is_sharded(module):
        return f"{kind}, which is sharded by itself: swap it first"
    if any("relative_position" in name or name.startswith("rel_pos") for name, _ in _tensors_and_parts(module)):
        return f"{kind}, which adds biases by relative position"
    return f"{kind}, which attends within windows already" if hasattr(module, "window_size") else kind


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on this very module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _tensors_and_parts(module: nn.Module) -> Iterator[tuple[str, object]]:
    yield from module._parameters.items()
    yield from module._buffers.items()
    yield from module._modules.items()


def _stack(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _by_name(name: str) -> str | None:
    if _is_temporal(name):
        return "temporal attention"
    if any(part.startswith("decoder") for part in name.split(".")):
        return "decoder"
    return None


def _is_temporal(name: str) -> bool:
    return any(part.startswith("temporal") for part in name.split("."))


def _layout(model: nn.Module, name: str) -> Layout:
    """What the innermost module around ``name`` tells that tells anything."""
    ancestors = [model]
    for part in name.split(".")[:-1]:
        ancestors.append(ancestors[-1].get_submodule(part))
    if _is_temporal(name):
        # The frames of one patch, and no class token among them.
        return Layout(None, 0, num_frames=next(filter(None, map(_num_frames, reversed(ancestors))), None))
    for module in reversed(ancestors):
        for adapter in _ADAPTERS:
            layout = adapter.layout(module)
            if layout is not None:
                return layout
    return Layout()


def _num_frames(module: nn.Module) -> int | None:
    """Of the clips that a video model takes, by its embedding of times or its configuration."""
    times = getattr(module, "time_embed", None)
    frames = (
        times.shape[1] if isinstance(times, Tensor) else getattr(getattr(module, "config", None), "num_frames", None)
    )
    return frames if isinstance(frames, int) else None


def sides(size: object) -> tuple[int, int] | None:
    """Height and width from a number, a pair, or neither."""
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if isinstance(size, (list, tuple)) and len(size) == 2 else None


def random_image(projection: object, sides: Sequence[int]) -> Tensor | None:
    """One random image for the convolution that cuts images into patches, or the first one of several layers.

    Returns:
        (1, channels, *sides) on the device and in the dtype of the weights, or None without a convolution.
    """
    layers = projection.modules() if isinstance(projection, nn.Module) else ()
    convolution = next((layer for layer in layers if isinstance(layer, nn.Conv2d)), None)
    if convolution is None:
        return None
    weight = convolution.weight
    generator = torch.Generator(weight.device) if weight.device.type != "meta" else None
    shape = (1, convolution.in_channels, *sides)
    return torch.randn(shape, generator=generator, device=weight.device).to(weight.dtype)
