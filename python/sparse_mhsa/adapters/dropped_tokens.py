"""Models that drop or shuffle tokens, whose sparse layers must know where the tokens stood.

Masked autoencoders, the original and transformers', have a method ``random_masking``; VideoMAE is told what is masked;
timm has patch dropout. Each of them is made to note down what it keeps.
"""

import sys
from collections.abc import Iterator

from torch import Tensor, nn

from ..layer import SparseLayer
from ..presence import TokenPositions
from .mixing import Mixed, mixed_class
from .registry import adapters


class _Noting(Mixed):
    """Notes down which tokens are left."""

    noted: TokenPositions


class _RandomMasking(_Noting):
    """Of masked autoencoders: ``random_masking`` returns what it keeps, a mask, and how to restore the order."""

    def random_masking(self, *args: object, **kwargs: object) -> tuple[Tensor, ...]:
        """As in the class that was, which shuffles the patches and keeps the first ones."""
        config = getattr(self, "config", None)
        shares = (getattr(owner, "mask_ratio", None) for owner in (self, config))
        _take_as_constants(*args, *kwargs.values(), *shares)
        result: tuple[Tensor, ...] = super().random_masking(*args, **kwargs)  # type: ignore[misc]
        kept, _, ids_restore, *_ = result
        ids_keep = ids_restore.argsort(dim=1)[:, : kept.shape[1]]
        self.noted.keep_patches(
            ids_keep, ids_restore.shape[1], int(isinstance(getattr(self, "cls_token", None), Tensor))
        )
        self.noted.hold_until_backward(kept)
        return result


class _VideoMasking(_Noting):
    """Of transformers' VideoMAE: the embeddings keep the patches where ``bool_masked_pos`` is False."""

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None) -> Tensor:
        """As in the class that was."""
        visible = None if bool_masked_pos is None else ~bool_masked_pos
        if visible is not None:
            kept = visible.nonzero()[:, 1].view(visible.shape[0], -1)
            self.noted.keep_patches(kept, visible.shape[1], 0)
        else:
            self.noted.keep_patches(None, 0, 0)
        result: Tensor = super().forward(pixel_values, bool_masked_pos)
        self.noted.hold_until_backward(result)
        return result


class _PatchDropout(_Noting):
    """Of timm, with and without the indices as a result."""

    prob: float
    num_prefix_tokens: int
    ordered: bool

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """As in the class that was."""
        from timm.layers.patch_dropout import patch_dropout_forward

        _take_as_constants(self.prob)
        out, kept = patch_dropout_forward(x, self.prob, self.num_prefix_tokens, self.ordered, self.training)
        self.noted.keep_patches(kept, x.shape[1] - self.num_prefix_tokens, self.num_prefix_tokens)
        self.noted.hold_until_backward(out)
        return (out, kept) if self.dense_class.__name__ == "PatchDropoutWithIndices" else out


def _take_as_constants(*arguments: object) -> None:
    """Have `torch.compile` take the shares of tokens among these for constants, and compile again for other shares.

    With ``dynamic=True`` they would be symbols, and a size that follows from a symbolic float cannot enter an
    `torch.autograd.Function` (torch 2.13 asserts that it has a source). To hash one settles its value.
    """
    for argument in arguments:
        if isinstance(argument, float):
            hash(argument)


def follow_dropped_tokens(model: nn.Module) -> None:
    """Connect what drops tokens with the sparse layers behind it, and undo that where none is sparse any more."""
    for owner, module, mixin in list(_droppers(model)):
        layers = [layer for layer in _encoder_layers(owner) if isinstance(layer, SparseLayer)]
        if layers and not isinstance(module, _Noting):
            module.__class__ = mixed_class(mixin, type(module))
            assert isinstance(module, _Noting)
            module.noted = TokenPositions()
        elif not layers and isinstance(module, _Noting):
            dense: nn.Module = module
            del module.noted
            dense.__class__ = module.dense_class
        for layer in layers:
            assert isinstance(module, _Noting)
            layer.positions = module.noted


def _droppers(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, type[_Noting]]]:
    """The part of the model whose encoder sees fewer tokens, the module that drops them, and how it is followed."""
    dropout = sys.modules.get("timm.layers.patch_dropout")
    videomae = sys.modules.get("transformers.models.videomae.modeling_videomae")
    for owner in model.modules():
        if callable(getattr(owner, "random_masking", None)) and _has_attention(owner):
            yield owner, owner, _RandomMasking
        for module in owner.children():
            if callable(getattr(module, "random_masking", None)) and not _has_attention(module):
                yield owner, module, _RandomMasking
            elif videomae is not None and isinstance(module, videomae.VideoMAEEmbeddings):
                yield owner, module, _VideoMasking
            elif dropout is not None and isinstance(module, (dropout.PatchDropout, dropout.PatchDropoutWithIndices)):
                yield owner, module, _PatchDropout


def _has_attention(module: nn.Module) -> bool:
    return any(adapter.matches(part) for part in module.modules() for adapter in adapters())


def _encoder_layers(owner: nn.Module) -> Iterator[nn.Module]:
    for name, module in owner.named_modules():
        if not any(part.startswith("decoder") for part in name.split(".")):
            yield module
