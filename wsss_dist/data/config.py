"""The `data:` section of a run configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, ValidationInfo, field_validator

from wsss_dist.schema import ConfigPath, StrictModel

# kind of a map -> what it holds outside the image
PADDING = {"labels": 255, "grey": 0, "scores": 0, "erased": 0}
# kinds whose values are ids, not amounts: they are resized by the nearest pixel
OF_IDS = ("labels", "erased")


def is_url(place: Any) -> bool:
    """Is it an address, as s3://bucket/folder, and no folder of this machine?"""
    return isinstance(place, str) and "://" in place


def _place(value: Any) -> Path | str:
    if not isinstance(value, str | Path):
        raise ValueError("must be a folder or an address")
    return value if is_url(value) else Path(value).expanduser()


# a folder, ~ is the home folder; or an address, which Path would spoil
DataRoot = Annotated[Path | str, PlainValidator(_place)]


class MapConfig(StrictModel):
    """One file per image that an earlier stage made; `wsss_dist/data/maps.py` holds the formats."""

    dir: ConfigPath
    kind: Literal["labels", "grey", "scores", "erased"]
    # the stage or command that makes the files, for the message where one is wrong
    made_by: str | None = None


class RandAugmentConfig(StrictModel):
    """RandAugment: n operations, each at a level of 1 .. m - 1; `wsss_dist/data/rand_augment.py` holds them."""

    n: int = Field(2, ge=1, le=16)
    m: int = Field(10, ge=2, le=10)


class ShardCacheConfig(StrictModel):
    """Whole shards on the node's own disk; `wsss_dist/data/shard_cache.py` says when one is kept."""

    dir: ConfigPath
    # most that lies there, in units of 10^9 bytes
    gb: float = Field(gt=0, allow_inf_nan=False)


class DataConfig(StrictModel):
    """Where the images are and how they are augmented."""

    format: Literal["coco", "voc", "folder", "shards"]
    # of format "shards" also an address that fsspec knows, as s3://bucket/coco14
    root: DataRoot
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
    # crop: scale, flip, pad, crop; squash: resize to a square without keeping the aspect, flip, crop; long_side: as
    # crop, but resized to a random length of the long side; native: flip alone, which needs train.micro_batch: 1
    augment: Literal["crop", "squash", "long_side", "native"] = "crop"
    # range of that length in pixels; of augment "long_side" alone
    long_side: tuple[int, int] | None = None
    # side of the square of augment "squash"; null: crop, so that nothing is cut off
    squash_size: int | None = Field(None, ge=8, le=4096)
    # colour of the padding: black, or mean (0 after the normalisation); null: mean for augment "long_side", else black
    pad: Literal["black", "mean"] | None = None
    # colour jitter, grey, blur, solarise, of the crop
    photometric: bool = False
    # largest change of brightness, contrast, saturation (0.3: factors .7 to 1.3) and hue (turns), of the whole image
    jitter: tuple[float, float, float, float] | None = None
    # random operations on the whole image, after the jitter
    rand_augment: RandAugmentConfig | None = None
    # name -> what an earlier stage made for each image; training gets them in Batch.maps, augmented as the image is
    maps: dict[str, MapConfig] = {}
    # of format "shards" alone: keep the shards that are read on this node's disk; null: read them where they lie
    cache: ShardCacheConfig | None = None
    num_workers: int = Field(2, ge=0, le=256)
    # a training stops when more files than this were unreadable, else other images take their places
    max_damaged: int = Field(10, ge=0)
    # a problems.csv: the files that it calls errors are left out of every split (of a mask: of the eval_splits)
    leave_out: ConfigPath | None = None
    # train on this many images of the training split, evenly strided; None: on all
    train_limit: int | None = Field(None, ge=1)
    # evaluate on this many images of a split, evenly strided; None: on all
    val_limit: int | None = Field(None, ge=1)

    @field_validator("root")
    @classmethod
    def _shards_alone_have_an_address(cls, value: Path | str, info: ValidationInfo) -> Path | str:
        if is_url(value) and info.data.get("format") not in ("shards", None):
            raise ValueError(
                f"data.format is '{info.data['format']}', which reads from a folder alone; give a folder, or make "
                "shards (`python launch/prepare_data.py shards`) and set format: shards"
            )
        return value

    @field_validator("cache")
    @classmethod
    def _shards_alone_are_cached(cls, value: ShardCacheConfig | None, info: ValidationInfo) -> ShardCacheConfig | None:
        if value is not None and info.data.get("format") not in ("shards", None):
            raise ValueError(
                f"data.format is '{info.data['format']}', which does not use it; set format: shards or remove it"
            )
        return value

    @field_validator("scale")
    @classmethod
    def _scale_is_a_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 16:
            raise ValueError("must be a range with 0 < low <= high <= 16")
        return value

    @field_validator("long_side")
    @classmethod
    def _long_side_is_a_range(cls, value: tuple[int, int] | None, info: ValidationInfo) -> tuple[int, int] | None:
        augment = info.data.get("augment")
        if value is None and augment == "long_side":
            raise ValueError("augment: long_side needs the range of lengths in pixels, as [320, 640]")
        if value is not None and augment not in ("long_side", None):
            raise ValueError(f"data.augment is '{augment}', which does not use it; set augment: long_side or remove it")
        if value is not None and not 8 <= value[0] <= value[1] <= 4096:
            raise ValueError("must be a range with 8 <= low <= high <= 4096")
        return value

    @field_validator("squash_size")
    @classmethod
    def _squash_holds_the_crop(cls, value: int | None, info: ValidationInfo) -> int | None:
        augment, crop = info.data.get("augment"), info.data.get("crop")
        if value is not None and augment not in ("squash", None):
            raise ValueError(f"data.augment is '{augment}', which does not use it; set augment: squash or remove it")
        if value is not None and crop is not None and value < crop:
            raise ValueError(f"must be data.crop ({crop}) or more: raise it, or lower data.crop")
        return value

    @field_validator("jitter")
    @classmethod
    def _jitter_is_in_range(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and not (all(0 <= x < float("inf") for x in value) and value[3] <= 0.5):
            raise ValueError("must be [brightness, contrast, saturation, hue], all at least 0 and hue at most 0.5")
        return value

    @field_validator("maps")
    @classmethod
    def _maps_can_follow_the_image(cls, value: dict[str, MapConfig], info: ValidationInfo) -> dict[str, MapConfig]:
        for name in value:
            if not name.isidentifier():
                raise ValueError(f"'{name}' is no name for a map; use letters, digits and _")
        if value and info.data.get("rand_augment") is not None:
            raise ValueError(
                "data.rand_augment turns and shifts the image but not its maps, which would no longer lie on it; "
                "remove one of the two"
            )
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

    @property
    def padding(self) -> Literal["black", "mean"]:
        """Colour of the padding: `pad`, or where that is None what the augmentation's papers do."""
        return self.pad or ("mean" if self.augment == "long_side" else "black")

    @property
    def fixed_views(self) -> bool:
        """Does training see each image in two views alone, as it is and mirrored?"""
        whole = self.augment == "native" or (self.augment == "squash" and self.squash_size in (None, self.crop))
        return whole and not (self.photometric or self.jitter or self.rand_augment)
