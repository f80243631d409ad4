"""Ways in which files break: bytes in, other bytes out, drawn from a numpy generator."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

Rng = np.random.Generator
Damage = Callable[[Rng, bytes], bytes]
_SIGNATURE = 8  # bytes before the first chunk of a PNG


# ---------------------------------------------------------------------------------------------------- of any file


def _span(rng: Rng, data: bytes, most: int = 4096) -> tuple[int, int]:
    """A random stretch, begin and end."""
    begin = int(rng.integers(len(data)))
    return begin, min(len(data), begin + int(rng.integers(1, max(2, min(most, len(data) // 4) + 1))))


def flip(rng: Rng, data: bytes, begin: int = 0, end: int | None = None, most: int = 8) -> bytes:
    """One to `most` bits between two places."""
    out = bytearray(data)
    for place in rng.integers(begin, max(begin + 1, end or len(data)), rng.integers(1, most + 1)):
        out[min(int(place), len(out) - 1)] ^= 1 << int(rng.integers(8))
    return bytes(out)


def truncate(rng: Rng, data: bytes) -> bytes:
    return data[: int(rng.integers(1, len(data)))]


def cut_end(rng: Rng, data: bytes) -> bytes:
    return data[: -int(rng.integers(1, min(64, len(data))))]


def zero_tail(rng: Rng, data: bytes) -> bytes:
    """The size is right and the end was never written, as after a power cut."""
    begin = int(rng.integers(1, len(data)))
    return data[:begin] + bytes(len(data) - begin)


def fill(rng: Rng, data: bytes, value: int) -> bytes:
    begin, end = _span(rng, data)
    return data[:begin] + bytes([value]) * (end - begin) + data[end:]


def zeros(rng: Rng, data: bytes) -> bytes:
    return fill(rng, data, 0)


def ones(rng: Rng, data: bytes) -> bytes:
    return fill(rng, data, 255)


def noise(rng: Rng, data: bytes) -> bytes:
    begin, end = _span(rng, data)
    return data[:begin] + rng.bytes(end - begin) + data[end:]


def double(rng: Rng, data: bytes) -> bytes:
    begin, end = _span(rng, data)
    return data[:end] + data[begin:]


def remove(rng: Rng, data: bytes) -> bytes:
    begin, end = _span(rng, data, 512)
    return data[:begin] + data[end:]


def swap(rng: Rng, data: bytes) -> bytes:
    size = int(rng.integers(1, max(2, min(2048, len(data) // 2))))
    one, two = sorted(int(x) for x in rng.integers(0, max(1, len(data) - size), 2))
    two = max(two, one + size)
    return data[:one] + data[two : two + size] + data[one + size : two] + data[one : one + size] + data[two + size :]


def append(rng: Rng, data: bytes) -> bytes:
    return data + rng.bytes(int(rng.integers(1, 4096)))


def prepend(rng: Rng, data: bytes) -> bytes:
    return rng.bytes(int(rng.integers(1, 64))) + data


def page(rng: Rng, data: bytes) -> bytes:
    """What a server sends instead of the file."""
    return b"<!DOCTYPE html><html><body>404 Not Found</body></html>"


def empty(rng: Rng, data: bytes) -> bytes:
    return b""


ANY: dict[str, Damage] = {
    f.__name__: f
    for f in (flip, truncate, cut_end, zero_tail, zeros, ones, noise, double, remove, swap, append, prepend, page)
}
ANY["empty"] = empty


# ------------------------------------------------------------------------------------------------------------- JPEG


def jpeg_segments(data: bytes) -> list[tuple[int, int, int]]:
    """(marker, first byte, end) of the segments up to the first scan, which is the last of them."""
    found, at = [], 2
    while at + 4 <= len(data) and data[at] == 255:
        end = at + 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]
        found.append((data[at + 1], at, end))
        if data[at + 1] == 0xDA:
            break
        at = end
    return found


def _jpeg_header(rng: Rng, data: bytes) -> bytes:
    return flip(rng, data, 0, jpeg_segments(data)[-1][2])


def _jpeg_tables(rng: Rng, data: bytes) -> bytes:
    """Bits of the quantisation or Huffman tables, or of the frame."""
    tables = [s for s in jpeg_segments(data) if s[0] in (0xDB, 0xC4, 0xC0, 0xC2, 0xDA)]
    _, begin, end = tables[rng.integers(len(tables))]
    return flip(rng, data, begin + 4, end, 4)


def _jpeg_data(rng: Rng, data: bytes) -> bytes:
    return flip(rng, data, jpeg_segments(data)[-1][2], len(data) - 2, 16)


def _jpeg_length(rng: Rng, data: bytes) -> bytes:
    segments = jpeg_segments(data)
    _, begin, _ = segments[rng.integers(len(segments))]
    return data[: begin + 2] + struct.pack(">H", int(rng.integers(65536))) + data[begin + 4 :]


def _jpeg_cut_marker(rng: Rng, data: bytes) -> bytes:
    segments = jpeg_segments(data)
    _, begin, end = segments[rng.integers(len(segments))]
    return data[:begin] + data[end if rng.random() < 0.5 else begin + int(rng.integers(1, 3)) :]


def _jpeg_marker(rng: Rng, data: bytes) -> bytes:
    """A marker in the middle of the picture, an early end among them."""
    begin = jpeg_segments(data)[-1][2]
    place = int(rng.integers(begin, len(data)))
    marker = 0xD9 if rng.random() < 0.3 else int(rng.integers(1, 255))
    return data[:place] + bytes([255, marker]) + data[place + (2 if rng.random() < 0.5 else 0) :]


def _jpeg_size(rng: Rng, data: bytes) -> bytes:
    """Another size in the header, often an enormous one."""
    begin = next(s[1] for s in jpeg_segments(data) if s[0] in (0xC0, 0xC2))
    largest = int(rng.choice([300, 3000, 8000, 65535]))
    size = struct.pack(">HH", *(int(x) for x in rng.integers(1, largest + 1, 2)))
    return data[: begin + 5] + size + data[begin + 9 :]


def _jpeg_components(rng: Rng, data: bytes) -> bytes:
    """Number and sampling of the colour channels."""
    begin = next(s[1] for s in jpeg_segments(data) if s[0] in (0xC0, 0xC2))
    return flip(rng, data, begin + 9, begin + 18, 2)


JPEG: dict[str, Damage] = {
    **ANY,
    "header": _jpeg_header,
    "tables": _jpeg_tables,
    "scan": _jpeg_data,
    "length": _jpeg_length,
    "cut marker": _jpeg_cut_marker,
    "marker": _jpeg_marker,
    "size": _jpeg_size,
    "components": _jpeg_components,
}


# -------------------------------------------------------------------------------------------------------------- PNG


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """(kind, content) of the chunks of a whole PNG."""
    found, at = [], _SIGNATURE
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    return found


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    out = b"\x89PNG\r\n\x1a\n"
    for kind, content in chunks:
        out += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return out


def _on_chunk(change: Callable[[Rng, list, int], None]) -> Damage:
    def damage(rng: Rng, data: bytes) -> bytes:
        chunks = png_chunks(data)
        change(rng, chunks, int(rng.integers(len(chunks))))
        return png_of(chunks)

    return damage


def _png_crc(rng: Rng, data: bytes) -> bytes:
    places, at = [], _SIGNATURE
    for _, content in png_chunks(data):
        at += 12 + len(content)
        places.append(at)
    end = places[rng.integers(len(places))]
    return flip(rng, data, end - 4, end, 2)


def _png_length(rng: Rng, data: bytes) -> bytes:
    return data[:_SIGNATURE] + struct.pack(">I", int(rng.integers(2**32))) + data[_SIGNATURE + 4 :]


def _png_content(rng: Rng, chunks: list, k: int) -> None:
    """Bits of a chunk whose checksum is right again."""
    kind, content = chunks[k]
    chunks[k] = (kind, flip(rng, content or b"\0"))


def _png_kind(rng: Rng, chunks: list, k: int) -> None:
    chunks[k] = (flip(rng, chunks[k][0], most=1), chunks[k][1])


def _png_header(rng: Rng, chunks: list, k: int) -> None:
    """Size, bit depth, colour type, interlacing."""
    chunks[0] = (b"IHDR", flip(rng, chunks[0][1], most=2))


def _png_bomb(rng: Rng, chunks: list, k: int) -> None:
    side = int(rng.choice([3000, 8000, 20000, 2**31 - 1]))
    chunks[0] = (b"IHDR", struct.pack(">II", side, min(side, 65535)) + chunks[0][1][8:])
    if side == 3000:  # all of its pixels are there, in some kilobytes
        (at,) = [n for n, (kind, _) in enumerate(chunks) if kind == b"IDAT"][:1]
        chunks[at] = (b"IDAT", zlib.compress(bytes(3000 * (1 + 3 * 3000))))


def _png_palette(rng: Rng, chunks: list, k: int) -> None:
    content = rng.bytes(int(rng.integers(0, 800)))
    chunks.insert(1, (b"PLTE", content)) if rng.random() < 0.5 else chunks.insert(1, (b"tRNS", content))


def _png_text(rng: Rng, chunks: list, k: int) -> None:
    """Text and colour profiles that unpack to much, or to nothing."""
    packed = zlib.compress(bytes(2**24)) if rng.random() < 0.5 else rng.bytes(64)
    kind = [b"zTXt", b"iCCP", b"iTXt"][rng.integers(3)]
    chunks.insert(1, (kind, b"key\0\0" + packed))


PNG: dict[str, Damage] = {
    **ANY,
    "crc": _png_crc,
    "chunk length": _png_length,
    "chunk content": _on_chunk(_png_content),
    "chunk kind": _on_chunk(_png_kind),
    "chunk dropped": _on_chunk(lambda rng, chunks, k: chunks.pop(k)),
    "chunk doubled": _on_chunk(lambda rng, chunks, k: chunks.insert(k, chunks[k])),
    "chunks swapped": _on_chunk(lambda rng, chunks, k: chunks.insert(0, chunks.pop(k))),
    "IHDR": _on_chunk(_png_header),
    "bomb": _on_chunk(_png_bomb),
    "palette": _on_chunk(_png_palette),
    "text": _on_chunk(_png_text),
}


# ------------------------------------------------------------------------------------------------------------ masks


def _as_png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def _of_ids(change: Callable[[Rng, np.ndarray], Image.Image]) -> Damage:
    def damage(rng: Rng, data: bytes) -> bytes:
        with Image.open(io.BytesIO(data)) as mask:
            return _as_png(change(rng, np.array(mask)))

    return damage


def _one_pixel(rng: Rng, ids: np.ndarray) -> Image.Image:
    ids[rng.integers(ids.shape[0]), rng.integers(ids.shape[1])] ^= 1 << int(rng.integers(8))
    return Image.fromarray(ids)


def _unknown(rng: Rng, ids: np.ndarray) -> Image.Image:
    ids[:2] = rng.integers(12, 255)
    return Image.fromarray(ids)


def _other_size(rng: Rng, ids: np.ndarray) -> Image.Image:
    return Image.fromarray(ids[: -int(rng.integers(1, 9))] if rng.random() < 0.5 else ids.T.copy()[:, 1:])


def _jpeg_named_png(rng: Rng, data: bytes) -> bytes:
    out = io.BytesIO()
    with Image.open(io.BytesIO(data)) as mask:
        Image.fromarray(np.array(mask)).save(out, "JPEG")
    return out.getvalue()


MASK: dict[str, Damage] = {
    **PNG,
    "one pixel": _of_ids(_one_pixel),
    "unknown id": _of_ids(_unknown),
    "other size": _of_ids(_other_size),
    "colours": _of_ids(lambda rng, ids: Image.fromarray(np.repeat(ids[:, :, None], 3, axis=2))),
    "four channels": _of_ids(lambda rng, ids: Image.fromarray(np.repeat(ids[:, :, None], 4, axis=2))),
    "grey and alpha": _of_ids(lambda rng, ids: Image.fromarray(ids).convert("LA")),
    "16 bits": _of_ids(lambda rng, ids: Image.fromarray(ids.astype(np.uint16))),
    "one bit": _of_ids(lambda rng, ids: Image.fromarray(ids).convert("1")),
    "a JPEG": _jpeg_named_png,
}
