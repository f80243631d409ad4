"""Evaluation of a method on splits with masks: CAM, segmentation head, and the head after a dense CRF.

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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import kernels
from wsss_dist import dist
from wsss_dist.data import build_dataset, build_eval_loader, check_eval_samples
from wsss_dist.data.batch import Batch, EvalSample
from wsss_dist.data.transforms import normalise
from wsss_dist.errors import UserError
from wsss_dist.metrics import SWEEP, ConfusionMatrix, ThresholdSweep
from wsss_dist.schema import StrictModel

if TYPE_CHECKING:  # config.py composes EvalConfig, so a plain import would be a circle
    from wsss_dist.config import RunConfig
    from wsss_dist.methods.base import BaseMethod, Prediction


class CRFConfig(StrictModel):
    """Dense CRF after the segmentation head; the defaults are PCRE's for VOC."""

    iterations: int = Field(10, ge=1)
    spatial: tuple[float, float] = (2.0, 1.0)  # sigma in pixels, weight
    bilateral: tuple[float, float, float] = (140.0, 1.0, 7.0)  # sigma in pixels, sigma in grey levels, weight

    @field_validator("spatial", "bilateral")
    @classmethod
    def _sigmas_are_positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if min(value[:-1]) <= 0 or value[-1] < 0:
            raise ValueError("sigmas must be above 0 and the weight (last number) at least 0")
        return value


class EvalConfig(StrictModel):
    """How a model is scored; it never changes the training."""

    cam_scales: list[float] = [1.0, 0.5, 0.75, 1.5]
    seg_scales: list[float] = [1.0, 1.25, 1.5]
    size: int | None = Field(448, ge=1)  # side of the square input; None: native size, rounded to the backbone's patch
    fuse: Literal["voc", "coco"] = "voc"  # how the logits of the scales are merged
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
    datasets = {split: build_dataset(cfg.data, split) for split in splits}
    for split, dataset in datasets.items():
        if not dataset.has_masks:
            raise UserError(
                f"evaluation: split '{split}' of {cfg.data.root} has no masks, so it cannot be scored; "
                f"add them or take '{split}' out of data.eval_splits"
            )
        class_names = class_names or dataset.class_names
        if dataset.class_names != class_names:
            raise UserError(
                f"evaluation: split '{split}' of {cfg.data.root} has the classes {_some(dataset.class_names)}, the "
                f"other splits {_some(class_names)}; expected the same: give all annotation files the same categories"
            )
    for dataset in datasets.values():
        dist.on_main(partial(check_eval_samples, dataset, cfg.data))
    return datasets


def evaluate_splits(
    method: BaseMethod, cfg: RunConfig, splits: list[str], run_dir: Path, step: int | None, *, final: bool = True
) -> dict[str, dict[str, dict]]:
    """Score a method on splits; a collective call, every rank has to make it and every rank gets the same result.

    Args:
        method: the module, on the device it should run on; its training flags and the random state are left as found.
        splits: names of splits with masks.
        run_dir: run folder.
        step: training step the weights stand at; None means trained to the end.
        final: the full evaluation: all images, CRF, pictures under run_dir/samples, and run_dir/result.json.
            False is the quick one during training: eval.limit images, no CRF, nothing written.
    Returns:
        split -> kind -> metrics (`ConfusionMatrix.summary`). Kinds: "cam" (threshold eval.beta, tags of the image
        given), "cam_best" (best threshold of 0.05..0.95 on this split: an oracle, as usual for CAM seeds), and, for a
        method with a segmentation head, "seg" and "seg_crf".
    """
    if not final and cfg.eval.limit is not None:
        limit = min(cfg.eval.limit, cfg.data.val_limit or cfg.eval.limit)
        cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"val_limit": limit})})
    results, records = {}, {}
    datasets = open_splits(cfg, splits)
    for split, dataset in datasets.items():
        start = time.perf_counter()
        with _inference(method):
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
        dist.on_main(lambda: _write_result(Path(run_dir), method, cfg, class_names, records))
    return results


