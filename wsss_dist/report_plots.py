"""The pictures of a report: sheets of panels side by side, and curves.

K classes with background (0), H W pixels of an image, T its tags. Panels are uint8 [H, W, 3].
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np

matplotlib.use("Agg")  # before pyplot: a report is made on machines without a display

import matplotlib.pyplot as plt  # noqa: E402

from wsss_dist.data.palette import voc_palette  # noqa: E402

PANEL = 208  # longest side of a panel in pixels
GAP = 6
TEXT = 24  # height of a line of text
INK = (40, 40, 40)
IGNORE = (255, 255, 255)
CURVE_COLOURS = ("#1f4e79", "#c55a11", "#548235", "#7030a0", "#7f6000", "#a0263c", "#2e8b8b", "#6b6b6b")


def label_panel(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Class colours, outlined in white, over the greyed image; background stays dark grey, 255 (ignore) is white.

    The outline matters: one of the VOC colours is grey.

    Args:
        image: uint8 [H, W, 3] RGB.
        labels: uint8 [H, W], 0..C and 255.
    """
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB).astype(np.float32)
    colours = voc_palette()[labels].astype(np.float32)
    colours[labels == 255] = IGNORE
    weight = np.where(labels == 0, 0.55, np.where(labels == 255, 0.7, 0.75))[..., None]
    panel = (grey * (1 - weight) + colours * weight).round().astype(np.uint8)
    panel[cv2.morphologyEx(labels, cv2.MORPH_GRADIENT, np.ones((2, 2), np.uint8)) > 0] = IGNORE
    return panel


