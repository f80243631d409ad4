"""Maps that an earlier stage made, one file per image, named after the image's id.

    labels  DIR/<id>.png   single channel or palette: 0 background, 1..C classes, 255 undecided; given as uint8 [H, W]
    grey    DIR/<id>.png   8-bit grey; given as float32 [H, W] in [0, 1], value / 255
    scores  DIR/<id>.npz   `labels` int16 [K], indices 0..C-1 of the classes present, and `full` float16 [K, H, W], the
                           scores of each; given as float32 [H, W], the largest of the K. It is zero where K = 0, and
                           for an image without a tag, which needs no file.
    erased  DIR/<id>.npz   regions that adversarial erasing has mined (`wsss_dist/data/erased.py`); given as uint8
                           [H, W], 1 where any tag has its region, and the loader gives those pixels the mean colour

H W is the size of the image. A map is no ground truth: a file in a mask folder of the data set is refused. A wrong map
is a mistake to put right, never a damaged image to replace.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from wsss_dist.data.config import MapConfig
from wsss_dist.data.dataset import Dataset, missing_files, unknown_ids
from wsss_dist.data.decode import DamagedImage, read_channel
from wsss_dist.data.erased import UnfitRegions, load_regions, read_manifest
from wsss_dist.errors import BadFile, UserError

_FORMAT = {
    "labels": "a single-channel PNG of class ids",
    "grey": "an 8-bit grey PNG",
    "scores": "an .npz of `labels` [K], whole numbers, and `full` [K, height, width], floating point",
    "erased": "an .npz of mined regions",
}
# kinds that hold something of each tag
_OF_TAGS = ("scores", "erased")


class UnfitMap(Exception):
    """A file that is not the map it should be: what was found, what was expected."""


def map_path(cfg: MapConfig, image_id: str) -> Path:
    """The file of an image's map."""
    return cfg.dir / _file_name(cfg, image_id)


def _file_name(cfg: MapConfig, image_id: str) -> str:
    return f"{image_id}.{'npz' if cfg.kind in _OF_TAGS else 'png'}"


def read_maps(dataset: Dataset, i: int, maps: dict[str, MapConfig], size: tuple[int, int]) -> dict[str, np.ndarray]:
    """The maps of image i, each [H, W]: uint8 class ids of kind "labels", else float32.

    Args:
        dataset: the split.
        i: position in it.
        maps: name -> where and what.
        size: (H, W) of the image.
    Raises:
        UserError: a file is missing, unreadable, of another size or holds what it may not; says which stage makes it.
    """
    return {name: _read_map(dataset, i, name, cfg, size) for name, cfg in maps.items()}


def _read_map(dataset: Dataset, i: int, name: str, cfg: MapConfig, size: tuple[int, int]) -> np.ndarray:
    path = map_path(cfg, dataset.id(i))
    if not _needs_file(dataset, i, cfg) and not path.is_file():
        return np.zeros(size, np.float32 if cfg.kind == "scores" else np.uint8)
    try:
        values = _READERS[cfg.kind](path, len(dataset.class_names))
        if values.shape != size:
            found, expected = (f"{h} x {w}" for h, w in (values.shape, size))
            raise UnfitMap(f"is {found} (height x width)", f"{expected}, the size of {dataset.path(i)}")
    except UnfitMap as error:
        found, expected = error.args
        message = (
            f"data: {path}, the map '{name}' of image {dataset.id(i)}, {found}; expected {expected}: {_fix(name, cfg)}"
        )
        raise BadFile(path, f"the map '{name}' of image {dataset.id(i)} {found}", message) from None
    return values


def check_maps(dataset: Dataset, maps: dict[str, MapConfig], count: int = 8) -> None:
    """Hold that every image has its maps, and read those of up to `count` evenly strided images.

    Args:
        dataset: the split.
        maps: name -> where and what.
        count: images whose maps are read.
    Raises:
        UserError: a map is missing or wrong, or is a ground-truth mask of the data set.
    """
    for name, cfg in maps.items():
        _check_complete(dataset, name, cfg)
        if cfg.kind == "erased":
            read_manifest(cfg.dir).check(cfg.dir, dataset)
    for k in range(min(count, len(dataset)) if maps else 0):
        i = k * len(dataset) // min(count, len(dataset))
        for name, cfg in maps.items():
            _check_is_no_mask(dataset, map_path(cfg, dataset.id(i)), name)
        try:
            height, width = dataset.image(i).shape[:2]
        except DamagedImage:
            continue  # what becomes of it is the loader's affair
        read_maps(dataset, i, maps, (height, width))


