"""A plain timm ViT as a weakly supervised segmenter sees it: class tokens that only read, patches that never see them.

Letters: B batch, C class tokens, R register tokens, N = h*w patches, T = C + R + N, D width, k frozen blocks. A pack
[M, D] holds the tokens of several batches [B_i, T_i, D] one after the other, M = sum B_i T_i.
Source: PCRE (CVPR 2025), architecture of the backbone; the value-only last block is that of dense CLIP.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from timm.layers import PatchEmbed
from torch import Tensor, nn

from wsss_dist.errors import UserError
from wsss_dist.models.norms import recomputed
from wsss_dist.models.pretrained import create_backbone, weights_note
from wsss_dist.models.token_cache import TokenCache
from wsss_dist.schema import ConfigPath, StrictModel


class BackboneConfig(StrictModel):
    """A ViT backbone."""

    name: str = "vit_base_patch16_224.orig_in21k_ft_in1k"  # timm model
    weights: str | None = "timm"  # "timm" hub, a file, or null for random weights
    depth: int | None = Field(None, ge=2)  # use the first blocks only; null: all
    aux_block: int | None = None  # 1-based block of the auxiliary features; null: depth - 2 (10 of 12)
    aux_norm: bool = False  # normalise the auxiliary features (no learnt scale); helps a head that trains briefly
    last_block: Literal["value_only", "attention"] = "value_only"
    frozen_blocks: int = Field(0, ge=0)  # first blocks (and the embedding) that keep their pretrained weights
    token_cache: ConfigPath | None = None  # folder that keeps the frozen blocks' tokens of each image it meets
    pos_antialias: bool = False  # antialias when the position table shrinks
    # keep no activations inside the trained blocks but compute them again in the backward pass: less memory, more time
    recompute: bool = False

    def check_views(self, data: object) -> None:
        """Refuse a token cache where no view of an image ever comes again.

        Raises:
            UserError: `data` (the run's data section) has random crops or colours.
        """
        if self.token_cache and not data.fixed_views:
            keys = ("augment", "squash_size", "photometric", "jitter", "rand_augment")
            found = ", ".join(f"'data.{key}' is {getattr(data, key)!r}" for key in keys if getattr(data, key))
            raise UserError(
                "config: 'method.backbone.token_cache' keeps tokens of views that come again, but none does where "
                f"{found}; set augment: squash and none of the others, or remove the cache"
            )


class Features(NamedTuple):
    """Outputs of the backbone; a named tuple, since ZeRO-3 looks for tensors in tuples and dicts alone.

    class_tokens [B, C, D] and patches [B, N, D] after the final LayerNorm; aux [B, N, D], patches after the auxiliary
    block, raw unless `aux_norm`; grid (h, w), patches are row-major.
    """

    class_tokens: Tensor
    patches: Tensor
    aux: Tensor
    grid: tuple[int, int]

    def as_map(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B, D, h, w]."""
        return tokens.transpose(1, 2).unflatten(2, self.grid)

    def followed_by(self, others: Features) -> Features:
        """Of both batches, which have one grid, as one; without gradient."""
        both = zip(self[:3], others[:3], strict=True)
        return Features(*(torch.cat([a.detach(), b.detach()]) for a, b in both), self.grid)


class ViT(nn.Module):
    """Any timm plain ViT (class token, absolute positions) with `num_class_tokens` class tokens.

    Class tokens start as copies of the pretrained [CLS] and separate only through their gradients. In every block all
    tokens read the patches (and registers, where the model has them) and nothing else, so patches are those of a ViT
    without [CLS]. With `frozen_blocks` = k > 0 one [CLS] runs through the frozen blocks and the class tokens, each with
    a learnt offset that starts at zero, branch off behind them.
    """

    def __init__(self, cfg: BackboneConfig, num_class_tokens: int):
        super().__init__()
        model = _create_plain_vit(cfg)
        self.cfg = cfg
        self.depth = len(model.blocks)
        self.dim = model.embed_dim
        self.patch_size = model.patch_embed.patch_size[0]
        self.aux_block = cfg.aux_block or self.depth - 2
        if not cfg.frozen_blocks <= self.aux_block < self.depth:
            raise UserError(
                f"config: 'method.backbone.aux_block' is {self.aux_block}, but must lie between frozen_blocks "
                f"({cfg.frozen_blocks}) and {self.depth - 1} for {cfg.name!r} with {self.depth} blocks"
            )
        self.patch_embed, self.blocks, self.norm = model.patch_embed, model.blocks, model.norm
        self.norm_pre = model.norm_pre
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        pos = model.pos_embed.detach()
        cls_pos = pos[:, :1].clone() if prefix else torch.zeros_like(model.cls_token)
        self.cls_token = nn.Parameter(model.cls_token.detach() + cls_pos)  # [1, 1, D], the reader in frozen blocks
        self.patch_pos = nn.Parameter(pos[:, prefix:].clone())
        self.pos_grid = tuple(model.patch_embed.grid_size)
        reg = model.reg_token
        self.registers = None if reg is None else nn.Parameter(reg.detach() + (pos[:, 1:prefix] if prefix else 0))
        start = torch.cat([model.cls_token.detach(), cls_pos])  # [2, 1, D]
        if cfg.frozen_blocks:
            start = torch.zeros_like(start)
        self.num_class_tokens = num_class_tokens
        for name, value in zip(("class_tokens", "class_pos"), start, strict=True):  # [C, D] each
            self.register_parameter(name, nn.Parameter(value.repeat(num_class_tokens, 1)) if num_class_tokens else None)
        self._block = _block
        self._freeze()
        self.cache: TokenCache | None = None
        self.open_cache()

    @property
    def weights_note(self) -> str | None:
        """What the weights file says of its origin."""
        return weights_note(self.cfg.weights)

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Patch grid of an image size in pixels; a rest smaller than a patch is cut off.

        Raises:
            UserError: the image is smaller than a patch.
        """
        if min(size) < self.patch_size:
            raise UserError(
                f"images of {size[0]} x {size[1]} pixels are smaller than a patch of {self.cfg.name!r} "
                f"({self.patch_size} pixels); raise data.crop (training) or eval.size, or take out the smallest scale"
            )
        return size[0] // self.patch_size, size[1] // self.patch_size

    def forward(self, images: Tensor | list[Tensor]) -> Features | list[Features]:
        """Features of `images [B, 3, H, W]`, normalised, of any size of at least one patch.

        Of a list of such batches, each with its own size, a list: on a GPU in one pack, on a CPU, whose caches hold
        less than that, one after the other (docs/LOG.md).
        """
        if isinstance(images, Tensor):
            return self.packed([images])[0]
        together = [images] if images[0].is_cuda else [[x] for x in images]
        return [features for batches in together for features in self.packed(batches)]

    def packed(self, batches: list[Tensor]) -> list[Features]:
        """Features of batches [B_i, 3, H_i, W_i]: the result of one call each, in fewer and larger operations.

        All tokens are one pack for the layers that treat a token by itself, and attention alone goes batch by batch.
        """
        grids = [self.grid_of(images.shape[-2:]) for images in batches]
        c = self.num_class_tokens
        first = c + (0 if self.registers is None else self.registers.shape[1])  # of the patches
        starts = self._frozen_tokens(batches, grids) if self.cfg.frozen_blocks else map(self._embed, batches, grids)
        x, shapes = _packed([self._with_class_tokens(tokens) for tokens in starts])
        aux, keep_nothing = x, self.cfg.recompute and torch.is_grad_enabled()
        for i in range(self.cfg.frozen_blocks, self.depth):
            value_only = i == self.depth - 1 and self.cfg.last_block == "value_only"
            of_block = self.blocks[i], x, shapes, c, value_only
            x = recomputed(self._block, *of_block) if keep_nothing else self._block(*of_block)
            if i + 1 == self.aux_block:
                aux = x
        if self.cfg.aux_norm:
            aux = F.layer_norm(aux, (self.dim,))
        both = zip(_unpacked(self.norm(x), shapes), _unpacked(aux, shapes), grids, strict=True)
        return [Features(x[:, :c], x[:, first:], aux[:, first:], grid) for x, aux, grid in both]

    def _with_class_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens of a batch behind its class tokens; frozen ones begin with [CLS], which these branch off."""
        frozen = self.cfg.frozen_blocks > 0
        cls, x = (tokens[:, :1], tokens[:, 1:]) if frozen else (None, tokens)
        if not self.num_class_tokens:
            return x
        own = (self.class_tokens + self.class_pos).expand(len(x), -1, -1)
        return torch.cat([cls + own if frozen else self.norm_pre(own), x], dim=1)

    def _embed(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Registers and patches with positions, [B, R + N, D]."""
        h, w = grid
        x = self.patch_embed(images[..., : h * self.patch_size, : w * self.patch_size]).flatten(1, 2)
        x = x + resize_positions(self.patch_pos, self.pos_grid, grid, self.cfg.pos_antialias)
        if self.registers is not None:
            x = torch.cat([self.registers.expand(len(x), -1, -1), x], dim=1)
        return self.norm_pre(x)

    def _frozen_tokens(self, batches: list[Tensor], grids: list[tuple[int, int]]) -> list[Tensor]:
        """[CLS], registers and patches behind the frozen blocks, [B, 1 + R + N, D] each, without gradient."""
        if self.cache is None:
            return self._run_frozen(batches, grids)
        # one image at a time: what is stored then does not depend on which images shared a batch
        rows = (
            [self.cache.get(x, lambda x=x, grid=grid: self._run_frozen([x[None]], [grid])[0][0]) for x in images]
            for images, grid in zip(batches, grids, strict=True)
        )
        return [torch.stack(row).to(images) for row, images in zip(rows, batches, strict=True)]

    @torch.no_grad()
    def _run_frozen(self, batches: list[Tensor], grids: list[tuple[int, int]]) -> list[Tensor]:
        cls, starts = self.norm_pre(self.cls_token), map(self._embed, batches, grids)
        x, shapes = _packed([torch.cat([cls.expand(len(tokens), -1, -1), tokens], dim=1) for tokens in starts])
        for block in self.blocks[: self.cfg.frozen_blocks]:
            x = self._block(block, x, shapes, 1, False)
        return _unpacked(x, shapes)

    def compile_blocks(self, **options: object) -> None:
        """From now on let torch.compile, with these options, run each block; all blocks share what it makes."""
        self._block = torch.compile(_block, **options)

    def _freeze(self) -> None:
        k = self.cfg.frozen_blocks
        frozen = [self.patch_embed, self.norm_pre, *self.blocks[:k]] if k else []
        for module in frozen:
            module.requires_grad_(False)
        if k:
            for param in (self.patch_pos, self.registers):
                if param is not None:
                    param.requires_grad_(False)
        self.cls_token.requires_grad_(False)

    def open_cache(self) -> None:
        """Open the token cache of the config, which is kept under a digest of the frozen weights as they are now."""
        if self.cfg.token_cache:
            frozen = {n: p for n, p in self.named_parameters() if not p.requires_grad}
            self.cache = TokenCache(self.cfg.token_cache, frozen, str(self.cfg.pos_antialias))


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int], antialias: bool = False) -> Tensor:
    """Bicubic resize (half-pixel centres) of a position table [1, h*w, D] to another grid."""
    if tuple(old) == tuple(new):
        return table
    maps = table.transpose(1, 2).unflatten(2, old)
    maps = F.interpolate(maps.float(), size=new, mode="bicubic", align_corners=False, antialias=antialias)
    return maps.flatten(2).transpose(1, 2).to(table.dtype)


def _packed(batches: list[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Tokens [B_i, T_i, D] -> a pack [M, D] and what `_unpacked` needs, (B_i, T_i) of each."""
    flat = [tokens.flatten(0, 1) for tokens in batches]
    return torch.cat(flat) if len(flat) > 1 else flat[0], [(x.shape[0], x.shape[1]) for x in batches]


def _unpacked(x: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    """A pack [M, ...] -> the batches [B_i, T_i, ...] in it."""
    return [part.unflatten(0, shape) for part, shape in zip(x.split([b * t for b, t in shapes]), shapes, strict=True)]


def _block(block: nn.Module, x: Tensor, shapes: list[tuple[int, int]], readers: int, value_only: bool) -> Tensor:
    """One transformer block on a pack [M, D]; the first `readers` tokens of an image read but are never read."""
    attn = block.attn
    q, k, v = attn.qkv(block.norm1(x)).unflatten(1, (3, attn.num_heads, -1)).unbind(1)
    if value_only:
        out = v
    else:
        q, k = attn.q_norm(q), attn.k_norm(k)
        parts = zip(*(_unpacked(part, shapes) for part in (q, k, v)), strict=True)
        out, _ = _packed([_attention(*(p.transpose(1, 2) for p in part), readers).transpose(1, 2) for part in parts])
    x = x + block.ls1(attn.proj(out.flatten(1)))
    return x + block.ls2(block.mlp(block.norm2(x)))


def _attention(q: Tensor, k: Tensor, v: Tensor, readers: int) -> Tensor:
    """Of heads [B, heads, T, d] each."""
    return F.scaled_dot_product_attention(q, k[:, :, readers:], v[:, :, readers:])


def _create_plain_vit(cfg: BackboneConfig) -> nn.Module:
    """The timm model of a config, refused where it is something else than a plain ViT or the config does not fit it."""
    try:
        model = create_backbone(cfg.name, cfg.weights, dynamic_img_size=True)
    except TypeError:  # the architecture takes no dynamic_img_size
        model = None
    parts = ("blocks", "norm", "norm_pre", "cls_token", "pos_embed")
    plain = model is not None and all(getattr(model, part, None) is not None for part in parts)
    plain = plain and isinstance(model.patch_embed, PatchEmbed)
    plain = plain and all(hasattr(b, "norm1") and hasattr(getattr(b, "attn", None), "qkv") for b in model.blocks)
    plain = plain and all(getattr(b.attn, "gate", None) is None for b in model.blocks)
    if not plain:
        raise UserError(
            f"config: backbone {cfg.name!r} is not a plain ViT with a class token and an absolute position table "
            "(timm names: vit_*, deit_*); choose one of these"
        )
    if cfg.depth is not None and cfg.depth > len(model.blocks):
        raise UserError(f"config: 'backbone.depth' is {cfg.depth}, but {cfg.name!r} has {len(model.blocks)} blocks")
    model.blocks = model.blocks[: cfg.depth]
    if cfg.frozen_blocks >= len(model.blocks):
        raise UserError(
            f"config: 'method.backbone.frozen_blocks' is {cfg.frozen_blocks}, but {cfg.name!r} has {len(model.blocks)} "
            "blocks and at least one must be trained; lower it"
        )
    if cfg.token_cache and not cfg.frozen_blocks:
        raise UserError(
            "config: 'method.backbone.token_cache' keeps the output of frozen blocks, but "
            "'method.backbone.frozen_blocks' is 0; set it above 0, or remove the cache"
        )
    return model
