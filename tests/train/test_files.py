"""Files that are whole or not there: long names, and the lock of a folder."""

from __future__ import annotations

import pytest

from wsss_dist.files import whole_file, write_whole


@pytest.mark.parametrize("contested", [False, True])
def test_a_name_that_leaves_no_room_for_its_partial(contested, tmp_path):
    partials = set()
    for name in ("b" * 251 + ".png", "b" * 250 + "c.png", "\N{SNOWMAN}" * 83 + ".png"):
        with whole_file(tmp_path / name, contested=contested) as partial:
            assert partial.parent == tmp_path and partial.name.startswith(".") and partial.name.endswith(".partial")
            partial.write_bytes(b"x")
            partials.add(partial)
        write_whole(tmp_path / name, b"y", contested=contested)
        assert (tmp_path / name).read_bytes() == b"y"
    assert len(partials) == 3 == len(list(tmp_path.iterdir()))


def test_what_a_kill_left_is_written_over(tmp_path):
    for name in ("a.png", "b" * 251 + ".png"):
        places = []
        for _ in range(2):
            with whole_file(tmp_path / name) as partial:
                places.append(partial)
                partial.write_bytes(b"x")
        assert places[0] == places[1]
