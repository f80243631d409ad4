"""A feature map from any timm backbone: plain ViTs through vit.py, everything convolutional through timm itself."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from wsss_dist.errors import UserError
from wsss_dist.models.norms import take_mixed_types
from wsss_dist.models.pretrained import create_backbone, weights_note
from wsss_dist.models.vit import BackboneConfig, ViT


class FeatureConfig(BackboneConfig):
    """A backbone of either kind; `output_stride` is for convolutional ones."""

    output_stride: int = Field(16, ge=1)


class FeatureExtractor(nn.Module):
    """Images [B, 3, H, W] -> final feature map [B, D, h, w]."""

    def __init__(self, cfg: FeatureConfig):
        super().__init__()
        self.is_vit = cfg.name.startswith(("vit_", "deit"))
        if self.is_vit:
            self.body = ViT(cfg, num_class_tokens=0)
            self.dim, self.patch_size = self.body.dim, self.body.patch_size
            return
        if cfg.frozen_blocks or cfg.token_cache or cfg.recompute:
            raise UserError(
                "config: 'method.backbone.frozen_blocks', 'token_cache' and 'recompute' are for ViTs here, "
                f"not for {cfg.name!r}; remove them"
            )
        try:
            self.body = create_backbone(cfg.name, cfg.weights, output_stride=cfg.output_stride)
        except TypeError:  # the architecture takes no output_stride
            raise UserError(
                f"config: backbone {cfg.name!r} is neither a plain ViT (timm names: vit_*, deit*) nor a convolutional "
                "network with an output stride (resnet*, efficientnet*); choose one of these"
            ) from None
        take_mixed_types(self.body)
        self.dim, self.patch_size = self.body.num_features, cfg.output_stride
        self.note = weights_note(cfg.weights)

    @property
    def weights_note(self) -> str | None:
        """What the weights file says of its origin."""
        return self.body.weights_note if self.is_vit else self.note

    def forward(self, images: Tensor) -> Tensor:
        if self.is_vit:
            features = self.body(images)
            return features.as_map(features.patches)
        return self.body.forward_features(images)
