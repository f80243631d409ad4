"""Object regions of one step of adversarial erasing, merged with those of the steps before.

out/<split>/<id>.npz: the regions of each tag as packed bits, out/<split>/store.json: what they belong to; both as in
`wsss_dist/data/erased.py`. An image without tags has no file. Source: AE-PSL (CVPR 2017), Algorithm 1.

Letters: K tags of an image, H W pixels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from wsss_dist import dist
from wsss_dist.cam import present_pairs, upsample
from wsss_dist.data import build_inference_loader
from wsss_dist.data.batch import EvalSample
from wsss_dist.data.dataset import Dataset
from wsss_dist.data.erased import (
    StoreManifest,
    UnfitRegions,
    fill_erased,
    load_regions,
    read_manifest,
    regions_writer,
    write_manifest,
)
from wsss_dist.errors import UserError
from wsss_dist.schema import ConfigPath
from wsss_dist.stages.base import Stage, StageConfig, output, views
from wsss_dist.stages.scores import score_regions
from wsss_dist.trained import config_of

FLAT = 1e-6  # a map with less between its largest and smallest value says nothing
# the stopping rule: stop where L_t > max(GROWTH * L_(t-1), L_1 + MARGIN); spec of the published loss values
GROWTH, MARGIN = 1.25, 0.08


class Config(StageConfig):
    """Region mining; the defaults are AE-PSL's."""

    network: ConfigPath  # folder of the training stage of this step's classifier
    before: ConfigPath | None = None  # folder of the stage of the step before; null: the first step
    # quantile: the share of the pixels with the largest values; frac_max: above share x the largest value; top_band: at
    # least (1 - share) x the largest value
    rule: Literal["quantile", "frac_max", "top_band"] = "quantile"
    share: float = Field(0.2, gt=0, lt=1)
    exclude_erased: bool = False  # pixels erased before take no part in the ranking and the largest value
    scales: list[PositiveFloat] = Field([1.0], min_length=1)
    mirror: bool = False  # each scale with its mirror image

    @property
    def rule_of_store(self) -> dict[str, Any]:
        """What must be the same in all steps of a store."""
        return {"rule": self.rule, "share": self.share, "exclude_erased": self.exclude_erased}


def run(stage: Stage) -> dict[str, Any]:
    """Mine the regions; returns kind "regions"."""
    cfg: Config = stage.config
    method = stage.network(cfg.network, "class_maps", "class activation maps")
    if cfg.data.train_split not in stage.splits():
        raise UserError(
            f"stage '{stage.name}': its splits are {', '.join(stage.splits())}; expected '{cfg.data.train_split}' "
            "among them, whose mean colour takes the place of what is erased"
        )
    _check_network(stage)
    means = _check_before(stage)
    mean = next(iter(means.values()), None) or mean_colour(stage)

    @torch.no_grad()
    def work(sample: EvalSample, split: str, dataset: Dataset):
        if not sample.labels.any():
            return None
        size, pairs = tuple(sample.image.shape[-2:]), present_pairs(sample.labels[None])
        found = torch.zeros(len(pairs), *size, dtype=torch.bool, device=dist.device())
        if cfg.before is not None:
            known, found = read_regions(cfg.before, split, sample.id, size, len(dataset.class_names))
            if known.tolist() != pairs[:, 1].tolist():
                path = output(cfg.before, split, sample.id, ".npz")
                raise UserError(
                    f"stage '{stage.name}': {path} holds regions of the classes {known.tolist()}; expected "
                    f"{pairs[:, 1].tolist()}, the tags of the image: delete {cfg.before / 'stage.json'} and run again"
                )
        erased, total = found.any(0), 0.0
        for pair in views(sample.image, cfg.scales):
            x = pair[:1]
            fill_erased(x, upsample(erased[None, None].float(), tuple(x.shape[-2:]))[0] > 0.5, mean)
            total = total + upsample(method.class_maps(x, pairs.to(x.device), cfg.mirror)[:, None], size)[:, 0]
        found = found | select(total, cfg.rule, cfg.share, erased if cfg.exclude_erased else None)
        return regions_writer(pairs[:, 1].cpu().numpy(), found.cpu().numpy())

    stage.make(".npz", work)
    losses = dist.on_main(lambda: _write_manifests(stage, mean))
    stage.say(f"{stage.name}: {stopping_rule(losses)}")
    scores = score_regions(stage, lambda *key: read_regions(stage.folder, *key))
    of_classifier = {"step": len(losses), "classifier_loss": losses[-1], "stopping_rule": stopping_rule(losses)}
    return {
        split: {"regions": {**scores.get(split, {}).get("regions", {}), **of_classifier}} for split in stage.splits()
    }


