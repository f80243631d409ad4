"""The `data:` section of a run configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from wsss_dist.schema import ConfigPath, StrictModel


class DataConfig(StrictModel):
    """Where the images are and how they are augmented."""

    format: Literal["coco", "voc", "folder"]
    root: ConfigPath
    train_split: str = "train"
    eval_splits: list[str] = []
    # names in the order of the class ids; None: the data set's own (coco: categories, voc: the 20, folder: classes.txt)
    classes: list[str] | None = None
    # images without any tag: "keep" them, or "drop" them (82 081 + 40 137 of COCO 2014, as the one-stage methods do)
    untagged: Literal["keep", "drop"] = "keep"
    # side of the square training crop in pixels
    crop: int = Field(448, ge=8, le=4096)
    # range of the random scale factor; used by augment "crop" alone
    scale: tuple[float, float] = (0.5, 2.0)
    flip: bool = True
    # crop: scale, flip, pad, crop; squash: resize to crop x crop without keeping the aspect, flip
    augment: Literal["crop", "squash"] = "crop"
    # colour jitter, grey, blur, solarise
    photometric: bool = False
    num_workers: int = Field(2, ge=0, le=256)
    # a run stops when more files than this were unreadable
    max_damaged: int = Field(10, ge=0)
    # evaluate on this many images of a split, evenly strided; None: on all
    val_limit: int | None = Field(None, ge=1)

    @field_validator("scale")
    @classmethod
    def _scale_is_a_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 16:
            raise ValueError("must be a range with 0 < low <= high <= 16")
        return value

    @field_validator("classes")
    @classmethod
    def _classes_are_distinct(cls, value: list[str] | None) -> list[str] | None:
        if value is not None:
            if not 1 <= len(value) <= 254:
                raise ValueError(f"must name 1 to 254 classes (255 means ignore in a mask), found {len(value)}")
            twice = sorted({name for name in value if value.count(name) > 1})
            if twice:
                raise ValueError(f"names a class twice: {', '.join(twice)}")
        return value
