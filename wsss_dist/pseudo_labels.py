"""What a trained run says of every image of a split, as files: labels for the training of another network, or CAMs.

OUT/out/<split>/<id>.png (or .npz, .npy), as in the folder of a stage, and OUT/pseudo_labels.json with what made them.
The ranks share the images, whoever is free takes the next ones; an image is alone in its batch, so that its file has
the same bytes with any number of ranks. A file that is there is whole: started again, only the missing ones are made.
Two commands at once do not write into one folder.

Letters: C foreground classes, T tags of the image, H W its pixels.
"""

from __future__ import annotations

import errno
import fcntl
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_dist import dist
from wsss_dist.agreement import check_same, check_shared, facts_of_config, facts_of_data, flat
from wsss_dist.config import RunConfig
from wsss_dist.crf import LabelCRFConfig, crf_labels, crf_of_labels
from wsss_dist.data.batch import EvalSample, batch_of
from wsss_dist.engine import WEIGHTS
from wsss_dist.errors import UserError, collective
from wsss_dist.evaluate import inference, network_input
from wsss_dist.files import write_whole
from wsss_dist.keys import is_place
from wsss_dist.methods.base import Prediction, Views
from wsss_dist.scoring import resized, resized_labels
from wsss_dist.stages.base import (
    Scores,
    Stage,
    StageConfig,
    label_writer,
    read_png,
    read_scores,
    scores_writer,
)
from wsss_dist.stages.scores import score_labels, score_maps
from wsss_dist.trained import load_newest

MANIFEST = "pseudo_labels.json"
LABELS = {
    "cam": "the best class of the CAM above eval.beta",
    "cam_crf": "the same after a CRF that trusts it with 0.7 (IRNet)",
    "seg": "segmentation head",
    "seg_crf": "segmentation head + CRF",
    "seg_tags": "segmentation head, the tags given",
    "seg_tags_crf": "segmentation head + CRF, the tags given",
    "pseudo": "the labels that the method itself is trained on, 255 undecided",
}
MAPS = {
    "maps": "CAMs of the tags: .npz of `labels` int16 [T] and `full` float16 [T, H, W]",
    "maps_irn": "CAMs of the tags as in IRNet: .npy, a dict of `keys` [T], a tensor `cam` at stride 4, `high_res`",
}
SUFFIXES = {**dict.fromkeys(LABELS, ".png"), "maps": ".npz", "maps_irn": ".npy"}


@dataclass
class Made:
    """What `make_pseudo_labels` made.

    `images` of each split, `scores` of splits with masks, `files` that were made in this call, and in how many
    `seconds`.
    """

    images: dict[str, int]
    scores: dict[str, dict[str, Any]]
    files: int
    seconds: float


