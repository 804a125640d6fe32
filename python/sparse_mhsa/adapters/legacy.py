"""Running model files of 2021 and 2022, such as those of MAE and TimeSformer, on current torch, timm and numpy.

    with legacy_imports():
        from models_mae import mae_vit_base_patch16
        model = mae_vit_base_patch16()
    sparse_mhsa.sparsify(model, config)

What they rely on and what stands in for it:

- ``timm.models.vision_transformer.Block(..., qk_scale=None)``: accepted; any other ``qk_scale`` sets the scale.
- subclasses of ``timm.models.vision_transformer.VisionTransformer`` with ``forward_features(self, x)`` that pools:
  the head is applied to what it returns, as timm 0.3 did.
- ``timm.__version__``: 0.3.2, which MAE's programs insist on.
- ``timm.optim.optim_factory.add_weight_decay``: its successor under the old name.
- ``torch._six`` with ``container_abcs``, ``string_classes``, ``int_classes`` and ``inf``.
- ``torch.nn.modules.linear._LinearWithBias``: its successor under the old name.
- ``numpy.float``: Python's ``float``.
- ``torchvision.transforms.functional._get_image_size``: its successor without the underscore.
- ``torch.load`` of checkpoints with an ``argparse.Namespace`` among the weights: that class counts as safe.

Their programs build models and load checkpoints when they run, so they run within it as well, and models are swapped
where they are built:

    with legacy_imports():
        import main_pretrain, models_mae
        dense = models_mae.mae_vit_base_patch16

        def sparse(**kwargs):
            model = dense(**kwargs)
            sparse_mhsa.sparsify(model, config, verify=True)
            return model

        models_mae.mae_vit_base_patch16 = sparse
        main_pretrain.main(main_pretrain.get_args_parser().parse_args())

MAE's programs synchronise with CUDA whatever their ``--device`` is. Where there is none, ``torch.cuda.synchronize``
must be replaced by a function that does nothing.
"""

import argparse
import collections.abc
import math
import sys
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch.nn.modules.linear
import torch.serialization
from torch import Tensor

from ..extras import needed_for

with needed_for("legacy_imports", "timm"):
    import timm.models.vision_transformer
    import timm.optim
    import torchvision.transforms.functional
    from timm.models.vision_transformer import Block, VisionTransformer


class LegacyBlock(Block):
    """timm's `Block` with the argument ``qk_scale`` of timm 0.3.

    Args:
        *args: as `Block` takes them up to ``qkv_bias``, after which timm 0.3 had ``qk_scale``.
        qk_scale: factor of the scores; None for 1 / sqrt(head_dim).
        **kwargs: as `Block` takes them.
    """

    def __init__(self, *args: object, qk_scale: float | None = None, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        if qk_scale is not None:
            self.attn.scale = qk_scale  # type: ignore[assignment]
            self.attn.fused_attn = False  # type: ignore[assignment]


class LegacyVisionTransformer(VisionTransformer):
    """timm's `VisionTransformer` for subclasses whose ``forward_features`` pools, as in timm 0.3.

    Args:
        *args: as `VisionTransformer` takes them.
        qk_scale: must be None.
        representation_size: likewise.
        **kwargs: as `VisionTransformer` takes them.
    """

    def __init__(
        self, *args: object, qk_scale: None = None, representation_size: None = None, **kwargs: object
    ) -> None:
        for name, value in (("qk_scale", qk_scale), ("representation_size", representation_size)):
            if value is not None:
                raise ValueError(f"{name}: only None can be had on current timm, got {value!r}")
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Logits of (B, C, H, W) images."""
        if type(self).forward_features is VisionTransformer.forward_features:
            return super().forward(x)
        features: Tensor = self.forward_features(x)
        logits: Tensor = self.head(features)
        return logits


@contextmanager
def legacy_imports() -> Iterator[None]:
    """Within it, such files can be imported and their models built; what it changes elsewhere is changed back."""
    six = {"container_abcs": collections.abc, "string_classes": (str, bytes), "int_classes": int, "inf": math.inf}
    # What timm has under this name warns as soon as it is imported.
    optimizers = {name: value for name, value in vars(timm.optim).items() if not name.startswith("__")}
    optimizers["add_weight_decay"] = optimizers["param_groups_weight_decay"]
    linear, transforms = torch.nn.modules.linear, torchvision.transforms.functional
    with ExitStack() as stack:
        for path, contents in (("torch._six", six), ("timm.optim.optim_factory", optimizers)):
            stack.callback(_restore_module, path, sys.modules.get(path))
            sys.modules[path] = types.ModuleType(path)
            vars(sys.modules[path]).update(contents)
        for owner, name, value in (
            # `import a.b as c` looks here first.
            (timm.optim, "optim_factory", sys.modules["timm.optim.optim_factory"]),
            (timm.models.vision_transformer, "Block", LegacyBlock),
            (timm.models.vision_transformer, "VisionTransformer", LegacyVisionTransformer),
            (timm, "__version__", "0.3.2"),
            (linear, "_LinearWithBias", linear.NonDynamicallyQuantizableLinear),
            (transforms, "_get_image_size", transforms.get_image_size),
            (np, "float", float),
        ):
            stack.callback(_restore, owner, name, vars(owner).get(name))
            setattr(owner, name, value)
        stack.enter_context(torch.serialization.safe_globals([argparse.Namespace]))
        yield


def _restore(owner: types.ModuleType, name: str, value: object) -> None:
    if value is None:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


def _restore_module(name: str, before: types.ModuleType | None) -> None:
    if before is None:
        sys.modules.pop(name, None)
    else:
        sys.modules[name] = before
