"""Composed scenes: cut-outs pasted on backgrounds, with masks that are exact because the pasting made them.

S is the side of a square scene in pixels. All randomness of a scene comes from (seed, split, number).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from wsss_dist.data.prepare.sources import Source
from wsss_dist.errors import UserError

SPLITS = ("train", "val", "val_seen")
# instances with less visible area than this share of the scene become 255 and lose their tag
MIN_VISIBLE = 0.004
# how often a training scene of a class with preferred backgrounds gets one of them
BIAS = 0.6


@dataclass(frozen=True)
class Material:
    """What one split is composed from: names of objects per class, distractors, backgrounds, and the bias."""

    objects: dict[str, list[str]]
    distractors: list[str]
    backgrounds: list[str]
    preferred: dict[str, list[str]]


@dataclass(frozen=True)
class Instance:
    """One visible labelled object: its class (0-based), the name of its cut-out, bool region [S, S]."""

    label: int
    name: str
    region: np.ndarray


@dataclass(frozen=True)
class Scene:
    """image uint8 [S, S, 3]; mask uint8 [S, S] (0, 1..C, 255); visible instances; background name; JPEG quality."""

    image: np.ndarray
    mask: np.ndarray
    instances: list[Instance]
    background: str
    quality: int


def split_material(source: Source, seed: int) -> dict[str, Material]:
    """Divide the source: `val` gets 35 % of the objects and its own backgrounds, `val_seen` the objects of `train` on
    the backgrounds of `val`. Only `train` has preferred backgrounds."""
    rng = np.random.default_rng((seed, 7))
    train, val = {}, {}
    for label, names in source.objects.items():
        train[label], val[label] = _divide(names, 0.35, rng)
    seen_distractors, new_distractors = _divide(source.distractors, 0.35, rng) if source.distractors else ([], [])
    if source.val_backgrounds is None:
        old_scenes, new_scenes = _divide(source.backgrounds, 0.375, rng)
    else:
        new_scenes = source.val_backgrounds
        old_scenes = [name for name in source.backgrounds if name not in new_scenes]
    return {
        "train": Material(train, seen_distractors, old_scenes, source.preferred),
        "val": Material(val, new_distractors, new_scenes, {}),
        "val_seen": Material(train, seen_distractors, new_scenes, {}),
    }


def _divide(names: list[str], share: float, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Two disjoint, non-empty, sorted parts, the second with about `share` of the names."""
    count = min(max(1, round(share * len(names))), len(names) - 1)
    second = {names[k] for k in rng.permutation(len(names))[:count]}
    return [n for n in names if n not in second], sorted(second)


def load_pictures(source: Source) -> dict[str, np.ndarray]:
    """All pictures of a source: cut-outs as premultiplied float32 [h, w, 4] in [0, 1], cropped to what is visible;
    backgrounds as float32 [h, w, 3] in [0, 1].

    Raises:
        UserError: a cut-out is unreadable or has no transparent pixel.
    """
    pictures = {name: _background(name, source.files.get(name)) for name in source.backgrounds}
    for name in [*source.distractors, *(n for names in source.objects.values() for n in names)]:
        try:
            pixels = np.asarray(Image.open(source.files[name]).convert("RGBA"), np.float32) / 255
        except OSError as error:
            raise UserError(f"prepare: {source.files[name]} cannot be read ({error}); replace or remove it") from None
        alpha = pixels[:, :, 3]
        if alpha.min() > 0.5 or alpha.max() < 0.5:
            raise UserError(
                f"prepare: {source.files[name]} is no cut-out: its alpha reaches from {alpha.min():.2f} to "
                f"{alpha.max():.2f}; expected an object on a transparent ground: replace or remove it"
            )
        ys, xs = np.flatnonzero((alpha > 0.1).any(1)), np.flatnonzero((alpha > 0.1).any(0))
        pixels = pixels[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1].copy()
        pixels[:, :, :3] *= pixels[:, :, 3:]
        pictures[name] = pixels
    return pictures


def _background(name: str, path: Path | None) -> np.ndarray:
    if path is not None:
        try:
            return np.asarray(Image.open(path).convert("RGB"), np.float32) / 255
        except OSError as error:
            raise UserError(f"prepare: the background {path} cannot be read ({error}); replace or remove it") from None
    # five octaves of smooth noise between two colours, keyed by the name
    rng = np.random.default_rng(list(name.encode()))
    height = sum(
        cv2.resize(rng.random((2**k, 2**k), np.float32), (512, 512), interpolation=cv2.INTER_CUBIC) / 2 ** (k - 2)
        for k in range(2, 7)
    )
    height = (height - height.min()) / (height.max() - height.min())
    low, high = rng.random((2, 3), np.float32)
    return low + height[:, :, None] * (high - low)


def compose(
    material: Material,
    pictures: dict[str, np.ndarray],
    any_angle: frozenset[str],
    *,
    size: int,
    key: tuple[int, ...],
) -> Scene:
    """Compose one scene that has at least one tag.

    Args:
        material: of the split.
        pictures: from `load_pictures`.
        any_angle: classes turned by any angle; others by at most 15 degrees.
        size: S.
        key: non-negative integers that decide everything random.
    """
    for attempt in range(1000):
        scene = _attempt(material, pictures, any_angle, size, np.random.default_rng((*key, attempt)))
        if scene.instances:
            return scene
    raise UserError("prepare: no object of this source stays visible in a scene; use larger cut-outs")