def make_pseudo_labels(
    cfg: RunConfig, run_dir: Path, out: Path, kind: str, splits: list[str], say: Callable[[str], None]
) -> Made:
    """Make the files of all images of the splits; a collective call, and nothing is made twice.

    Args:
        cfg: of the run; `eval` and `data` may differ from those of the training.
        run_dir: its folder, the newest checkpoint counts.
        out: folder to make, or to go on with.
        kind: one of `LABELS` or `MAPS`.
        splits: names.
        say: takes lines that say how far it is.
    Raises:
        UserError: no checkpoint, a method without such an output, files of other settings in `out`, a damaged image;
            another process makes files in `out`, or not every node sees it.
    """
    # every image, also of a split of which the evaluations of a training see data.val_limit alone
    data = cfg.data.model_copy(update={"val_limit": None})
    stage = Stage(out.name, out, StageConfig(data=data, splits=splits), say)
    check_same(lambda: _facts(stage, cfg, kind))
    names = {tuple(dataset.class_names) for dataset, _ in stage.splits().values()}
    if len(names) > 1:
        message = f"data: the splits {', '.join(splits)} have different classes; make their files one by one"
        raise collective(UserError(message))
    method, checkpoint = load_newest(cfg, run_dir, list(names.pop()))
    views = _views(cfg, kind, checkpoint["step"])

    def work(sample: EvalSample, *_: Any) -> Callable[[IO], None] | None:
        if kind in MAPS and not sample.labels.any():
            return None
        image = network_input(sample.image.to(dist.device()), cfg.eval.size, method)
        prediction = method.predict(batch_of([sample], image[None]), views)
        return _writer(prediction, sample, cfg, kind)

    with _held(out):
        dist.on_main(lambda: _check_manifest(stage, cfg, kind, checkpoint))
        check_shared(out, "--out")
        start = time.perf_counter()
        with inference(method):
            files = stage.make(SUFFIXES[kind], work)
        seconds = time.perf_counter() - start
        images = {split: len(rows) for split, (_, rows) in stage.splits().items()}
        return Made(images, _scores(stage, kind), files, seconds)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The folder for the ranks of this command alone; entering is a collective call.

    By a lock of the operating system on rank 0, which a killed process leaves to the next. File systems without locks
    have none.
    """
    held = []

    def take() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        held.append(open(folder / ".lock", "w"))  # noqa: SIM115  held until the end
        try:
            fcntl.lockf(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"pseudo labels: another process is making files in {folder}; wait for it, stop it, or choose "
                    "another --out"
                ) from None
        for mark in folder.glob(".shared-*"):  # of a start that was killed
            mark.unlink()

    try:
        dist.on_main(take)
        yield
    finally:
        for file in held:
            file.close()


def _facts(stage: Stage, cfg: RunConfig, kind: str) -> dict[str, Any]:
    """What has to be the same on every rank."""
    data = {k: v for split, (dataset, _) in stage.splits().items() for k, v in facts_of_data(split, dataset).items()}
    return {**facts_of_config(cfg.model_dump(mode="json")), **data, "kind": kind}


def _views(cfg: RunConfig, kind: str, step: int) -> Views:
    """Of the CAM or the segmentation head alone: nothing is computed that the kind does not need."""
    of_cam, of_seg = kind.startswith(("cam", "maps")), kind.startswith("seg")
    return Views(
        cfg.eval.cam_scales if of_cam or kind == "pseudo" else [1.0],
        cfg.eval.seg_scales if of_seg else [1.0],
        cfg.eval.fuse,
        step=step,
        extras=kind == "pseudo",
    )


def _writer(prediction: Prediction, sample: EvalSample, cfg: RunConfig, kind: str) -> Callable[[IO], None]:
    size = tuple(sample.image.shape[-2:])
    tags = torch.nonzero(sample.labels > 0).flatten()
    if kind == "pseudo":
        return label_writer(resized_labels(_given(prediction.extras.get("pseudo"), cfg, kind)[0], size))
    if kind.startswith("seg"):
        return label_writer(_of_head(_given(prediction.logits, cfg, kind)[0], sample, tags, cfg, kind))
    cam = resized(_given(prediction.cam, cfg, kind)[0, tags.to(dist.device())].float(), size)
    if kind == "maps":
        return scores_writer(Scores(tags, cam))
    if kind == "maps_irn":
        return _irn_writer(tags, cam)
    best = torch.cat([torch.full_like(cam[:1] if len(cam) else cam.new_zeros(1, *size), cfg.eval.beta), cam]).argmax(0)
    if kind == "cam_crf":
        best = crf_of_labels(best, len(tags) + 1, sample.image, LabelCRFConfig())
    return label_writer(torch.cat([tags.new_zeros(1), tags + 1]).to(best.device)[best])


def _given(value: Tensor | None, cfg: RunConfig, kind: str) -> Tensor:
    if value is None:
        what = {"pseudo": "labels of its own", "seg": "segmentation"}.get(kind.split("_")[0], "class activation maps")
        raise UserError(f"pseudo labels: method '{cfg.method_name}' gives no {what}; choose another --kind than {kind}")
    return value


def _of_head(logits: Tensor, sample: EvalSample, tags: Tensor, cfg: RunConfig, kind: str) -> Tensor:
    logits = resized(logits.float(), tuple(sample.image.shape[-2:]))
    allowed = torch.arange(len(logits), device=logits.device)
    if "tags" in kind:
        allowed = torch.cat([tags.new_zeros(1), tags + 1]).to(logits.device)
    if not kind.endswith("crf"):
        return allowed[logits[allowed].argmax(0)]
    if cfg.eval.crf is None:
        raise UserError(f"pseudo labels: 'eval.crf' is null, but --kind {kind} needs one; set it, or leave out _crf")
    return allowed[crf_labels(logits[allowed], sample.image, cfg.eval.crf)]


def _irn_writer(tags: Tensor, cam: Tensor) -> Callable[[IO], None]:
    small = F.interpolate(cam[None], size=[-(-side // 4) for side in cam.shape[-2:]], mode="bilinear")[0]
    content = {"keys": tags.cpu().numpy(), "cam": _Tensor(small.cpu().numpy()), "high_res": cam.cpu().numpy()}
    return lambda file: np.save(file, content, allow_pickle=True)


class _Tensor:
    """Read as a float32 tensor, which IRNet's code asks for; what torch itself writes of one holds its address."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __reduce__(self) -> tuple[type, tuple[np.ndarray]]:
        return torch.Tensor, (self.array,)