def heat_panel(image: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """The strongest of the maps as heat (blue 0, red 1) over the greyed image.

    Args:
        image: uint8 [H, W, 3] RGB.
        maps: uint8 [T, H, W], 0..255 for 0..1; T may be 0.
    """
    strongest = maps.max(0) if len(maps) else np.zeros(image.shape[:2], np.uint8)
    heat = cv2.cvtColor(cv2.applyColorMap(strongest, cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB)
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(grey, 0.4, heat, 0.6, 0)


def region_panel(image: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """The image with regions erased to the panel's mean colour, each outlined in the colour of its class.

    Args:
        image: uint8 [H, W, 3] RGB.
        regions: uint8 [T, H, W], the class id 1..C inside the region of a tag, 0 outside.
    """
    panel = image.copy()
    panel[regions.any(0)] = image.mean((0, 1)).round().astype(np.uint8)
    for region in regions[regions.any((1, 2))]:
        outlines, _ = cv2.findContours((region > 0).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(panel, outlines, -1, voc_palette()[int(region.max())].tolist(), 2)
    return panel


# key in a sample -> (heading, how its panel is made); the order is the order of the columns
COLUMNS: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
    "image": ("image", lambda image, value: value),
    "cam": ("CAM", heat_panel),
    "extra_crme": ("CRME mask", heat_panel),
    "extra_pseudo": ("pseudo label", label_panel),
    "seg": ("prediction", label_panel),
    "seg_crf": ("prediction + CRF", label_panel),
    "truth": ("truth", label_panel),
}


def sample_sheet(
    samples: list[dict[str, np.ndarray]],
    class_names: list[str],
    path: Path,
    columns: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = COLUMNS,
) -> None:
    """Write one PNG: a row per sample, a column per kind of panel that any sample has, a legend of the classes below.

    Args:
        samples: as `evaluate` saves them: image, truth, cam, tags, id and, where there are any, the other columns.
        class_names: K names, background first.
        path: the PNG.
        columns: key in a sample -> heading and how its panel is made.
    """
    keys = [key for key in columns if any(key in sample for sample in samples)]
    width = len(keys) * (PANEL + GAP) + GAP
    parts = [_text_row([columns[key][0] for key in keys], width, PANEL + GAP)]
    for sample in samples:
        tags = ", ".join(class_names[t] for t in sample["tags"]) or "no tag"
        parts.append(_text_row([f"{sample['id']}: {tags}"], width, width))
        parts.append(_panel_row(sample, {key: columns[key][1] for key in keys}, width))
    labelled = [key for key in keys if columns[key][1] in (label_panel, region_panel)]
    used = sorted({int(c) for s in samples for key in labelled if key in s for c in np.unique(s[key])} - {0, 255})
    parts.append(_legend([(class_names[c], tuple(int(v) for v in voc_palette()[c])) for c in used], width))
    _save(np.concatenate(parts), path)


def _panel_row(sample: dict[str, np.ndarray], makers: dict[str, Callable], width: int) -> np.ndarray:
    height, breadth = sample["image"].shape[:2]
    scale = PANEL / max(height, breadth)
    size = (max(1, round(breadth * scale)), max(1, round(height * scale)))
    row = np.full((size[1] + GAP, width, 3), 255, np.uint8)
    for i, (key, make) in enumerate(makers.items()):
        if key not in sample:
            continue
        image = _scaled(sample["image"], size)
        if make is heat_panel:
            value = np.array([_scaled(m, size) for m in sample[key]], np.uint8)
        elif make is region_panel:
            value = np.array([_nearest(m, size) for m in sample[key]], np.uint8).reshape(-1, size[1], size[0])
        else:
            value = _nearest(sample[key], size)
        left = GAP + i * (PANEL + GAP)
        row[: size[1], left : left + size[0]] = image if key == "image" else make(image, value)
    return row


def _scaled(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA if size[0] < picture.shape[1] else cv2.INTER_LINEAR)


def _nearest(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return cv2.resize(picture, size, interpolation=cv2.INTER_NEAREST_EXACT)


def _text_row(texts: list[str], width: int, step: int) -> np.ndarray:
    row = np.full((TEXT, width, 3), 255, np.uint8)
    for i, text in enumerate(texts):
        _write(row, text, GAP + i * step)
    return row


def _legend(entries: list[tuple[str, tuple[int, int, int]]], width: int) -> np.ndarray:
    """Coloured squares with names, broken into as many lines as they need."""
    entries = [*entries, ("ignored", IGNORE)]
    lines, left = [np.full((TEXT, width, 3), 255, np.uint8)], GAP
    for name, colour in entries:
        needed = 26 + _text_width(name) + 18
        if left + needed > width and left > GAP:
            lines.append(np.full((TEXT, width, 3), 255, np.uint8))
            left = GAP
        cv2.rectangle(lines[-1], (left, 5), (left + 18, 19), colour, -1)
        cv2.rectangle(lines[-1], (left, 5), (left + 18, 19), INK, 1)
        _write(lines[-1], name, left + 26)
        left += needed
    return np.concatenate(lines)


def _write(canvas: np.ndarray, text: str, left: int) -> None:
    plain = text.encode("ascii", "replace").decode()  # OpenCV's fonts know no other letters
    cv2.putText(canvas, plain, (left, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.45, INK, 1, cv2.LINE_AA)


def _text_width(text: str) -> int:
    return cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.45, 1)[0][0]


def _save(picture: np.ndarray, path: Path) -> None:
    ok, data = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    assert ok
    path.write_bytes(data.tobytes())


# ---------------------------------------------------------------------------------------------------- curves


def loss_curves(lines: list[dict[str, Any]], path: Path) -> bool:
    """Small multiples of every number that the training logged, "loss" first; False if there is none.

    Args:
        lines: the training lines of metrics.jsonl, each with "step".
    """
    keys = sorted({k for line in lines for k, v in line.items() if k != "step" and _is_number(v)})
    keys.sort(key=lambda k: (k != "loss", not k.startswith("loss"), k))
    if not keys:
        return False
    columns = min(4, len(keys))
    rows = -(-len(keys) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.1 * columns, 2.1 * rows), squeeze=False, layout="constrained")
    for axis, key in zip(axes.flat, keys, strict=False):
        points = [(line["step"], line[key]) for line in lines if _is_number(line.get(key))]
        _curve(axis, points, CURVE_COLOURS[0])
        axis.set_title(key, fontsize=9, loc="left")
    for axis in axes.flat[len(keys) :]:
        axis.remove()
    _finish(figure, path)
    return True


def miou_curves(lines: list[dict[str, Any]], names: dict[str, str], path: Path) -> bool:
    """mIoU (%) against the step, one axis per split, one line per kind; False with fewer than two steps.

    Args:
        lines: the evaluation lines of metrics.jsonl: {"step", "split", "eval": {kind: {"miou": ..}}}.
        names: kind -> name in the legend.
    """
    splits = list(dict.fromkeys(line["split"] for line in lines))
    if len({line["step"] for line in lines}) < 2:
        return False
    figure, axes = plt.subplots(
        1, len(splits), figsize=(3.6 * len(splits) + 1, 2.6), squeeze=False, sharey=True, layout="constrained"
    )
    kinds = list(dict.fromkeys(kind for line in lines for kind in line["eval"]))
    for axis, split in zip(axes.flat, splits, strict=True):
        for kind, colour in zip(kinds, CURVE_COLOURS, strict=False):
            points = [
                (line["step"], 100 * line["eval"][kind]["miou"])
                for line in lines
                if line["split"] == split and _is_number(line["eval"].get(kind, {}).get("miou"))
            ]
            _curve(axis, points, colour, label=names.get(kind, kind), marker="o")
        axis.set_title(f"mIoU on {split} (%)", fontsize=9, loc="left")
        axis.set_xlabel("step", fontsize=8)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside right center")
    _finish(figure, path)
    return True


def region_curves(points: dict[str, list[dict[str, float | None]]], path: Path) -> None:
    """Precision and recall of mined regions (%) against the erasing step, one axis per split.

    Args:
        points: split -> metrics of step 1, 2, ... with "region_precision" and "region_recall".
        path: the PNG.
    """
    figure, axes = plt.subplots(
        1, len(points), figsize=(2.9 * len(points) + 1, 2.6), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, (split, steps) in zip(axes.flat, points.items(), strict=True):
        for name, colour in zip(("recall", "precision"), CURVE_COLOURS, strict=False):
            values = [(t, m[f"region_{name}"]) for t, m in enumerate(steps, start=1)]
            _curve(axis, [(t, 100 * v) for t, v in values if v is not None], colour, label=name, marker="o")
        axis.set_title(f"mined regions on {split} (%)", fontsize=9, loc="left")
        axis.set_xlabel("erasing steps merged", fontsize=8)
        axis.set_xticks(range(1, len(steps) + 1))
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside right center")
    _finish(figure, path)


def _curve(axis: Any, points: list[tuple[int, float]], colour: str, **style: Any) -> None:
    points = sorted(dict(points).items())  # a resumed run logs some steps twice: the last line counts
    axis.plot([s for s, _ in points], [v for _, v in points], color=colour, linewidth=1.3, markersize=3, **style)
    axis.tick_params(labelsize=7)
    axis.grid(color="#e4e4e4", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _finish(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))
