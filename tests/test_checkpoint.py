"""Checkpoints: strict loading from every kind of file, atomic saving, fingerprints."""

import hashlib
import json
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from worldgym import checkpoint
from worldgym.checkpoint import describe, fingerprint, load_into, load_tensors, save
from worldgym.errors import ConfigError, DTypeError, NotFiniteError

sys.path.insert(0, str(Path(__file__).resolve().parent))
from weights import (  # noqa: E402
    Net,
    as_folder,
    as_sharded_folder,
    as_single,
    as_torch,
    same,
    training_dict,
    weights,
    write_shards,
)

# ---------------------------------------------------------------------------- what loads


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
    ("net.safetensors", {"a": torch.tensor([1.0, float("nan")])}, None, NotFiniteError, "1 of 2"),
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
