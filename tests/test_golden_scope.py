"""The golden kinds of SCOPE on fixtures of other sizes, written by a plain reading of the spec."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
for package in ("diffusers", "transformers", "pyarrow"):
    pytest.importorskip(package)

import golden  # noqa: E402
from test_gamepad import columns, write  # noqa: E402
from test_scope import published_order  # noqa: E402

from worldgym.models.scope import ScopeConfig, ScopeDiT, frame_times  # noqa: E402
from worldgym.models.wan import WanDiT  # noqa: E402


def results(folder):
    return {r.case.rpartition("/")[2]: r for r in golden.run([folder])}


def dit_fixture(folder, *, heads=3, width=24, rows=(4, 2), layers=3, frames=4, batch=2, text=3,
                paths=("mouse", "keyboard"), mouse_dim=4, keyboard_dim=6, actions=True):
    """``dit_other_io`` and ``dit_other_weights``: outputs of the published order of operations."""
    rng = torch.Generator().manual_seed(frames)
    cfg = dict(patch_size=[1, 2, 2], in_dim=8, out_dim=6, eps=1e-6, dim=heads * width, ffn_dim=40,
               freq_dim=20, text_dim=10, num_heads=heads, num_layers=layers, has_image_input=False)
    if actions:
        cfg["action_config"] = dict(
            mouse_dim_in=mouse_dim, keyboard_dim_in=keyboard_dim, dim=heads * width,
            num_heads=heads, vae_time_compression_ratio=rows[0], windows_size=rows[1])
    net = ScopeDiT(ScopeConfig.from_dict({**cfg, "text_len": text})).eval()
    weights = {k: (torch.randn(v.shape, generator=rng) * 0.2).bfloat16()
               for k, v in net.state_dict().items()}
    net.load_state_dict({k: v.float() for k, v in weights.items()})
    raw = rows[0] * (frames - 1) + 1
    tensors = {"in.latents": torch.randn(batch, 8, frames, 4, 6, generator=rng),
               "in.context": torch.randn(batch, text, 10, generator=rng),
               "in.timestep": torch.tensor([437.25])}
    dims = {"mouse": mouse_dim, "keyboard": keyboard_dim}
    tensors |= {f"in.{p}": torch.randn(batch, raw, dims[p], generator=rng) for p in paths}
    uses = {"full": (True, paths), "scalar_timestep": (False, paths), "no_action": (True, ())}
    uses |= {f"{p}_only": (True, (p,)) for p in paths if len(paths) > 1}
    for name, (first, used) in uses.items():
        rows_of = [tensors[f"in.{p}"] if p in used else None for p in ("mouse", "keyboard")]
        between = (lambda i, x, r=rows_of: published_order(
            net.blocks[i].action_attn, x, *r, frames)) if actions else None
        for dtype, end in ((torch.float32, ""), (torch.bfloat16, "_bf16")):
            t = frame_times(tensors["in.timestep"].to(dtype).float(), batch, frames, first)
            with torch.no_grad():
                tensors[f"out.{name}{end}"] = WanDiT.forward(
                    net, tensors["in.latents"], t, tensors["in.context"], between=between
                ).to(dtype)
    save_file(weights, folder / "dit_other_weights.safetensors")
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "dit_other_io.safetensors")
    (folder / "dit_other_io.json").write_text(json.dumps(
        {"kind": "scope.dit", "config": cfg, "tolerance": "max abs 1e-4 (Wan2.2)"}))
    (folder / "dit_other_weights.json").write_text(json.dumps(
        {"kind": "scope.weights", "config": cfg, "n_tensors": len(weights),
         "n_params": sum(v.numel() for v in weights.values())}))


@pytest.mark.parametrize("sizes", [
    dict(), dict(heads=2, width=32, rows=(4, 4), frames=2, batch=1, layers=1),
    dict(heads=4, width=12, rows=(2, 3), frames=6), dict(paths=("mouse",)),
    dict(paths=("keyboard",), frames=1), dict(paths=(), actions=False),
    dict(mouse_dim=2, keyboard_dim=9)], ids=str)
def test_other_networks(tmp_path, sizes):
    dit_fixture(tmp_path, **sizes)
    got = results(tmp_path)
    assert set(got) == {"dit_other_io", "dit_other_weights"}
    assert not any(r.reason for r in got.values()), got


def edit(path, change):
    if path.suffix == ".json":
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
    else:
        data = load_file(path)
        change(data)
        save_file(data, path)


@pytest.mark.parametrize("name,change,words", [
    ("dit_other_io.json", lambda d: d["config"].update(num_heads=6), "out.full"),
    ("dit_other_io.json", lambda d: d["config"]["action_config"].update(windows_size=1), "shape"),
    ("dit_other_io.json", lambda d: d["config"].update(num_layers=2), "extra tensor"),
    ("dit_other_io.safetensors", lambda d: d["out.full_bf16"].mul_(1.1), "relative RMS"),
    ("dit_other_io.safetensors", lambda d: d["out.mouse_only"][0, 0, 0].add_(1e-2), "mouse_only"),
    ("dit_other_io.safetensors", lambda d: d.update({"out.new": torch.ones(1)}), "without a rule"),
    ("dit_other_weights.json", lambda d: d.update(n_params=1), "parameters")])
def test_spoiled_fixtures_fail(tmp_path, name, change, words):
    dit_fixture(tmp_path)
    edit(tmp_path / name, change)
    got = results(tmp_path)
    assert words in got.pop(name.partition(".")[0]).reason
    assert not any(r.reason for r in got.values())


def test_schedules_and_actions_of_other_settings(tmp_path):
    u = torch.linspace(0.7, 0, 8)[:-1]
    sigmas = 2.5 * u / (1 + 1.5 * u)
    save_file({"sigmas.steps7.shift2.5.strength0.7": sigmas,
               "timesteps_bf16.steps7.shift2.5.strength0.7": (1000 * sigmas).bfloat16()},
              tmp_path / "schedule.safetensors")
    (tmp_path / "schedule.json").write_text('{"kind": "scope.scheduler"}')
    data = columns(6)
    write(tmp_path / "pad.parquet", data)
    stick = torch.tensor([[*a, *b] for a, b in zip(data["j_left"], data["j_right"], strict=True)])
    long = torch.cat([stick, stick[-1:].expand(7, -1)])[None]
    save_file({"out.mouse": long, "out.mouse_cut": stick[None, :2].bfloat16()},
              tmp_path / "pad.safetensors")
    (tmp_path / "pad.json").write_text(json.dumps(
        {"kind": "scope.actions", "frames": 13, "frames_cut": 2}))
    got = results(tmp_path)
    assert set(got) == {"schedule", "pad"} and not any(r.reason for r in got.values()), got
    edit(tmp_path / "pad.json", lambda d: d.update(frames_cut=3))
    edit(tmp_path / "schedule.safetensors",
         lambda d: d["sigmas.steps7.shift2.5.strength0.7"][3].add_(1e-4))
    assert all(r.reason for r in results(tmp_path).values())
