"""TimeSformer: a Vision Transformer over the frames of a clip.

After Bertasius, Wang and Torresani, "Is Space-Time Attention All You Need for Video Understanding?", arXiv 2102.05095.
The names of the parameters are those of the public checkpoints (below their ``model.``).
"""

from functools import partial
from typing import Literal

import torch
from timm.layers import DropPath, Mlp, PatchEmbed, trunc_normal_  # type: ignore[attr-defined]  # re-exported
from timm.layers.attention import Attention
from torch import Tensor, nn

Kind = Literal["divided", "joint", "space_only"]


class SpaceTimeBlock(nn.Module):
    """One layer, over tokens (B, 1 + h * w * T, C): the class token, then the patches with time fastest.

    ``divided``: attention along time for every place (without the class token) and then along space for every frame
    (with it; its outputs are averaged over the frames). ``joint``: attention over all tokens. ``space_only``: along
    space, the frames being batch entries, so tokens are (B * T, 1 + h * w, C).

    Args:
        dim: C.
        num_heads: H.
        kind: of attention.
        mlp_ratio: hidden features of the MLP over C.
        drop_path: stochastic depth rate.
        eps: of the norms.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kind: Kind,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=eps)
        self.kind = kind
        if kind == "joint":
            # The tokens here are not those of one image: `sparsify` must not take the grid of the patch embedding.
            self.num_prefix_tokens = 1
        self.norm1 = norm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias=True)
        if kind == "divided":
            self.temporal_norm1 = norm(dim)
            self.temporal_attn = Attention(dim, num_heads, qkv_bias=True)
            self.temporal_fc = nn.Linear(dim, dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """The layer's output, in the layout of ``x``.

        Args:
            x: tokens.
            frames: T.
        """
        x = self._divided(x, frames) if self.kind == "divided" else x + self.drop_path(self.attn(self.norm1(x)))
        result: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return result

    def _divided(self, x: Tensor, frames: int) -> Tensor:
        batch, _, dim = x.shape
        first, patches = x[:, :1], x[:, 1:]
        places = patches.reshape(-1, frames, dim)  # (B * h * w, T, C)
        along_time = self.temporal_fc(self.drop_path(self.temporal_attn(self.temporal_norm1(places))))
        patches = patches + along_time.view(batch, -1, dim)

        of_frames = patches.unflatten(1, (-1, frames)).transpose(1, 2)  # (B, T, h * w, C)
        tokens = torch.cat([first[:, None].expand(-1, frames, -1, -1), of_frames], dim=2).flatten(0, 1)
        along_space = self.drop_path(self.attn(self.norm1(tokens))).unflatten(0, (batch, frames))
        to_first = along_space[:, :, 0].mean(dim=1, keepdim=True)
        to_patches = along_space[:, :, 1:].transpose(1, 2).flatten(1, 2)
        return torch.cat([first + to_first, patches + to_patches], dim=1)


TIME_STD = 0.5
"""Spread of the time embedding at the start."""


class TimeSformer(nn.Module):
    """A classifier of clips.

    Args:
        frames: T.
        img_size: side of a frame in pixels.
        patch_size: side of a patch.
        in_chans: channels of a frame.
        num_classes: outputs.
        embed_dim: C.
        depth: layers.
        num_heads: H.
        kind: of attention.
        drop_path: stochastic depth rate of the last layer; it grows linearly from 0.
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        frames: int,
        img_size: int,
        patch_size: int,
        in_chans: int,
        num_classes: int,
        *,
        embed_dim: int = 64,
        depth: int = 4,
        num_heads: int = 4,
        kind: Kind = "divided",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.frames, self.kind = frames, kind
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, embed_dim))
        if kind != "space_only":
            self.time_embed = nn.Parameter(torch.zeros(1, frames, embed_dim))
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.ModuleList(SpaceTimeBlock(embed_dim, num_heads, kind, drop_path=rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        if kind != "space_only":
            # Not zero, as where the weights of an image model are taken over: from a start that is blind to the order
            # of frames, nothing is learned about it.
            trunc_normal_(self.time_embed, std=TIME_STD)
        for block in self.blocks:
            if kind == "divided":
                # The layer starts as one without time.
                nn.init.zeros_(block.get_parameter("temporal_fc.weight"))
                nn.init.zeros_(block.get_parameter("temporal_fc.bias"))

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, rows and columns of patches."""
        rows, columns = self.patch_embed.grid_size
        return self.frames, rows, columns

    def forward(self, clips: Tensor) -> Tensor:
        """(B, classes) logits.

        Args:
            clips: (B, C, T, H, W).
        """
        batch, frames = clips.shape[0], clips.shape[2]
        x = self.patch_embed(clips.transpose(1, 2).flatten(0, 1))  # (B * T, h * w, C)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(batch, -1, -1)
        x = x + self.pos_embed[:, 1:]
        if self.kind == "space_only":
            x = torch.cat([first.repeat_interleave(frames, dim=0), x], dim=1)
            for block in self.blocks:
                x = block(x, frames)
            x = x.unflatten(0, (batch, frames)).mean(dim=1)
        else:
            x = x.unflatten(0, (batch, frames)) + self.time_embed[:, :, None]
            x = torch.cat([first, x.transpose(1, 2).flatten(1, 2)], dim=1)
            for block in self.blocks:
                x = block(x, frames)
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits
