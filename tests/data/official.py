"""Archives with the layout, the names and the quirks of COCO 2014, VOC 2012 and SBD, of any size, drawn from a seed.

`python -m tests.data.official coco|voc OUT [--full] [--folders] [--test]` writes them; --full has the official counts.
"""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.packing import mat, write_folder, write_tar, write_zip
from wsss_dist.data.palette import palette_picture
from wsss_dist.data.voc import VOC_CLASSES

# the raw ids of COCO: 1 to 90 with ten holes
HOLES = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
RAW_IDS = [k for k in range(1, 91) if k not in HOLES]
SIZES = [(24, 32), (32, 24), (30, 30), (25, 40)]
# images, images without annotation, annotations
FULL_COCO = {"train2014": (82783, 702, 604907), "val2014": (40504, 367, 291875)}
SMALL_COCO = {"train2014": (9, 2, 30), "val2014": (5, 1, 14)}
# images, train, val, SBD, of these in train or val
FULL_VOC = (17125, 1464, 1449, 11355, 2237)
SMALL_VOC = (14, 4, 3, 8, 3)
# images of the test set, in its list for segmentation, with an XML
FULL_TEST = (16135, 1456, 5138)
SMALL_TEST = (9, 3, 2)
_POOL = 400


def jpeg(seed: int, size: tuple[int, int], **options) -> bytes:
    """A picture of noise of size (height, width)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", **options)
    return out.getvalue()


def png(mask: np.ndarray) -> bytes:
    out = io.BytesIO()
    palette_picture(mask).save(out, "PNG")
    return out.getvalue()


# ------------------------------------------------------------------------------------------------------------- COCO


def write_coco(folder: Path, counts: dict = SMALL_COCO, folders: bool = False, seed: int = 0) -> Path:
    """The three archives of COCO 2014, or what they unpack to, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [jpeg(k, SIZES[k % len(SIZES)]) for k in range(16)]
    annotations = {}
    for number, (split, (images, empty, total)) in enumerate(counts.items()):
        names = [f"COCO_{split}_{_image_id(k, number):012d}.jpg" for k in range(images)]
        contents = ((f"{split}/{name}", pictures[k % 16]) for k, name in enumerate(names))
        write_folder(folder, contents) if folders else write_zip(folder / f"{split}.zip", contents, f"{split}/")
        content = _instances(split, number, images, empty, total, seed)
        annotations[f"annotations/instances_{split}.json"] = content
    annotations["annotations/captions_train2014.json"] = iter([b"{}"])
    if folders:
        for name, parts in annotations.items():
            (folder / name).parent.mkdir(exist_ok=True)
            with (folder / name).open("wb") as file:
                file.writelines(parts)
    else:
        with zipfile.ZipFile(folder / "annotations_trainval2014.zip", "w") as out:
            for name, parts in annotations.items():
                entry = zipfile.ZipInfo(name)
                entry.compress_type = zipfile.ZIP_DEFLATED
                with out.open(entry, "w", force_zip64=True) as file:
                    file.writelines(parts)
    return folder


def _image_id(k: int, number: int) -> int:
    # neither ascending nor without gaps, as in the official files
    return 7 * (k ^ 5) + 3 * number + 9


def _instances(split: str, number: int, images: int, empty: int, total: int, seed: int) -> Iterator[bytes]:
    """An annotation file, in pieces; the annotations of an image do not lie together, the last are crowds."""
    rng = np.random.default_rng((seed, number))
    yield b'{"info": {"description": "COCO 2014 Dataset", "url": "http://cocodataset.org"}, "images": ['
    for k in range(images):
        height, width = SIZES[k % len(SIZES)]
        entry = {"license": 5, "file_name": f"COCO_{split}_{_image_id(k, number):012d}.jpg", "height": height}
        entry |= {"width": width, "date_captured": "2013-11-14 16:28:13", "id": _image_id(k, number)}
        yield (", " if k else "").encode() + json.dumps(entry).encode()
    yield '], "licenses": [{"url": "x", "id": 1, "name": "Attribution — ©"}], "annotations": ['.encode()
    polygons = [_polygon(rng) for _ in range(_POOL)]
    used = images - empty
    of_image = np.concatenate([rng.permutation(used), rng.integers(0, used, total - used)]) + empty
    classes, shapes = rng.choice(RAW_IDS, total), rng.integers(0, _POOL, total)
    for k in range(total):
        image = int(of_image[k])
        crowd = k % 90 == 89 or k == used - 1
        shape = _crowd(image, rng) if crowd else polygons[shapes[k]]
        yield (
            f'{", " if k else ""}{{"segmentation": {shape}, "area": 12.5, "iscrowd": {int(crowd)}, "image_id": '
            f'{_image_id(image, number)}, "bbox": [1.0, 2.0, 3.5, 4.25], "category_id": {classes[k]}, "id": {k + 1}}}'
        ).encode()
    categories = [{"supercategory": "thing", "id": raw, "name": f"class {raw}"} for raw in RAW_IDS]
    yield f'], "categories": {json.dumps(categories)}}}'.encode()


