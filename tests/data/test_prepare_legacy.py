"""cls_labels_onehot.npy: written as others read it, read without running what it names, imported into COCO and VOC."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.data import official
from tests.data.preparing import run
from wsss_dist.data import DataConfig, build_dataset
from wsss_dist.data.prepare.legacy import read_onehot, write_onehot
from wsss_dist.errors import UserError

TAGS = np.array([[1, 0, 1], [0, 0, 0]], np.uint8)


def save(path: Path, content: object, protocol: int = 4, version: tuple = (1, 0)) -> Path:
    """As np.save does, in any protocol: the head of a .npy, and the array of one object pickled."""
    whole = np.empty((), object)
    whole[()] = content
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        pickle.dump(whole, file, protocol=protocol)
    return path


def test_what_is_written_is_read_by_numpy_and_by_us(tmp_path):
    path = tmp_path / "cls_labels_onehot.npy"
    path.write_bytes(write_onehot(["a", "b"], TAGS))
    theirs = np.load(path, allow_pickle=True).item()
    assert list(theirs) == ["a", "b"] and theirs["a"].dtype == np.float32 and theirs["a"].tolist() == [1, 0, 1]
    ours = read_onehot(path, 3)
    assert list(ours) == ["a", "b"] and all((ours[name] == TAGS[k]).all() for k, name in enumerate(ours))
    assert ours["a"].dtype == np.uint8


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("kind", ["float32", ">f4", "float64", "int64", "uint8", "bool"])
def test_every_protocol_and_kind_of_number(tmp_path, protocol, kind):
    path = save(tmp_path / "x.npy", {"a": TAGS[0].astype(kind), 7: TAGS[1].astype(kind)}, protocol)
    found = read_onehot(path, 3)
    assert found["a"].tolist() == [1, 0, 1] and found[7].tolist() == [0, 0, 0]


def test_a_file_of_an_older_numpy_and_of_python_2(tmp_path):
    new = pickle.dumps({"a": TAGS[0].astype(np.float32)}, protocol=0)
    assert b"numpy._core.multiarray" in new
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|O", "fortran_order": False, "shape": ()})
    path = tmp_path / "x.npy"
    path.write_bytes(head.getvalue() + new.replace(b"numpy._core", b"numpy.core"))
    assert read_onehot(path, 3)["a"].tolist() == [1, 0, 1]
    old = (
        b"(dp0\nS'a'\np1\ncnumpy.core.multiarray\n_reconstruct\np2\n(cnumpy\nndarray\np3\n(I0\ntp4\nS'b'\np5\ntp6\nRp7\n"
        b"(I1\n(I3\ntp8\ncnumpy\ndtype\np9\n(S'u1'\np10\nI0\nI1\ntp11\nRp12\n(I3\nS'|'\np13\nNNNI-1\nI-1\nI0\ntp14\nb"
        b"I00\nS'\\x01\\x00\\x01'\np15\ntp16\nbs."
    )
    assert pickle.loads(old, encoding="latin1")["a"].tolist() == [1, 0, 1]  # noqa: S301 (written above)
    path.write_bytes(head.getvalue() + old)
    assert read_onehot(path, 3)["a"].tolist() == [1, 0, 1]


@pytest.mark.parametrize("protocol", range(5))
def test_names_that_are_scalars_of_numpy(tmp_path, protocol):
    """A dict made from an array of names or numbers has them."""
    names = [np.str_("2007_000001"), np.str_("é"), np.int64(9), np.uint32(7), np.array(["x"], ">U1")[0]]
    found = read_onehot(save(tmp_path / "x.npy", {name: TAGS[0] for name in names}, protocol), 3)
    assert list(found) == ["2007_000001", "é", 9, 7, "x"] and all(type(name) in (str, int) for name in found)
    with pytest.raises(UserError, match="is no cls_labels_onehot.npy .ValueError: a name of type 'f8'"):
        read_onehot(save(tmp_path / "x.npy", {np.float64(0.5): TAGS[0]}, protocol), 3)


def test_a_small_file_cannot_fill_the_memory(tmp_path):
    """137 bytes that name the object of number 2^26: the fast unpickler makes room for as many."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|O", "fortran_order": False, "shape": ()})
    path = tmp_path / "x.npy"
    path.write_bytes(head.getvalue() + b"\x80\x02}r" + (2**26).to_bytes(4, "little") + b".")
    command = (
        "import resource, sys; from pathlib import Path; from wsss_dist.data.prepare.legacy import read_onehot; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; read_onehot(Path(sys.argv[1]), 3); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", command, str(path)], capture_output=True, text=True, timeout=120)
    kilobytes = int(done.stdout)  # on Linux; macOS counts bytes, of which 512 MiB are more
    assert kilobytes < 100_000 or sys.platform != "linux"


