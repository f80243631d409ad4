"""PCRE: progressive confidence region expansion, single-stage WSSS with a plain ViT (CVPR 2025, pp. 9829-9838).

Without CRME and CPE (`crme: null, cpe: null`) this is the ToCo base: auxiliary head, patch-token contrast, refined
pseudo labels, segmentation head and dense energy.

Letters: B batch, C foreground classes, K = C + 1, H W pixels, h w patch grid, N = h*w, D width, P pairs of an image and
one of its tags, M steps of the run, t step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt, field_validator
from torch import Tensor, nn

import kernels
from wsss_dist import cam as cams
from wsss_dist import dist
from wsss_dist.cam import CamConfig, ParConfig, RadiusConfig
from wsss_dist.data.batch import Batch
from wsss_dist.losses import balanced_segmentation_loss, mask_bce, tag_loss
from wsss_dist.methods.base import BaseMethod, Prediction, Views
from wsss_dist.models.decoders import ParallelDilatedHead, QueryDecoder, QueryDecoderConfig
from wsss_dist.models.prototypes import PrototypeMemory, shares_of, summed
from wsss_dist.models.vit import BackboneConfig, Features, ViT
from wsss_dist.schema import StrictModel


class CrmeConfig(QueryDecoderConfig):
    """Confidence region mask expansion."""

    tau: float = Field(0.7, gt=0, lt=1)  # tau_bin of Eq. 7
    overlap: tuple[float, float] = (0.3, 0.5)  # share of the seed's region that lets a candidate join, inclusive
    max_seeds: int = Field(5, ge=1)  # T
    top: int = Field(300, ge=1)  # candidates kept per pair, the most confident first
    radius: RadiusConfig = RadiusConfig()
    ignore_as_negative: bool = True  # undecided target pixels count as "not this class" in L_refine

    @field_validator("overlap")
    @classmethod
    def _overlap_is_a_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] <= value[1] <= 1:
            raise ValueError(f"must be a range with 0 <= low <= high <= 1, found {list(value)}")
        return value


class CpeConfig(StrictModel):
    """Class-prototype enhancement."""

    momentum: float = Field(0.99, ge=0, lt=1)  # lambda_p of Eq. 12
    start: float = Field(0.1, ge=0, le=1)  # fraction of the run from which the prototypes move
    normalize_token: bool = False


class LossConfig(StrictModel):
    """Weights of the loss terms; a term of weight 0 is not computed, but for aux, whose CAM labels the patches."""

    aux: float = Field(1.0, ge=0)
    ptc: float = Field(0.3, ge=0)
    contrast_from: float = Field(0.0, ge=0, le=1)  # ptc and cpe count from this fraction of the run on
    conf: float = Field(1.0, ge=0)  # lambda_1
    conf_from: float = Field(0.0, ge=0, le=1)  # conf counts from this fraction of the run on
    refine: float = Field(2.0, ge=0)  # lambda_2
    cpe: float = Field(0.02, ge=0)  # lambda_3
    seg: float = Field(0.12, ge=0)
    reg: float = Field(0.05, ge=0)
    gate_from: float = Field(0.1, ge=0, le=1)  # refine, seg and reg count after this fraction of the run
    energy_sigma_rgb: float = Field(15.0, gt=0)
    energy_sigma_xy: float = Field(100.0, gt=0)
    energy_scale_factor: float = Field(0.5, gt=0, le=1)
    energy_scale: Literal["lattice", "true"] = "lattice"  # "true": about 1.8 times larger, so halve reg with it


class Config(StrictModel):
    """PCRE with the settings that the paper's tables and the released scripts agree on (VOC column)."""

    name: Literal["pcre"] = "pcre"
    backbone: BackboneConfig = BackboneConfig()
    pool: Literal["max", "avg"] = "max"  # over the grid, before both classifiers
    seg_dilations: list[PositiveInt] = Field([6, 12, 18, 24], min_length=1)
    cam: CamConfig = CamConfig()
    par: ParConfig = ParConfig()
    crme: CrmeConfig | None = CrmeConfig()
    cpe: CpeConfig | None = CpeConfig()
    loss: LossConfig = LossConfig()
    head_lr_mult: float = Field(10.0, gt=0)  # classifiers
    seg_lr_mult: float = Field(10.0, gt=0)  # segmentation head
    crme_lr_mult: float = Field(1.0, gt=0)
    token_lr_mult: float = Field(1.0, gt=0)  # class tokens and their positions

    def check_run(self, run: object) -> None:
        """What must hold between the method and the rest of the run."""
        self.backbone.check_views(run.data)