def _polygon(rng: np.random.Generator) -> str:
    """One or two outlines of 3 to 40 corners, about as long in bytes as those of COCO; some enclose nothing."""
    parts = []
    for _ in range(rng.integers(1, 3)):
        corners = int(rng.integers(3, 40))
        angles, radius = np.sort(rng.uniform(0, 2 * np.pi, corners)), rng.uniform(2, 14)
        centre = rng.uniform(4, 20, 2)
        points = centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        parts.append(np.clip(points, 0, 24).round(2).reshape(-1).tolist())
    if rng.random() < 0.02:
        parts.append([1.0, 1.0, 2.0, 2.0])
    return json.dumps(parts)


def _crowd(image: int, rng: np.random.Generator) -> str:
    height, width = SIZES[image % len(SIZES)]
    cuts = np.sort(rng.integers(0, height * width, 2))
    counts = np.diff([0, *cuts, height * width]).tolist()
    return json.dumps({"counts": counts, "size": [height, width]})


# -------------------------------------------------------------------------------------------------------------- VOC


def voc_names(counts: tuple = SMALL_VOC) -> dict[str, list[str]]:
    """The names in every list: all, train, val, SBD train, SBD val."""
    images, train, val, sbd, shared = counts
    every = [f"{2007 + k % 6}_{k:06d}" for k in range(images)]
    trainval = every[: train + val]
    # every third of train and val is in SBD too, until there are enough
    inside = (trainval[::3] + trainval[1::3] + trainval[2::3])[:shared]
    of_sbd = sorted(inside + every[train + val : train + val + sbd - shared])
    cut = len(of_sbd) * 3 // 4
    return {
        "all": every,
        "train": sorted(trainval[:train]),
        "val": sorted(trainval[train:]),
        "sbd_train": of_sbd[:cut],
        "sbd_val": of_sbd[cut:],
    }


def write_voc(
    folder: Path, counts: tuple = SMALL_VOC, folders: bool = False, test: tuple[int, int, int] | None = None
) -> Path:
    """The archives of VOC 2012 and SBD, or what they unpack to, in `folder`; with `test` that of the test set too."""
    folder.mkdir(parents=True, exist_ok=True)
    names = voc_names(counts)
    made = [
        (_voc_files(names), "VOCtrainval_11-May-2012.tar", "w"),
        (_sbd_files(names), "benchmark.tgz", "w:gz"),
    ]
    if test is not None:
        made.append((_test_files(*test), "VOC2012test.tar", "w"))
    for contents, archive, mode in made:
        if folders:
            write_folder(folder, contents)
        else:
            write_tar(folder / archive, contents, mode)
    return folder


def voc_mask(k: int, border: bool) -> np.ndarray:
    """Ids of image k: two classes, in the official masks with a border of 255."""
    height, width = SIZES[k % len(SIZES)]
    mask = np.zeros((height, width), np.uint8)
    mask[4:16, 4:20] = k % 20 + 1
    mask[8:12, 8:12] = (k * 7) % 20 + 1
    if border:
        mask[4, 4:20] = mask[15, 4:20] = 255
    return mask


def _voc_files(names: dict[str, list[str]]) -> Iterator[tuple[str, bytes]]:
    base = "VOCdevkit/VOC2012"
    pictures = [jpeg(k, SIZES[k % len(SIZES)]) for k in range(16)]
    masks = [png(voc_mask(k, border=True)) for k in range(80)]
    trainval = set(names["train"]) | set(names["val"])
    for k, name in enumerate(names["all"]):
        yield f"{base}/JPEGImages/{name}.jpg", pictures[k % 16]
        yield f"{base}/Annotations/{name}.xml", _xml(name, k)
        if name in trainval:
            yield f"{base}/SegmentationClass/{name}.png", masks[k % 80]
            yield f"{base}/SegmentationObject/{name}.png", masks[k % 80]
    lists = {"train": names["train"], "val": names["val"], "trainval": sorted(trainval)}
    for kind in ("Segmentation", "Main"):
        for split, listed in lists.items():
            # the last line of some has no line break
            yield f"{base}/ImageSets/{kind}/{split}.txt", "\n".join(listed).encode()


