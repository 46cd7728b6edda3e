"""Checkpoints that must be refused: each message says what was given, expected, and the fix."""

import json
import os
import pickle
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from worldgym.checkpoint import load_into
from worldgym.errors import CheckpointError, DTypeError, UnsafeFileError

sys.path.insert(0, str(Path(__file__).resolve().parent))
from weights import (  # noqa: E402
    Net,
    as_single,
    as_torch,
    same,
    training_dict,
    weights,
    write_shards,
)

# ---------------------------------------------------------------------------- what is refused


class Exploit:
    def __reduce__(self):
        return os.system, ("touch /tmp/worldgym_was_here",)


def changed(folder, write=as_single, **changes):
    tensors = weights()
    for key, value in changes.items():
        key = key.replace("__", ".")
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    return write(folder, tensors)


def cut(path, keep):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def raw(folder, name, data):
    (folder / name).write_bytes(data)
    return folder / name


def shards(folder, spoil):
    index = write_shards(folder, weights())
    spoil(folder / "model-b.safetensors")
    return index


def break_index(folder, change):
    index = write_shards(folder, weights())
    data = json.loads(index.read_text())
    change(data["weight_map"], folder)
    index.write_text(json.dumps(data))
    return index


def two_sets(folder):
    as_single(folder, weights())
    save_file(weights(), folder / "other.safetensors")
    return folder


def float8(folder):
    return changed(folder, stem__weight=torch.zeros(4, 3).to(torch.float8_e4m3fn))