def _attempt(
    material: Material,
    pictures: dict[str, np.ndarray],
    any_angle: frozenset[str],
    size: int,
    rng: np.random.Generator,
) -> Scene:
    classes = list(material.objects)
    count = min(int(rng.choice([1, 2, 3], p=[0.45, 0.35, 0.20])), len(classes))
    chosen = [classes[k] for k in rng.choice(len(classes), count, replace=False)]
    things: list[tuple[int | None, str]] = []
    for label in chosen:
        for _ in range(1 + int(rng.random() < 0.25)):
            things.append((classes.index(label), str(rng.choice(material.objects[label]))))
    if material.distractors:
        things += [(None, str(rng.choice(material.distractors))) for _ in range(rng.integers(0, 3))]
    things = [things[k] for k in rng.permutation(len(things))]

    background = _choose_background(material, chosen, rng)
    canvas = _jitter(_cut_background(pictures[background], size, rng), rng)
    owner = np.full((size, size), -1, np.int32)
    for k, (label, name) in enumerate(things):
        turn = 180.0 if label is not None and classes[label] in any_angle else 15.0
        cutout = _place(pictures[name], size, turn, rng)
        cutout[:, :, :3] = _jitter(cutout[:, :, :3], rng, cutout[:, :, 3:])
        canvas = canvas * (1 - cutout[:, :, 3:]) + cutout[:, :, :3]
        owner[cutout[:, :, 3] > 0.5] = k
    mask, instances = _label(owner, things, size)
    image = np.clip(np.rint(canvas * 255), 0, 255).astype(np.uint8)
    return Scene(image, mask, instances, background, int(rng.integers(80, 93)))


def _choose_background(material: Material, chosen: list[str], rng: np.random.Generator) -> str:
    preferred = [name for label in chosen for name in material.preferred.get(label, [])]
    biased = rng.random() < BIAS
    return str(rng.choice(preferred if preferred and biased else material.backgrounds))


def _label(owner: np.ndarray, things: list, size: int) -> tuple[np.ndarray, list[Instance]]:
    """Mask and visible instances from the map of which thing owns which pixel."""
    mask = np.zeros((size, size), np.uint8)
    instances = []
    for k, (label, name) in enumerate(things):
        region = owner == k
        if label is None or not region.any():
            continue
        if region.sum() < MIN_VISIBLE * size * size:
            mask[region] = 255
        else:
            mask[region] = label + 1
            instances.append(Instance(label, name, region))
    return mask, instances


def _cut_background(picture: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A square of 55 to 100 % of the shorter side, perhaps mirrored, resized to S x S."""
    height, width = picture.shape[:2]
    side = max(1, int(min(height, width) * rng.uniform(0.55, 1.0)))
    y, x = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))
    part = picture[y : y + side, x : x + side]
    if rng.random() < 0.5:
        part = part[:, ::-1]
    method = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
    return cv2.resize(np.ascontiguousarray(part), (size, size), interpolation=method)


def _place(cutout: np.ndarray, size: int, turn: float, rng: np.random.Generator) -> np.ndarray:
    """Scale, mirror, turn and place a cut-out on an empty S x S canvas: premultiplied float32 [S, S, 4].

    The long side becomes .22 to .75 S (log-uniform), never more than twice its own; the edge of the alpha is softened.
    """
    height, width = cutout.shape[:2]
    long_side = size * np.exp(rng.uniform(np.log(0.22), np.log(0.75)))
    factor = min(long_side / max(height, width), 2.0)
    method = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    width, height = max(1, round(width * factor)), max(1, round(height * factor))
    cutout = cv2.resize(cutout, (width, height), interpolation=method)
    if rng.random() < 0.5:
        cutout = np.ascontiguousarray(cutout[:, ::-1])
    centre = rng.uniform(0.1, 0.9, 2) * size
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), rng.uniform(-turn, turn), 1.0)
    matrix[:, 2] += centre - (width / 2, height / 2)
    placed = cv2.warpAffine(cutout, matrix, (size, size), flags=cv2.INTER_LINEAR)
    return np.clip(cv2.GaussianBlur(placed, (0, 0), 0.6), 0, 1)


def _jitter(colour: np.ndarray, rng: np.random.Generator, alpha: np.ndarray | float = 1.0) -> np.ndarray:
    """Change brightness, contrast and saturation of premultiplied colours [S, S, 3]; stays within [0, alpha]."""
    brightness, contrast = rng.uniform(0.75, 1.25, 2)
    saturation = rng.uniform(0.7, 1.3)
    grey = colour @ np.array([0.299, 0.587, 0.114], np.float32)
    colour = grey[:, :, None] + saturation * (colour - grey[:, :, None])
    middle = 0.5 * alpha
    return np.clip((middle + contrast * (colour - middle)) * brightness, 0, alpha).astype(np.float32)