def select(maps: Tensor, rule: str, share: float, erased: Tensor | None = None) -> Tensor:
    """The pixels of class maps that a rule takes: bool [K, H, W].

    Args:
        maps: [K, H, W], not negative; a flat one, or a pixel that is 0, gives nothing.
        rule: "quantile", "frac_max" or "top_band".
        share: as in `Config`.
        erased: bool [H, W], pixels that take no part; None: all do.
    """
    allowed = torch.ones_like(maps[:1], dtype=torch.bool) if erased is None else ~erased[None]
    smallest = torch.where(allowed, maps, torch.inf).amin((1, 2), keepdim=True)
    maps = torch.where(allowed, maps, 0.0)
    largest = maps.amax((1, 2), keepdim=True)
    if rule == "quantile":  # of equal pixels the first ones, so that it is no more than the share
        first = maps.flatten(1).sort(dim=1, descending=True, stable=True).indices[:, : int(share * int(allowed.sum()))]
        taken = torch.zeros_like(maps, dtype=torch.bool).flatten(1).scatter(1, first, True).view_as(maps)
    else:
        taken = maps > share * largest if rule == "frac_max" else maps >= (1 - share) * largest
    return taken & allowed & (maps > 0) & (largest - smallest >= FLAT)


def mean_colour(stage: Stage) -> list[float]:
    """Mean RGB in 0..255 over all pixels of all training images of the stage, from integer sums; a collective call.

    Raises:
        UserError: an image cannot be read; on every rank.
    """
    data = stage.config.data
    dataset, rows = stage.splits()[data.train_split]

    sums = torch.zeros(4, dtype=torch.int64)
    with dist.shared(len(rows)) as mine:
        for sample in build_inference_loader(dataset, data, (int(rows[k]) for k in mine)):
            sums[:3] += sample.image.sum((1, 2))
            sums[3] += sample.image[0].numel()
    red, green, blue, pixels = dist.all_reduce_sum(sums).tolist()
    return [red / pixels, green / pixels, blue / pixels]


def read_regions(
    folder: Path, split: str, image_id: str, size: tuple[int, int], num_classes: int
) -> tuple[Tensor, Tensor]:
    """Tags int64 [K] and regions bool [K, H, W] of an image; K = 0 where it has no file.

    Raises:
        UserError: damaged, of another size or of other classes; names the file and the stage that makes it.
    """
    path = output(folder, split, image_id, ".npz")
    device = dist.device()
    if not path.is_file():
        return torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, *size, dtype=torch.bool, device=device)
    labels, regions = _load(folder, path, num_classes, tuple(size))
    return torch.from_numpy(labels).to(device), torch.from_numpy(regions).to(device)


def _load(
    folder: Path, path: Path, num_classes: int, size: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`load_regions` of a file that the stage in `folder` made, held to `size` if one is given."""
    try:
        labels, regions = load_regions(path, num_classes)
        if size not in (None, regions.shape[1:]):
            raise UnfitRegions(
                f"are regions of {regions.shape[1]} x {regions.shape[2]} pixels", f"{size[0]} x {size[1]}"
            )
    except UnfitRegions as error:
        found, expected = error.args
        raise UserError(
            f"stage: {path} {found}; expected {expected}: delete it, with {folder / 'stage.json'}, and run the config "
            f"again: the stage '{folder.name}' makes it"
        ) from None
    return labels, regions


def stopping_rule(losses: list[float | None]) -> str:
    """What the rule on the classifiers' losses L_1 .. L_t says of the last step t."""
    step = len(losses)
    if any(loss is None for loss in losses):
        return f"step {step}: no loss in the classifier's log, the stopping rule says nothing"
    last = f"step {step}: loss of the last epoch {losses[-1]:.4f}"
    if step == 1:
        return f"{last}, the first step"
    limit = max(GROWTH * losses[-2], losses[0] + MARGIN)
    verdict = "stop, leave this step out" if losses[-1] > limit else "go on"
    return f"{last}, limit {limit:.4f}: the stopping rule says {verdict}"


def picture(folder: Path, split: str, image_id: str) -> tuple[str, np.ndarray] | None:
    """The merged regions of an image, uint8 [K, H, W], the class id 1..C inside."""
    path = output(folder, split, image_id, ".npz")
    if not path.is_file():
        return None
    labels, regions = _load(folder, path, 255)
    return "regions", (regions * (labels + 1)[:, None, None]).astype(np.uint8)


def _check_network(stage: Stage) -> None:
    """Hold that the classifier was trained with exactly the regions of the step before erased."""
    cfg: Config = stage.config
    maps = config_of(cfg.network).data.maps.values()
    # stage and split alone, so that a run may be moved
    found = ["/".join(m.dir.parts[-3:]) for m in maps if m.kind == "erased"]
    expected = [] if cfg.before is None else [f"{cfg.before.name}/out/{cfg.data.train_split}"]
    if found != expected:
        erased, says = (", ".join(names) or "nothing" for names in (found, expected))
        raise UserError(
            f"stage '{stage.name}': the network of '{cfg.network.name}' was trained with {erased} erased, 'before' "
            f"says {says}; expected the same: correct 'before', or the data.maps of the network"
        )


def _check_before(stage: Stage) -> dict[str, list[float]]:
    """The mean colour of each split's store of the step before, {} in the first step."""
    cfg: Config = stage.config
    if cfg.before is None:
        return {}
    means = {}
    for split, (dataset, _) in stage.splits().items():
        folder = cfg.before / "out" / split
        manifest = read_manifest(folder)
        manifest.check(folder, dataset)
        if manifest.rule != cfg.rule_of_store:
            raise UserError(
                f"stage '{stage.name}': {folder} was mined by {manifest.rule}, this stage by {cfg.rule_of_store}; "
                "expected one rule for all steps: make them equal"
            )
        means[split] = manifest.mean
    return means


def _write_manifests(stage: Stage, mean: list[float]) -> list[float | None]:
    """Write the manifest of each split; returns the classifiers' losses L_1 .. L_t."""
    cfg: Config = stage.config
    losses: list[float | None] = []
    for split, (dataset, _) in stage.splits().items():
        before = [] if cfg.before is None else read_manifest(cfg.before / "out" / split).losses
        losses = [*before, last_epoch_loss(cfg.network, stage)]
        folder = stage.folder / "out" / split
        write_manifest(folder, StoreManifest(dataset.digest(), dataset.class_names, mean, cfg.rule_of_store, losses))
    return losses


def last_epoch_loss(run_dir: Path, stage: Stage) -> float | None:
    """Mean of the loss over the logged steps of a training's last epoch; None where none is logged."""
    cfg = config_of(run_dir)
    dataset, _ = stage.splits()[stage.config.data.train_split]
    epoch = max(1, len(dataset) // cfg.train.global_batch)
    try:
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return None
    losses = [line["loss_cls"] for line in lines if "loss_cls" in line and line["step"] > cfg.train.steps - epoch]
    return sum(losses) / len(losses) if losses else None