# ---------------------------------------------------------------------------------------------------- one split


@dataclass
class _Tally:
    """Counts and kept pictures of one split on this rank."""

    sweep: ThresholdSweep
    matrices: dict[str, ConfusionMatrix] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, kind: str, pred: Tensor, gt: Tensor) -> None:
        if kind not in self.matrices:
            self.matrices[kind] = ConfusionMatrix(self.sweep.num_classes)
        self.matrices[kind].update(pred, gt)

    def results(self, beta: float) -> dict[str, dict]:
        """Metrics over all ranks. A rank without images has no kinds of its own, so the names are gathered first."""
        sweep = self.sweep.reduced()
        threshold, best = sweep.best(SWEEP)
        out = {
            "cam": {**sweep.at(beta).summary(), "threshold": beta},
            "cam_best": {**best.summary(), "threshold": threshold, "oracle": "threshold chosen on this split"},
        }
        for kind in sorted(set().union(*dist.all_gather_object(list(self.matrices)))):
            own = self.matrices.get(kind, ConfusionMatrix(self.sweep.num_classes))
            out[kind] = own.reduced().summary()
        return out


def _score_split(method: BaseMethod, cfg: RunConfig, dataset: Any, split: str, step: int | None, final: bool) -> _Tally:
    num_classes = len(dataset.class_names) + 1
    tally = _Tally(ThresholdSweep(num_classes, (*SWEEP, cfg.eval.beta)))
    loader = build_eval_loader(dataset, cfg.data, rank=dist.rank(), world_size=dist.world_size())
    total = _num_images(dataset, cfg)
    keep = _strided(total, cfg.report.num_images) if final else set()
    crf = cfg.eval.crf if final else None
    inputs = ((sample, _network_input(sample.image.to(_device(method)), cfg.eval.size, method)) for sample in loader)
    positions = itertools.count(dist.rank(), dist.world_size())
    for chunk in _chunks(_progress(inputs, len(loader), f"evaluate {split}"), cfg.eval.batch):
        samples, images = zip(*chunk, strict=True)
        prediction = _predict(method, cfg.eval, samples, torch.stack(images), step)
        for i, sample in enumerate(samples):
            shown = _score_image(tally, prediction, i, sample, crf)
            if next(positions) in keep:
                tally.samples.append(shown)
    return tally


def _predict(
    method: BaseMethod, cfg: EvalConfig, samples: Sequence[EvalSample], images: Tensor, step: int | None
) -> Prediction:
    device = images.device
    batch = Batch(
        images=images,
        labels=torch.stack([s.labels for s in samples]).to(device),
        boxes=torch.tensor([[0, 0, *images.shape[-2:]]] * len(samples), device=device),
        ids=[s.id for s in samples],
        flipped=torch.zeros(len(samples), dtype=torch.bool, device=device),
    )
    return method.predict(batch, cam_scales=cfg.cam_scales, seg_scales=cfg.seg_scales, fuse=cfg.fuse, step=step)


def _score_image(
    tally: _Tally, prediction: Prediction, i: int, sample: EvalSample, crf: CRFConfig | None
) -> dict[str, Any]:
    """Add image i of a prediction to the counts; returns what the report shows of it (numpy, native size)."""
    size = tuple(sample.image.shape[-2:])
    device = prediction.cam.device
    gt = sample.mask.to(device)
    tags = torch.nonzero(sample.labels > 0).flatten().tolist()
    shown = {
        "index": np.int64(sample.index),
        "id": np.str_(sample.id),
        "tags": np.array(tags, dtype=np.int64) + 1,  # class ids as in the masks
        "image": sample.image.permute(1, 2, 0).numpy(),
        "truth": sample.mask.numpy(),
    }
    cam = _resized(prediction.cam[i, tags].float(), size)
    value, which = cam.max(0) if tags else (torch.zeros(size, device=device), torch.zeros_like(gt, dtype=torch.int64))
    class_ids = torch.tensor([t + 1 for t in tags] or [1], device=device)
    tally.sweep.update(value, class_ids[which], gt)
    shown["cam"] = _bytes(cam)
    if prediction.logits is not None:
        logits = _resized(prediction.logits[i].float(), size)
        labels = {"seg": logits.argmax(0)}
        if crf is not None:
            labels["seg_crf"] = crf_labels(logits, sample.image.to(device), crf)
        for kind, pred in labels.items():
            tally.add(kind, pred, gt)
            shown[kind] = pred.to(torch.uint8).cpu().numpy()
    for name, maps in prediction.extras.items():
        shown[f"extra_{name}"] = _shown_extra(maps[i], tags, size)
    return shown


