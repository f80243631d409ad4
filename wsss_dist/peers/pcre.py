"""A training step of PCRE as research code has it, on the weights of our method and with the same losses.

The maths is that of `wsss_dist/methods/pcre.py`; what differs is how: the gradient-free pass makes the maps of every
class at full size and starts from the image again at every scale, labels are made image by image and class by class,
attention and contrast materialise their scores, and the operators are those of `peers/operators.py`. What such code
computes and throws away is left out: refined labels of the auxiliary map, averaged attention weights, masks before they
are mixed in.

Letters: B batch, C foreground classes, K = C + 1, H W pixels, h w patch grid, N = h*w, D width, P pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss_dist.data.batch import Batch
from wsss_dist.errors import UserError
from wsss_dist.methods.pcre import Config, Method
from wsss_dist.models.decoders import Attention, QueryDecoder
from wsss_dist.models.vit import Features, resize_positions
from wsss_dist.peers import operators

IGNORE = operators.IGNORE


def check(cfg: Config) -> None:
    """What the peer can do.

    Raises:
        UserError: PCRE without one of its branches, or with something that the published code does not have.
    """
    backbone = cfg.backbone
    for key, value, fix in (
        ("method.crme", cfg.crme, "leave it at its default"),
        ("method.cpe", cfg.cpe, "leave it at its default"),
        ("method.backbone.frozen_blocks", not backbone.frozen_blocks, "set it to 0"),
    ):
        if not value:
            raise UserError(f"config: '{key}' is a setting that the peer of PCRE does not have; {fix}, or no --peer")
    if cfg.loss.reg and not operators.has_lattice():
        raise UserError(
            "install: the dense energy of the peer needs pydensecrf2 (pip install -e '.[bench]'); install it, or "
            "leave that loss out on both sides with --set method.loss.reg=0"
        )
    if cfg.loss.reg and cfg.loss.energy_scale != "lattice":
        raise UserError("config: the peer knows 'method.loss.energy_scale' lattice alone; set it to that")


class Peer:
    """The step on the weights of `method`, which its optimiser and its `after_step` go on using."""

    def __init__(self, method: Method):
        self.method, self.cfg = method, method.cfg
        if method.backbone.registers is not None:
            raise UserError(f"config: the peer knows no register tokens, which {self.cfg.backbone.name!r} has")

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Losses of one micro batch, as `Method.training_step` names them."""
        method, w, progress = self.method, self.cfg.loss, step / self.method.train_steps
        gated, contrast = progress > w.gate_from, progress >= w.contrast_from
        main, aux, proto, masks = self._cam_stage(batch, progress)
        y_grid = self._grid_labels(aux, batch)
        y_seg = self._refined(self._mixed(main, masks, batch.labels), batch, self.cfg.cam.high, self.cfg.cam.low)

        features = operators.backbone(method.backbone, batch.images)
        fmap = features.as_map(features.patches)
        parts = {
            "cls": F.multilabel_soft_margin_loss(self._logits(method.classifier, fmap), batch.labels),
            "aux": w.aux
            * F.multilabel_soft_margin_loss(
                self._logits(method.aux_classifier, features.as_map(features.aux)), batch.labels
            ),
        }
        if contrast:
            parts["ptc"] = w.ptc * operators.patch_token_contrast(features.patches, y_grid.flatten(1))
            parts["cpe"] = w.cpe * operators.class_patch_contrast(
                features.class_tokens, features.patches.detach(), y_grid.flatten(1), batch.labels
            )
        if progress >= self.cfg.cpe.start:
            method._pending.append((step, features.class_tokens.detach().float(), batch.labels))
        mask_logits, scores = query_decoder(method.crme, batch.images, features.patches, features.grid)
        if progress >= w.conf_from:
            parts["conf"] = w.conf * F.binary_cross_entropy(scores.sum(1).clamp(0, 1), batch.labels)
        parts["refine"] = 0.0 * mask_logits.sum()
        if gated:
            y_pro = self._refined(proto, batch, self.cfg.cam.proto_high, self.cfg.cam.proto_low)
            refine = self._refine(mask_logits, scores, features, y_pro, batch, progress)
            parts["refine"] = parts["refine"] + w.refine * refine
            parts |= self._segmentation(fmap, y_seg, batch)
        loss = sum(parts.values())
        return {"loss": loss} | {f"loss_{k}": v.detach() for k, v in parts.items()}

    # ---- losses ---------------------------------------------------------------------------------------------------

    def _logits(self, classifier: nn.Conv2d, fmap: Tensor) -> Tensor:
        pool = F.adaptive_max_pool2d if self.cfg.pool == "max" else F.adaptive_avg_pool2d
        return classifier(pool(fmap, 1)).flatten(1)

    def _refine(
        self, mask_logits: Tensor, scores: Tensor, features: Features, y_pro: Tensor, batch: Batch, progress: float
    ) -> Tensor:
        """L_refine, pair by pair."""
        radius = self.method.radius(progress)
        chosen = self._select(mask_logits, scores, batch.labels, features.grid, radius)
        size = tuple(batch.images.shape[-2:])
        masks = operators.max_upsampled_masks(mask_logits, chosen, grid=features.grid, size=size, radius=radius)
        loss = mask_logits.new_zeros(())
        for mask, (b, c) in zip(masks, chosen.pairs.tolist(), strict=True):
            bce = F.binary_cross_entropy(mask, (y_pro[b] == c + 1).float(), reduction="none")
            loss = loss + (bce if self.cfg.crme.ignore_as_negative else bce * (y_pro[b] != IGNORE)).mean()
        return loss / max(1, len(masks))

    def _segmentation(self, fmap: Tensor, y_seg: Tensor, batch: Batch) -> dict[str, Tensor]:
        """L_seg with background and foreground apart, and L_reg, on logits at full size."""
        w, size = self.cfg.loss, batch.images.shape[-2:]
        logits = F.interpolate(self.method.decoder(fmap), size, mode="bilinear", align_corners=False)
        background, foreground = y_seg.clone(), y_seg.clone()
        background[y_seg != 0] = IGNORE
        foreground[y_seg == 0] = IGNORE
        halves = [
            F.cross_entropy(logits, y, ignore_index=IGNORE, reduction="sum") / ((y != IGNORE).sum() + 1e-6)
            for y in (background, foreground)
        ]
        parts = {"seg": w.seg * 0.5 * sum(halves)}
        if w.reg:
            roi = torch.zeros_like(batch.images[:, 0])
            for b, (y0, y1, x0, x1) in enumerate(batch.boxes.tolist()):
                roi[b, y0:y1, x0:x1] = 1
            parts["reg"] = w.reg * operators.dense_energy(
                logits.softmax(dim=1),
                batch.rgb() * 255,
                roi,
                y_seg,
                sigma_rgb=w.energy_sigma_rgb,
                sigma_xy=w.energy_sigma_xy,
                scale_factor=w.energy_scale_factor,
            )
        return parts

    # ---- maps and labels ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _cam_stage(self, batch: Batch, progress: float) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Main, auxiliary and prototype maps [B, C, H, W] of all classes, and the masks of CRME [P, H, W]."""
        method, size, count = self.method, tuple(batch.images.shape[-2:]), len(batch)
        sums: list[list[Tensor]] = [[], [], [], []]
        for scale in self.cfg.cam.scales:
            side = [int(s * scale) for s in size]
            x = F.interpolate(batch.images, side, mode="bilinear", align_corners=False)
            x = torch.cat([x, x.flip(-1)])
            features = operators.backbone(method.backbone, x)
            cosine = operators.cosine_to_prototypes(features.patches, method.memory.prototypes)
            maps = [
                method.classifier(features.as_map(features.patches)),
                method.aux_classifier(features.as_map(features.aux)),
                features.as_map(cosine),
            ]
            for kept, part in zip(sums, maps, strict=False):
                full = F.interpolate(part, size, mode="bilinear", align_corners=False)
                kept.append(F.relu(torch.max(full[:count], full[count:].flip(-1))))
            if progress >= self.cfg.cam.mix_from:
                mask_logits, scores = query_decoder(method.crme, x, features.patches, features.grid)
                chosen = self._select(mask_logits, scores, batch.labels.repeat(2, 1), features.grid, None)
                masks = operators.max_upsampled_masks(mask_logits, chosen, grid=features.grid, size=tuple(side))
                half = len(masks) // 2
                best = torch.max(masks[:half], masks[half:].flip(-1))
                sums[3].append(F.interpolate(best[:, None], size, mode="bilinear", align_corners=False)[:, 0])
        done = [_normalised(torch.stack(kept).sum(0)) if kept else None for kept in sums]
        return done[0], done[1], done[2], done[3]

    def _select(
        self, mask_logits: Tensor, scores: Tensor, labels: Tensor, grid: tuple[int, int], radius: float | None
    ) -> operators.RegionSelection:
        c = self.cfg.crme
        settings = {"tau": c.tau, "overlap": c.overlap, "max_seeds": c.max_seeds, "top": c.top}
        return operators.select_regions(
            mask_logits.detach(), scores.detach(), labels, grid=grid, radius=radius, **settings
        )

    @torch.no_grad()
    def _mixed(self, maps: Tensor, masks: Tensor | None, labels: Tensor) -> Tensor:
        """Maps [B, C, H, W] of the tags, each mixed with its mask."""
        valid = maps * labels[:, :, None, None]
        if masks is None:
            return valid
        mix = self.cfg.cam.mix
        for mask, (b, c) in zip(masks, labels.nonzero().tolist(), strict=True):
            if mask.sum() > 1e-5:
                valid[b, c] = mix * mask + (1 - mix) * valid[b, c]
        return valid

    @torch.no_grad()
    def _grid_labels(self, aux: Tensor, batch: Batch) -> Tensor:
        """Labels [B, h, w] of the patches, from the auxiliary map at full size."""
        p = self.method.patch_size
        grid = tuple(side // p for side in aux.shape[-2:])
        maps = F.interpolate(aux, grid, mode="bilinear", align_corners=False) * batch.labels[:, :, None, None]
        value, label = maps.max(dim=1)
        label = label + 1
        label[value <= self.cfg.cam.high] = IGNORE
        label[value <= self.cfg.cam.low] = 0
        out = torch.full_like(label, IGNORE)
        for b, (y0, y1, x0, x1) in enumerate(batch.boxes.tolist()):
            inside = (b, slice(-(-y0 // p), y1 // p), slice(-(-x0 // p), x1 // p))
            out[inside] = label[inside]
        return out

    @torch.no_grad()
    def _refined(self, maps: Tensor, batch: Batch, high: float, low: float) -> Tensor:
        """Refined labels [B, H, W] of maps [B, C, H, W], image by image, PAR for each of the two backgrounds."""
        par, size = self.cfg.par, maps.shape[-2:]
        small = [side // par.downscale for side in size]
        images = F.interpolate(batch.rgb(), small, mode="bilinear", align_corners=False)
        maps = F.interpolate(maps, small, mode="bilinear", align_corners=False)
        out = torch.full((len(maps), *size), IGNORE, dtype=torch.int64, device=maps.device)
        for b, (y0, y1, x0, x1) in enumerate(batch.boxes.tolist()):
            tags = batch.labels[b].nonzero().flatten()
            keys = torch.cat([tags.new_zeros(1), tags + 1])
            found = []
            for level in (high, low):
                stack = torch.cat([torch.full_like(maps[b, :1], level), maps[b, tags]])[None].softmax(dim=1)
                stack = operators.par(images[b : b + 1], stack, dilations=par.dilations, iterations=par.iterations)
                stack = F.interpolate(stack, size, mode="bilinear", align_corners=False)
                found.append(keys[stack.argmax(dim=1)[0]])
            label = found[0].clone()
            label[found[0] == 0] = IGNORE
            label[(found[0] == 0) & (found[1] == 0)] = 0
            out[b, y0:y1, x0:x1] = label[y0:y1, x0:x1]
        return out


def _normalised(maps: Tensor) -> Tensor:
    """Each plane to [0, 1] by its minimum and maximum."""
    maps = maps - maps.flatten(-2).min(dim=-1).values[..., None, None]
    return maps / (maps.flatten(-2).max(dim=-1).values[..., None, None] + 1e-5)


def query_decoder(crme: QueryDecoder, images: Tensor, patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Mask logits [B, N, N] and joint confidence [B, N, C] of CRME, attention weights in memory."""
    patch, patches = crme.embed.kernel_size[0], patches.detach()
    queries = crme.embed(images[..., : grid[0] * patch, : grid[1] * patch]).flatten(2).transpose(1, 2)
    queries = queries + resize_positions(crme.positions, crme.grid, grid)
    for layer in crme.layers:
        queries = layer.norm1(queries + _attention(layer.self_attn, queries, queries))
        queries = layer.norm2(queries + _attention(layer.cross_attn, queries, patches))
        queries = layer.norm3(queries + layer.ffn(queries))
    queries = crme.norm(queries)
    pixels = crme.pixels(patches.transpose(1, 2).reshape(len(patches), -1, *grid))
    masks = torch.einsum("bqc,bchw->bqhw", crme.mask_embed(queries), pixels).flatten(2)
    scores = crme.class_branch(queries).softmax(dim=2) * crme.patch_branch(queries).softmax(dim=1)
    return masks, scores


def _attention(attention: Attention, queries: Tensor, memory: Tensor) -> Tensor:
    b, m, d = queries.shape
    heads = attention.heads
    q = attention.q(queries).view(b, m, heads, d // heads).transpose(1, 2)
    k, v = (p(memory).view(b, -1, heads, d // heads).transpose(1, 2) for p in (attention.k, attention.v))
    weights = (q @ k.transpose(-2, -1) / (d // heads) ** 0.5).softmax(dim=-1)
    return attention.out((weights @ v).transpose(1, 2).reshape(b, m, d))
