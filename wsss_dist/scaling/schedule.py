"""Hours of a config's whole schedule on a machine of the model: trainings, evaluations, checkpoints, stages between.

What a step computes is taken from docs/scaling.json, where `python -m wsss_dist.scaling flops` counted it. Left out:
reading pictures in evaluations and stages (PREFETCH ahead of their use), the metrics, and pictures of the report.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wsss_dist.benchmark import flops, synthetic
from wsss_dist.benchmark.contest import random_weights
from wsss_dist.benchmark.fake import Fake, backward, fake_batch
from wsss_dist.config import RunConfig, parse_config, read_config
from wsss_dist.errors import UserError
from wsss_dist.methods import load_method
from wsss_dist.methods.base import BaseMethod
from wsss_dist.models.pretrained import no_parts
from wsss_dist.pipeline import Entry, Pipeline
from wsss_dist.scaling.machine import Machine
from wsss_dist.scaling.model import Work, step_parts

MEASURED = Path(__file__).resolve().parents[2] / "docs" / "scaling.json"
# of an image, about as many as in COCO and VOC
TAGS = 3
# images of the official splits; those of COCO that a config drops for want of a tag are not counted
SPLITS = {"train_aug": 10582, "train": 1464, "val": 1449, "train2014": 82081, "train-81k": 82081, "train-82k": 82783}
SPLITS |= {"val2014": 40504, "val-81k": 40137, "val-82k": 40504}
# pixels of a picture, most of them
PIXELS = {"voc": 500 * 375, "coco": 640 * 480}
# dense CRFs of each image of a stage, and which setting of docs/scaling.json is nearest
_CRFS = {"saliency": (1, "labels"), "affinity_labels": (2, "labels"), "pseudo_masks": (0.1, "labels")}
_CRFS |= {"segmentation": (1, "segmentation")}


@dataclass(frozen=True)
class Part:
    """One line of a schedule: seconds, and how many steps or images."""

    name: str
    kind: str
    count: int
    seconds: float


def read_measured(path: Path = MEASURED) -> dict[str, Any]:
    """The file of what was measured."""
    return json.loads(path.read_text(encoding="utf-8"))


def schedule(
    path: str,
    overrides: list[str],
    machine: Machine,
    ranks: int,
    *,
    until: str | None = None,
    known: dict[str, Any] | None = None,
) -> list[Part]:
    """The parts of a run in their order.

    Args:
        path, overrides: the config and its --set.
        ranks: GPUs.
        until: as --until of launch/train.py.
        known: the content of docs/scaling.json.
    Raises:
        UserError: the file lacks the training of a stage, or the ranks do not fit its batch.
    """
    known = known or read_measured()
    values = read_config(path, overrides)
    if "stages" not in values:
        return list(_training(key_of(path, overrides), parse_config(values), machine, ranks, known))
    pipeline = Pipeline(values)
    if until is not None and until not in pipeline.entries:
        raise UserError(f"command line: --until {until} is none of the stages: {', '.join(pipeline.entries)}")
    needed = set(pipeline.entries) if until is None else needed_by(pipeline.entries, until)
    parts: list[Part] = []
    for entry in pipeline.entries.values():
        if entry.name not in needed:
            continue
        if entry.kind == "train":
            parts += _training(f"{Path(path).stem}/{entry.name}", entry.config, machine, ranks, known)
        else:
            parts += _stage(Path(path).stem, entry, machine, ranks, known)
    return parts


def needed_by(entries: dict[str, Entry], name: str) -> set[str]:
    """A stage and all that it depends on."""
    return {name}.union(*(needed_by(entries, other) for other in entries[name].inputs))


def key_of(path: str, overrides: list[str]) -> str:
    """Name of a config with those of its overrides that change what is computed."""
    return " ".join([Path(path).stem, *sorted(o for o in overrides if o.startswith("method."))])


def _entry(name: str, known: dict[str, Any]) -> dict[str, Any]:
    found = known["trainings"].get(known["same"].get(name, name))
    if found is None:
        raise UserError(
            f"scaling: docs/scaling.json does not know the training '{name}'; count it with `python -m "
            "wsss_dist.scaling flops` and the same --config, --set and --stage"
        )
    return found


def work_of(name: str, cfg: RunConfig, known: dict[str, Any] | None = None, **changes: Any) -> Work:
    """The work of a training that docs/scaling.json knows, `changes` its fields with other values.

    Raises:
        UserError: it does not know it.
    """
    train, entry = cfg.train, _entry(name, known or read_measured())
    work = Work(
        flops=entry["flops"],
        groups=tuple((total,) for total in entry["groups"]),
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        gathered=entry["gathered"],
        reduced=entry["reduced"],
        engine=train.engine,
        zero_stage=train.zero_stage,
        precision=train.precision,
        convolutions=entry["convolutions"],
    )
    return replace(work, **changes)


def count_training(cfg: RunConfig, points: int) -> dict[str, Any]:
    """What docs/scaling.json holds of a training: operations of an image, mean over moments of the schedule, and sizes.

    Forward and backward of two images (one where they keep their size), on fake tensors: nothing is computed.
    """
    classes = synthetic.num_classes(cfg.data)
    one = synthetic.make_batch(cfg.data, classes, 1, 0)
    total, forward = 0, 0
    with Fake(TAGS, cuda=False).entered(), no_parts():
        method = load_method(cfg.method_name).Method(random_weights(cfg.method), classes, cfg.train.steps).train()
        batch = fake_batch(one, 1 if cfg.data.augment == "native" else 2)
        for k in range(points):
            with flops.counted() as counter:
                loss = method(batch, int((k + 0.5) / points * cfg.train.steps))["loss"]
                forward = counter.get_total_flops()
                backward(loss)
            total += counter.get_total_flops()
            method.zero_grad(set_to_none=True)
            method.after_step(-1)  # a step that was skipped: what is kept for it is dropped
    images = len(batch)
    counts = {"flops": round(total / points / images), "view": forward / images / cfg.data.crop**2}
    return {**counts, **sizes(method), "gathered": 0, "reduced": 0, "predict": {}}


def sizes(method: BaseMethod) -> dict[str, Any]:
    """What docs/scaling.json holds of the weights of a method."""
    return {
        "groups": [sum(p.numel() for p in group["params"]) for group in method.param_groups()],
        "frozen": sum(p.numel() for p in method.parameters() if not p.requires_grad),
        "buffer_bytes": sum(b.numel() * b.element_size() for b in method.buffers()),
        "convolutions": flops.mostly_convolutions(method),
    }


def _training(name: str, cfg: RunConfig, machine: Machine, ranks: int, known: dict[str, Any]) -> Iterator[Part]:
    train, entry, work = cfg.train, _entry(name, known), work_of(name, cfg, known=known)
    if not work.micro_batches(ranks):
        raise UserError(
            f"scaling: '{name}' has train.global_batch {train.global_batch} and train.micro_batch {train.micro_batch}, "
            f"which cannot be split over {ranks} ranks; give another --ranks, or --set another micro batch"
        )
    yield Part(name, "train", train.steps, train.steps * step_parts(work, machine, ranks)["step"])
    if train.save_every:
        bytes_each = 16 * work.trained
        saves = -(-train.steps // train.save_every)
        yield Part(name, "checkpoints", saves, saves * bytes_each * (1 / machine.disk + 1 / machine.sha))
    images = sum(SPLITS[split] for split in cfg.data.eval_splits)
    if not images:
        return
    rate = machine.flops_per_s(work.arithmetic, work.convolutions)
    area = PIXELS[cfg.data.format] if cfg.eval.size is None else cfg.eval.size**2
    per_pixel = {kind: flops / cfg.data.crop**2 for kind, flops in entry["predict"].items()}
    if train.eval_every and (times := (train.steps - 1) // train.eval_every):
        quick = times * sum(min(SPLITS[s], cfg.eval.limit or SPLITS[s]) for s in cfg.data.eval_splits)
        yield Part(name, "evaluations", quick, quick * area * per_pixel["quick"] / rate / ranks)
    crf = 0.0 if cfg.eval.crf is None else 2 * known["crf_s"][f"{cfg.data.format} {cfg.method_name}"]
    yield Part(name, "evaluation", images, images / ranks * (area * per_pixel["final"] / rate))
    yield Part(name, "CRF", 2 * images, images / ranks * crf)


def _stage(config: str, entry: Entry, machine: Machine, ranks: int, known: dict[str, Any]) -> Iterator[Part]:
    cfg, name = entry.config, f"{config}/{entry.name}"
    images = sum(SPLITS[s] for s in dict.fromkeys(cfg.splits or [cfg.data.train_split, *cfg.data.eval_splits]))
    seconds = known["file_s"][cfg.data.format]
    network = getattr(cfg, "network", None)
    if network is not None:
        trained = _entry(f"{config}/{Path(network).name}", known)
        scales = getattr(cfg, "scales", [1.0])
        views = sum(s * s for s in scales) * (2 if getattr(cfg, "mirror", entry.kind != "random_walk") else 1)
        kind = trained["convolutions"]
        rate = machine.flops_per_s(flops.arithmetic("fp32", kind), kind)
        seconds += views * PIXELS[cfg.data.format] * trained["view"] / rate
    yield Part(name, entry.kind, images, images * seconds / ranks)
    crfs, setting = _CRFS.get(entry.kind, (0, ""))
    if crfs and getattr(cfg, "crf", None) is not None:
        each = crfs * known["crf_s"][f"{cfg.data.format} {setting}"]
        yield Part(name, "CRF", images, images * each / ranks)
