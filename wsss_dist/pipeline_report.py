"""What a run of several stages shows: one table of scores, result.json, and a report with pictures of every stage.

All of it is made from the files of the stages and the data set.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from wsss_dist.data import DataConfig, build_dataset, chosen_rows
from wsss_dist.files import write_whole
from wsss_dist.report import KINDS, ROWS_PER_SHEET, embedded, page, percent, table
from wsss_dist.stages import load_kind

STAGE_KINDS = {
    **KINDS,
    "cam": "CAM, best threshold of 0.05 to 0.80",
    "saliency": "saliency, two classes",
    "affinity_labels": "affinity labels, decided pixels",
    "random_walk": "random walk, best threshold of 0.05 to 0.80",
    "pseudo": "pseudo masks",
    "regions": "mined regions, pixels of one tag alone",
    "region_masks": "assembled masks, decided pixels",
    "seg": "segmentation",
    "seg_crf": "segmentation + CRF",
    "seg_tags": "segmentation, tags given: an upper bound",
    "seg_tags_crf": "segmentation + CRF, tags given: an upper bound",
}


def build_pipeline_report(folder: Path, stages: list[str], seed: int, data: DataConfig | None, images: int) -> Path:
    """Write folder/result.json and folder/report.html from the manifests of the stages that are done.

    Args:
        folder: run.dir/run.name.
        stages: their names in order.
        seed: of the run.
        data: of the splits to show; None: no pictures.
        images: of each split to show.
    Returns:
        the path of the report.
    """
    manifests = [json.loads(path.read_text()) for s in stages if (path := folder / s / "stage.json").is_file()]
    kept = ("stage", "kind", "seconds", "commit", "scores")
    result = {"name": folder.name, "seed": seed, "stages": [{k: m[k] for k in kept} for m in manifests]}
    write_whole(folder / "result.json", json.dumps(result, indent=1))
    pictures = folder / "report"
    pictures.mkdir(exist_ok=True)
    parts = [
        f"<h1>{escape(folder.name)}</h1>",
        "<p>Every stage of the run with its score: mIoU in percent, background included. Thresholds of score maps are "
        "chosen on the split they are measured on. Maps and masks up to the pseudo masks know the tags of the image, "
        "the segmentation does not, where its row does not say so.</p>",
        _score_table(result),
        _regions(result, pictures),
        *(_sheets(folder, manifests, data, split, images, pictures) for split in _splits(result) if data),
    ]
    path = folder / "report.html"
    write_whole(path, page(f"{folder.name}: report", "\n".join(parts)))
    return path


def scores_text(folder: Path) -> str:
    """The table of scores for a terminal."""
    result = json.loads((folder / "result.json").read_text())
    splits = _splits(result)
    lines = ["mIoU %".ljust(66) + "".join(f"{s:>12}" for s in splits)]
    for stage, kind, scores in _rows(result):
        values = "".join(f"{percent(scores.get(s, {}).get('miou')):>12}" for s in splits)
        lines.append(f"{stage:<20} {STAGE_KINDS.get(kind, kind):<45}{values}")
    steps = _region_steps(result)
    if steps:
        lines.append("mined regions, recall / precision %".ljust(66) + "".join(f"{s:>12}" for s in splits))
    for stage, scores in steps:
        values = (
            " / ".join(percent(scores.get(s, {}).get(f"region_{k}")) for k in ("recall", "precision")) for s in splits
        )
        lines.append(f"{stage:<66}" + "".join(f"{value:>12}" for value in values))
    lines += [next(iter(scores.values()))["stopping_rule"] for _, scores in steps if scores]
    seconds = sum(s["seconds"] for s in result["stages"])
    return "\n".join([*lines, f"{len(result['stages'])} stages, {seconds:.0f} s"])


def _rows(result: dict[str, Any]) -> list[tuple[str, str, dict[str, dict]]]:
    """(stage, kind, split -> metrics) in the order of the stages."""
    rows = []
    for stage in result["stages"]:
        kinds = dict.fromkeys(k for scores in stage["scores"].values() for k in scores)
        rows += [(stage["stage"], k, {s: v[k] for s, v in stage["scores"].items() if k in v}) for k in kinds]
    return rows


def _splits(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(split for stage in result["stages"] for split in stage["scores"]))


def _score_table(result: dict[str, Any]) -> str:
    splits, rows = _splits(result), []
    seconds = {s["stage"]: s["seconds"] for s in result["stages"]}
    for stage, kind, scores in _rows(result):
        cells = "".join(f'<td class="main">{percent(scores.get(s, {}).get("miou"))}</td>' for s in splits)
        rows.append(
            f'<tr><td>{escape(stage)}</td><td class="name">{escape(STAGE_KINDS.get(kind, kind))}</td>{cells}'
            f"<td>{seconds.pop(stage, '')}</td></tr>"
        )
    rows += [
        f"<tr><td>{escape(s)}</td><td></td>{'<td></td>' * len(splits)}<td>{t}</td></tr>" for s, t in seconds.items()
    ]
    return table(["stage", "result", *splits, "seconds"], rows, named=2)


def _region_steps(result: dict[str, Any]) -> list[tuple[str, dict[str, dict]]]:
    """(stage, split -> metrics) of the steps of adversarial erasing."""
    return [(stage, scores) for stage, kind, scores in _rows(result) if kind == "regions"]


def _regions(result: dict[str, Any], pictures: Path) -> str:
    """Curve and table of the mined regions after each erasing step, with what the stopping rule says."""
    from wsss_dist import report_plots

    steps, splits = _region_steps(result), _splits(result)
    if not steps:
        return ""
    path = pictures / "regions.png"
    chains: list[list[dict[str, dict]]] = []
    for _, scores in steps:
        if not chains or any(metrics.get("step") == 1 for metrics in scores.values()):
            chains.append([])
        chains[-1].append(scores)
    points = {
        split if len(chains) == 1 else f"{split}, run {number} of erasing": [scores[split] for scores in chain]
        for number, chain in enumerate(chains, start=1)
        for split in splits
        if all("region_recall" in scores.get(split, {}) for scores in chain)
    }
    if points:
        report_plots.region_curves(points, path)
    rows = []
    for stage, scores in steps:
        shares = ("region_recall", "region_precision", "region_share")
        cells = "".join(f"<td>{percent(scores.get(s, {}).get(key))}</td>" for s in splits for key in shares)
        verdict = next(iter(scores.values()))["stopping_rule"] if scores else ""
        rows.append(f'<tr><td>{escape(stage)}</td>{cells}<td class="name">{escape(verdict)}</td></tr>')
    head = [f"{s}: {what}" for s in splits for what in ("recall", "precision", "share of pixels")]
    return "\n".join(
        [
            "<h2>Mined regions</h2>",
            "<p>After each step of adversarial erasing, merged with the steps before, in percent.</p>",
            embedded(path, "recall and precision of the mined regions after each step") if points else "",
            table(["stage", *head, "classifier"], rows),
        ]
    )


def _sheets(
    folder: Path, manifests: list[dict[str, Any]], data: DataConfig, split: str, images: int, pictures: Path
) -> str:
    """Sheets of pictures of evenly strided images, a column per stage that makes something of an image."""
    from wsss_dist import report_plots

    panels = {
        "heat": report_plots.heat_panel,
        "labels": report_plots.label_panel,
        "regions": report_plots.region_panel,
    }
    samples, columns = [], {"image": ("image", lambda image, value: value)}
    dataset = build_dataset(data, split)
    dataset.open_masks()
    rows = chosen_rows(dataset, None if split == data.train_split else data.val_limit)
    for row in rows[np.arange(min(images, len(rows))) * len(rows) // max(1, min(images, len(rows)))]:
        sample = {"id": dataset.id(row), "image": dataset.image(row), "truth": dataset.mask(row)}
        sample["tags"] = np.flatnonzero(dataset.labels(row)) + 1
        for manifest in manifests:
            if manifest["kind"] == "train":
                continue
            found = load_kind(manifest["kind"]).picture(folder / manifest["stage"], split, sample["id"])
            if found is not None:
                columns[manifest["stage"]] = (manifest["stage"].replace("_", " "), panels[found[0]])
                sample[manifest["stage"]] = found[1]
        samples.append(sample)
    if not samples:
        return ""
    columns["truth"] = ("truth", report_plots.label_panel)
    parts = [f"<h2>Pictures: {escape(split)}</h2>"]
    for number, start in enumerate(range(0, len(samples), ROWS_PER_SHEET), start=1):
        path = pictures / f"{split.replace('/', '_')}_{number}.png"
        names = ["background", *dataset.class_names]
        report_plots.sample_sheet(samples[start : start + ROWS_PER_SHEET], names, path, columns)
        parts.append(embedded(path, f"images of {split} beside what each stage made of them", photographs=True))
    return "\n".join(parts)
