"""Gamepad files: columns by name, lengths by rule, every mistake by its name."""

import numpy as np
import pytest

from worldgym.errors import ActionError, DatasetError, ShapeError
from worldgym.gamepad import BUTTONS, STICKS, Gamepad, read_parquet

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def columns(rows=5, seed=0):
    rng = np.random.default_rng(seed)
    data = {n: (rng.random(rows) < 0.5).astype(float).tolist() for n in BUTTONS}
    return data | {n: (rng.random((rows, 2)) * 2 - 1).tolist() for n in STICKS}


def write(path, data):
    parquet.write_table(pa.table(data), path)
    return path


def test_columns_are_found_by_name(tmp_path):
    data = columns()
    pad = read_parquet(write(tmp_path / "a.parquet", dict(reversed(data.items())) | {"x": [0] * 5}))
    want = np.array([data[n] for n in ("right_trigger", "left_trigger", "south", "right_thumb",
                                       "west", "north")], np.float32).T
    assert np.array_equal(pad.buttons_N6, want)
    assert np.array_equal(pad.sticks_N4, np.concatenate(
        [np.array(data[n], np.float32) for n in ("j_left", "j_right")], 1))


def test_lengths():
    pad = Gamepad(np.eye(6), np.linspace(-1, 1, 24).reshape(6, 4))
    for frames in (6, 7):  # the last row of a clip is never read
        assert len(pad.fit(frames)) == frames
    for frames in (5, 9):
        with pytest.raises(ActionError, match="differ in length"):
            pad.fit(frames)
    long, short = pad.fit(9, pad=True), pad.fit(5, pad=True)
    assert np.array_equal(long.buttons_N6[5:], np.tile(np.eye(6)[5], (4, 1)))
    assert np.array_equal(short.sticks_N4, pad.sticks_N4[:5])


def spoil(data, what):
    data = dict(data)
    if what == "column":
        del data["south"]
    elif what == "width":
        data["j_left"] = [[0.0, 0.0, 0.0]] * 5
    elif what == "ragged":
        data["j_left"] = [[0.0]] + [[0.0, 0.0]] * 4
    elif what == "hole":
        data["north"] = [None] * 5
    elif what == "text":
        data["north"] = ["a"] * 5
    return data


@pytest.mark.parametrize("what,words", [
    ("column", r"without \['south'\]"), ("width", "3 values a row"), ("ragged", "not numeric"),
    ("hole", "north"), ("text", "not numeric")])
def test_spoiled_files(tmp_path, what, words):
    with pytest.raises(DatasetError, match=words):
        read_parquet(write(tmp_path / "a.parquet", spoil(columns(), what)))


def test_files_that_are_none(tmp_path):
    with pytest.raises(DatasetError, match="missing"):
        read_parquet(tmp_path / "a.parquet")
    path = write(tmp_path / "a.parquet", columns())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DatasetError, match="not a whole parquet"):
        read_parquet(path)
    with pytest.raises(ActionError, match="no action row"):
        read_parquet(write(path, columns(0)))


def test_values():
    with pytest.raises(ShapeError):
        Gamepad(np.zeros((5, 5)), np.zeros((5, 4)))
    with pytest.raises(ActionError, match="not finite"):
        Gamepad(np.full((5, 6), np.nan), np.zeros((5, 4)))
    wild = Gamepad(np.zeros((5, 6)), np.full((5, 4), 300.0))
    with pytest.raises(ActionError, match="outside its range"):
        wild.check_range()
