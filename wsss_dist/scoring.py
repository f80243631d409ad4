"""Scores of one image's prediction, kind by kind, at the native size of the image.

B batch, C foreground classes, K = C + 1 with background (0), H W pixels of an image at its native size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_dist import dist
from wsss_dist.crf import CRFConfig, crf_labels
from wsss_dist.data.batch import EvalSample
from wsss_dist.metrics import SWEEP, ConfusionMatrix, ThresholdSweep

if TYPE_CHECKING:
    from wsss_dist.methods.base import Prediction

UNDECIDED = 255  # in a label map and in the truth
# beside "cam" and "cam_best", in the order in which they are reported
LABEL_KINDS = ("seg_single", "seg", "seg_crf", "seg_tags", "seg_tags_crf", "pseudo")


@dataclass
class Tally:
    """Counts and kept pictures of one split on this rank."""

    sweep: ThresholdSweep
    has_cam: bool = False
    matrices: dict[str, ConfusionMatrix] = field(default_factory=dict)
    ignored: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.int64))  # undecided pixels, all
    samples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, kind: str, pred: Tensor, gt: Tensor) -> None:
        """Count the pixels of one image: labels pred [H, W] in 0..C against gt [H, W] with 255."""
        if kind not in self.matrices:
            self.matrices[kind] = ConfusionMatrix(self.sweep.num_classes)
        self.matrices[kind].update(pred, gt)

    def add_pseudo(self, pred: Tensor, gt: Tensor) -> None:
        """The same of kind "pseudo": an undecided pixel (255) finds nothing, it counts as background.

        Left out of the count, it would take the hard pixels out of the score, and whole classes out of its mean.
        """
        undecided = pred == UNDECIDED
        valid = gt < self.sweep.num_classes
        self.ignored += torch.stack([(undecided & valid).sum(), valid.sum()]).cpu()
        self.add("pseudo", pred.masked_fill(undecided, 0), gt)

    def results(self, beta: float) -> dict[str, dict]:
        """Metrics over all ranks. A rank without images has no kinds of its own, so the names are gathered first."""
        out = {}
        if any(dist.all_gather_object(self.has_cam)):
            sweep = self.sweep.reduced()
            threshold, best = sweep.best(SWEEP)
            out["cam"] = {**sweep.at(beta).summary(), "threshold": beta}
            out["cam_best"] = {**best.summary(), "threshold": threshold, "oracle": "threshold chosen on this split"}
        found = set().union(*dist.all_gather_object(list(self.matrices)))
        for kind in sorted(found, key=LABEL_KINDS.index):
            own = self.matrices.get(kind, ConfusionMatrix(self.sweep.num_classes))
            out[kind] = own.reduced().summary()
        if "pseudo" in found:
            left_out, total = dist.all_reduce_sum(self.ignored).tolist()
            out["pseudo"]["ignored"] = left_out / total if total else None
        return out


def score_image(
    tally: Tally, prediction: Prediction, i: int, sample: EvalSample, crf: CRFConfig | None, keep: bool
) -> None:
    """Add image i of a prediction to the counts, and to the pictures of the report where `keep` says so."""
    size = tuple(sample.image.shape[-2:])
    first = prediction.logits if prediction.cam is None else prediction.cam
    gt = sample.mask.to(first.device)
    tags = torch.nonzero(sample.labels > 0).flatten().tolist()
    shown = {}
    if prediction.cam is not None:
        tally.has_cam = True
        cam = resized(prediction.cam[i, tags].float(), size)
        _score_cam(tally, cam, tags, gt)
        shown["cam"] = _bytes(cam)
    labels = labels_of(prediction, i, sample, crf)
    for kind, pred in labels.items():
        tally.add(kind, pred, gt)
    pseudo = prediction.extras.get("pseudo")
    if pseudo is not None:
        tally.add_pseudo(resized_labels(pseudo[i], size), gt)
    if keep:
        shown |= {kind: labels[kind].to(torch.uint8).cpu().numpy() for kind in ("seg", "seg_crf") if kind in labels}
        extras = {f"extra_{n}": _shown_extra(maps[i], tags, size) for n, maps in prediction.extras.items()}
        tally.samples.append({**_shown_input(sample, tags), **shown, **extras})


def _score_cam(tally: Tally, cam: Tensor, tags: list[int], gt: Tensor) -> None:
    """cam [T, H, W] of the image's T tags (class indices without background)."""
    zero = torch.zeros(gt.shape, device=gt.device)
    value, which = cam.max(0) if tags else (zero, zero.long())
    class_ids = torch.tensor([t + 1 for t in tags] or [1], device=gt.device)
    tally.sweep.update(value, class_ids[which], gt)


def labels_of(prediction: Prediction, i: int, sample: EvalSample, crf: CRFConfig | None) -> dict[str, Tensor]:
    """Kind -> labels [H, W] int64 of a method with a segmentation head."""
    size, out = tuple(sample.image.shape[-2:]), {}
    if prediction.single is not None:
        out["seg_single"] = resized(prediction.single[i].float(), size).argmax(0)
    if prediction.logits is None:
        return out
    logits = resized(prediction.logits[i].float(), size)
    out["seg"] = logits.argmax(0)
    if crf is not None:
        out["seg_crf"] = crf_labels(logits, sample.image, crf)
    allowed = (torch.cat([torch.ones(1), sample.labels]) > 0).nonzero().flatten().to(logits.device)
    out["seg_tags"] = allowed[logits[allowed].argmax(0)]
    if crf is not None:
        out["seg_tags_crf"] = allowed[crf_labels(logits[allowed], sample.image, crf)]
    return out


# ---------------------------------------------------------------------------------------------------- tensors


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """[C, H, W] float -> [C, *size], bilinear; C may be 0, which interpolate would refuse."""
    if maps.shape[0] == 0:
        return maps.new_zeros(0, *size)
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]


def resized_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """[H, W] labels -> [*size] int64, nearest."""
    return F.interpolate(labels[None, None].float(), size, mode="nearest-exact")[0, 0].long()


def _shown_input(sample: EvalSample, tags: list[int]) -> dict[str, Any]:
    return {
        "index": np.int64(sample.index),
        "id": np.str_(sample.id),
        "tags": np.array(tags, dtype=np.int64) + 1,  # class ids as in the masks
        "image": sample.image.permute(1, 2, 0).numpy(),
        "truth": sample.mask.numpy(),
    }


def _shown_extra(maps: Tensor, tags: list[int], size: tuple[int, int]) -> np.ndarray:
    """A map of the report at native size: [C, H, W] floats -> uint8 of the tags; [H, W] labels -> uint8 labels."""
    if maps.ndim == 3:
        return _bytes(resized(maps[tags].float(), size))
    return resized_labels(maps, size).to(torch.uint8).cpu().numpy()


def _bytes(maps: Tensor) -> np.ndarray:
    return (maps.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
