"""Image and mask files to arrays; whatever is wrong with a file ends in one small exception."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from wsss_dist.errors import BadFile, UserError

# Larger pictures are refused before they are unpacked: a file of a few bytes can claim any size.
MAX_PIXELS = 2**26
# Most pixels that a byte can hold: each 8 x 8 block of a JPEG takes a bit or more, deflate shrinks 1032 times at most.
_PIXELS_PER_BYTE = {"JPEG": 8 * 64, "MPO": 8 * 64, "PNG": 8 * 1032}
_ORIENTATION = 0x0112
# Pillow spreads grey of 2 and 4 bits over 0..255: what it multiplies by, after its name for what is in the file
_SPREAD = {"L;2": 85, "L;2R": 85, "L;4": 17, "L;4R": 17}


class DamagedImage(Exception):
    """An image file that cannot be turned into RGB pixels."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def read_image(path: Path | str, content: bytes | None = None) -> np.ndarray:
    """Read a picture as uint8 [H, W, 3] RGB.

    The EXIF orientation is applied; grey, palette and CMYK become RGB; 16-bit grey is scaled to 8 bits; transparent
    pixels are put on black, the colour that training pads with; of an animation the first frame counts.

    Args:
        path: the file; with `content` a name for messages alone.
        content: the bytes of the picture, where it is no file of its own.
    Raises:
        DamagedImage: missing, not a picture, truncated, larger than MAX_PIXELS, or of a kind that has no RGB meaning.
    """
    try:
        # Pillow warns of odd metadata in many pictures; what matters of it ends in an exception
        with warnings.catch_warnings(action="ignore"), _open(path, content) as file:
            return _rgb(ImageOps.exif_transpose(file))
    except DamagedImage:
        raise
    except Exception as error:  # decoders raise many kinds on damaged bytes, and all mean the same here
        raise DamagedImage(str(path), _reason(path, error, content)) from None


class Picture(NamedTuple):
    """What a picture file holds, and what `read_image` makes of it.

    mode         Pillow's name for the pixels as they are stored: RGB, L, CMYK, I;16, ...
    width, height  in pixels, as stored.
    orientation  of EXIF, 1 upright.
    frames       1, or more of an animation.
    shape        (height, width) of what `read_image` returns.
    """

    mode: str
    width: int
    height: int
    orientation: int
    frames: int
    shape: tuple[int, int]


def inspect_image(path: Path, content: bytes) -> Picture:
    """Decode the picture `content` of the file `path` just as `read_image` does. Raises DamagedImage as there."""
    try:
        with warnings.catch_warnings(action="ignore"), _open(path, content) as file:
            mode, (width, height), turned = file.mode, file.size, file.getexif().get(_ORIENTATION)
            pixels = _rgb(ImageOps.exif_transpose(file))
            orientation = turned if isinstance(turned, int) and 1 <= turned <= 8 else 1
            return Picture(mode, width, height, orientation, getattr(file, "n_frames", 1), pixels.shape[:2])
    except DamagedImage:
        raise
    except Exception as error:
        raise DamagedImage(str(path), _reason(path, error, content)) from None


def read_mask(path: Path | str, content: bytes | None = None) -> np.ndarray:
    """Read a single-channel picture of ids as uint8 [H, W]; a palette is ignored, the ids behind it count.

    Args:
        path, content: as in `read_image`.
    Raises:
        BadFile: unreadable, a colour picture, or a JPEG.
    """
    try:
        with warnings.catch_warnings(action="ignore"), _open(path, content) as file:
            if file.mode not in ("L", "P", "1"):
                what = f"is a picture of mode '{file.mode}'"
                message = (
                    f"data: mask {path} {what}; expected 8-bit single-channel class ids (mode 'L' or 'P'): convert "
                    "colours to ids first"
                )
                raise BadFile(path, what, message)
            if file.format in ("JPEG", "MPO"):
                what = "is a JPEG, which does not keep ids"
                raise BadFile(path, what, f"data: mask {path} {what}; expected a PNG: make the mask again")
            return _ids(file)
    except UserError:
        raise
    except Exception as error:
        what = f"cannot be read ({_reason(path, error, content)})"
        raise BadFile(path, what, f"data: mask {path} {what}; write it again") from None


def read_channel(path: Path, modes: tuple[str, ...]) -> np.ndarray:
    """Read a picture of one channel of at most 8 bits, of a Pillow mode in `modes`, as uint8 [H, W].

    With "P" among the modes it holds ids, which are given as they are stored, else brightness: 255 is white.

    Raises:
        DamagedImage: unreadable, or of another mode.
    """
    try:
        with warnings.catch_warnings(action="ignore"), _open(path) as file:
            if file.mode not in modes:
                raise DamagedImage(str(path), f"it is a picture of mode '{file.mode}', not '{modes[0]}'")
            return _ids(file) if "P" in modes else np.array(file, dtype=np.uint8)
    except DamagedImage:
        raise
    except Exception as error:
        raise DamagedImage(str(path), _reason(path, error)) from None


def _open(path: Path, content: bytes | None = None) -> Image.Image:
    file = Image.open(path if content is None else io.BytesIO(content))
    claim = f"claims {file.width} x {file.height} pixels"
    if file.width * file.height > MAX_PIXELS:
        file.close()
        raise DamagedImage(str(path), f"{claim}, more than the {MAX_PIXELS} that are accepted")
    size = os.stat(path).st_size if content is None else len(content)
    if file.width * file.height > size * _PIXELS_PER_BYTE.get(file.format, MAX_PIXELS):
        file.close()
        raise DamagedImage(str(path), f"{claim}, which {size} bytes of {file.format} cannot hold")
    return file


def _ids(file: Image.Image) -> np.ndarray:
    """The ids that a picture of mode L, P or 1 stores, uint8 [H, W], whatever its bits. Raises what decoders raise."""
    decoder, _, _, how = file.tile[0] if file.tile else ("", None, 0, "")
    stored, *more = how if isinstance(how, tuple) else (how,)
    # TIFF whose zero is white, PBM, and PGM of another maximum: their numbers come out changed, and not always back
    if "I" in str(stored).partition(";")[2] or (decoder.startswith("ppm") and more != [255]):
        raise ValueError(f"its numbers are grey values ({file.format}, {how}), not ids; expected a PNG")
    return np.array(file, dtype=np.uint8) // _SPREAD.get(stored, 1)


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its grey values reach from {values.min()} to {values.max()}, more than 16 bits")
        # 65535 = 255 * 257, so 16-bit white becomes 8-bit white
        grey = ((values + 128) // 257).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return np.array(image.convert("RGB"))


def _reason(path: Path | str, error: Exception, content: bytes | None = None) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file is missing"
    if content == b"" or (content is None and Path(path).is_file() and Path(path).stat().st_size == 0):
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture of a known format"
    if isinstance(error, DamagedImage):
        return error.reason
    return f"{type(error).__name__}: {error}"
