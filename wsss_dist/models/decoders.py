"""Heads on top of a backbone: the parallel dilated segmentation head, and the query decoder of CRME.

Letters: B batch, C foreground classes, K = C + 1, N = h*w patches, D width. Source: PCRE (CVPR 2025).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from wsss_dist.errors import UserError
from wsss_dist.models.vit import resize_positions
from wsss_dist.schema import StrictModel


class ParallelDilatedHead(nn.Module):
    """Four parallel 3x3 convolutions of different dilation, summed: [B, D, h, w] -> logits [B, K, h, w]."""

    def __init__(self, dim: int, num_outputs: int, dilations: list[int]):
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(dim, num_outputs, 3, padding=d, dilation=d) for d in dilations)
        for conv in self.branches:
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Tensor) -> Tensor:
        return sum(conv(features) for conv in self.branches)


class QueryDecoderConfig(StrictModel):
    """Sizes of the CRME branch."""

    layers: int = Field(2, ge=1)
    heads: int = Field(8, ge=1)
    ffn: int = Field(2048, ge=1)
    query_grid: int = Field(28, ge=1)  # side of the learnt position table of the queries


class QueryDecoder(nn.Module):
    """One mask per patch and the joint confidence of each patch for each class.

    Queries come from an own patch embedding of the image, pixels from the (detached) backbone features.
    """

    def __init__(self, cfg: QueryDecoderConfig, dim: int, patch_size: int, num_classes: int):
        super().__init__()
        if dim % cfg.heads or dim % 32:
            raise UserError(
                f"config: 'method.crme.heads' is {cfg.heads}, which must divide the backbone's width {dim}, "
                "itself a multiple of 32; choose another number of heads or another backbone"
            )
        self.grid = (cfg.query_grid, cfg.query_grid)
        self.embed = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, cfg.query_grid**2, dim), std=0.02))
        template = DecoderLayer(dim, cfg.heads, cfg.ffn)
        self.layers = nn.ModuleList(DecoderLayer(dim, cfg.heads, cfg.ffn) for _ in range(cfg.layers))
        for layer in self.layers:
            layer.load_state_dict(template.state_dict())
        self.norm = nn.LayerNorm(dim)
        self.pixels = nn.Sequential(
            nn.Conv2d(dim, dim, 1),
            nn.Conv2d(dim, dim, 3, padding=1, bias=False),
            nn.GroupNorm(32, dim),
            nn.ReLU(),
            nn.Conv2d(dim, dim, 3, padding=1),
        )
        for conv in (m for m in self.pixels if isinstance(m, nn.Conv2d)):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        self.mask_embed = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim)
        )
        self.class_branch, self.patch_branch = nn.Linear(dim, num_classes), nn.Linear(dim, num_classes)
        for linear in (self.class_branch, self.patch_branch):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, images: Tensor, patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Mask logits [B, N, N] (query, pixel) and joint confidence [B, N, C], whose sum over patches is at most 1.

        Args:
            images: [B, 3, H, W], normalised, as the backbone saw them.
            patches: [B, N, D] final backbone features; detached here.
            grid: (h, w).
        """
        h, w = grid
        patch = self.embed.kernel_size[0]
        patches = patches.detach()
        queries = self.embed(images.detach()[..., : h * patch, : w * patch]).flatten(2).transpose(1, 2)
        queries = queries + resize_positions(self.positions, self.grid, grid)
        for layer in self.layers:
            queries = layer(queries, patches)
        queries = self.norm(queries)
        pixels = self.pixels(patches.transpose(1, 2).unflatten(2, grid)).flatten(2)
        masks = self.mask_embed(queries) @ pixels
        scores = self.class_branch(queries).float().softmax(2) * self.patch_branch(queries).float().softmax(1)
        return masks, scores


class DecoderLayer(nn.Module):
    """DETR-style post-norm decoder layer: self-attention, cross-attention, feed-forward; no dropout, no mask."""

    def __init__(self, dim: int, heads: int, ffn: int):
        super().__init__()
        self.self_attn, self.cross_attn = Attention(dim, heads), Attention(dim, heads)
        self.cross_attn.load_state_dict(self.self_attn.state_dict())
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn), nn.ReLU(), nn.Linear(ffn, dim))

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        x = self.norm1(queries + self.self_attn(queries, queries))
        x = self.norm2(x + self.cross_attn(x, memory))
        return self.norm3(x + self.ffn(x))


class Attention(nn.Module):
    """Multi-head attention with biased projections: queries [B, M, D], memory [B, N, D] -> [B, M, D]."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        for linear in (self.q, self.k, self.v):
            nn.init.xavier_uniform_(linear.weight)
        for linear in (self.q, self.k, self.v, self.out):
            nn.init.zeros_(linear.bias)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for proj, x in ((self.q, queries), (self.k, memory), (self.v, memory))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
