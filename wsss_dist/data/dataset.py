"""What every data set can do, whatever its files look like."""

from __future__ import annotations

import hashlib
import posixpath
from pathlib import Path, PurePosixPath

import numpy as np

from wsss_dist.data.decode import read_image, read_mask
from wsss_dist.data.problems import LeftOut
from wsss_dist.errors import BadFile, UserError


class Dataset:
    """Images with image-level tags, and masks that only the evaluation may ask for.

    name         for messages and reports.
    class_names  the C foreground classes; class c has id c + 1 in a mask.
    root         folder that the image paths are relative to.
    left_out     how many images without a tag were taken out.
    unusable     how many images data.leave_out took out.
    files        [n] array of str, image paths relative to `root`.
    tags         [n, C] uint8, 1 where the image carries the tag.

    Names and tags are two arrays, not lists of objects, so that worker processes share their memory.
    """

    def __init__(self, name: str, class_names: list[str], root: Path, files: list[str], tags: np.ndarray) -> None:
        assert tags.shape == (len(files), len(class_names)) and tags.dtype == np.uint8
        self.name = name
        self.left_out = 0  # images without a tag that `drop_untagged` took away
        self.unusable = 0
        self.class_names = list(class_names)
        self.root = root
        self.files = np.array(files, dtype=np.str_)
        self.tags = tags

    def __len__(self) -> int:
        return len(self.files)

    def id(self, i: int) -> str:
        """Name of image i within the data set: its path below the image folder without the ending."""
        return image_id(str(self.files[i]))

    def path(self, i: int) -> Path | str:
        """The file of image i, or where else it lies, as messages name it."""
        return self.root / str(self.files[i])

    def image(self, i: int) -> np.ndarray:
        """Image i, uint8 [H, W, 3] RGB, turned upright. Raises DamagedImage."""
        return read_image(self.path(i))

    def labels(self, i: int) -> np.ndarray:
        """Tags of image i, float32 [C], 1 where present."""
        return self.tags[i].astype(np.float32)

    def digest(self) -> str:
        """SHA-256 of the names and tags of the images in their order; their pixels are not read."""
        total = hashlib.sha256(str(self.files.dtype).encode())
        for array in (self.files, self.tags):
            total.update(np.ascontiguousarray(array).view(np.uint8))
        return total.hexdigest()

    def drop_untagged(self) -> None:
        """Leave out the images without any tag. Raises UserError when none is left."""
        rows = np.flatnonzero(self.tags.any(axis=1))
        if not len(rows):
            raise UserError(
                f"data: no image of '{self.name}' has a tag and data.untagged is 'drop'; "
                "correct the annotations, or set data.untagged: keep"
            )
        self.left_out = len(self) - len(rows)
        self._select(rows)

    def leave_out(self, left_out: LeftOut, masks: bool) -> None:
        """Leave out the images that `left_out` names; with `masks` those, too, whose mask it names."""
        named = np.array([self._is_named(i, left_out, masks) for i in range(len(self))], bool)
        self.unusable += int(named.sum())
        if named.all():
            raise UserError(
                f"data: data.leave_out names all {self.unusable} images of '{self.name}'; repair the files and make "
                "the table again, or take another split"
            )
        self._select(np.flatnonzero(~named))

    def _is_named(self, i: int, left_out: LeftOut, masks: bool) -> bool:
        if self.path(i) in left_out:
            return True
        mask = self.mask_file(i) if masks else None
        return mask is not None and mask in left_out

    def keep_strided(self, limit: int | None) -> None:
        """Leave out all but `limit` evenly strided images; None keeps all."""
        if limit is not None and limit < len(self):
            self._select(np.arange(limit) * len(self) // limit)

    def _select(self, rows: np.ndarray) -> None:
        """Keep the images `rows` (int64) alone."""
        self.files, self.tags = self.files[rows], self.tags[rows]

    @property
    def has_masks(self) -> bool:
        """True where `mask` can answer."""
        return False

    @property
    def mask_folders(self) -> list[Path]:
        """Folders of ground-truth masks, there or not; nothing in them may be given to a training."""
        return []

    def mask_file(self, i: int) -> Path | str | None:
        """What `mask` reads for image i, the file or where else it lies; None: it draws the mask, or there is none."""
        return None

    def open_masks(self) -> None:
        """Load what `mask` needs; called once before worker processes start. Training never calls it."""

    def mask(self, i: int) -> np.ndarray:
        """Pixel labels of image i for the evaluation, uint8 [H, W]: 0 background, 1..C classes, 255 ignore.

        Raises:
            UserError: the split has no masks, or the mask is not one.
        """
        raise UserError(
            f"data: '{self.name}' has no masks, which an evaluation needs; "
            "add them, or take the split out of data.eval_splits"
        )


def checked_mask(path: Path, num_classes: int) -> np.ndarray:
    """Read a mask file and hold it to the ids 0..num_classes and 255.

    Raises:
        UserError: it is missing, not a single-channel picture, or holds another id.
    """
    if not path.is_file():
        message = (
            f"data: mask {path} is missing; expected one PNG of class ids per image of an evaluation split: add it, or "
            "take the split out of data.eval_splits"
        )
        raise BadFile(path, "the file is missing", message)
    return checked_ids(read_mask(path), path, num_classes)


def checked_ids(mask: np.ndarray, path: Path | str, num_classes: int) -> np.ndarray:
    """`mask`, uint8 [H, W], if it holds the ids 0..num_classes and 255 alone. Raises UserError, which names `path`."""
    wrong = unknown_ids(mask, num_classes)
    if wrong:
        what = f"holds the ids {wrong[:5]}"
        message = (
            f"data: mask {path} {what}; expected 0 (background), 1..{num_classes} (the classes) and 255 (ignore): "
            "convert the mask, or correct data.classes"
        )
        raise BadFile(path, what, message)
    return mask


def unknown_ids(ids: np.ndarray, num_classes: int) -> list[int]:
    """Those of `ids`, uint8 [H, W], that are neither 0..num_classes nor 255, ascending and each once."""
    counts = np.bincount(ids.reshape(-1), minlength=256)
    return (np.flatnonzero(counts[num_classes + 1 : 255]) + num_classes + 1).tolist()


def existing_root(root: Path) -> Path:
    """`root` if it is a folder, else a UserError."""
    if not root.is_dir():
        raise UserError(
            f"data.root is '{root}', which is not a folder; give the folder of the data set "
            "(`python launch/prepare_data.py quickstart` makes data/stampscenes, `coco` and `voc` prepare theirs)"
        )
    return root


def check_images(folder: Path, files: list[str], where: Path, left_out: LeftOut | None = None) -> None:
    """Hold that each of `files` lies in `folder`, but for those left out; `where` is the list that names them.

    Raises:
        BadFile: with how many are missing and the first three, or that there is none, or as `check_names`.
    """
    if not files:
        what = "lists no image"
        raise BadFile(where, what, f"data: {where} {what}; expected at least one: add images, or name another split")
    check_names(files, where)
    missing = missing_files(folder, files)
    if left_out:
        missing = [name for name in missing if folder / name not in left_out]
    if missing:
        what = f"names {len(missing)} of {len(files)} images that are not in {folder}"
        rows = [(str(folder / name), f"the file is missing, and {where.name} names it") for name in missing]
        message = f"data: {where} {what} (first: {', '.join(missing[:3])}); copy them there, or correct data.root"
        raise BadFile(where, what, message, rows)


def image_id(file: str) -> str:
    """Id of an image, its path without the ending: the name of its mask, of its maps and of what stages make of it."""
    stem, _ = posixpath.splitext(file)
    return str(PurePosixPath(stem)) if "./" in stem or "//" in stem else stem  # which takes 9 times as long


def check_names(files: list[str], where: Path | str) -> None:
    """Hold that ids are distinct and stay inside a folder, for stages write files under them.

    Args:
        files: paths of the images.
        where: the list that names them.
    Raises:
        BadFile: with how many do not, the first, and a row for each.
    """
    outside = [name for name in files if _leads_out(name)]
    if outside:
        what = f"holds {len(outside)} images whose names lead out of the folder"
        rows = [(str(where), f"the image {name!r} leads out of the folder") for name in outside]
        message = f"data: {where} {what} (first: {outside[0]!r}); expected names as 'a.jpg' or 'b/a.jpg': correct them"
        raise BadFile(where, what, message, rows)
    check_ids(files, where)


def check_ids(files: list[str], where: Path | str) -> None:
    """Hold that no two images have one id. Raises BadFile with the first two and a row for each pair."""
    seen: dict[str, int] = {}
    firsts = [seen.setdefault(image_id(name), k) for k, name in enumerate(files)]
    pairs = [(files[first], files[k]) for k, first in enumerate(firsts) if first != k]
    if pairs:
        what = f"holds {len(pairs)} images with the id of another"
        rows = [(str(where), f"the images {a} and {b} have one id, {image_id(a)}") for a, b in pairs]
        message = (
            f"data: {where} {what} (first: {pairs[0][0]} and {pairs[0][1]}); expected names that differ before the "
            "ending, for masks, maps and pseudo labels are named without it: rename or remove one of each"
        )
        raise BadFile(where, what, message, rows)


def _leads_out(name: str) -> bool:
    parts = name.split("/")
    return name.startswith("/") or ".." in parts or parts[-1] in ("", ".") or "\0" in name


def missing_files(folder: Path, files: list[str]) -> list[str]:
    """Those of `files` (paths relative to `folder`) that are not there; lists folders instead of asking for each."""
    seen: dict[str, set[str]] = {}
    missing = []
    for name in files:
        parent, _, leaf = name.rpartition("/")
        if parent not in seen:
            inside = folder / parent
            seen[parent] = {entry.name for entry in inside.iterdir()} if inside.is_dir() else set()
        if leaf not in seen[parent]:
            missing.append(name)
    return missing


def check_distinct(names: list[str], what: str, where: Path | str) -> None:
    """Hold that no name comes twice. Raises BadFile with how many do and the first three."""
    seen: set[str] = set()
    twice = []
    for name in names:
        if name in seen:
            twice.append(name)
        seen.add(name)
    if twice:
        found = f"holds {len(twice)} {what} more than once"
        first = ", ".join(map(str, twice[:3]))
        message = f"data: {where} {found} (first: {first}); expected each once: remove the repetitions"
        rows = [(str(where), f"{what}: {name} is there more than once") for name in twice]
        raise BadFile(where, found, message, rows)
