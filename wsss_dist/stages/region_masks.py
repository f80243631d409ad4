"""Training masks from mined regions and a background cue.

out/<split>/<id>.png: 0 background, 1..C classes, 255 undecided: nobody claims the pixel, two classes do, or one does
where the cue says background. An image without tags has no region and is background by the cue alone.
Source: AE-PSL (CVPR 2017), section 3.1, rules 1 to 3.

Letters: K tags of an image, H W pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from wsss_dist import dist
from wsss_dist.data.batch import EvalSample
from wsss_dist.data.dataset import Dataset
from wsss_dist.data.erased import read_manifest
from wsss_dist.errors import UserError
from wsss_dist.schema import ConfigPath
from wsss_dist.stages.base import Stage, StageConfig, grey_of, label_writer, read_png, read_scores
from wsss_dist.stages.pseudo_masks import picture
from wsss_dist.stages.regions import read_regions
from wsss_dist.stages.scores import IGNORE, score_labels

__all__ = ["Config", "picture", "run"]
# the classes of VOC's supercategory "indoor"
INDOOR = ["bottle", "chair", "diningtable", "pottedplant", "sofa", "tvmonitor"]


class Config(StageConfig):
    """Mask assembly; the defaults are AE-PSL's for VOC."""

    regions: ConfigPath  # folder of a stage of kind regions: the last step that is merged
    # grey maps of the same images: the folder of a stage of kind saliency, or a folder DIR/<split>/<id>.png
    saliency: ConfigPath | None = None
    outdoor: float = Field(0.12, ge=0, le=1)  # saliency below: background
    indoor: float = Field(0.06, ge=0, le=1)  # the same for an image with any tag of ...
    indoor_classes: list[str] = INDOOR  # [] where there are none
    # without saliency: folder of a stage of kind cams, background where no class has `cam_background`
    cams: ConfigPath | None = None
    cam_background: float = Field(0.05, ge=0, le=1)

    @model_validator(mode="after")
    def _one_cue(self) -> Config:
        if (self.saliency is None) == (self.cams is None):
            raise ValueError("needs a background cue, either 'saliency' or 'cams'")
        return self


def run(stage: Stage) -> dict[str, Any]:
    """Make the masks; returns kind "region_masks"."""
    cfg: Config = stage.config
    (dataset, _), *_ = stage.splits().values()
    unknown = [name for name in cfg.indoor_classes if name not in dataset.class_names]
    if unknown and cfg.saliency is not None:
        raise UserError(
            f"stage '{stage.name}': indoor_classes names {', '.join(unknown[:3])}, no class of '{dataset.name}'; name "
            f"some of its classes, {', '.join(dataset.class_names)}, or write []"
        )
    for split, (dataset, _) in stage.splits().items():
        folder = cfg.regions / "out" / split
        read_manifest(folder).check(folder, dataset)
    indoor = torch.tensor([name in cfg.indoor_classes for name in dataset.class_names])

    def work(sample: EvalSample, split: str, dataset: Dataset):
        size = tuple(sample.image.shape[-2:])
        classes, regions = read_regions(cfg.regions, split, sample.id, size, len(dataset.class_names))
        tags = sample.labels.nonzero()[:, 0].tolist()
        if classes.tolist() != tags:
            raise UserError(
                f"stage '{stage.name}': the regions of image {sample.id} in {cfg.regions / 'out' / split} are of the "
                f"classes {classes.tolist()}; expected its tags, {tags}: run the stage '{cfg.regions.name}' again"
            )
        if cfg.saliency is not None:
            threshold = cfg.indoor if bool((sample.labels > 0)[indoor].any()) else cfg.outdoor
            background = grey_of(cfg.saliency, split, sample.id, size, dataset) < threshold
        else:
            scores = read_scores(cfg.cams, split, sample.id, size, sample.labels)
            background = torch.ones(size, dtype=torch.bool, device=regions.device)
            if scores is not None:
                background = scores.maps.amax(0) < cfg.cam_background
        return label_writer(assemble(classes, regions, background))

    stage.make(".png", work)
    _say_undecided(stage)
    return score_labels(stage, lambda *key: read_png(stage.folder, *key), "region_masks")


def _say_undecided(stage: Stage) -> None:
    """Say how many images have a mask without a decided pixel: they train on their other terms."""
    for split, (dataset, rows) in stage.splits().items():
        with dist.shared(len(rows)) as mine:
            masks = (read_png(stage.folder, split, dataset.id(int(rows[k]))) for k in mine)
            own = sum(bool((mask == IGNORE).all()) for mask in masks)
        if count := sum(dist.all_gather_object(own)):
            stage.say(f"{stage.name}, {split}: {count} of {len(rows)} images have no decided pixel")


def assemble(classes: Tensor, regions: Tensor, background: Tensor) -> Tensor:
    """Labels [H, W] int64: 0 background, 1..C classes, 255 undecided.

    Args:
        classes: [K] int64, 0..C-1.
        regions: bool [K, H, W], merged over the steps.
        background: bool [H, W], the cue.
    """
    claims = regions.sum(0)
    names = torch.cat([classes + 1, classes.new_zeros(1)])
    first = torch.cat([regions, torch.ones_like(background)[None]]).int().argmax(0)  # the last row: no region
    decided = (claims == 1) & ~background | (claims == 0) & background
    return torch.where(decided, names[first], IGNORE)
