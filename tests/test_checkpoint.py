"""Checkpoints: strict loading, bad files refused by name, atomic saving, fingerprints."""

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from worldgym import checkpoint
from worldgym.checkpoint import describe, fingerprint, load_into, load_tensors, save
from worldgym.errors import (
    CheckpointError,
    ConfigError,
    DTypeError,
    NotFiniteError,
    UnsafeFileError,
)


class Net(nn.Module):
    """A little of everything: weights, a float buffer, an integer buffer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        self.register_buffer("scale", torch.ones(4))
        self.register_buffer("count", torch.tensor(7))


def weights(seed=0):
    noise = torch.Generator().manual_seed(seed)
    return {
        k: torch.randn(v.shape, generator=noise) if v.is_floating_point() else v.clone()
        for k, v in Net().state_dict().items()
    }


def same(module, want):
    got = module.state_dict()
    return set(got) == set(want) and all(torch.equal(got[k], v) for k, v in want.items())


def write_shards(folder, tensors, name="model"):
    names = sorted(tensors)
    files = {"a": names[: len(names) // 2], "b": names[len(names) // 2 :]}
    weight_map = {}
    for part, keys in files.items():
        file = f"{name}-{part}.safetensors"
        save_file({k: tensors[k] for k in keys}, folder / file)
        weight_map.update({k: file for k in keys})
    index = folder / f"{name}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def training_dict(tensors):
    """What Self-Forcing saves, with the names that FSDP and activation checkpointing leave."""

    def wrap(k):
        return "model._fsdp_wrapped_module." + k.replace(
            "body.", "body._checkpoint_wrapped_module."
        )

    return {
        "generator": {wrap(k): torch.zeros_like(v) for k, v in tensors.items()},
        "generator_ema": {wrap(k): v for k, v in tensors.items()},
        "step": 200,
    }


# ---------------------------------------------------------------------------- what loads


def as_single(folder, t):
    save_file(t, folder / "net.safetensors")
    return folder / "net.safetensors"


def as_folder(folder, t):
    as_single(folder, t)
    (folder / "config.json").write_text("{}")
    return folder


def as_sharded_folder(folder, t):
    write_shards(folder, t)
    return folder


def as_torch(folder, t, name="net.pt", **options):
    torch.save(t, folder / name, **options)
    return folder / name


GOOD = {
    "single": as_single,
    "folder": as_folder,
    "index": lambda d, t: write_shards(d, t),
    "sharded folder": as_sharded_folder,
    "pt": as_torch,
    "pth ordered": lambda d, t: as_torch(d, OrderedDict(t), "net.pth"),
    "legacy ckpt": lambda d, t: as_torch(d, t, "net.ckpt", _use_new_zipfile_serialization=False),
    "lightning": lambda d, t: as_torch(d, {"state_dict": t, "epoch": 3}),
    "self forcing": lambda d, t: as_torch(d, training_dict(t)),
    "compiled": lambda d, t: as_single(d, {f"_orig_mod.{k}": v for k, v in t.items()}),
    "ddp": lambda d, t: as_single(d, {f"module.{k}": v for k, v in t.items()}),
}


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("write", GOOD.values(), ids=GOOD.keys())
def test_loads(tmp_path, write, meta):
    want = weights()
    with torch.device("meta" if meta else "cpu"):
        net = Net()
    assert load_into(net, write(tmp_path, want)) is net
    assert same(net, want)
    assert all(p.requires_grad for p in net.parameters())


def test_state_dict_source_is_copied():
    want = weights()
    with torch.device("meta"):
        net = Net()
    load_into(net, want)
    want["stem.weight"].zero_()
    assert net.stem.weight.abs().sum() > 0


def test_part_of_a_training_checkpoint(tmp_path):
    path = as_torch(tmp_path, training_dict(weights()))
    assert load_into(Net(), path, part="generator").stem.weight.abs().sum() == 0
    told = describe(path)
    assert told["part"] == "generator_ema" and told["parts"] == ["generator", "generator_ema"]
    assert told["wrapped_names"] and told["fingerprint"] == fingerprint(Net())


def test_leading_model_stays_where_the_module_has_it(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Net()

    want = {f"model.{k}": v for k, v in weights().items()}
    assert same(load_into(Wrapped(), as_single(tmp_path, want)), want)


def test_dtype_and_device(tmp_path):
    path = as_single(tmp_path, weights())
    with torch.device("meta"):
        net = Net()
    load_into(net, path, dtype=torch.bfloat16, device="cpu")
    assert net.stem.weight.dtype == net.scale.dtype == torch.bfloat16
    assert net.count.dtype == torch.int64
    half = load_into(Net().half(), path)  # the module's own precision is kept
    assert half.stem.weight.dtype == torch.float16
    torch.testing.assert_close(
        half.stem.weight.float(), weights()["stem.weight"], atol=1e-2, rtol=0
    )


def test_loading_in_place_keeps_the_parameters_of_an_optimizer(tmp_path):
    net = Net()
    before = net.stem.weight
    load_into(net, as_single(tmp_path, weights()))
    assert net.stem.weight is before


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


# ---------------------------------------------------------------------------- saving, telling


def test_save_round_trip(tmp_path):
    net = load_into(Net(), weights())
    meta = {"steps": 3, "recipe": {"seed": 0, "lr": 1e-4}, "name": "näno"}
    path = save(tmp_path / "deep" / "net.safetensors", net, meta)
    tensors, header = load_tensors(path)
    assert header == meta and same(net, tensors)
    assert [p.name for p in path.parent.iterdir()] == ["net.safetensors"]
    first = path.read_bytes()
    assert save(path, net, meta).read_bytes() == first


def test_save_takes_views_and_shared_tensors(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": base, "b": base.t(), "c": base[1:], "d": base, "e": torch.zeros(0)}
    got, _ = load_tensors(save(tmp_path / "x.safetensors", tensors))
    assert all(torch.equal(got[k], v) for k, v in tensors.items())


def test_a_crash_while_saving_leaves_the_old_file(tmp_path, monkeypatch):
    path = save(tmp_path / "net.safetensors", weights(1))

    def crash(tensors, file, metadata):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", crash)
    with pytest.raises(KeyboardInterrupt):
        save(path, weights(2))
    assert same(load_into(Net(), path), weights(1))
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


BAD_SAVES = [
    ("net.pt", {}, None, ConfigError, "net.safetensors"),
    ("net.safetensors", {}, {"a": torch.ones(1)}, ConfigError, "Tensor"),
    ("net.safetensors", {}, {"a": float("nan")}, ConfigError, "JSON"),
    ("net.safetensors", {"a": NAN}, None, NotFiniteError, "12 of 12"),
    ("net.safetensors", {"a": 3}, None, DTypeError, "int"),
    ("net.safetensors", {"a": torch.ones(1, device="meta")}, None, DTypeError, "meta device"),
]


@pytest.mark.parametrize(("name", "tensors", "meta", "error", "word"), BAD_SAVES)
def test_bad_saves(tmp_path, name, tensors, meta, error, word):
    with pytest.raises(error) as caught:
        save(tmp_path / name, tensors, meta)
    text = str(caught.value)
    assert word in text and "expected" in text and "Fix:" in text
    assert not list(tmp_path.iterdir())


def test_fingerprint_is_of_the_architecture():
    assert fingerprint(Net()) == fingerprint(Net().half()) == fingerprint(weights())
    with torch.device("meta"):
        assert fingerprint(Net()) == fingerprint(weights())
    other = weights()
    other["scale"] = torch.ones(5)
    assert fingerprint(other) != fingerprint(weights())
    lines = "a 2x3\nb "  # the exact recipe, so that others can reproduce it
    import hashlib

    got = fingerprint({"b": torch.tensor(1.0), "a": torch.ones(2, 3)})
    assert got == hashlib.md5(lines.encode()).hexdigest()


def test_describe(tmp_path):
    path = save(tmp_path / "net.safetensors", load_into(Net(), weights()), {"steps": 3})
    told = describe(path)
    assert told["kind"] == "safetensors" and told["tensors"] == 8
    assert told["parameters"] == sum(v.numel() for v in weights().values())
    assert told["dtypes"] == {"float32": 7, "int64": 1}
    assert told["bytes"] == path.stat().st_size and told["metadata"] == {"steps": 3}
    assert told["fingerprint"] == fingerprint(Net())
    json.dumps(told)
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shards(folder, weights())
    told = describe(folder)
    assert told["kind"] == "sharded safetensors" and len(told["files"]) == 2
    assert told["fingerprint"] == fingerprint(Net())