def _check_complete(dataset: Dataset, name: str, cfg: MapConfig) -> None:
    if not cfg.dir.is_dir():
        raise UserError(
            f"data: data.maps.{name}.dir is '{cfg.dir}', which is not a folder; expected the maps '{name}' of "
            f"'{dataset.name}', {_FORMAT[cfg.kind]} for each image: {_fix(name, cfg)}"
        )
    wanted = [_file_name(cfg, dataset.id(i)) for i in range(len(dataset)) if _needs_file(dataset, i, cfg)]
    missing = missing_files(cfg.dir, wanted)
    if missing:
        raise UserError(
            f"data: {cfg.dir} misses the map '{name}' of {len(missing)} of {len(wanted)} images of '{dataset.name}' "
            f"(first: {', '.join(missing[:3])}); expected {_FORMAT[cfg.kind]} for each: {_fix(name, cfg)}"
        )


def _check_is_no_mask(dataset: Dataset, path: Path, name: str) -> None:
    for folder in dataset.mask_folders:
        if path.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"data: data.maps.{name} leads to {path}, a ground-truth mask of '{dataset.name}'; expected what an "
                f"earlier stage made, for training never sees a mask: correct data.maps.{name}.dir"
            )


def _needs_file(dataset: Dataset, i: int, cfg: MapConfig) -> bool:
    return cfg.kind not in _OF_TAGS or bool(dataset.tags[i].any())


def _fix(name: str, cfg: MapConfig) -> str:
    return f"make it with {cfg.made_by or 'the stage before'}, or correct data.maps.{name}"


# ---------------------------------------------------------------- one reader per kind: (path, C) -> array, or UnfitMap


def _labels(path: Path, num_classes: int) -> np.ndarray:
    ids = _channel(path, ("L", "P", "1"), "labels")
    wrong = unknown_ids(ids, num_classes)
    if wrong:
        known = f"0 (background), 1..{num_classes} (the classes) and 255 (undecided)"
        raise UnfitMap(f"holds the ids {wrong[:5]}", known)
    return ids


def _grey(path: Path, num_classes: int) -> np.ndarray:
    return _channel(path, ("L",), "grey").astype(np.float32) / 255


def _channel(path: Path, modes: tuple[str, ...], kind: str) -> np.ndarray:
    try:
        return read_channel(path, modes)
    except DamagedImage as error:
        raise UnfitMap(f"cannot be used: {error.reason}", _FORMAT[kind]) from None


def _scores(path: Path, num_classes: int) -> np.ndarray:
    full = load_scores(path, num_classes)["full"]
    if not len(full):
        return np.zeros(full.shape[1:], np.float32)
    largest = full.astype(np.float32).max(axis=0)
    if not np.isfinite(largest).all():
        raise UnfitMap("holds scores that are not finite", "numbers")
    return largest


def load_scores(path: Path, num_classes: int) -> dict[str, np.ndarray]:
    """The arrays of a file of kind "scores" by name: `labels` in 0..num_classes - 1, `full`, and what else it holds.

    Raises:
        UnfitMap: missing, damaged, or it holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
            labels, full = arrays["labels"], arrays["full"]
    except Exception as error:  # numpy, zipfile and zlib raise many kinds on damaged bytes, and all mean the same here
        reason = "the file is missing" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
        raise UnfitMap(f"cannot be used: {reason}", _FORMAT["scores"]) from None
    fits = labels.ndim == 1 and labels.dtype.kind in "iu" and full.ndim == 3 and full.dtype.kind == "f"
    if not fits or len(labels) != len(full):
        found = f"`labels` {labels.dtype} {list(labels.shape)} and `full` {full.dtype} {list(full.shape)}"
        raise UnfitMap(f"holds {found}", _FORMAT["scores"])
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise UnfitMap(f"holds the classes {wrong[:5].tolist()}", f"indices 0..{num_classes - 1}")
    return arrays


def _erased(path: Path, num_classes: int) -> np.ndarray:
    try:
        return load_regions(path, num_classes)[1].any(axis=0).astype(np.uint8)
    except UnfitRegions as error:
        raise UnfitMap(*error.args) from None


_READERS = {"labels": _labels, "grey": _grey, "scores": _scores, "erased": _erased}