@dataclass
class Stage:
    """Maps of the gradient-free pass over scales and mirror images, each min-max normalised plane by plane.

    Only the tags of an image have maps: main, aux, proto and masks (of CRME) are [P, H, W], planes of `pairs` [P, 2].
    logits: per scale [B, K, H, W], plain and mirrored added; single: the plain ones of scale 1.
    """

    pairs: Tensor
    main: Tensor
    aux: Tensor | None
    proto: Tensor | None
    masks: Tensor | None
    logits: list[Tensor]
    single: Tensor | None


class Method(BaseMethod):
    """The network and its training step."""

    def __init__(self, cfg: Config, num_classes: int, train_steps: int):
        super().__init__()
        self.cfg, self.num_classes, self.train_steps = cfg, num_classes, train_steps
        self.backbone = ViT(cfg.backbone, num_classes if cfg.cpe else 0)
        dim, patch = self.backbone.dim, self.backbone.patch_size
        self.patch_size = patch
        self.classifier = nn.Conv2d(dim, num_classes, 1, bias=False)
        self.aux_classifier = nn.Conv2d(dim, num_classes, 1, bias=False)
        self.decoder = ParallelDilatedHead(dim, num_classes + 1, cfg.seg_dilations)
        self.crme = QueryDecoder(cfg.crme, dim, patch, num_classes) if cfg.crme else None
        self.memory = PrototypeMemory(num_classes, dim) if cfg.cpe else None
        self._pending: list[tuple[int, Tensor, Tensor]] = []  # step, class tokens and tags of its micro batches

    @property
    def weights_note(self) -> str | None:
        """What the backbone's weights file says of its origin."""
        return self.backbone.weights_note

    def param_groups(self) -> list[dict]:
        """Backbone (x1, norms apart), class tokens, heads and CRME branch with their factors."""
        norms = {id(p) for m in self.backbone.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
        tokens = [p for n, p in self.backbone.named_parameters() if n in ("class_tokens", "class_pos")]
        apart = norms | {id(p) for p in tokens}
        heads = [self.classifier, self.aux_classifier]
        groups = [
            ("backbone", [p for p in self.backbone.parameters() if id(p) not in apart], 1.0),
            ("backbone_norm", [p for p in self.backbone.parameters() if id(p) in norms], 1.0),
            ("class_tokens", tokens, self.cfg.token_lr_mult),
            ("heads", [p for m in heads for p in m.parameters()], self.cfg.head_lr_mult),
            ("decoder", list(self.decoder.parameters()), self.cfg.seg_lr_mult),
            ("crme", list(self.crme.parameters()) if self.crme else [], self.cfg.crme_lr_mult),
        ]
        kept = [{"name": n, "params": [p for p in ps if p.requires_grad], "lr_mult": m} for n, ps, m in groups]
        return [g for g in kept if g["params"]]

    # ---- training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Losses of one micro batch (section "one iteration" of the paper's method): `loss` and its parts."""
        w, progress = self.cfg.loss, step / self.train_steps
        gated = progress > w.gate_from
        refine = gated and self.crme is not None and w.refine > 0
        dense = gated and (w.seg > 0 or w.reg > 0)
        contrast = progress >= w.contrast_from and (w.ptc > 0 or (self.memory is not None and w.cpe > 0))
        pairs = cams.present_pairs(batch.labels)  # once, at the start: for their number the host waits for a GPU
        features = self.backbone(batch.images)
        y_grid = y_seg = y_pro = None
        if contrast or refine or dense:
            stage = self._stage(batch, pairs, self.cfg.cam.scales, (), progress, features, proto=refine)
            y_grid = self._grid_labels(stage, batch)
            if refine or dense:
                y_seg, y_pro = self._pseudo_labels(stage, batch)

        fmap = features.as_map(features.patches)
        parts = {"cls": tag_loss(self._pooled(self.classifier, fmap), batch.labels)}
        parts["aux"] = w.aux * tag_loss(self._pooled(self.aux_classifier, features.as_map(features.aux)), batch.labels)
        if contrast and w.ptc:
            parts["ptc"] = w.ptc * kernels.patch_token_contrast(features.patches, y_grid.flatten(1))
        if self.memory is not None:
            if contrast and w.cpe:
                parts["cpe"] = w.cpe * kernels.class_patch_contrast(
                    features.class_tokens, features.patches.detach(), y_grid.flatten(1), batch.labels
                )
            if progress >= self.cfg.cpe.start:
                self._pending.append((step, features.class_tokens.detach().float(), batch.labels))
        extra = {}
        if refine or (self.crme is not None and progress >= w.conf_from and w.conf > 0):
            parts |= self._crme_losses(batch, pairs, features, y_pro if refine else None, progress, extra)
        if dense:
            parts |= self._segmentation_losses(batch, fmap, y_seg)
        loss = sum(parts.values())
        return {"loss": loss} | {f"loss_{k}": v.detach() for k, v in parts.items()} | extra

    def after_step(self, step: int) -> None:
        """Move the prototypes with the class tokens of the whole global batch, in its order (Eq. 12).

        The order is in the shares, for which tags are enough: the tokens are summed before they travel.
        """
        pending = [p[1:] for p in self._pending if p[0] == step]  # not those of a step that was skipped
        self._pending.clear()
        if not pending:
            return
        tokens, labels = (torch.stack(x) for x in zip(*pending, strict=True))  # [micro batches, B, ...]
        # the global batch is dealt out chunk by chunk: micro batch major, then rank
        every = dist.all_gather(labels).transpose(0, 1)
        shares, kept = shares_of(every.flatten(0, 2), self.cfg.cpe.momentum)
        mine = shares.view(every.shape)[:, dist.rank()]
        own = summed(tokens.flatten(0, 1), mine.flatten(0, 1), self.cfg.cpe.normalize_token)
        self.memory.move(kept, dist.all_reduce_sum(own))

    def radius(self, progress: float) -> float | None:
        """Radius of the disc at a fraction of the run; None where there is no disc."""
        r = self.cfg.crme.radius
        if r.after == "off" and progress > r.finish:
            return None
        return cams.radius_at(progress, r.start, r.end, r.begin, r.finish)

    def _crme_losses(
        self, batch: Batch, pairs: Tensor, features: Features, y_pro: Tensor | None, progress: float, extra: dict
    ) -> dict[str, Tensor]:
        """L_conf from its start on; L_refine where there are pseudo labels. The selection carries no gradient."""
        w = self.cfg.loss
        mask_logits, scores = self.crme(batch.images, features.patches, features.grid)
        parts = {}
        if progress >= w.conf_from and w.conf > 0:
            confidence = scores.sum(1).clamp(0, 1)  # [B, C]
            parts["conf"] = w.conf * mask_bce(confidence, batch.labels).mean()
        if y_pro is None:
            # keeps the mask head in the graph: every step then has the same parameters in it
            return parts | {"refine": mask_logits.float().sum() * 0.0}
        radius = self.radius(progress)
        chosen = self._select(mask_logits, scores, batch.labels, pairs=pairs, grid=features.grid, radius=radius)
        size = batch.images.shape[-2:]
        masks = kernels.max_upsampled_masks(mask_logits, chosen, grid=features.grid, size=size, radius=radius)
        image, label = chosen.pairs.unbind(1)
        target = y_pro[image]  # [P, H, W]
        bce = mask_bce(masks, (target == label[:, None, None] + 1).float())
        if not self.cfg.crme.ignore_as_negative:
            bce = bce * (target != cams.IGNORE)
        inside = (masks > 0).float()
        extra["refine_inside"] = (bce.detach() * inside).sum() / inside.sum().clamp(min=1)
        extra["radius"] = mask_logits.new_full((), -1.0 if radius is None else radius)
        parts["refine"] = w.refine * bce.flatten(1).mean(1).sum() / max(len(masks), 1) + mask_logits.float().sum() * 0.0
        return parts

    def _segmentation_losses(self, batch: Batch, fmap: Tensor, y_seg: Tensor) -> dict[str, Tensor]:
        w, size = self.cfg.loss, batch.images.shape[-2:]
        logits = cams.upsample(self.decoder(fmap).float(), size)
        parts = {"seg": w.seg * balanced_segmentation_loss(logits, y_seg)} if w.seg else {}
        if w.reg:
            parts["reg"] = w.reg * kernels.dense_energy(
                logits.softmax(1),
                batch.rgb() * 255,
                cams.box_mask(batch.boxes, size).float(),
                y_seg,
                sigma_rgb=w.energy_sigma_rgb,
                sigma_xy=w.energy_sigma_xy,
                scale_factor=w.energy_scale_factor,
                scale=w.energy_scale,
            )
        return parts

    # ---- pseudo labels --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _stage(
        self,
        batch: Batch,
        pairs: Tensor,
        cam_scales: Sequence[float],
        seg_scales: Sequence[float],
        progress: float,
        known: Features | None = None,
        proto: bool = False,
    ) -> Stage:
        """Run every scale with its mirror image; see `Stage`.

        known: features of the images as they are, where the caller has them; proto: make the prototype maps too.
        """
        images, size = batch.images, batch.images.shape[-2:]
        want_masks = self.crme is not None and progress >= self.cfg.cam.mix_from
        sums: dict[str, Tensor] = {}
        logits, single = {}, None
        scales = sorted({*cam_scales, *seg_scales})
        views = [cams.upsample(images, cams.scaled_size(size, scale)) for scale in scales]
        views = [torch.cat([x, x.flip(-1)]) for x in views]
        known_at = scales.index(1.0) if known is not None and 1.0 in scales else None
        for scale, x, features in zip(scales, views, self._backbone(views, known, known_at), strict=True):
            fmap = features.as_map(features.patches)
            maps = {}
            if scale in seg_scales:
                up = cams.upsample(self.decoder(fmap).float(), size)
                logits[scale] = up[: len(images)] + up[len(images) :].flip(-1)
                single = up[: len(images)] if scale == 1.0 else single
            if scale not in cam_scales:
                continue
            maps["main"] = self.classifier(fmap)
            maps["aux"] = self.aux_classifier(features.as_map(features.aux))
            if proto and self.memory is not None:
                maps["proto"] = features.as_map(self.memory(features.patches))
            maps = {k: cams.merge_mirror(v, pairs, size).relu() for k, v in maps.items()}
            if want_masks:
                maps["masks"] = self._crme_masks(x, features, batch, pairs)
            sums = {k: sums[k] + v if k in sums else v for k, v in maps.items()}
        maps = {k: cams.minmax(v) for k, v in sums.items()}
        return Stage(
            pairs=pairs,
            main=maps.get("main"),
            aux=maps.get("aux"),
            proto=maps.get("proto"),
            masks=maps.get("masks"),
            logits=[logits[s] for s in seg_scales],
            single=single,
        )

    def _backbone(self, views: list[Tensor], known: Features | None, at: int | None) -> list[Features]:
        """Features of images with their mirror images [2B, 3, ., .], in one call; those of the images of `at` known."""
        found = self.backbone([x.chunk(2)[1] if i == at else x for i, x in enumerate(views)])
        return found if at is None else [known.followed_by(f) if i == at else f for i, f in enumerate(found)]

    def _crme_masks(self, x: Tensor, features: Features, batch: Batch, pairs: Tensor) -> Tensor:
        """Masks [P, H, W] of a batch and its mirror images x [2B, 3, ., .], without disc."""
        mask_logits, scores = self.crme(x, features.patches, features.grid)
        both = torch.cat([pairs, torch.stack([pairs[:, 0] + len(batch), pairs[:, 1]], dim=1)])
        where = {"pairs": both, "grid": features.grid, "radius": None}
        chosen = self._select(mask_logits, scores, batch.labels.repeat(2, 1), **where)
        masks = kernels.max_upsampled_masks(mask_logits, chosen, grid=features.grid, size=tuple(x.shape[-2:]))
        half = len(chosen.pairs) // 2
        plain, mirrored = masks[:half], masks[half:].flip(-1)
        return cams.upsample(torch.maximum(plain, mirrored)[:, None], batch.images.shape[-2:])[:, 0]

    def _select(self, mask_logits: Tensor, scores: Tensor, labels: Tensor, **where: Any) -> kernels.RegionSelection:
        """`where`: pairs, grid and radius."""
        c = self.cfg.crme
        settings = {"tau": c.tau, "overlap": c.overlap, "max_seeds": c.max_seeds, "top": c.top}
        return kernels.select_regions(mask_logits.detach(), scores.detach(), labels, **where, **settings)

    def _fused(self, stage: Stage) -> Tensor:
        """Main CAM [P, H, W], mixed with the CRME masks where there are any."""
        if stage.masks is None:
            return stage.main
        mix = self.cfg.cam.mix * (stage.masks.sum((1, 2), keepdim=True) > 1e-5)  # an empty mask leaves the CAM as it is
        return mix * stage.masks + (1 - mix) * stage.main

    @torch.no_grad()
    def _pseudo_labels(self, stage: Stage, batch: Batch) -> tuple[Tensor, Tensor]:
        """Refined label maps [B, H, W]: of the fused main CAM, and of the prototype CAM (the target of L_refine).

        Without CPE there are no prototypes, and the main one serves both.
        """
        cam, par = self.cfg.cam, self.cfg.par
        maps, thresholds = [self._fused(stage)], [(cam.high, cam.low)]
        if stage.proto is not None:
            maps.append(stage.proto)
            thresholds.append((cam.proto_high, cam.proto_low))
        refined = cams.refine_labels(
            maps,
            thresholds,
            stage.pairs,
            batch.rgb(),
            cams.box_mask(batch.boxes, batch.images.shape[-2:]),
            downscale=par.downscale,
            dilations=par.dilations,
            iterations=par.iterations,
        )
        return refined[0], refined[-1]

    @torch.no_grad()
    def _grid_labels(self, stage: Stage, batch: Batch) -> Tensor:
        """Labels [B, h, w] of the patches for PTC and CPE, from the auxiliary CAM (never mixed with CRME)."""
        grid = self.backbone.grid_of(batch.images.shape[-2:])
        inside = cams.box_mask(cams.grid_boxes(batch.boxes, self.patch_size), grid)
        maps = cams.all_classes(cams.upsample(stage.aux[:, None], grid)[:, 0], stage.pairs, batch.labels)
        return cams.training_labels(maps, inside, self.cfg.cam.high, self.cfg.cam.low)

    def _pooled(self, classifier: nn.Conv2d, fmap: Tensor) -> Tensor:
        """Tag logits [B, C]: pooled over the grid, then the linear classifier."""
        return classifier(cams.pool(fmap, self.cfg.pool)).flatten(1)

    # ---- inference ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, batch: Batch, views: Views) -> Prediction:
        progress = 1.0 if views.step is None else views.step / self.train_steps
        stage = self._stage(batch, cams.present_pairs(batch.labels), views.cam_scales, views.seg_scales, progress)
        shown = {}
        if views.extras:
            shown["pseudo"] = self._pseudo_labels(stage, batch)[0]
        if views.extras and stage.masks is not None:
            shown["crme"] = cams.all_classes(stage.masks, stage.pairs, batch.labels)
        return Prediction(
            cam=cams.all_classes(self._fused(stage), stage.pairs, batch.labels),
            logits=cams.fuse_logits(stage.logits, list(views.seg_scales), views.fuse),
            single=stage.single,
            extras=shown,
        )
