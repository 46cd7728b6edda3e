"""A small network and the ways its weights come in files, for the checkpoint tests."""

import json

import torch
from safetensors.torch import save_file
from torch import nn


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
