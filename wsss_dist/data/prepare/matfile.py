"""Reads one matrix out of a MATLAB file of level 5, the format of the Semantic Boundaries Dataset (SBD).

The format: "MAT-File Format", The MathWorks, chapter 1. Elements of a tag (type, bytes) and their data follow one
another; data of one to four bytes may lie in the tag itself; a compressed element holds one element, deflated.
scipy.io.loadmat, which reads all of the format, dies of damaged files (docs/LOG.md).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np

# A file of a few bytes can hold any number of zeros. The largest picture of SBD has 250,000 pixels.
MAX_BYTES = 2**26
# And elements of no bytes are eight bytes each, in a file and many more in memory.
MAX_ELEMENTS = 1000

_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_MATRIX, _COMPRESSED = 14, 15
_STRUCT, _NUMBERS = 2, range(6, 16)


class MatError(ValueError):
    """The bytes are no such file, or what was asked for is not in it."""


def read_mat_field(data: bytes, variable: str, field: str) -> np.ndarray:
    """The matrix `variable.field` of a MATLAB file of level 5.

    Args:
        data: the whole file.
        variable: name of a struct of size 1 x 1.
        field: name of a full, real numeric matrix of two dimensions in it.
    Returns:
        the matrix [rows, columns] in the type that it is stored in.
    Raises:
        MatError: with the reason.
    """
    if len(data) < 128 or data[124:128] not in (b"\x00\x01IM", b"\x01\x00MI"):
        raise MatError("not a MATLAB file of level 5")
    order = "<" if data[126:128] == b"IM" else ">"
    try:
        for kind, element in _elements(data[128:], order):
            if kind == _COMPRESSED:
                kind, element = next(_elements(_inflated(element), order))
            if kind != _MATRIX:
                continue
            flags, dims, name, rest = _matrix(element, order)
            if name == variable:
                if flags & 255 != _STRUCT or dims != (1, 1):
                    raise MatError(f"'{variable}' is no struct of size 1 x 1")
                return _numbers(_field(rest, field, order), f"{variable}.{field}", order)
    except (struct.error, StopIteration, ValueError, zlib.error) as error:
        if isinstance(error, MatError):
            raise
        raise MatError("it ends in the middle, or is damaged") from None
    raise MatError(f"it holds no variable '{variable}'")


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """The (type, data) of each element of a sequence."""
    at = number = 0
    while at < len(data):
        number += 1
        if number > MAX_ELEMENTS:
            raise MatError(f"it holds more than {MAX_ELEMENTS} elements in a row")
        kind, count = struct.unpack_from(order + "II", data, at)
        if kind >> 16:  # the small form: 16 bits of size, 16 bits of type, and the data in the tag itself
            kind, count, begin, after = kind & 0xFFFF, kind >> 16, at + 4, at + 8
        else:
            begin = at + 8
            # all but compressed elements are padded to eight bytes
            after = begin + count if kind == _COMPRESSED else begin + (count + 7) // 8 * 8
        if begin + count > len(data):
            raise ValueError
        yield kind, data[begin : begin + count]
        at = after


def _inflated(data: bytes) -> bytes:
    out = zlib.decompressobj()
    content = out.decompress(data, MAX_BYTES)
    if out.unconsumed_tail:
        raise MatError(f"it unpacks to more than {MAX_BYTES} bytes")
    if not out.eof:  # without its end the checksum has not been compared
        raise ValueError
    return content


def _matrix(element: bytes, order: str) -> tuple[int, tuple[int, ...], str, list[tuple[int, bytes]]]:
    """Flags, dimensions, name and the remaining elements of a matrix."""
    parts = list(_elements(element, order))
    flags = struct.unpack_from(order + "I", parts[0][1])[0] if parts else 0
    if len(parts) < 3:
        raise ValueError
    dims = tuple(np.frombuffer(parts[1][1], order + "i4").tolist())
    return flags, dims, parts[2][1].decode("latin-1"), parts[3:]


def _field(rest: list[tuple[int, bytes]], field: str, order: str) -> bytes:
    if len(rest) < 2:
        raise ValueError
    length = struct.unpack_from(order + "I", rest[0][1])[0]
    if not 0 < length <= 64:
        raise ValueError
    packed = rest[1][1][: MAX_ELEMENTS * length]
    names = [packed[k : k + length].split(b"\0")[0].decode("latin-1") for k in range(0, len(packed), length)]
    if field not in names:
        raise MatError(f"its struct has the fields {', '.join(names) or '(none)'}, and not '{field}'")
    kind, element = rest[2 + names.index(field)] if len(rest) > 2 + names.index(field) else (0, b"")
    if kind != _MATRIX or not element:
        raise ValueError
    return element


def _numbers(element: bytes, name: str, order: str) -> np.ndarray:
    flags, dims, _, rest = _matrix(element, order)
    complex_numbers = flags >> 8 & 8
    if flags & 255 not in _NUMBERS or len(dims) != 2 or min(dims) < 0 or complex_numbers or not rest:
        raise MatError(f"'{name}' is no full matrix of numbers with two dimensions")
    kind, data = rest[0]
    if kind not in _TYPES:
        raise ValueError
    # MATLAB stores by columns
    return np.frombuffer(data, np.dtype(order + _TYPES[kind])).reshape(dims, order="F")
