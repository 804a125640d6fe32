"""Masked autoencoder: a Vision Transformer that sees a part of the patches, and a small one that restores the rest.

After He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377. The names of the parameters are
those of the public checkpoints, so weights go both ways.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..layer import SparseLayer
from . import UsageError
from .datasets import ImageData
from .models import create
from .recipes import PretrainOptions, TrainOptions


class MaskedAutoencoder(VisionTransformer):
    """A timm Vision Transformer with a class token, and the decoder that makes it a masked autoencoder.

    Made by `around`. The encoder's masks apply at the original positions of the patches that it sees.
    """

    mask_ratio: float
    norm_pix_loss: bool
    decoder_embed: nn.Linear
    mask_token: nn.Parameter
    decoder_pos_embed: nn.Parameter
    decoder_blocks: nn.ModuleList
    decoder_norm: nn.LayerNorm
    decoder_pred: nn.Linear

    @classmethod
    def around(
        cls,
        encoder: VisionTransformer,
        *,
        decoder_dim: int,
        decoder_depth: int,
        decoder_heads: int,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = False,
    ) -> "MaskedAutoencoder":
        """Turn a Vision Transformer into a masked autoencoder, in place.

        Args:
            encoder: with one class token and a position for every token.
            decoder_dim: channels of the decoder, a multiple of 4.
            decoder_depth: its layers.
            decoder_heads: its heads.
            mask_ratio: share of the patches that the encoder does not see.
            norm_pix_loss: reconstruct patches normalised by their own mean and standard deviation.

        Returns:
            The same object, with weights drawn anew as MAE draws them.

        Raises:
            ValueError: ``encoder`` is another kind of Vision Transformer.
        """
        patches, grid = encoder.patch_embed.num_patches, encoder.patch_embed.grid_size
        if encoder.num_prefix_tokens != 1 or encoder.cls_token is None or encoder.reg_token is not None:
            raise ValueError("expected a Vision Transformer with a class token and no other prefix")
        if encoder.pos_embed is None or encoder.pos_embed.shape[1] != patches + 1:
            raise ValueError("expected a Vision Transformer with a position embedding for every token")
        encoder.__class__ = cls
        assert isinstance(encoder, MaskedAutoencoder)
        self, dim = encoder, encoder.embed_dim
        side: tuple[int, int] = self.patch_embed.patch_size
        channels = self.patch_embed.proj.in_channels
        self.mask_ratio, self.norm_pix_loss = mask_ratio, norm_pix_loss
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, patches + 1, decoder_dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_dim, decoder_heads, 4.0, qkv_bias=True, norm_layer=norm)  # type: ignore[arg-type]
            for _ in range(decoder_depth)
        )
        self.decoder_norm = norm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, side[0] * side[1] * channels)
        self._draw_weights(grid)
        return self

    def _draw_weights(self, grid: tuple[int, int]) -> None:
        self.pos_embed = nn.Parameter(sincos_embedding(self.embed_dim, grid, prefix=1)[None], requires_grad=False)
        self.decoder_pos_embed.data = sincos_embedding(self.decoder_pos_embed.shape[2], grid, prefix=1)[None]
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        projection = self.patch_embed.proj.weight
        nn.init.xavier_uniform_(projection.view(projection.shape[0], -1))
        assert self.cls_token is not None
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(  # type: ignore[override]
        self, images: Tensor, both: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The reconstruction loss of a random masking, which torch's default generator draws.

        Args:
            images: (B, C, H, W).
            both: also classify the whole images.

        Returns:
            The loss, a scalar; with ``both``, logits (B, classes) and the loss.
        """
        loss, _, _ = self.reconstruct(images, torch.rand(len(images), self._patches, device=images.device))
        return (self.classify(images), loss) if both else loss

    def classify(self, images: Tensor) -> Tensor:
        """(B, classes) logits of the whole images."""
        return VisionTransformer.forward(self, images)

    def reconstruct(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode the patches with the least noise and restore the others.

        Args:
            images: (B, C, H, W).
            noise: (B, L), one number per patch.

        Returns:
            The mean squared error of the removed patches, a scalar; the restored patches (B, L, patch area * C); and
            which were removed, (B, L), 1 for removed.
        """
        order = noise.argsort(dim=1)
        kept = order[:, : patches_kept(self._patches, self.mask_ratio)]
        removed = torch.ones_like(noise).scatter_(1, kept, 0.0)
        restored = self.decode(self.encode(images, kept), order.argsort(dim=1))
        target = self.patchify(images)
        if self.norm_pix_loss:
            mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6) ** 0.5
        error = F.mse_loss(restored.float(), target.float(), reduction="none").mean(dim=-1)
        return (error * removed).sum() / removed.sum(), restored, removed

    def encode(self, images: Tensor, kept: Tensor) -> Tensor:
        """The class token and the patches ``kept`` (B, n), in that order, after the encoder: (B, 1 + n, D)."""
        assert self.cls_token is not None
        assert self.pos_embed is not None
        patches = self.patch_embed(images) + self.pos_embed[:, 1:]
        patches = patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[2]))
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        x = self.norm_pre(torch.cat([first, patches], dim=1))
        places = F.pad(kept + 1, (1, 0))
        for block in self.blocks:
            x = _through(block, x, places)
        result: Tensor = self.norm(x)
        return result

    def decode(self, encoded: Tensor, places: Tensor) -> Tensor:
        """All patches (B, L, patch area * C), from encoded tokens and each patch's place among them, (B, L)."""
        x = self.decoder_embed(encoded)
        hidden = self.mask_token.to(x.dtype).expand(len(x), places.shape[1] + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], hidden], dim=1)
        patches = patches.gather(1, places[..., None].expand(-1, -1, patches.shape[2]))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        result: Tensor = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        return result

    def patchify(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, L, patch area * C): rows, then columns, then channels of a patch."""
        rows, columns = self.patch_embed.grid_size
        high, wide = self.patch_embed.patch_size
        tiles = images.reshape(len(images), -1, rows, high, columns, wide)
        return tiles.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """The inverse of `patchify`."""
        rows, columns = self.patch_embed.grid_size
        high, wide = self.patch_embed.patch_size
        tiles = patches.reshape(len(patches), rows, columns, high, wide, -1)
        return tiles.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    @property
    def _patches(self) -> int:
        number: int = self.patch_embed.num_patches
        return number


def _through(block: nn.Module, x: Tensor, token_positions: Tensor) -> Tensor:
    """A timm block over tokens picked out of the sequence."""
    block_: Any = block
    if not isinstance(block_.attn, SparseLayer) or block_.attn.backend is not None:
        return block_(x)  # type: ignore[no-any-return]
    attended = block_.attn(block_.norm1(x), token_positions=token_positions)
    x = x + block_.drop_path1(block_.ls1(attended))
    result: Tensor = x + block_.drop_path2(block_.ls2(block_.mlp(block_.norm2(x))))
    return result


def patches_kept(patches: int, mask_ratio: float) -> int:
    """How many patches the encoder sees, as the reference counts them."""
    return int(patches * (1 - mask_ratio))


def sincos_embedding(dim: int, grid: tuple[int, int], prefix: int = 0) -> Tensor:
    """Fixed position embeddings: sines and cosines of the column, then of the row, at dim / 4 frequencies.

    Args:
        dim: channels, a multiple of 4.
        grid: rows and columns of patches.
        prefix: leading tokens, whose embedding is zero.

    Returns:
        (prefix + rows * columns, dim) float32.
    """
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (columns, rows)]
    parts = [part for angle in angles for part in (angle.sin(), angle.cos())]
    return F.pad(torch.cat(parts, dim=1), (0, 0, prefix, 0)).float()


def masked_autoencoder(options: PretrainOptions, data: ImageData) -> MaskedAutoencoder:
    """The masked autoencoder that ``options`` describe, on the CPU.

    Raises:
        UsageError: the model cannot be built for these images.
    """
    return _around(
        options,
        data,
        num_classes=0,
        decoder_dim=options.decoder_dim,
        decoder_depth=options.decoder_depth,
        decoder_heads=options.decoder_heads,
    )


def two_branch(options: TrainOptions, data: ImageData) -> MaskedAutoencoder:
    """A classifier with a decoder of two layers and half the channels beside it, on the CPU.

    Raises:
        UsageError: the model cannot be built for these images.
    """
    encoder: Any = create(options, data, num_classes=0)
    heads, dim = int(encoder.blocks[0].attn.num_heads), int(encoder.embed_dim)
    return _around(
        options,
        data,
        num_classes=options.nb_classes or data.num_classes,
        decoder_dim=max(4 * heads, dim // 2 // (4 * heads) * 4 * heads),
        decoder_depth=2,
        decoder_heads=heads,
    )


def _around(
    options: PretrainOptions | TrainOptions, data: ImageData, num_classes: int, **decoder: int
) -> MaskedAutoencoder:
    drop_path = options.drop_path if isinstance(options, TrainOptions) else 0.0
    encoder = create(options, data, num_classes=num_classes, global_pool="token", drop_path_rate=drop_path)
    if encoder.embed_dim % 4:
        raise UsageError(f"--model {options.model}: expected channels in multiples of 4, got {encoder.embed_dim}")
    mask_ratio = options.mask_ratio or 0.75
    _check_ratio(mask_ratio, encoder.patch_embed.num_patches)
    try:
        return MaskedAutoencoder.around(encoder, mask_ratio=mask_ratio, norm_pix_loss=options.norm_pix_loss, **decoder)
    except ValueError as error:
        raise UsageError(f"--model {options.model}: {error}") from error


def _check_ratio(mask_ratio: float, patches: int) -> None:
    """Raise a `UsageError` where nothing is removed, whose mean error is no number, or nothing is seen."""
    kept = patches_kept(patches, mask_ratio)
    if 0 < kept < patches:
        return
    if patches == 1:
        raise UsageError(
            "--mask-ratio must remove some patches and keep some, and a single patch has none to spare: "
            "give a smaller --patch-size"
        )
    most = math.floor(1e4 * (1 - 1 / patches)) / 1e4
    raise UsageError(
        f"--mask-ratio must remove some of the {patches} patches and keep some: at most {most:g}, got {mask_ratio:g}, "
        f"which keeps {kept}"
    )