def crf_labels(logits: Tensor, image: Tensor, cfg: CRFConfig) -> Tensor:
    """Labels [H, W] int64 after a dense CRF with unary -ln(clip(softmax(logits), 1e-5, 1)).

    Args:
        logits: [K, H, W] at the native size.
        image: [3, H, W] uint8 RGB.
    Source: Krähenbühl & Koltun, NeurIPS 2011; unary and parameters as PCRE's evaluation.
    """
    unary = -logits.float().softmax(0).clamp(1e-5, 1.0).log()
    refined = kernels.dense_crf(
        unary[None], image[None], spatial=cfg.spatial, bilateral=cfg.bilateral, iterations=cfg.iterations, mode="fast"
    )
    return refined[0].argmax(0)


# ---------------------------------------------------------------------------------------------------- tensors


def _network_input(image: Tensor, size: int | None, method: nn.Module) -> Tensor:
    """[3, H, W] uint8 -> normalised float32 at the network's size (bilinear, half-pixel centres, no antialiasing)."""
    patch = getattr(method, "patch_size", 1)
    native = [max(patch, round(s / patch) * patch) for s in image.shape[-2:]]
    return normalise(_resized(image.float(), tuple(native) if size is None else (size, size)))


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """[C, H, W] float -> [C, *size]; C may be 0, which interpolate would refuse."""
    if maps.shape[0] == 0:
        return maps.new_zeros(0, *size)
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]


def _shown_extra(maps: Tensor, tags: list[int], size: tuple[int, int]) -> np.ndarray:
    """A map of the report at native size: [C, H, W] floats -> uint8 of the tags; [H, W] labels -> uint8 labels."""
    if maps.ndim == 3:
        return _bytes(_resized(maps[tags].float(), size))
    return F.interpolate(maps[None, None].float(), size, mode="nearest-exact")[0, 0].to(torch.uint8).cpu().numpy()


def _bytes(maps: Tensor) -> np.ndarray:
    return (maps.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def _device(method: nn.Module) -> torch.device:
    return next(method.parameters()).device


@contextmanager
def _inference(method: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradient; afterwards each submodule's training flag and the random state are as found."""
    flags = {module: module.training for module in method.modules()}
    device = _device(method)
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


def _write_result(run_dir: Path, method: nn.Module, cfg: RunConfig, class_names: list[str], records: dict) -> None:
    """Write run_dir/result.json; splits of an earlier evaluation that this one did not touch are kept."""
    path = run_dir / "result.json"
    earlier = json.loads(path.read_text())["splits"] if path.exists() else {}
    result = {
        "name": cfg.run.name,
        "method": cfg.method_name,
        "seed": cfg.run.seed,
        "class_names": ["background", *class_names],
        "data_note": _data_note(Path(cfg.data.root)),
        "weights_note": getattr(method, "weights_note", None),
        "splits": {**earlier, **records},
    }
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(result, indent=1, allow_nan=False))
    os.replace(partial, path)


def _data_note(root: Path) -> str | None:
    """What the data set says of itself: "about" in its manifest.json, if it has one."""
    manifest = root / "manifest.json"
    return json.loads(manifest.read_text(encoding="utf-8")).get("about") if manifest.is_file() else None
