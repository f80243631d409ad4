"""Reads a large COCO annotation file piece by piece: the annotations of one image without the rest in memory.

`instances_train2014.json` has 600,000 annotations in 330 MB; parsed as a whole it takes two gigabytes. Here one pass
over the file keeps of each annotation its image, its category and where its text lies; workers read the text again.
"""

from __future__ import annotations

import json
import mmap
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wsss_dist.data.decode import MAX_PIXELS
from wsss_dist.data.prepare.manifest import LEFT_OUT
from wsss_dist.errors import BadFile

_BLOCK = 2**22
# No entry of COCO is longer than 100 kB; what seems to be is a file with an error in it.
_LONGEST = 2**26
_LISTS = ("images", "annotations", "categories")
_BLANK = " \t\r\n"


class Defect(NamedTuple):
    """A single wrong entry: the row of its image, or None; kind, reason, effect as problems.csv has them.

    again: the image was listed before, so there is nothing to make of this row.
    """

    row: int | None
    kind: str
    reason: str
    effect: str
    again: bool = False


class ImageEntry(NamedTuple):
    """An entry of `images`: id, file name, height and width in pixels."""

    id: int
    file_name: str
    height: int
    width: int


class AnnotationIndex:
    """Where the annotations of each image are in a file of n images, m annotations, C categories.

    images      [n] ImageEntry, in the order of the file.
    categories  category id -> name, ascending: classes 0..C-1.
    tags        [n, C] uint8, 1 where the image has an annotation of the class, a crowd included.
    counts      [n] int64, annotations of each image.
    defects     what is wrong with single entries.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images: list[ImageEntry] = []
        self.categories: dict[int, str] = {}
        self.defects: list[Defect] = []
        columns = [array("q") for _ in range(5)]  # id, image id, category id, first byte, bytes
        found = set()
        for key, value, begin, length in elements(path):
            found.add(key)
            if key == "images":
                self._add_image(value)
            elif key == "categories":
                self._add_category(value)
            elif key == "annotations":
                for column, number in zip(columns, (*self._annotation(value), begin, length), strict=True):
                    column.append(number)
        missing = [key for key in ("images", "categories") if key not in found]
        if missing:
            what = f"has no list '{missing[0]}' with entries"
            raise BadFile(path, what, f"prepare: {path} {what}; give an annotation file of COCO")
        self.categories = dict(sorted(self.categories.items()))
        self._arrange(*(np.frombuffer(column, np.int64) if column else np.zeros(0, np.int64) for column in columns))
        self._map: mmap.mmap | None = None

    @property
    def class_of(self) -> dict[int, int]:
        """Category id -> class 0..C-1."""
        return {raw: c for c, raw in enumerate(self.categories)}

    def annotations(self, row: int) -> list[dict]:
        """The annotations of image `row` in the order of the file, parsed."""
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        places = self._places[self._first[row] : self._first[row + 1]]
        return [json.loads(self._map[begin : begin + length]) for begin, length in places.tolist()]

    def _add_image(self, value: Any) -> None:
        kinds = {"id": int, "file_name": str, "height": int, "width": int}
        entry = ImageEntry(*(self._member(value, name, kind, "images") for name, kind in kinds.items()))
        name = entry.file_name
        if not name.isprintable() or Path(name).name != name or name in (".", ".."):
            raise self._wrong("images", f"an image has the file_name {name!r}, which is not the name of a file")
        if min(entry.height, entry.width) < 1 or entry.height * entry.width > MAX_PIXELS:
            raise self._wrong("images", f"{name} is {entry.height} x {entry.width} pixels")
        self.images.append(entry)

    def _add_category(self, value: Any) -> None:
        raw, name = (self._member(value, key, kind, "categories") for key, kind in (("id", int), ("name", str)))
        if raw in self.categories or name in self.categories.values():
            raise self._wrong("categories", f"category {raw} '{name}' comes twice")
        if len(self.categories) == 254:
            raise self._wrong("categories", "there are more than 254 categories, and 255 means ignore in a mask")
        self.categories[raw] = name

    def _annotation(self, value: Any) -> tuple[int, int, int]:
        number = value.get("id", -1) if isinstance(value, dict) else -1
        image, category = (self._member(value, key, int, "annotations") for key in ("image_id", "category_id"))
        return number if isinstance(number, int) and abs(number) < 2**63 else -1, image, category

    def _member(self, value: Any, name: str, kind: type, where: str) -> Any:
        found = value.get(name) if isinstance(value, dict) else value
        if type(found) is not kind or (kind is int and abs(found) >= 2**63):
            wanted = "a whole number" if kind is int else "a string"
            raise self._wrong(where, f"'{name}' of an entry is {str(found)[:80]!r}; expected {wanted}")
        return found

    def _wrong(self, where: str, what: str) -> BadFile:
        message = f"prepare: {self.path}: in '{where}' {what}: download the file again, or correct the entry"
        return BadFile(self.path, f"in '{where}' {what}", message)

    def _arrange(self, numbers: np.ndarray, image_ids: np.ndarray, raw: np.ndarray, begins, lengths) -> None:
        """Sort the annotations by image, and note the entries that fit to nothing."""
        ids = np.array([image.id for image in self.images], np.int64)
        seen: set = set()
        for row, image in enumerate(self.images):
            stem = Path(image.file_name).stem  # the name of its mask
            if image.id in seen or stem in seen:
                reason = f"image id {image.id} or the name {stem} comes twice in {self.path.name}"
                self.defects.append(Defect(row, "error", reason, LEFT_OUT, again=True))
            seen.update((image.id, stem))
        order = np.argsort(ids, kind="stable")
        # the first of equal ids, should there be any: `order` is stable and searchsorted finds the leftmost
        at = np.searchsorted(ids[order], image_ids)
        row_of = order[np.minimum(at, len(ids) - 1)] if len(image_ids) else np.zeros(0, np.int64)
        known_image = ids[row_of] == image_ids
        classes = np.array(list(self.categories), np.int64)
        class_at = np.minimum(np.searchsorted(classes, raw), len(classes) - 1)
        known_class = classes[class_at] == raw
        for k in np.flatnonzero(~known_image):
            self._note(None, f"annotation {numbers[k]} is of image {image_ids[k]}, which is not listed")
        for k in np.flatnonzero(known_image & ~known_class):
            self._note(int(row_of[k]), f"annotation {numbers[k]} has the unknown category {raw[k]}")
        known_numbers = np.sort(numbers[numbers >= 0])
        for number in np.unique(known_numbers[1:][known_numbers[1:] == known_numbers[:-1]]):
            reason = f"annotation id {number} comes more than once"
            self.defects.append(Defect(None, "note", reason, "all of them are used"))
        self.counts = np.bincount(row_of[known_image], minlength=len(ids)).astype(np.int64)
        self.tags = np.zeros((len(ids), len(classes)), np.uint8)
        self.tags[row_of[known_image & known_class], class_at[known_image & known_class]] = 1
        kept = np.flatnonzero(known_image)
        kept = kept[np.argsort(row_of[kept], kind="stable")]
        self._places = np.stack([begins[kept], lengths[kept]], axis=1)
        self._first = np.concatenate([[0], np.cumsum(self.counts)])

    def _note(self, row: int | None, reason: str) -> None:
        effect = "the annotation is left out" if row is None else LEFT_OUT
        self.defects.append(Defect(row, "error", reason, effect))


def elements(path: Path) -> Iterator[tuple[str, Any, int, int]]:
    """The entries of the lists images, annotations and categories of a JSON file, one after another.

    Yields:
        key of the list, the parsed entry, its first byte in the file and its number of bytes.
    Raises:
        UserError: no JSON object, or it ends in the middle.
    """
    with path.open("rb") as file:
        text = _Text(file, path)
        text.expect("{")
        if text.peek() == "}":
            return
        while True:
            key, _, _ = text.value()
            text.expect(":")
            if key in _LISTS and text.peek() == "[":
                text.expect("[")
                while text.peek() != "]":
                    yield key, *text.value()
                    if text.peek() != "]":
                        text.expect(",")
                text.expect("]")
            else:
                text.value()
            if text.peek() == "}":
                return
            text.expect(",")


class _Text:
    """A window on a JSON file. One character is one byte (latin-1), so positions are those of the file."""

    _decode = staticmethod(json.JSONDecoder().scan_once)

    def __init__(self, file, path: Path) -> None:
        self.file, self.path = file, path
        self.window, self.at, self.before = "", 0, 0
        self.ended = False

    def peek(self) -> str:
        """The next character that is no blank."""
        while True:
            while self.at < len(self.window) and self.window[self.at] in _BLANK:
                self.at += 1
            if self.at < len(self.window):
                return self.window[self.at]
            self._more()

    def expect(self, character: str) -> None:
        found = self.peek()
        if found != character:
            raise self._broken(f"byte {self.before + self.at:,} is {found!r}, expected {character!r}")
        self.at += 1

    def value(self) -> tuple[Any, int, int]:
        """The next value, its first byte and its number of bytes."""
        self.peek()
        while True:
            try:
                value, end = self._decode(self.window, self.at)
                # a number may go on behind the window
                if end < len(self.window) or self.ended:
                    break
            except (StopIteration, ValueError) as error:
                if self.ended or len(self.window) - self.at > _LONGEST:
                    raise self._broken(f"from byte {self.before + self.at:,} on: {error}") from None
            except RecursionError:
                raise self._broken("nested too deeply") from None
            self._more()
        begin, length, text = self.before + self.at, end - self.at, self.window[self.at : end]
        self.at = end
        if not text.isascii():
            try:
                value = json.loads(text.encode("latin-1"))
            except ValueError as error:
                raise self._broken(str(error)) from None
        return value, begin, length

    def _more(self) -> None:
        if self.ended:
            raise self._broken("no more data")
        block = self.file.read(_BLOCK)
        # a value that does not end may be damage: whoever needs a larger window gets one twice as large
        if len(self.window) - self.at > _BLOCK:
            block += self.file.read(len(self.window) - self.at)
        self.ended = not block
        self.before += self.at
        self.window, self.at = self.window[self.at :] + block.decode("latin-1"), 0

    def _broken(self, reason: str) -> BadFile:
        what = f"truncated or not readable JSON ({reason})"
        return BadFile(self.path, what, f"prepare: {self.path} is {what}; unpack or download it again")
