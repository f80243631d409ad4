"""Evaluation of a method on splits with masks: CAM, segmentation head in several protocols, pseudo labels.

B batch, C foreground classes, K = C + 1 with background (0), H W pixels of an image at its native size.

Each rank takes every world_size-th image and only integer counts travel between ranks, so N ranks give the result of
one (as far as the network gives an image the same maps in another batch). The protocol is that of PCRE (CVPR 2025):
the image is squeezed to a square (or keeps its aspect), the maps are resized to the native size and labelled there.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from wsss_dist import dist
from wsss_dist.agreement import check_same, facts_of_data
from wsss_dist.crf import CRFConfig
from wsss_dist.data import build_dataset, build_eval_loader, check_eval_samples
from wsss_dist.data.batch import Batch, EvalSample
from wsss_dist.data.transforms import normalise
from wsss_dist.errors import UserError
from wsss_dist.methods.base import BaseMethod, Views
from wsss_dist.metrics import SWEEP, ThresholdSweep
from wsss_dist.schema import StrictModel
from wsss_dist.scoring import Tally, resized, score_image

if TYPE_CHECKING:  # config.py composes EvalConfig, so a plain import would be a circle
    from wsss_dist.config import RunConfig


class EvalConfig(StrictModel):
    """How a model is scored; it never changes the training."""

    cam_scales: list[float] = [1.0, 0.5, 0.75, 1.5]
    seg_scales: list[float] = [1.0, 1.25, 1.5]
    size: int | None = Field(448, ge=1)  # side of the square input; None: native size, rounded to the backbone's patch
    fuse: Literal["voc", "coco", "mean"] = "voc"  # how the logits of the scales are merged
    beta: float = Field(0.5, ge=0, le=1)  # CAM label: background where no class is above it
    crf: CRFConfig | None = CRFConfig()
    limit: int | None = Field(None, ge=1)  # images of a split in the evaluations during training; None: all
    batch: int = Field(8, ge=1)  # images at once, as far as neighbours have one size

    @field_validator("cam_scales", "seg_scales")
    @classmethod
    def _scales(cls, value: list[float]) -> list[float]:
        if 1.0 not in value or min(value) <= 0 or len(set(value)) != len(value):
            raise ValueError("scales must be different numbers above 0, 1.0 among them")
        return value


def open_splits(cfg: RunConfig, splits: list[str], class_names: list[str] | None = None) -> dict[str, Any]:
    """The data sets of the splits, a few of their masks looked at; a collective call, before a run to fail early.

    Args:
        class_names: classes that the splits must have; None: those of the first one.
    Raises:
        UserError: a split has no masks, so there is nothing to score against, wrong ones, or other classes.
    """
    datasets: dict[str, Any] = {}

    def opened(classes: list[str] | None = class_names) -> dict[str, Any]:
        for split in splits:
            datasets[split] = dataset = build_dataset(cfg.data, split)
            if not dataset.has_masks:
                raise UserError(
                    f"evaluation: split '{split}' of {cfg.data.root} has no masks, so it cannot be scored; "
                    f"add them or take '{split}' out of data.eval_splits"
                )
            classes = classes or dataset.class_names
            if dataset.class_names != classes:
                raise UserError(
                    f"evaluation: split '{split}' of {cfg.data.root} has the classes {_some(dataset.class_names)}, the "
                    f"other splits {_some(classes)}; expected the same: give all annotation files the same categories"
                )
        return {k: v for split, dataset in datasets.items() for k, v in facts_of_data(split, dataset).items()}

    check_same(opened)
    for dataset in datasets.values():
        dist.on_main(partial(check_eval_samples, dataset, cfg.data))
    return datasets


def evaluate_splits(
    method: BaseMethod,
    cfg: RunConfig,
    splits: list[str],
    run_dir: Path,
    step: int | None,
    *,
    final: bool = True,
    weights_note: str | None = None,
) -> dict[str, dict[str, dict]]:
    """Score a method on splits; a collective call, every rank has to make it and every rank gets the same result.

    Args:
        method: the module, on the device it should run on; its training flags and the random state are left as found.
        splits: names of splits with masks.
        run_dir: run folder.
        step: training step the weights stand at; None means trained to the end.
        final: the full evaluation: all images, scales and kinds, pictures under run_dir/samples, and
            run_dir/result.json. False is the quick one during training: eval.limit images, the segmentation head at
            scale 1.0 alone, no CRF, no pseudo labels, nothing written.
        weights_note: what result.json says of the weights the run started from; None: what the method says.
    Returns:
        split -> kind -> metrics (`ConfusionMatrix.summary`). Kinds:
        "cam": threshold eval.beta, tags of the image given;
        "cam_best": best threshold of 0.05..0.95 on this split, an oracle, as usual for CAM seeds;
        and, for a method with a segmentation head,
        "seg_single": scale 1.0 without mirror image (PCRE's ablations, Tables 1a-h);
        "seg": eval.seg_scales, each with its mirror image;
        "seg_crf": the same after the CRF;
        "seg_tags": as "seg", with classes that are not tags of the image ruled out, the measure of pseudo masks;
        "seg_tags_crf": the same after the CRF, which sees the remaining classes alone;
        "pseudo": the label map that such a method would be trained on (`Prediction.extras`). Its undecided pixels (255)
        count as background; "ignored" is their share of the pixels with a true label.
    """
    if not final:
        cfg = _quick(cfg)
    results, records = {}, {}
    datasets = open_splits(cfg, splits)
    for split, dataset in datasets.items():
        start = time.perf_counter()
        with inference(method):
            tally = _score_split(method, cfg, dataset, split, step, final)
        results[split] = tally.results(cfg.eval.beta)
        records[split] = {
            "images": _num_images(dataset, cfg),
            "step": cfg.train.steps if step is None else step,
            "seconds": round(time.perf_counter() - start, 1),
            "settings": cfg.eval.model_dump(mode="json"),
            "kinds": results[split],
        }
        if final:
            _write_samples(Path(run_dir) / "samples" / split, tally.samples)
    if final and datasets:
        class_names = next(iter(datasets.values())).class_names
        note = weights_note or getattr(method, "weights_note", None)
        dist.on_main(lambda: _write_result(Path(run_dir), note, cfg, class_names, records))
    return results


def _quick(cfg: RunConfig) -> RunConfig:
    """The settings of the evaluation during training."""
    settings = cfg.eval.model_copy(update={"seg_scales": [1.0], "crf": None})
    data = cfg.data
    if settings.limit is not None:
        data = data.model_copy(update={"val_limit": min(settings.limit, data.val_limit or settings.limit)})
    return cfg.model_copy(update={"eval": settings, "data": data})


# ---------------------------------------------------------------------------------------------------- one split


def _score_split(method: BaseMethod, cfg: RunConfig, dataset: Any, split: str, step: int | None, final: bool) -> Tally:
    num_classes = len(dataset.class_names) + 1
    tally = Tally(ThresholdSweep(num_classes, (*SWEEP, cfg.eval.beta)))
    loader = build_eval_loader(dataset, cfg.data, rank=dist.rank(), world_size=dist.world_size())
    total = _num_images(dataset, cfg)
    keep = _strided(total, cfg.report.num_images) if final else set()
    inputs = ((sample, network_input(sample.image.to(device_of(method)), cfg.eval.size, method)) for sample in loader)
    positions = itertools.count(dist.rank(), dist.world_size())
    views = Views(cfg.eval.cam_scales, cfg.eval.seg_scales, cfg.eval.fuse, step=step, extras=final)
    for chunk in _chunks(_progress(inputs, len(loader), f"evaluate {split}"), cfg.eval.batch):
        samples, images = zip(*chunk, strict=True)
        batch = batch_of(samples, torch.stack(images))
        prediction = method.predict(batch, views)
        for i, sample in enumerate(samples):
            score_image(tally, prediction, i, sample, cfg.eval.crf, keep=next(positions) in keep)
    return tally


def batch_of(samples: Sequence[EvalSample], images: Tensor) -> Batch:
    """The batch of images [B, 3, H, W], as they go into the network, with the tags of their samples."""
    device = images.device
    return Batch(
        images=images,
        labels=torch.stack([s.labels for s in samples]).to(device),
        boxes=torch.tensor([[0, images.shape[-2], 0, images.shape[-1]]] * len(samples), device=device),
        ids=[s.id for s in samples],
        flipped=torch.zeros(len(samples), dtype=torch.bool, device=device),
    )


# ---------------------------------------------------------------------------------------------------- tensors


def network_input(image: Tensor, size: int | None, method: nn.Module) -> Tensor:
    """[3, H, W] uint8 -> normalised float32 at the network's size (bilinear, half-pixel centres, no antialiasing)."""
    patch = getattr(method, "patch_size", 1)
    native = [max(patch, round(s / patch) * patch) for s in image.shape[-2:]]
    return normalise(resized(image.float(), tuple(native) if size is None else (size, size)))


def device_of(method: nn.Module) -> torch.device:
    """Where a method's parameters are."""
    return next(method.parameters()).device


@contextmanager
def inference(method: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradient; afterwards each submodule's training flag and the random state are as found."""
    flags = {module: module.training for module in method.modules()}
    device = device_of(method)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        method.eval()
        try:
            yield
        finally:
            for module, training in flags.items():
                module.training = training


# ---------------------------------------------------------------------------------------------------- lists, files


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''} ({len(names)})"


def _num_images(dataset: Any, cfg: RunConfig) -> int:
    return min(len(dataset), cfg.data.val_limit or len(dataset))


def _strided(total: int, count: int) -> set[int]:
    """`count` indices evenly spread over 0..total-1 (all of them where there are fewer)."""
    count = min(total, count)
    return {i * total // count for i in range(count)}


def _progress(items: Iterable[Any], total: int, text: str) -> Iterator[Any]:
    """The items, with a bar on rank 0's terminal, or a line every tenth of the way where there is none."""
    console = Console()
    if not dist.is_main():
        yield from items
    elif console.is_terminal:
        yield from track(items, text, total=total, console=console, transient=True)
    else:
        start = time.perf_counter()
        for i, item in enumerate(items, start=1):
            yield item
            if i * 10 // total > (i - 1) * 10 // total:
                print(f"{text}: image {i}/{total}, {time.perf_counter() - start:.0f} s", flush=True)


def _chunks(items: Iterable[tuple[EvalSample, Tensor]], size: int) -> Iterator[list[tuple[EvalSample, Tensor]]]:
    """Runs of at most `size` neighbours whose network inputs have one shape."""
    chunk: list[tuple[EvalSample, Tensor]] = []
    for item in items:
        if chunk and (len(chunk) == size or item[1].shape != chunk[0][1].shape):
            yield chunk
            chunk = []
        chunk.append(item)
    if chunk:
        yield chunk


def _write_samples(folder: Path, samples: list[dict[str, Any]]) -> None:
    """Rank 0 writes the kept pictures of all ranks as folder/<index>.npz; those of an earlier evaluation go."""
    gathered = [sample for part in dist.all_gather_object(samples) for sample in part]

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.npz"):
            old.unlink()
        for sample in gathered:
            np.savez_compressed(folder / f"{int(sample['index']):06d}.npz", **sample)

    dist.on_main(write)


def _write_result(run_dir: Path, note: str | None, cfg: RunConfig, class_names: list[str], records: dict) -> None:
    """Write run_dir/result.json; splits of an earlier evaluation that this one did not touch are kept."""
    path = run_dir / "result.json"
    earlier = json.loads(path.read_text())["splits"] if path.exists() else {}
    result = {
        "name": cfg.run.name,
        "method": cfg.method_name,
        "seed": cfg.run.seed,
        "class_names": ["background", *class_names],
        "data_note": _data_note(Path(cfg.data.root)),
        "weights_note": note,
        "splits": {**earlier, **records},
    }
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(result, indent=1, allow_nan=False))
    os.replace(partial, path)


def _data_note(root: Path) -> str | None:
    """What the data set says of itself: "about" in its manifest.json, if it has one."""
    manifest = root / "manifest.json"
    return json.loads(manifest.read_text(encoding="utf-8")).get("about") if manifest.is_file() else None
