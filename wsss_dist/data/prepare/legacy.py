"""`cls_labels_onehot.npy`, the tags as other repositories pass them on: a pickled dict, name -> float32 [C].

A pickle can run any code when it is loaded. Here nothing that a file names is ever called: the names that such a file
needs stand for small classes of this module that keep what they are given, and any other name is refused. It is read by
the slow unpickler of the standard library: the fast one makes room for as many objects as a file claims to have.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from wsss_dist.errors import BadFile, UserError

MAX_BYTES = 2**30


def write_onehot(names: Iterable[str], tags: np.ndarray) -> bytes:
    """The file's bytes for `names` and their tags [n, C]."""
    rows = {name: row.astype(np.float32) for name, row in zip(names, tags, strict=True)}
    out = io.BytesIO()
    np.save(out, rows, allow_pickle=True)
    return out.getvalue()


def read_onehot(path: Path, classes: int) -> dict[str | int, np.ndarray]:
    """Read such a file: name (some have numbers) -> tags, uint8 [classes].

    Raises:
        BadFile: no such file, another number of classes, or a pickle that names anything but arrays.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes, more than {MAX_BYTES:,}")
        with path.open("rb") as file:
            _check_head(file, path)
            content = _Unpickler(file, path).load()
        if isinstance(content, _Array):
            content = content.only_object()
        rows = {name: np.asarray(_values(row)) for name, row in content.items()}
    except (UserError, OSError):
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        what = f"is no cls_labels_onehot.npy ({type(error).__name__}: {error})"
        message = f"prepare: {path} {what}; give a file that holds a pickled dict of arrays"
        raise BadFile(path, what, message) from None
    for name, row in rows.items():
        if row.shape != (classes,) or not np.isin(row, (0, 1)).all():
            what = f"the labels of {name!r} are {str(row.tolist()):.80}"
            message = (
                f"prepare: {path}: {what}; expected {classes} numbers, each 0 or 1: give the file of this data set"
            )
            raise BadFile(path, what, message)
    return {name: row.astype(np.uint8) for name, row in rows.items()}


def _check_head(file: io.BufferedReader, path: Path) -> None:
    """Read the head of a .npy up to the pickle."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if not dtype.hasobject or shape != ():
        what = f"is an array of {dtype} with shape {shape}"
        message = (
            f"prepare: {path} {what}; expected a pickled dict, as in the cls_labels_onehot.npy of other repositories"
        )
        raise BadFile(path, what, message)


class _Array:
    """What a pickled numpy array says of itself."""

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.dtype, self.by_columns, self.content = state

    def only_object(self) -> Any:
        """The one object of an array of shape () that holds objects."""
        if self.dtype.code not in ("O", "O4", "O8") or self.shape != () or len(self.content) != 1:
            raise ValueError(f"an array of shape {self.shape}")
        return self.content[0]

    def values(self) -> np.ndarray:
        dtype = self.dtype.numbers()
        # Python 2 wrote bytes as text
        content = self.content.encode("latin-1") if isinstance(self.content, str) else self.content
        if len(self.shape) != 1 or not isinstance(content, bytes):
            raise ValueError(f"labels of shape {self.shape}")
        return np.frombuffer(content, dtype, count=self.shape[0])


class _Type:
    """What a pickled numpy dtype says of itself."""

    def __init__(self, code: str, *_: object) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def numbers(self) -> np.dtype:
        if self.code not in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1"):
            raise ValueError(f"values of type {self.code!r}")
        return np.dtype((self.order if self.order in "<>" else "=") + self.code)


def _new_array(*_: object) -> _Array:
    return _Array()


def _scalar(kind: _Type, content: bytes | str) -> str | int:
    """A number or text of numpy, which some files have for the names of images."""
    content = content.encode("latin-1") if isinstance(content, str) else content
    if kind.code.startswith("U"):
        return content.decode("utf-32-be" if kind.order == ">" else "utf-32-le").rstrip("\0")
    if not kind.code.startswith(("i", "u")):
        raise ValueError(f"a name of type {kind.code!r}")
    return int(np.frombuffer(content, kind.numbers(), count=1)[0])


def _encoded(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 hold bytes."""
    if encoding != "latin1":
        raise ValueError(f"bytes in {encoding}")
    return text.encode("latin-1")


_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): _new_array,
    ("numpy._core.multiarray", "_reconstruct"): _new_array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encoded,
}


class _Unpickler(pickle._Unpickler):
    def __init__(self, file: io.BufferedReader, path: Path) -> None:
        super().__init__(file, encoding="latin1")  # as Python 2 wrote them
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            what = f"asks for '{module}.{name}', which labels do not need and which could run any code"
            raise BadFile(self._path, what, f"prepare: {self._path} {what}; it was not loaded: do not use this file")
        return _KNOWN[module, name]


def _values(row: Any) -> np.ndarray:
    if not isinstance(row, _Array):
        raise ValueError(f"labels of type {type(row).__name__}")
    return row.values()