def voc_test_names(images: int) -> list[str]:
    return [f"{2008 + k % 5}_{900000 + k:06d}" for k in range(images)]


def _test_files(images: int, listed: int, boxes: int) -> Iterator[tuple[str, bytes]]:
    """The test set: for most images nothing but the picture, for the last an XML with the boxes of persons."""
    base, names = "VOCdevkit/VOC2012", voc_test_names(images)
    pictures = [jpeg(50 + k, SIZES[k % len(SIZES)]) for k in range(8)]
    for k, name in enumerate(names):
        yield f"{base}/JPEGImages/{name}.jpg", pictures[k % 8]
    for name in names[images - boxes :]:
        yield f"{base}/Annotations/{name}.xml", _xml(name, 14)  # a person
    yield f"{base}/ImageSets/Segmentation/test.txt", "\n".join(names[:listed]).encode()
    yield f"{base}/ImageSets/Main/test.txt", "\n".join(names[: images - boxes]).encode()
    yield f"{base}/ImageSets/Action/test.txt", "".join(f"{n} 1\n" for n in names[images - boxes :]).encode()


def _xml(name: str, k: int) -> bytes:
    """Objects of the mask's classes, the second difficult; every fifth has an empty box, every seventh a large one."""
    height, width = SIZES[k % len(SIZES)]
    boxes = [(5, 5, 20, 16), (9, 9, 12, 12)]
    if k % 5 == 3:
        boxes[1] = (9, 9, 9, 12)
    if k % 7 == 6:
        boxes[0] = (5, 5, width + 3, 16)
    text = f"<annotation><folder>VOC2012</folder><filename>{name}.jpg</filename><size><width>{width}</width>"
    text += f"<height>{height}</height><depth>3</depth></size><segmented>1</segmented>"
    for j, (box, label) in enumerate(zip(boxes, (k % 20, (k * 7) % 20), strict=True)):
        text += f"<object><name>{VOC_CLASSES[label]}</name><difficult>{j}</difficult><bndbox>"
        text += "".join(f"<{key}>{v}</{key}>" for key, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        text += "</bndbox><part><name>head</name></part></object>"
    return (text + "</annotation>\n").encode()


def _sbd_files(names: dict[str, list[str]]) -> Iterator[tuple[str, bytes]]:
    base = "benchmark_RELEASE/dataset"
    number = {name: k for k, name in enumerate(names["all"])}
    files = [mat("GTcls", voc_mask(k, border=False), k % 3 > 0) for k in range(240)]
    yield "benchmark_RELEASE/README", b"Semantic boundaries"
    for name in sorted(names["sbd_train"] + names["sbd_val"]):
        k = number[name]
        yield f"{base}/img/{name}.jpg", b"\xff\xd8 the same as in VOC"
        yield f"{base}/cls/{name}.mat", files[k % 240]
        yield f"{base}/inst/{name}.mat", files[k % 240]
    for split in ("train", "val"):
        yield f"{base}/{split}.txt", "".join(f"{name}\n" for name in names[f"sbd_{split}"]).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", choices=("coco", "voc"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--full", action="store_true", help="the official counts")
    parser.add_argument("--part", type=int, help="the official counts divided by this")
    parser.add_argument("--test", action="store_true", help="with the archive of the test set of VOC")
    parser.add_argument("--folders", action="store_true", help="what the archives unpack to")
    args = parser.parse_args()
    part = 1 if args.full else args.part
    if args.data == "coco":
        full = {split: tuple(n // part for n in counts) for split, counts in FULL_COCO.items()} if part else SMALL_COCO
        write_coco(args.out, full, args.folders)
    else:
        counts, test = (FULL_VOC, FULL_TEST) if part else (SMALL_VOC, SMALL_TEST)
        counts, test = (tuple(n // (part or 1) for n in numbers) for numbers in (counts, test))
        write_voc(args.out, counts, args.folders, test if args.test else None)


if __name__ == "__main__":
    main()
