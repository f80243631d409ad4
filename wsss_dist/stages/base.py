"""What every stage that makes one file per image shares: which images, which rank, what is there already.

The images of a stage are those of its splits, by default the training split and data.eval_splits (of the latter
data.val_limit, as in an evaluation). A rank that is free takes the next image, and an image has the same bytes on
whichever rank. A file that is there is whole, since it is written under another name first: a stage that was
killed goes on with the images that are missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from wsss_dist import dist
from wsss_dist.agreement import check_same
from wsss_dist.cam import rescaled
from wsss_dist.data import DataConfig, Dataset, build_dataset, build_inference_loader, chosen_rows
from wsss_dist.data.batch import EvalSample
from wsss_dist.data.decode import DamagedImage, read_channel
from wsss_dist.data.maps import UnfitMap, load_scores
from wsss_dist.data.palette import palette_picture
from wsss_dist.data.transforms import normalise
from wsss_dist.errors import UserError
from wsss_dist.files import whole_file
from wsss_dist.schema import StrictModel
from wsss_dist.trained import load_trained


class StageConfig(StrictModel):
    """What every kind has."""

    data: DataConfig
    splits: list[str] | None = Field(None, min_length=1)  # null: the training split and data.eval_splits


@dataclass
class Stage:
    """One stage to run: its name, folder, parsed config, and where to say how far it is."""

    name: str
    folder: Path
    config: Any
    say: Callable[[str], None] = print
    _splits: dict[str, tuple[Dataset, np.ndarray]] | None = field(default=None, init=False, repr=False)

    def splits(self) -> dict[str, tuple[Dataset, np.ndarray]]:
        """Split -> data set and the positions of its images that count, int64; opened once."""
        if self._splits is None:
            data = self.config.data
            sets = {name: build_dataset(data, name) for name in split_names(self.config)}
            limits = {name: None if name == data.train_split else data.val_limit for name in sets}
            self._splits = {name: (dataset, chosen_rows(dataset, limits[name])) for name, dataset in sets.items()}
        return self._splits

    def network(
        self,
        run_dir: Path,
        ability: str = "predict",
        gives: str = "predictions",
        changes: dict[str, Any] | None = None,
    ) -> nn.Module:
        """The trained network of the stage in `run_dir`, in evaluation mode on this rank's device; a collective call.

        Args:
            run_dir: folder of a training stage.
            ability: method that the network must have.
            gives: what that method gives, for the message.
            changes: keys of its `method:` section that take other values than in training.
        Raises:
            UserError: it is not trained, was trained on other classes, or lacks the method.
        """
        (dataset, _), *_ = self.splits().values()
        found = []

        def load() -> dict[str, Any]:
            _, method = load_trained(run_dir, dataset.class_names, changes)
            if not hasattr(method, ability):
                raise UserError(f"stage '{self.name}': the network of '{run_dir.name}' gives no {gives}")
            found.append(method)
            return {}

        check_same(load)  # every rank raises what one of them met
        return found[0]

    def output(self, split: str, image_id: str, suffix: str) -> Path:
        """The file of an image."""
        return output(self.folder, split, image_id, suffix)

    def make(self, suffix: str, work: Callable[[EvalSample, str, Dataset], Callable[[IO], None] | None]) -> int:
        """Make the file of every image that has none; a collective call.

        Args:
            suffix: ".png" or ".npz".
            work: (sample, split, data set) -> what writes the content into an open file, or None for an image without.
        Returns:
            how many were made, on all ranks.
        Raises:
            UserError: on every rank, if any of them met one.
        """
        total = 0
        for split, (dataset, rows) in self.splits().items():
            made, without = make_files(
                f"{self.name}, {split}",
                dataset,
                rows,
                self.config.data,
                lambda image_id, split=split: self.output(split, image_id, suffix),
                lambda sample, split=split, dataset=dataset: work(sample, split, dataset),
                self.say,
            )
            if left_out := dataset.left_out + without:
                self.say(f"{self.name}, {split}: {left_out} images without tags are left out")
            total += made
        return total


def split_names(config: StageConfig) -> list[str]:
    """Of the splits whose images a stage goes through."""
    names = config.splits if config.splits is not None else [config.data.train_split, *config.data.eval_splits]
    return list(dict.fromkeys(names))


def make_files(
    name: str,
    dataset: Dataset,
    rows: np.ndarray,
    cfg: DataConfig,
    path_of: Callable[[str], Path],
    work: Callable[[EvalSample], Callable[[IO], None] | None],
    say: Callable[[str], None],
) -> tuple[int, int]:
    """Make the file of every image that has none, the ranks together; a collective call.

    Args:
        name: of what is made, for the lines that say how far it is.
        dataset: the split.
        rows: positions of its images, ascending, int64.
        cfg: num_workers.
        path_of: id of an image -> its file.
        work: sample -> what writes the content into an open file, or None for an image without.
        say: takes those lines.
    Returns:
        how many files were made on all ranks, and how many images have none.
    Raises:
        UserError: on every rank, if any of them met one.
    """
    todo = dist.on_main(lambda: np.array([r for r in rows if not path_of(dataset.id(int(r))).is_file()], np.int64))
    if len(todo) < len(rows):
        say(f"{name}: {len(rows) - len(todo)} of {len(rows)} images are there already")
    made, without, quarter, start = 0, 0, 0, time.perf_counter()
    with dist.shared(len(todo), block=1) as mine:
        for sample in build_inference_loader(dataset, cfg, (int(todo[k]) for k in mine), ahead=1):
            write = work(sample)
            if write is None:
                without += 1
            else:
                _write(path_of(sample.id), write)
                made += 1
            number = int(np.searchsorted(todo, sample.index)) + 1
            if number * 4 // len(todo) > quarter:
                quarter = number * 4 // len(todo)
                say(f"{name}: image {number}/{len(todo)}, {time.perf_counter() - start:.0f} s")
    made, without = dist.all_reduce_sum(torch.tensor([made, without])).tolist()
    return made, without


def output(folder: Path, split: str, image_id: str, suffix: str) -> Path:
    """The file that a stage made of an image."""
    return folder / "out" / split / f"{image_id}{suffix}"


def _write(path: Path, write: Callable[[IO], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial, partial.open("wb") as file:
        write(file)


# ------------------------------------------------------------------------------------------------------ images


def views(image: Tensor, scales: list[float]) -> Iterator[Tensor]:
    """Image [3, H, W] uint8 -> [2, 3, h, w] normalised, itself and its mirror image, for each scale."""
    own = image.to(dist.device()).float()[None]
    for scale in scales:
        x = normalise(rescaled(own, scale).clamp(0, 255).round())
        yield torch.cat([x, x.flip(-1)])


# ------------------------------------------------------------------------------------------------------ files


@dataclass
class Scores:
    """Scores of the classes of an image: classes [K] int64 in 0..C-1, maps [K, H, W] float32, small [K, h, w] or None.

    `small` is on the grid of stride 4.
    """

    classes: Tensor
    maps: Tensor
    small: Tensor | None = None


def scores_writer(scores: Scores) -> Callable[[IO], None]:
    """What writes an .npz of `labels` int16 [K], `full` float16 [K, H, W] and, where there is one, `s4`."""
    arrays = {"labels": scores.classes.cpu().numpy().astype(np.int16), "full": _half(scores.maps)}
    if scores.small is not None:
        arrays["s4"] = _half(scores.small)
    return lambda file: np.savez_compressed(file, **arrays)


def png_writer(picture: Tensor) -> Callable[[IO], None]:
    """What writes [H, W] values of 0..255 as an 8-bit PNG."""
    array = picture.to(torch.uint8).cpu().numpy()
    return lambda file: Image.fromarray(array).save(file, "PNG")


def label_writer(labels: Tensor) -> Callable[[IO], None]:
    """What writes [H, W] class ids as an 8-bit PNG with the colours of PASCAL VOC as its palette."""
    array = labels.to(torch.uint8).cpu().numpy()
    return lambda file: palette_picture(array).save(file, "PNG")


def read_scores(folder: Path, split: str, image_id: str, size: tuple[int, int], labels: Tensor) -> Scores | None:
    """What `scores_writer` wrote of the tags of an image; None for an image without tags, which has no file.

    Args:
        folder, split, image_id: where it lies.
        size: of the image.
        labels: its tags, [C], 1 where present.
    Raises:
        UserError: missing, damaged, of another size, or of other classes; names the file and the stage that makes it.
    """
    path, tags = output(folder, split, image_id, ".npz"), labels.nonzero()[:, 0].tolist()
    if not path.is_file():
        if tags:
            raise UserError(
                f"stage: {path} is missing; expected the maps of the {len(tags)} tags of the image: run the config "
                f"again, the stage '{folder.name}' makes it, if the split '{split}' is one of its splits"
            )
        return None
    try:
        arrays = load_scores(path, len(labels))
    except UnfitMap as error:
        found, expected = error.args
        raise _unusable(path, folder, f"{found.removeprefix('cannot be used: ')}; expected {expected}") from None
    if arrays["labels"].tolist() != tags:
        found = f"holds the classes {arrays['labels'].tolist()}, the tags of the image are {tags}"
        raise _unusable(path, folder, found)
    _check_size(path, folder, arrays["full"].shape[1:], size)
    device = dist.device()
    classes, maps = (torch.from_numpy(arrays[name]).to(device) for name in ("labels", "full"))
    small = torch.from_numpy(arrays["s4"]).to(device).float() if "s4" in arrays else None
    return Scores(classes.long(), maps.float(), small)


def read_png(folder: Path, split: str, image_id: str, size: tuple[int, int] | None = None) -> Tensor:
    """What `png_writer` or `label_writer` wrote of an image of the given size (None: of any), uint8 [H, W].

    Raises:
        UserError: missing, damaged or of another size; names the file and the stage that makes it.
    """
    path = output(folder, split, image_id, ".png")
    try:
        picture = read_channel(path, ("L", "P"))
    except DamagedImage as error:
        raise _unusable(path, folder, error.reason) from None
    if size is not None:
        _check_size(path, folder, picture.shape, size)
    return torch.from_numpy(picture).to(dist.device())


def grey_of(folder: Path, split: str, image_id: str, size: tuple[int, int], dataset: Dataset) -> Tensor:
    """The grey map of an image, float32 [H, W] in [0, 1], of a stage's folder or from DIR/<split>/<id>.png.

    Raises:
        UserError: missing, not 8-bit grey, of another size, or with no value but 0 and 1; names the map and the image.
    """
    made_here = (folder / "out").is_dir()
    path = output(folder, split, image_id, ".png") if made_here else folder / split / f"{image_id}.png"
    try:
        picture = read_channel(path, ("L",))
        reason = f"is {picture.shape[0]} x {picture.shape[1]} (height x width)" if picture.shape != size else None
        if not made_here and picture.size and picture.max() == 1:
            reason = "holds the values 0 and 1 alone"
    except DamagedImage as error:
        reason = f"cannot be used ({error.reason})"
    if reason is not None:
        row = next(i for i in range(len(dataset)) if dataset.id(i) == image_id)
        raise UserError(
            f"stage: the saliency map {path} {reason}; expected an 8-bit grey PNG of {size[0]} x {size[1]}, 0 to "
            f"255, as the image {dataset.path(row)}: make it again"
        )
    return torch.from_numpy(picture).to(dist.device()).float() / 255


def _check_size(path: Path, folder: Path, found: tuple[int, ...], size: tuple[int, int]) -> None:
    if tuple(found) != tuple(size):
        raise _unusable(path, folder, f"is {found[0]} x {found[1]} (height x width), the image {size[0]} x {size[1]}")


def _unusable(path: Path, folder: Path, reason: str) -> UserError:
    return UserError(
        f"stage: {path} cannot be used: {reason}; delete it, with {folder / 'stage.json'}, and run the config again: "
        f"the stage '{folder.name}' makes it"
    )


def _half(maps: Tensor) -> np.ndarray:
    return maps.cpu().numpy().astype(np.float16)
