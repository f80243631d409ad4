"""Unusual pictures are read right, damaged ones are replaced and reported."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.data import sets
from tests.data.synthetic import write_synthetic_dataset
from wsss_dist.data import build_dataset, build_eval_loader, build_train_loader
from wsss_dist.data.decode import DamagedImage, read_image
from wsss_dist.errors import UserError


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be width x height."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def damage(path, kind: str) -> None:
    whole = path.read_bytes()
    path.unlink()
    if kind != "missing":
        path.write_bytes(
            {
                "truncated": whole[: len(whole) // 2],
                "empty": b"",
                "text": b"<html>404 Not Found</html>",
                "bomb": png_header(2**31 - 1, 1000),
                "large": png_header(9000, 9000),
                "header": whole[:20],
            }[kind]
        )


REASONS = {
    "truncated": "truncated",
    "empty": "the file is empty",
    "text": "not a picture",
    "bomb": "pixels",
    "large": "claims 9000 x 9000 pixels, more than the 67108864",
    "header": "not a picture",
    "missing": "the file is missing",
}


@pytest.mark.parametrize("kind", REASONS)
def test_a_damaged_file_is_replaced_by_the_next_and_reported(tmp_path, kind):
    root = write_synthetic_dataset(tmp_path / "set", 6, 1, 40, 3, seed=0)
    cfg = sets.config(root, augment="squash", flip=False, crop=40)
    data = build_dataset(cfg, "train")
    broken, last = root / "images" / "train" / "00002.jpg", root / "images" / "train" / "00005.jpg"
    damage(broken, kind)
    damage(last, kind)
    with pytest.raises(DamagedImage, match=REASONS[kind]):
        read_image(broken)
    loader = build_train_loader(
        data, cfg, seed=0, global_batch=6, micro_batch=6, rank=0, world_size=1, start_step=0, num_steps=1
    )
    ((batch,),) = list(loader)
    assert sorted(batch.ids) == ["00000", "00000", "00001", "00003", "00003", "00004"]  # 5 -> 0, 2 -> 3
    assert sorted(path for path, _ in batch.damaged) == [str(broken), str(last)]
    assert all(REASONS[kind] in reason and reason for _, reason in batch.damaged)
    twins = [k for k, name in enumerate(batch.ids) if name == "00003"]
    assert (batch.labels[twins[0]] == batch.labels[twins[1]]).all()
    assert np.allclose(batch.images[twins[0]], batch.images[twins[1]])


@pytest.mark.parametrize("workers", [0, 1])
def test_when_nothing_can_be_read_the_run_stops_with_one_sentence(tmp_path, workers):
    root = write_synthetic_dataset(tmp_path / "set", 4, 1, 40, 3, seed=0)
    cfg = sets.config(root, num_workers=workers)
    data = build_dataset(cfg, "train")
    for path in (root / "images" / "train").iterdir():
        path.write_bytes(b"")
    loader = build_train_loader(
        data, cfg, seed=0, global_batch=2, micro_batch=2, rank=0, world_size=1, start_step=0, num_steps=1
    )
    with pytest.raises(UserError, match="^data: 4 images of 'set/train' in a row cannot be read .*the file is empty"):
        list(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_never_leaves_an_image_out(tmp_path, workers):
    root = write_synthetic_dataset(tmp_path / "set", 1, 3, 40, 3, seed=0)
    cfg = sets.config(root, num_workers=workers)
    data = build_dataset(cfg, "val")
    damage(root / "images" / "val" / "00001.jpg", "truncated")
    with pytest.raises(UserError, match="^data: image .*00001.jpg.* of the evaluation split 'set/val' cannot be read"):
        list(build_eval_loader(data, cfg, range(3)))


def corner(path) -> list:
    return read_image(path)[0, 0].tolist()


def test_kinds_of_pictures_become_rgb(tmp_path):
    def save(name, image, **options):
        image.save(tmp_path / name, **options)
        pixels = read_image(tmp_path / name)
        assert pixels.dtype == np.uint8 and pixels.shape == (4, 6, 3) and pixels.flags.c_contiguous
        return pixels[0, 0].tolist()

    size = (6, 4)
    assert save("grey.png", Image.new("L", size, 77)) == [77, 77, 77]
    assert save("palette.gif", Image.new("RGB", size, (255, 0, 0)).convert("P")) == [255, 0, 0]
    assert save("bits.png", Image.new("1", size, 1)) == [255, 255, 255]
    assert save("alpha.png", Image.new("RGBA", size, (200, 100, 50, 0))) == [0, 0, 0]
    assert save("solid.png", Image.new("RGBA", size, (200, 100, 50, 255))) == [200, 100, 50]
    assert save("grey-alpha.png", Image.new("LA", size, (80, 255))) == [80, 80, 80]
    # JPEG rounds: within 2 of 255 - cyan
    assert np.abs(np.subtract(save("cmyk.jpg", Image.new("CMYK", size, (255, 0, 0, 0))), [0, 255, 255])).max() <= 2
    deep = Image.fromarray(np.full((4, 6), 65535, np.uint16))
    assert save("deep.png", deep) == [255, 255, 255]
    assert save("half.png", Image.fromarray(np.full((4, 6), 128 * 257, np.uint16))) == [128, 128, 128]


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (6, 4), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 3, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    image.save(tmp_path / "turned.png", exif=exif)
    pixels = read_image(tmp_path / "turned.png")
    assert pixels.shape == (6, 4, 3)
    assert (pixels[:3] == 255).all() and (pixels[3:] == 0).all()


def test_floating_point_pictures_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(DamagedImage, match="floating-point"):
        read_image(tmp_path / "f.tiff")
    Image.fromarray(np.full((4, 4), 2**20, np.int32)).save(tmp_path / "i.tiff")
    with pytest.raises(DamagedImage, match="more than 16 bits"):
        read_image(tmp_path / "i.tiff")


def test_random_damage_is_a_damaged_image_or_a_picture(tmp_path):
    """No byte of a file may raise anything else, however it is changed."""
    rng = np.random.default_rng(0)
    path = tmp_path / "x"
    for form in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"):
        sets.picture(24, 24).save(path, form)
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(150):
            changed = whole[: rng.integers(1, len(whole) + 1)].copy()
            for place in rng.integers(0, min(len(changed), 200), rng.integers(0, 4)):
                changed[place] = rng.integers(256)
            path.write_bytes(changed.tobytes())
            try:
                assert read_image(path).shape[2] == 3
            except DamagedImage as error:
                assert error.reason and error.path == str(path)
