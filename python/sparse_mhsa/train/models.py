"""Models by name: any of timm's, and a small Vision Transformer of our own, registered with timm; initial weights."""

import difflib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import UsageError, require_packages
from .checkpoint import read_tensors
from .datasets import ImageData
from .distributed import GatheredBatchNorm
from .recipes import ImageOptions, TrainOptions

require_packages("timm", "torchvision")

import timm  # noqa: E402
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model  # noqa: E402
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn  # noqa: E402

_LOGGER = logging.getLogger("sparse_mhsa")

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
    """Create the classifier that ``options`` describe for the images of ``data``.

    Returns:
        The model on its device, initialised from torch's generator or from ``options.finetune``.

    Raises:
        UsageError: timm has no such model, the model cannot be built for these images, or the initial weights
            do not fit.
    """
    if options.two_branch:
        from .mae import two_branch

        model: nn.Module = two_branch(options, data)
    else:
        pool = "avg" if options.global_pool else "token" if options.cls_token else None
        model = create(
            options,
            data,
            num_classes=options.nb_classes or data.num_classes,
            # The frozen layers of a linear probe always compute the same.
            drop_path_rate=0.0 if options.linear_probe else options.drop_path,
            **({} if pool is None else {"global_pool": pool}),
        )
    if options.linear_probe:
        freeze_all_but_head(model)
    if options.finetune is not None:
        load_initial_weights(model, options.finetune)
    return model.to(torch.device(options.device))


def create(options: ImageOptions, data: ImageData, **kwargs: Any) -> VisionTransformer:  # noqa: ANN401
    """A timm model for the images of ``data``, by the name ``options.model``.

    Raises:
        UsageError: timm has no such model, or it cannot be built for these images.
    """
    if not timm.is_model(options.model):
        near = difflib.get_close_matches(options.model, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UsageError(f"--model: timm has no model {options.model!r}{hint}")
    patch_size = options.patch_size or data.patch_size
    if patch_size is not None and data.input_size % patch_size:
        raise UsageError(f"--patch-size must divide the image side {data.input_size}, got {patch_size}")
    # Timm takes None for patch_size as the model's own only where it is not given at all.
    sizes: dict[str, Any] = {"img_size": data.input_size, **({} if patch_size is None else {"patch_size": patch_size})}
    try:
        model = timm.create_model(options.model, in_chans=data.in_chans, **sizes, **kwargs)
    except TypeError as error:  # it does not know img_size or patch_size
        raise UsageError(
            f"--model {options.model}: expected a Vision Transformer, whose image and patch size can be chosen: {error}"
        ) from error
    except (ValueError, AssertionError, RuntimeError) as error:
        raise UsageError(f"--model {options.model}: {error}") from error
    if not isinstance(model, VisionTransformer):
        raise UsageError(f"--model {options.model}: expected a Vision Transformer of timm, got {type(model).__name__}")
    return model


def load_initial_weights(model: nn.Module, path: Path) -> None:
    """Take over what fits from a checkpoint of ours, of timm, or of a public MAE.

    Position embeddings and patch projections of other sizes are resized. A head that does not fit (for other classes,
    or a linear probe's) is left out as a whole, and so are a decoder that the model has not and the final norm of a
    model that pools otherwise: normalised are either all tokens or the mean of the patches.

    Args:
        model: a Vision Transformer.
        path: the file.

    Raises:
        UsageError: the file is missing or damaged, or a weight is missing, superfluous or of another shape.
    """
    assert isinstance(model, VisionTransformer)
    file = read_weights(path)
    given = checkpoint_filter_fn(dict(file), model)
    if "decoder_embed.weight" in file and "mask_token" in file:
        # That of a decoder; timm takes every one for DINOv2's, which its models have no use for.
        given["mask_token"] = file["mask_token"]
    own = model.state_dict()
    decoder = ("decoder", "mask_token")
    weights = {name: tensor for name, tensor in given.items() if name in own or not name.startswith(decoder)}
    fresh = set()
    if _shapes(weights, "head.") != _shapes(own, "head."):
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
    mine, other = ("fc_norm.", "norm.") if "fc_norm.weight" in own else ("norm.", "fc_norm.")
    if f"{mine}weight" not in weights and f"{other}weight" in weights:
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(other)}
        fresh |= {name for name in own if name.startswith(mine)}
    for name in own.keys() - weights.keys():
        if name.startswith(("head.", "fc_norm.", *decoder)):
            fresh.add(name)
    _take_over(model, weights, fresh, path, given.keys() - weights.keys())
    if "head.weight" in fresh:
        nn.init.trunc_normal_(model.get_parameter("head.weight"), std=2e-5)