NAN, INF = torch.full((4, 3), float("nan")), torch.full((4, 3), float("inf"))
TWICE = {"a._orig_mod.b": torch.ones(1), "a.b": torch.ones(1)}
BAD = {
    "no file": (lambda d: d / "none.safetensors", CheckpointError, "none.safetensors"),
    "no folder": (lambda d: d / "none", CheckpointError, "none"),
    "empty folder": (lambda d: d, CheckpointError, "with none"),
    "two sets in a folder": (two_sets, CheckpointError, "other.safetensors"),
    "empty safetensors": (lambda d: raw(d, "a.safetensors", b""), CheckpointError, "0 bytes"),
    "empty torch": (lambda d: raw(d, "a.pt", b""), CheckpointError, "0 bytes"),
    "garbage safetensors": (
        lambda d: raw(d, "a.safetensors", b"not safetensors at all"),
        CheckpointError,
        "22 bytes",
    ),
    "garbage torch": (lambda d: raw(d, "a.pt", b"\x01garbage"), CheckpointError, "8 bytes"),
    "cut safetensors": (lambda d: cut(as_single(d, weights()), 0.6), CheckpointError, "cut off"),
    "cut header": (lambda d: cut(as_single(d, weights()), 0.1), CheckpointError, "cut off"),
    "cut torch": (lambda d: cut(as_torch(d, weights()), 0.6), CheckpointError, "cut off"),
    "missing tensor": (
        lambda d: changed(d, stem__weight=None),
        CheckpointError,
        "1 missing tensor",
    ),
    "extra tensor": (
        lambda d: changed(d, more=torch.ones(2)),
        CheckpointError,
        "1 extra tensor (more)",
    ),
    "missing and extra": (
        lambda d: changed(d, more=torch.ones(2), scale=None, count=None),
        CheckpointError,
        "2 missing tensors (count, scale) and 1 extra tensor (more)",
    ),
    "another model": (
        lambda d: as_single(d, {"foo.weight": torch.ones(2)}),
        CheckpointError,
        "8 missing|foo",
    ),
    "wrong shape": (
        lambda d: changed(d, stem__weight=torch.ones(3, 4)),
        CheckpointError,
        "[3, 4], not [4, 3]",
    ),
    "wrong rank": (lambda d: changed(d, scale=torch.ones(4, 1)), CheckpointError, "[4, 1]"),
    "integer weights": (
        lambda d: changed(d, stem__weight=torch.ones(4, 3, dtype=torch.int8)),
        CheckpointError,
        "int8, not float32",
    ),
    "float for integer": (
        lambda d: changed(d, count=torch.tensor(1.0)),
        CheckpointError,
        "float32, not int64",
    ),
    "float8 weights": (float8, CheckpointError, "float8_e4m3fn"),
    "complex weights": (
        lambda d: changed(d, as_torch, stem__weight=torch.ones(4, 3, dtype=torch.complex64)),
        CheckpointError,
        "complex64",
    ),
    "NaN": (lambda d: changed(d, stem__weight=NAN), CheckpointError, "12 of 12 values"),
    "inf": (lambda d: changed(d, as_torch, stem__weight=INF), CheckpointError, "stem.weight"),
    "missing shard": (
        lambda d: shards(d, Path.unlink),
        CheckpointError,
        "model-b.safetensors",
    ),
    "cut shard": (
        lambda d: shards(d, lambda p: cut(p, 0.5)),
        CheckpointError,
        "model-b.safetensors",
    ),
    "tensor not in its shard": (
        lambda d: break_index(d, lambda m, _: m.update(ghost="model-a.safetensors")),
        CheckpointError,
        "ghost",
    ),
    "tensor not in the index": (
        lambda d: break_index(d, lambda m, _: m.pop("stem.weight")),
        CheckpointError,
        "stem.weight",
    ),
    "index leaves its folder": (
        lambda d: break_index(d, lambda m, _: m.update(ghost="../x.safetensors")),
        UnsafeFileError,
        "../x.safetensors",
    ),
    "index names a pickle": (
        lambda d: break_index(d, lambda m, _: m.update(ghost="x.bin")),
        UnsafeFileError,
        "x.bin",
    ),
    "index is not JSON": (
        lambda d: raw(d, "m.safetensors.index.json", b"{"),
        CheckpointError,
        "JSONDecodeError",
    ),
    "index without a map": (
        lambda d: raw(d, "m.safetensors.index.json", b"[1]"),
        CheckpointError,
        "weight_map",
    ),
    "index with an empty map": (
        lambda d: raw(d, "m.safetensors.index.json", b'{"weight_map": {}}'),
        CheckpointError,
        "empty",
    ),
    "pickle runs code": (lambda d: as_torch(d, {"w": Exploit()}), UnsafeFileError, "system"),
    "legacy pickle runs code": (
        lambda d: as_torch(d, {"w": Exploit()}, _use_new_zipfile_serialization=False),
        UnsafeFileError,
        "system",
    ),
    "bare pickle runs code": (
        lambda d: raw(d, "a.ckpt", pickle.dumps(Exploit())),
        UnsafeFileError,
        "system",
    ),
    "pickled module": (lambda d: as_torch(d, Net()), UnsafeFileError, "Net"),
    "pickle file": (lambda d: raw(d, "a.pkl", pickle.dumps({"w": 1})), UnsafeFileError, "a.pkl"),
    "unknown suffix": (lambda d: raw(d, "a.onnx", b"123"), UnsafeFileError, "a.onnx"),
    "no state dict": (lambda d: as_torch(d, {"step": 3}), CheckpointError, "step"),
    "only a number": (lambda d: as_torch(d, 3), CheckpointError, "int"),
    "numbers among tensors": (
        lambda d: as_torch(d, {**weights(), "step": 3}),
        CheckpointError,
        "dict of tensors",
    ),
    "same name twice": (lambda d: as_single(d, TWICE), CheckpointError, "a.b"),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(("write", "error", "words"), BAD.values(), ids=BAD.keys())
def test_refuses_and_leaves_the_module_alone(tmp_path, write, error, words):
    net, before = Net(), weights(5)
    net.load_state_dict(before)
    with pytest.raises(error) as caught:
        load_into(net, write(tmp_path))
    text = str(caught.value)
    assert all(word in text for word in words.split("|")), text
    assert caught.value.given and caught.value.expected and caught.value.fix
    assert "expected" in text and "Fix:" in text
    assert same(net, before)
    assert not os.path.exists("/tmp/worldgym_was_here")
    path = as_single(tmp_path, weights())  # still usable
    assert same(load_into(net, path), weights())


def test_other_refusals(tmp_path):
    path = changed(tmp_path, stem__weight=torch.full((4, 3), 1e6))
    with pytest.raises(CheckpointError, match="overflows.*1e\\+06 as float16.*bfloat16"):
        load_into(Net(), path, dtype=torch.float16)
    with pytest.raises(CheckpointError, match="no state dict at 'critic'"):
        load_into(Net(), as_torch(tmp_path, training_dict(weights())), part="critic")
    with pytest.raises(DTypeError, match="stem: dict"):
        load_into(Net(), {"stem": {}})

    class Lost(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.ones(3), persistent=False)

    with torch.device("meta"):
        net = Lost()
    with pytest.raises(CheckpointError, match="table"):
        load_into(net, path)
    assert load_into(Lost(), path).table.sum() == 3


def test_check_finite_can_be_off(tmp_path):
    path = changed(tmp_path, stem__weight=NAN)
    assert load_into(Net(), path, check_finite=False).stem.weight.isnan().all()


def test_safe_globals_let_a_named_class_through(tmp_path):
    path = as_torch(tmp_path, {"state_dict": weights(), "spec": torch.nn.ReLU()})
    with pytest.raises(UnsafeFileError, match="ReLU"):
        load_into(Net(), path)
    allowed = [torch.nn.ReLU, OrderedDict, set]
    assert same(load_into(Net(), path, safe_globals=allowed), weights())
