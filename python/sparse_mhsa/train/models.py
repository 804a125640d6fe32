"""Models by name: any of timm's, and a small Vision Transformer of our own, registered with timm."""

import difflib
from typing import Any

import torch
from torch import nn

from . import UsageError, require_packages
from .datasets import ImageData
from .options import TrainOptions

require_packages("timm", "torchvision")

import timm  # noqa: E402
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model  # noqa: E402
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn  # noqa: E402

default_cfgs = generate_default_cfgs(
    {
        "vit_micro": {
            "input_size": (3, 28, 28),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


@register_model
def vit_micro(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:  # noqa: ANN401
    """A Vision Transformer small enough to train on a laptop: dim 64, depth 4, 4 heads, 0.2 M parameters.

    At its own 28 x 28 pixels and patch side 2 it has 196 patches and a class token, the sequence of ViT-B/16
    at 224 px, so that attention masks have their true size. It predicts from the mean of the patches.
    """
    own: dict[str, Any] = {
        "img_size": 28,
        "patch_size": 2,
        "embed_dim": 64,
        "depth": 4,
        "num_heads": 4,
        "global_pool": "avg",
        # PyTorch's own: timm's (normal with std 0.02) is made for wide models and too small here.
        "weight_init": "reset",
    }
    return build_model_with_cfg(
        VisionTransformer,
        "vit_micro",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        **(own | kwargs),
    )


def build_model(options: TrainOptions, data: ImageData) -> nn.Module:
    """Create the model that ``options`` describe for the images of ``data``.

    Returns:
        The model on its device, initialised from torch's generator or from ``options.finetune``.

    Raises:
        UsageError: timm has no such model, the model cannot be built for these images, or the initial weights
            do not fit.
    """
    if not timm.is_model(options.model):
        near = difflib.get_close_matches(options.model, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UsageError(f"--model: timm has no model {options.model!r}{hint}")
    patch_size = options.patch_size or data.patch_size
    if patch_size is not None and data.input_size % patch_size:
        raise UsageError(f"--patch-size must divide the image side {data.input_size}, got {patch_size}")
    if options.finetune is not None and not options.finetune.is_file():
        raise UsageError(f"--finetune: no such file: '{options.finetune}'")
    weights = {"file": str(options.finetune), "custom_load": False} if options.finetune else None
    try:
        model = timm.create_model(
            options.model,
            pretrained=weights is not None,
            pretrained_cfg_overlay=weights,
            num_classes=options.nb_classes or data.num_classes,
            in_chans=data.in_chans,
            img_size=data.input_size,
            patch_size=patch_size,
            drop_path_rate=options.drop_path,
        )
    except TypeError as error:  # it does not know img_size or patch_size
        raise UsageError(
            f"--model {options.model}: expected a Vision Transformer, whose image and patch size can be chosen: {error}"
        ) from error
    except (ValueError, AssertionError, RuntimeError) as error:
        given = f" with --finetune '{options.finetune}'" if weights else ""
        raise UsageError(f"--model {options.model}{given}: {error}") from error
    return model.to(torch.device(options.device))


def num_tokens(model: nn.Module) -> int:
    """Tokens that every attention layer of a Vision Transformer sees: patches and prefix tokens."""
    patches, prefix = getattr(model.patch_embed, "num_patches", None), getattr(model, "num_prefix_tokens", 0)
    if not isinstance(patches, int):
        raise UsageError(f"{type(model).__name__} is not a Vision Transformer with a fixed number of patches")
    return patches + int(prefix)