class Payload:
    """Pickles to a call of `function`."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("where", ["whole", "value", "key", "inside the array"])
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch {}",), "posix.system"),
        (eval, ("open('{}', 'w')",), "builtins.eval|__builtin__.eval"),
        (open, ("{}", "w"), "io.open|_io.open"),
        (np.load, ("{}",), "numpy.load|numpy.lib"),
        (getattr, (np, "load"), "builtins.getattr|__builtin__.getattr|numpy"),
    ],
)
def test_nothing_that_a_file_names_is_run(tmp_path, function, arguments, name, where, protocol):
    if function is getattr:
        arguments = ("x", "y")
    canary = tmp_path / "canary"
    payload = Payload(function, *(a.replace("{}", str(canary)) if isinstance(a, str) else a for a in arguments))
    inside = np.empty(1, object)
    inside[0] = payload
    content = {"whole": payload, "value": {"a": payload}, "key": {payload: 1}, "inside the array": {"a": inside}}[where]
    path = save(tmp_path / "x.npy", content, protocol)
    with pytest.raises(UserError, match=rf"x.npy asks for '({name}).*it was not loaded: do not use this file"):
        read_onehot(path, 3)
    assert not canary.exists()


def test_files_that_hold_something_else_are_one_sentence(tmp_path):
    path = tmp_path / "x.npy"
    for content, message in (
        ({"a": np.ones(4, np.float32)}, r"labels of 'a' are \[1.0, 1.0, 1.0, 1.0\]; expected 3 numbers, each 0 or 1"),
        ({"a": np.full(3, 0.5)}, "labels of 'a' are"),
        ({"a": np.full(3, np.nan)}, "labels of 'a' are"),
        ({"a": [1, 0, 1]}, "is no cls_labels_onehot.npy .ValueError: labels of type list"),
        ({"a": np.ones((1, 3))}, "is no cls_labels_onehot.npy .ValueError: labels of shape"),
        ({"a": np.array(["x"] * 3)}, "is no cls_labels_onehot.npy .ValueError: values of type 'U1'"),
        ([1, 2], "is no cls_labels_onehot.npy"),
        ({"a": Payload(np.dtype, "f4")}, "is no cls_labels_onehot.npy"),
    ):
        with pytest.raises(UserError, match=message):
            read_onehot(save(path, content), 3)
    np.save(path, TAGS)
    with pytest.raises(UserError, match=r"is an array of uint8 with shape \(2, 3\); expected a pickled dict"):
        read_onehot(path, 3)
    whole, rng = save(path, {"a": TAGS[0].astype(np.float32)}).read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        data[rng.integers(len(data))] = rng.integers(256)
        path.write_bytes(data[: rng.integers(len(data))] if rng.random() < 0.3 else data)
        try:
            read_onehot(path, 3)
        except UserError:
            continue


def test_coco_exports_and_imports_tags(tmp_path):
    source, first, second = official.write_coco(tmp_path / "source"), tmp_path / "first", tmp_path / "second"
    run("coco", source, first, legacy=True)
    path = first / "legacy" / "cls_labels_onehot.npy"
    rows = np.load(path, allow_pickle=True).item()
    names = (first / "legacy" / "train.txt").read_text().split() + (first / "legacy" / "val.txt").read_text().split()
    assert list(rows) == names and len(names) == 7 + 4
    data = build_dataset(DataConfig(format="coco", root=first), "train-81k")
    assert [data.id(i) for i in range(len(data))] == names[:7]
    assert all((rows[data.id(i)] == data.tags[i]).all() for i in range(len(data)))
    # a tag less for one image, and images by number, as some files have them
    changed = {int(name.rpartition("_")[2]): row.copy() for name, row in rows.items()}
    number = next(number for number, row in changed.items() if row.sum() > 1)
    changed[number][changed[number].argmax()] = 0
    said = run("coco", source, second, labels=save(tmp_path / "x.npy", changed))
    assert "train2014: the tags of 1 images are not those of the annotations; taken from --labels" in said
    again = build_dataset(DataConfig(format="coco", root=second), "train-81k")
    assert (again.tags != data.tags).sum() == 1
    changed.pop(number)
    with pytest.raises(UserError, match="--labels has none for 1 annotated images of train2014 .first: COCO_train2014"):
        run("coco", source, tmp_path / "third", labels=save(tmp_path / "x.npy", changed))
    with pytest.raises(UserError, match="--labels is '.*none.npy', which is no file"):
        run("coco", source, tmp_path / "third", labels=tmp_path / "none.npy")


def test_voc_exports_and_imports_tags(tmp_path):
    source, first, second = official.write_voc(tmp_path / "source"), tmp_path / "first", tmp_path / "second"
    run("voc", source, first, legacy=True)
    path = first / "legacy" / "cls_labels_onehot.npy"
    rows = np.load(path, allow_pickle=True).item()
    data = build_dataset(DataConfig(format="voc", root=first), "train_aug")
    assert all((rows[data.id(i)] == data.tags[i]).all() for i in range(len(data))) and len(rows) == 9 + 3
    name = data.id(0)
    rows[name] = 1 - rows[name]
    assert "the tags of 1 images are not those of the XML files; taken from --labels" in run(
        "voc", source, second, labels=save(tmp_path / "x.npy", rows)
    )
    again = build_dataset(DataConfig(format="voc", root=second), "train_aug")
    assert (again.tags[0] == 1 - data.tags[0]).all() and (again.tags[1:] == data.tags[1:]).all()
    with pytest.raises(UserError, match="--labels has none for 1 images .first: 20"):
        run("voc", source, tmp_path / "third", labels=save(tmp_path / "x.npy", {k: rows[k] for k in list(rows)[1:]}))
