"""The lists and tags of COCO 2014: both families, and the form of other repositories."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from wsss_dist.data.prepare.coco_index import AnnotationIndex
from wsss_dist.data.prepare.legacy import write_onehot
from wsss_dist.errors import UserError

# folder of the images -> short name of the split
SPLITS = {"train2014": "train", "val2014": "val"}
Indexes = dict[str, AnnotationIndex]
# by split, [n] bool: the image can be used
Usable = dict[str, np.ndarray]


def families(indexes: Indexes, usable: Usable) -> Iterator[tuple[str, str, np.ndarray]]:
    """(list, folder of its images, [n] bool of the images in it)."""
    for split, index in indexes.items():
        yield f"{SPLITS[split]}-81k", split, usable[split] & (index.counts > 0)
        yield f"{SPLITS[split]}-82k", split, usable[split]


def list_names() -> list[str]:
    """The names of all lists."""
    return [*(f"{short}-{family}" for short in SPLITS.values() for family in ("81k", "82k")), *SPLITS]


def split_lists(indexes: Indexes, usable: Usable, tags: dict[str, np.ndarray]) -> dict[str, bytes]:
    """Path -> content of every list; the list of all images has the name of their folder too."""
    made = {}
    for name, split, mask in families(indexes, usable):
        content = _list(split, indexes[split], mask, tags[split])
        made[f"annotations/{name}.json"] = content
        if name.endswith("-82k"):
            made[f"annotations/{split}.json"] = content
    return made


def _list(split: str, index: AnnotationIndex, mask: np.ndarray, tags: np.ndarray) -> bytes:
    raw_ids = list(index.categories)
    lines = []
    for row in np.flatnonzero(mask):
        labels = [raw_ids[c] for c in np.flatnonzero(tags[row])]
        lines.append(json.dumps({**index.images[row]._asdict(), "labels": labels}))
    categories = json.dumps([{"id": raw, "name": name} for raw, name in index.categories.items()])
    images = ",\n".join(lines)
    text = f'{{"folder": "{split}",\n"categories": {categories},\n"annotations": [],\n"images": [\n{images}\n]}}\n'
    return text.encode()


def tags_of(
    split: str, index: AnnotationIndex, rows: list[int], imported: dict | None, say: Callable[[str], None]
) -> np.ndarray:
    """The tags [n, C] of a split: those of the annotations, or where given the imported ones.

    Args:
        rows: the images in use.
        imported: name or id of an image -> its tags, uint8 [C].
    Raises:
        UserError: an annotated image is not among the imported ones.
    """
    if imported is None:
        return index.tags
    tags, missing = index.tags.copy(), []
    for row in rows:
        image = index.images[row]
        found = imported.get(Path(image.file_name).stem, imported.get(image.id))
        if found is not None:
            tags[row] = found
        elif index.counts[row]:
            missing.append(image.file_name)
    if missing:
        raise UserError(
            f"prepare: --labels has none for {len(missing):,} annotated images of {split} (first: {missing[0]}); give "
            "the file of this data set, or leave --labels out"
        )
    changed = int((tags != index.tags).any(axis=1).sum())
    say(f"{split}: the tags of {changed:,} images are not those of the annotations; taken from --labels")
    return tags


def legacy_files(indexes: Indexes, usable: Usable, tags: dict[str, np.ndarray]) -> dict[str, bytes]:
    """Path -> content of what other repositories read, of the 81k family: cls_labels_onehot.npy and lists of names."""
    made, names, rows = {}, [], []
    for name, split, mask in families(indexes, usable):
        if name.endswith("-81k"):
            stems = [Path(indexes[split].images[row].file_name).stem for row in np.flatnonzero(mask)]
            made[f"legacy/{SPLITS[split]}.txt"] = "".join(f"{stem}\n" for stem in stems).encode()
            names += stems
            rows.append(tags[split][mask])
    made["legacy/cls_labels_onehot.npy"] = write_onehot(names, np.concatenate(rows))
    return made
