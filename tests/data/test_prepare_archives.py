"""Unpacking archives: nothing outside the folder, nothing without limit, and on from where a kill stopped it."""

from __future__ import annotations

import gzip
import io
import stat
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from wsss_dist.data.prepare import archives
from wsss_dist.data.prepare.archives import unpack_archive
from wsss_dist.errors import UserError

FILES = {"top/a.txt": b"alpha", "top/b/c.bin": bytes(range(256)) * 20, "top/empty": b""}


def write_zip(path: Path, members: list) -> Path:
    """A zip of (name, content) or (ZipInfo, content)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def write_tar(path: Path, members: list, mode: str = "w", form: int = tarfile.GNU_FORMAT) -> Path:
    """A tar of (name, content) or (TarInfo, content)."""
    with tarfile.open(path, mode, format=form) as archive:
        for name, content in members:
            entry = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if entry.isreg():
                entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def write(kind: str, folder: Path, members: list) -> Path:
    if kind == "zip":
        return write_zip(folder / "x.zip", members)
    return write_tar(folder / f"x.{kind}", members, "w:gz" if kind == "tgz" else "w")


def unpack(path: Path, into: Path):
    return unpack_archive(path, lambda name: into / name, lambda line: None)


def found(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def into(tmp_path) -> Path:
    (tmp_path / "deep" / "into").mkdir(parents=True)
    return tmp_path / "deep" / "into"


@pytest.mark.parametrize("kind", ["zip", "tar", "tgz"])
def test_files_are_unpacked_and_what_is_there_is_kept(kind, tmp_path, into):
    path = write(kind, tmp_path, [("top/", b"")] * (kind == "zip") + list(FILES.items()))
    counts = unpack(path, into)
    assert (counts.written, counts.kept) == (3, 0) and found(into) == FILES
    (into / "top/b/c.bin").write_bytes(b"half")
    (into / "top/.a.txt.partial").write_bytes(b"left by a kill")
    (into / "top/a.txt").unlink()
    counts = unpack(path, into)
    assert (counts.written, counts.kept) == (2, 1) and found(into) == FILES
    only = unpack_archive(path, lambda name: into / "one" if name == "top/a.txt" else None, lambda line: None)
    assert only.written == 1


@pytest.mark.parametrize("kind", ["zip", "tar", "tgz"])
def test_a_file_that_was_damaged_is_unpacked_again(kind, tmp_path, into):
    """Its size is that of the member; the large one is longer than the pieces that are compared."""
    noise = np.random.default_rng(0).bytes(5 * 2**19)
    files = {**FILES, "top/large": noise}
    path = write(kind, tmp_path, list(files.items()))
    unpack(path, into)
    for name, at in (("top/a.txt", 2), ("top/b/c.bin", 5000), ("top/large", 2**20 + 7), ("top/large", 2**21 + 9)):
        data = bytearray(files[name])
        data[at] ^= 1
        (into / name).write_bytes(data)
        counts = unpack(path, into)
        assert (counts.written, counts.kept) == (1, 3) and found(into) == files


def test_a_name_that_is_too_long_is_one_sentence(tmp_path, into):
    path = write_zip(tmp_path / "x.zip", [("a" * 300 + ".jpg", b"x")])
    with pytest.raises(
        UserError, match="x.zip holds '.?a{150}.*', a name too long for the disk; it is not the officia"
    ):
        unpack(path, into)
    path = write_tar(tmp_path / "x.tar", [("a" * 250, b"x")])  # that of the half file is shortened
    assert unpack(path, into).written == 1 and [len(name) for name in found(into)] == [250]


@pytest.mark.parametrize("kind", ["zip", "tgz"])
def test_what_macos_adds_is_not_unpacked(kind, tmp_path, into):
    members = [("top/a", b"x"), ("top/._a", b"y"), ("__MACOSX/top/a", b"z"), ("__MACOSX/top/._a", b"z")]
    assert unpack(write(kind, tmp_path, members), into).written == 1 and found(into) == {"top/a": b"x"}


def special_zip(name: str, mode: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = mode << 16
    return entry


def special_tar(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


UNSAFE_NAMES = [
    "/etc/evil",
    "../evil",
    "top/../../evil",
    "top/..",
    "..",
    "C:/evil",
    "C:\\evil",
    "..\\evil",
    "\\evil",
    ".",
]
TWICE = [("top/a", b"1"), ("top/a", b"2")]
SAME = [("top/a", b"1"), ("./top//a", b"2")]
CORPUS = {
    **{f"zip {name}": ("zip", [("good", b"x"), (name, b"x")]) for name in UNSAFE_NAMES},
    **{f"{k} {name}": (k, [("good", b"x"), (name, b"x")]) for name in UNSAFE_NAMES for k in ("tar", "tgz")},
    "zip link": ("zip", [(special_zip("top/l", stat.S_IFLNK | 0o777), b"/etc")]),
    "zip device": ("zip", [(special_zip("top/l", stat.S_IFCHR | 0o666), b"")]),
    "zip pipe": ("zip", [(special_zip("top/l", stat.S_IFIFO | 0o666), b"")]),
    "zip folder": ("zip", [("../evil/", b"")]),
    **{f"{k} twice": (k, TWICE) for k in ("zip", "tar", "tgz")},
    **{f"{k} twice in two ways": (k, SAME) for k in ("zip", "tar", "tgz")},
    "tar link": ("tar", [(special_tar("l", tarfile.SYMTYPE, "/etc"), b"")]),
    "tar link and a file through it": ("tar", [(special_tar("l", tarfile.SYMTYPE, ".."), b""), ("l/evil", b"x")]),
    "tar hard link": ("tar", [(special_tar("l", tarfile.LNKTYPE, "../../x.tar"), b"")]),
    "tar device": ("tar", [(special_tar("l", tarfile.CHRTYPE), b"")]),
    "tar block device": ("tar", [(special_tar("l", tarfile.BLKTYPE), b"")]),
    "tar pipe": ("tar", [(special_tar("l", tarfile.FIFOTYPE), b"")]),
    "tar folder": ("tar", [(special_tar("../evil", tarfile.DIRTYPE), b"")]),
    "tgz link": ("tgz", [(special_tar("l", tarfile.SYMTYPE, "/etc"), b"")]),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", CORPUS)
def test_an_unsafe_archive_is_refused_and_nothing_leaves_the_folder(case, tmp_path, into):
    kind, members = CORPUS[case]
    path = write(kind, tmp_path, members)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"prepare: .*x.* holds '.*it is not the official archive and was not unpacked"):
        unpack(path, into)
    outside = {p for p in set(tmp_path.rglob("*")) - before if into not in p.parents}
    assert not outside and not Path("/etc/evil").exists()
    assert set(found(into)) <= {"good", "top/a"} and not any(p.is_symlink() for p in into.rglob("*"))


@pytest.mark.parametrize("kind", ["tar", "tgz"])
def test_a_link_that_nobody_wants_is_passed_over(kind, tmp_path, into):
    members = [(special_tar("code/link", tarfile.SYMTYPE, "/etc"), b""), ("top/a", b"x"), ("top/a2", b"y")]
    path = write(kind, tmp_path, members)
    unpack_archive(path, lambda name: into / name if name.startswith("top/") else None, lambda line: None)
    assert found(into) == {"top/a": b"x", "top/a2": b"y"} and not (into / "code").exists()


def test_an_encrypted_zip_is_refused(tmp_path, into):
    path = write_zip(tmp_path / "x.zip", [("a", b"x" * 1000), ("b", b"y" * 1000)])
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    data[at + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="holds 'a', which is encrypted"):
        unpack(path, into)


@pytest.mark.parametrize("kind", ["zip", "tgz"])
def test_a_bomb_is_refused_before_it_grows(kind, tmp_path, into, monkeypatch):
    monkeypatch.setattr(archives, "SMALL", 2**16)
    path = write(kind, tmp_path, [("small", b"x"), ("bomb", bytes(2**22)), ("after", b"x")])
    with pytest.raises(
        UserError, match="'bomb', with which it unpacks to 4,194,305 bytes, more than 200 times its size"
    ):
        unpack(path, into)
    assert sum(len(content) for content in found(into).values()) <= 1


def test_many_small_files_are_a_bomb_too(tmp_path, into, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBERS", 10)
    path = write("tgz", tmp_path, [(f"f{k}", b"") for k in range(20)])
    with pytest.raises(UserError, match="'f10', which is one file more than the 10"):
        unpack(path, into)


def test_a_zip_that_declares_less_than_it_holds(tmp_path, into):
    path = write_zip(tmp_path / "x.zip", [("a", bytes(1000))])
    data = path.read_bytes()
    path.write_bytes(data.replace((1000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises(UserError, match="truncated or damaged"):
        unpack(path, into)
    assert found(into) == {}


def test_a_header_of_a_tar_cannot_fill_the_memory(tmp_path, into):
    entry = tarfile.TarInfo("x")
    entry.type, entry.size = tarfile.XHDTYPE, 2**33
    with gzip.open(tmp_path / "x.tgz", "wb") as file:
        file.write(entry.tobuf(tarfile.GNU_FORMAT) + bytes(2**22))
    with pytest.raises(UserError, match="a header of 8,589,934,592 bytes"):
        unpack(tmp_path / "x.tgz", into)


@pytest.mark.parametrize("kind", ["zip", "tar", "tgz"])
def test_truncated_anywhere_is_one_sentence(kind, tmp_path, into):
    noise = np.random.default_rng(0).bytes(4000)
    whole = write(kind, tmp_path, [("a", noise), ("b", noise[:700]), ("c", noise[:512])]).read_bytes()
    path = tmp_path / f"cut.{kind}"
    if kind == "tar":  # the second block of the end mark and the padding are not needed
        whole = whole[: 3 * 512 + 4096 + 1024 + 512 + 512]
    for cut in sorted({1, 3, 511, 512, 513, *np.random.default_rng(1).integers(4, len(whole), 25).tolist()}):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"cut.* bytes. is truncated or damaged .*wget -c"):
            unpack(path, into)
    path.write_bytes(whole)
    unpack(path, into)
    assert found(into) == {"a": noise, "b": noise[:700], "c": noise[:512]}


@pytest.mark.parametrize("kind", ["zip", "tgz"])
def test_a_flipped_bit_is_found_by_the_checksum(kind, tmp_path, into):
    noise = np.random.default_rng(0).bytes(4000)
    path = write(kind, tmp_path, [("a", noise)])
    data = bytearray(path.read_bytes())
    data[2000] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match="truncated or damaged"):
        unpack(path, into)


def test_what_is_no_archive_or_has_no_room(tmp_path, into, monkeypatch):
    (tmp_path / "x.zip").write_bytes(b"<html>404 Not Found</html>" * 100)
    with pytest.raises(UserError, match="x.zip .* is truncated or damaged"):
        unpack(tmp_path / "x.zip", into)
    path = write_zip(tmp_path / "y.zip", [("a", bytes(5000))])
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    with pytest.raises(
        UserError, match="y.zip needs 5,000 bytes more to unpack, and 10 are free on the disk of .*into"
    ):
        unpack(path, into)
