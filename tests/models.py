"""Small models that the tests of several frameworks swap."""

import copy

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")

FIBOTTENTION = {"mask": "fibottention", "mask_kwargs": {"shuffled": True}}
LOCAL = {"mask": "local", "mask_kwargs": {"window": 1}}


def vit(name="vit_tiny_patch16_224", depth=3, **kwargs):
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": depth, "num_classes": 5}
    return timm.create_model(name, **{**options, **kwargs}).double()


def images(model, batch=2):
    return torch.randn(batch, 3, *model.patch_embed.img_size, dtype=torch.float64)


def encoder(depth=2, **kwargs):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    return nn.TransformerEncoder(layer, depth, **kwargs)


class CopiedAttention(nn.Module):
    """The attention that MAE, DeiT and Fibottention copied from an early timm."""

    def __init__(self, dim=24, num_heads=3, qk_scale=None):
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x):
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attn = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(-1))
        return self.proj_drop(self.proj((attn @ v).transpose(1, 2).reshape(batch, tokens, dim)))


class ChannelAttention(CopiedAttention):
    """Same parameters, other mathematics: attention between channels."""

    def forward(self, x):
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attn = (q.transpose(-2, -1) @ k).softmax(-1)
        return self.proj((attn @ v.transpose(-2, -1)).permute(0, 3, 1, 2).reshape(batch, tokens, dim))


def masked_attention(model, masks):
    """Outputs of a dense timm model whose layers get the given masks as their attn_mask."""

    class Masked(nn.Module):
        def __init__(self, attn, mask):
            super().__init__()
            self.attn, self.mask = attn, mask

        def forward(self, x, attn_mask=None, is_causal=False):
            return self.attn(x, attn_mask=self.mask)

    model = copy.deepcopy(model)
    for block, mask in zip(model.blocks, masks, strict=True):
        block.attn = Masked(block.attn, mask)
    return model