def load_state(model: nn.Module, path: Path, prefix: str = "") -> None:
    """Take over a checkpoint of the very model, or of one with a head for other classes.

    Args:
        model: with a linear ``head``.
        path: the file.
        prefix: that its names may have and the model's have not.

    Raises:
        UsageError: the file is missing or damaged, or a weight is missing, superfluous or of another shape.
    """
    own = model.state_dict()
    given = {name.removeprefix(prefix): tensor for name, tensor in read_weights(path).items()}
    fresh = {name for name in ("head.weight", "head.bias") if name not in given or given[name].shape != own[name].shape}
    weights = {name: tensor for name, tensor in given.items() if name not in fresh}
    _take_over(model, weights, fresh, path, given.keys() - weights.keys())


def _shapes(weights: Mapping[str, Tensor], prefix: str) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items() if name.startswith(prefix)}


def _take_over(
    model: nn.Module, weights: dict[str, Tensor], fresh: set[str], path: Path, left_out: Iterable[str]
) -> None:
    """Load ``weights``, which must be all that the model has but ``fresh``; ``left_out`` is what else the file has."""
    own = model.state_dict()
    problems = [f"it has no {name}" for name in sorted(own.keys() - weights.keys() - fresh)]
    problems += [f"it also has {name}" for name in sorted(weights.keys() - own.keys())]
    problems += [
        f"{name} is {tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}"
        for name, tensor in weights.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if problems:
        raise UsageError(f"--finetune: '{path}' does not fit the model: {'; '.join(problems[:3])}")
    for name, tensor in weights.items():
        if own[name].is_floating_point() and not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UsageError(f"--finetune: '{path}' is damaged: {name}: expected floating-point numbers, got {kind}")
        if not torch.isfinite(tensor).all():
            raise UsageError(f"--finetune: '{path}' is damaged: {name}: expected finite numbers, got NaN or infinity")
    model.load_state_dict(weights, strict=False)
    kept = len(own) - len(fresh)
    unused = sorted({name.partition(".")[0] for name in left_out})
    _LOGGER.info(
        "%s: %d of %d tensors taken over, new: %s%s",
        path,
        kept,
        len(own),
        ", ".join(sorted(fresh)) or "none",
        f"; left out: {', '.join(unused)}" if unused else "",
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, under ``model``, ``state_dict`` or at the top; no code of the file is run.

    Raises:
        UsageError: the file is missing, damaged, or holds something else.
    """
    state = read_tensors(path, "--finetune")
    if isinstance(state, dict):
        if isinstance(state.get("attention"), str):
            _LOGGER.info(
                "%s was trained with sparse attention; its weights are taken, and the attention is that of --attn-cfg",
                path,
            )
        state = next((state[key] for key in ("model", "state_dict") if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UsageError(f"--finetune: '{path}' holds no state dict")
    return state


def freeze_all_but_head(model: nn.Module) -> None:
    """Make a linear probe as in MAE: frozen features, normalised per batch, and a new linear head."""
    head = model.head
    assert isinstance(head, nn.Linear)
    model.requires_grad_(False)
    fresh = nn.Linear(head.in_features, head.out_features)
    nn.init.trunc_normal_(fresh.weight, std=0.01)
    nn.init.zeros_(fresh.bias)
    model.head = nn.Sequential(GatheredBatchNorm(head.in_features, eps=1e-6), fresh)


def num_tokens(model: nn.Module) -> int:
    """Tokens that every attention layer of a Vision Transformer sees: patches and prefix tokens."""
    patches, prefix = getattr(model.patch_embed, "num_patches", None), getattr(model, "num_prefix_tokens", 0)
    if not isinstance(patches, int):
        raise UsageError(f"{type(model).__name__} is not a Vision Transformer with a fixed number of patches")
    return patches + int(prefix)
