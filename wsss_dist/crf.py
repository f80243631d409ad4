"""Dense CRF on one image, from logits or from a label map.

K labels, H W pixels. Source: Krähenbühl and Koltun, NeurIPS 2011, with the unaries of pydensecrf.
"""

from __future__ import annotations

from pydantic import Field, field_validator
from torch import Tensor

import kernels
from wsss_dist.schema import StrictModel


class CRFConfig(StrictModel):
    """Dense CRF after a segmentation head; the defaults are PCRE's for VOC."""

    iterations: int = Field(10, ge=1)
    spatial: tuple[float, float] = (2.0, 1.0)  # sigma in pixels, weight
    bilateral: tuple[float, float, float] = (140.0, 1.0, 7.0)  # sigma in pixels, sigma in grey levels, weight
    prune: float = Field(0.0, ge=0, le=0.1)  # above 0 (such as 1e-3): faster, without classes that cannot matter

    @field_validator("spatial", "bilateral")
    @classmethod
    def _sigmas_are_positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if min(value[:-1]) <= 0 or value[-1] < 0:
            raise ValueError("sigmas must be above 0 and the weight (last number) at least 0")
        return value


class LabelCRFConfig(CRFConfig):
    """Dense CRF on a label map; the defaults are those of IRNet and P-NOC."""

    spatial: tuple[float, float] = (3.0, 3.0)
    bilateral: tuple[float, float, float] = (50.0, 5.0, 10.0)
    confidence: float = Field(0.7, gt=0, lt=1)  # probability that a label is right


def crf_labels(logits: Tensor, image: Tensor, cfg: CRFConfig) -> Tensor:
    """Labels [H, W] int64 after a dense CRF with unary -ln(clip(softmax(logits), 1e-5, 1)).

    Args:
        logits: [K, H, W] at the size of the image.
        image: [3, H, W] uint8 RGB.
    """
    return _refined(-logits.float().softmax(0).clamp(1e-5, 1.0).log()[None], image, cfg)


def crf_of_labels(labels: Tensor, num_labels: int, image: Tensor, cfg: LabelCRFConfig) -> Tensor:
    """Labels [H, W] int64 after a dense CRF that trusts each pixel's label with cfg.confidence.

    Args:
        labels: [H, W] integers in 0 .. num_labels - 1.
        num_labels: K; with 1 there is nothing to decide.
        image: [3, H, W] uint8 RGB.
    """
    if num_labels == 1:
        return labels.long()
    return _refined(kernels.dense_crf_unary(labels[None].long(), num_labels, cfg.confidence), image, cfg)


def _refined(unary: Tensor, image: Tensor, cfg: CRFConfig) -> Tensor:
    settings = {"spatial": cfg.spatial, "bilateral": cfg.bilateral, "iterations": cfg.iterations, "prune": cfg.prune}
    return kernels.dense_crf(unary, image[None].to(unary.device), **settings)[0].argmax(0)