def _scores(stage: Stage, kind: str) -> dict[str, dict[str, Any]]:
    """Split -> metrics of what the files say, on splits with masks."""
    if kind == "maps":
        found = score_maps(stage, lambda *key: read_scores(stage.folder, *key), kind)
    elif kind == "maps_irn":
        return {}
    else:
        found = score_labels(stage, lambda *key: read_png(stage.folder, *key), kind)
    return {split: kinds[kind] for split, kinds in found.items()}


def _check_manifest(stage: Stage, cfg: RunConfig, kind: str, checkpoint: dict[str, Any]) -> None:
    """Write OUT/pseudo_labels.json, or hold that the one there is the same but for the splits."""
    method = flat("", cfg.method.model_dump(mode="json"))
    settings = {
        "run": cfg.run.name,
        "method": {"name": cfg.method_name, **{k: v for k, v in method.items() if not is_place(f"method.{k}")}},
        "step": checkpoint["step"],
        "weights": checkpoint["files"][WEIGHTS]["sha256"],
        "kind": kind,
        "eval": cfg.eval.model_dump(mode="json", exclude={"limit", "batch"}),
        "kernels": cfg.kernels,
    }
    images = {split: dataset.digest() for split, (dataset, _) in stage.splits().items()}
    path = stage.folder / MANIFEST
    known = {"images": {}}
    if path.is_file():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(known, dict) or not isinstance(known.get("images"), dict):
                raise ValueError("no 'images' in it")
        except ValueError as error:
            raise UserError(
                f"pseudo labels: {path} is no manifest ({error}); choose another --out, or delete {stage.folder}"
            ) from None
        changed = [k for k, v in settings.items() if known.get(k) != v]
        changed += [f"images of {s}" for s, v in images.items() if known["images"].get(s, v) != v]
        if changed:
            raise UserError(
                f"pseudo labels: {path} is of other settings ({', '.join(changed)}), so the files there are others; "
                f"expected the same: choose another --out, or delete {stage.folder}"
            )
    elif any((stage.folder / "out").glob("*")):
        raise UserError(
            f"pseudo labels: {stage.folder / 'out'} holds files, but {path}, which says what they are, is missing; "
            f"choose another --out, or delete {stage.folder}"
        )
    write_whole(path, json.dumps({**settings, "images": {**known["images"], **images}}, indent=1))
