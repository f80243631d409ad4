"""Evaluation of a method on splits with masks: CAM, segmentation head in several protocols, pseudo labels.

B batch, C foreground classes, K = C + 1 with background (0), H W pixels of an image at its native size.

The images of a split are cut into blocks of eval.batch, a batch is the images of a block that have one size, and the
ranks share the blocks, whoever is free takes the next one. So an image meets the same others with any number of ranks,
and as only integer counts travel between them, N ranks give the result of one. The protocol is that of PCRE (CVPR
2025): the image is squeezed to a square (or keeps its aspect), the maps are resized to the native size and labelled
there.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from wsss_dist import dist
from wsss_dist.agreement import check_same, facts_of_data, flat
from wsss_dist.crf import CRFConfig
from wsss_dist.data import build_dataset, build_eval_loader, check_eval_samples, chosen_rows
from wsss_dist.data.batch import EvalSample, batch_of
from wsss_dist.data.transforms import normalise
from wsss_dist.errors import UserError
from wsss_dist.files import locked, whole_file, write_whole
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
    batch: int = Field(8, ge=1)  # images at once, as far as they have one size

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
        UserError: a split has no masks, so there is nothing to score against, wrong ones, or other classes; or a rank
            has other images or settings.
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
        found = {k: v for split, dataset in datasets.items() for k, v in facts_of_data(split, dataset).items()}
        # all ranks have to cut the images into the same blocks
        settings = {**flat("eval", cfg.eval.model_dump(mode="json")), "data.val_limit": cfg.data.val_limit}
        return {**found, **{f"config '{key}'": value for key, value in settings.items()}}

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
    results, records, samples = {}, {}, {}
    datasets = open_splits(cfg, splits)
    if final:
        dist.on_main(lambda: _earlier(Path(run_dir)))  # now, not after hours
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
            samples[split] = [sample for part in dist.all_gather_object(tally.samples) for sample in part]
    if final and datasets:
        class_names = next(iter(datasets.values())).class_names
        note = weights_note or getattr(method, "weights_note", None)
        dist.on_main(lambda: _write(Path(run_dir), note, cfg, class_names, records, samples))
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
    rows = chosen_rows(dataset, cfg.data.val_limit)
    keep = {int(rows[i]) for i in _strided(len(rows), cfg.report.num_images)} if final else set()
    views = Views(cfg.eval.cam_scales, cfg.eval.seg_scales, cfg.eval.fuse, step=step, extras=final)
    with dist.shared(len(rows), cfg.eval.batch) as mine:
        loader = build_eval_loader(dataset, cfg.data, (int(rows[k]) for k in mine), cfg.eval.batch)
        for block in _progress(_blocks(loader, cfg.eval.batch), rows, f"evaluate {split}"):
            for samples, images in _of_one_shape(block, cfg.eval.size, method):
                prediction = method.predict(batch_of(samples, images), views)
                for i, sample in enumerate(samples):
                    score_image(tally, prediction, i, sample, cfg.eval.crf, keep=sample.index in keep)
    return tally


def _blocks(samples: Iterable[EvalSample], size: int) -> Iterator[list[EvalSample]]:
    """Blocks as they were handed out: the ranks get whole ones, and the last of all may be shorter."""
    samples = iter(samples)
    while block := list(itertools.islice(samples, size)):
        yield block


def _of_one_shape(
    block: list[EvalSample], size: int | None, method: nn.Module
) -> Iterator[tuple[list[EvalSample], Tensor]]:
    """The samples of a block whose network inputs have one shape, with these inputs [B, 3, H, W]; shape by shape."""
    device, found = device_of(method), {}
    for sample in block:
        image = network_input(sample.image.to(device), size, method)
        found.setdefault(image.shape, []).append((sample, image))
    for pairs in found.values():
        samples, images = zip(*pairs, strict=True)
        yield list(samples), torch.stack(images)


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


def _progress(blocks: Iterable[list[EvalSample]], rows: np.ndarray, text: str) -> Iterator[list[EvalSample]]:
    """The blocks, with a bar on rank 0's terminal, or a line every tenth of the way where there is none.

    `rows`, int64 ascending, are handed out in order to all ranks: the place of rank 0's block says how far they are.
    """
    if not dist.is_main():
        yield from blocks
        return
    total, start, tenth, console = len(rows), time.perf_counter(), 0, Console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=total)
        for block in blocks:
            yield block
            number = int(np.searchsorted(rows, block[-1].index)) + 1
            bar.update(task, completed=number)
            if not console.is_terminal and number * 10 // total > tenth:
                tenth = number * 10 // total
                print(f"{text}: image {number}/{total}, {time.perf_counter() - start:.0f} s", flush=True)


def _write(
    run_dir: Path, note: str | None, cfg: RunConfig, class_names: list[str], records: dict, samples: dict
) -> None:
    """Write result.json and samples/ of a run, which another evaluation of it may do at the same time."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with locked(run_dir):
        for split, shown in samples.items():
            _write_samples(run_dir / "samples" / split, shown)
        _write_result(run_dir, note, cfg, class_names, records)


def _write_samples(folder: Path, samples: list[dict[str, Any]]) -> None:
    """Write the kept pictures as folder/<index>.npz; those of an earlier evaluation go."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{int(sample['index']):06d}.npz" for sample in samples]
    for path, sample in zip(paths, samples, strict=True):
        with whole_file(path, contested=True) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **sample)
    for old in set(folder.glob("*.npz")) - set(paths):
        old.unlink(missing_ok=True)


def _write_result(run_dir: Path, note: str | None, cfg: RunConfig, class_names: list[str], records: dict) -> None:
    """Write run_dir/result.json; splits of an earlier evaluation that this one did not touch are kept."""
    result = {
        "name": cfg.run.name,
        "method": cfg.method_name,
        "seed": cfg.run.seed,
        "class_names": ["background", *class_names],
        "data_note": _data_note(Path(cfg.data.root)),
        "weights_note": note,
        "splits": {**_earlier(run_dir), **records},
    }
    write_whole(run_dir / "result.json", json.dumps(result, indent=1, allow_nan=False), contested=True)


def _earlier(run_dir: Path) -> dict[str, Any]:
    """The splits that an earlier evaluation scored. Raises UserError where result.json is damaged."""
    path = run_dir / "result.json"
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["splits"])
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise UserError(
        f"evaluation: {path} is no result of an evaluation ({reason}), so the splits in it cannot be kept; delete it, "
        "or put a good copy there"
    )


def _data_note(root: Path) -> str | None:
    """What the data set says of itself: "about" in its manifest.json, if it has one."""
    manifest = root / "manifest.json"
    return json.loads(manifest.read_text(encoding="utf-8")).get("about") if manifest.is_file() else None
