"""The golden kinds of SCOPE on fixtures of other sizes, written by a plain reading of the spec."""

import itertools
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
import scope_folder as layout  # noqa: E402
from test_gamepad import columns, write  # noqa: E402
from test_scope import published_order  # noqa: E402

from worldgym.clip import ClipSize, Prompt, Sampler, draw_noise, make_latents  # noqa: E402
from worldgym.models.scope import ScopeConfig, ScopeDiT, frame_times  # noqa: E402
from worldgym.models.umt5 import TextEncoder  # noqa: E402
from worldgym.models.wan import WanDiT  # noqa: E402
from worldgym.models.wan_vae import WanVAE, to_uint8  # noqa: E402


def results(folder):
    return {r.case.rpartition("/")[2]: r for r in golden.run([folder])}


def rotations(frames, grid, width):
    """Section 3.3 and 4: angles of every token, and of every frame for the action paths."""
    third = width // 3
    sizes = (width - 2 * third, third, third)
    rows = [[place[axis] * 10000 ** (-2 * j / size) for axis, size in enumerate(sizes)
             for j in range(size // 2)]
            for place in itertools.product(range(frames), range(grid[0]), range(grid[1]))]
    line = [[i * 10000 ** (-2 * j / width) for j in range(width // 2)] for i in range(frames)]
    return {f"mid.{n}_{part}": getattr(torch.tensor(angle, dtype=torch.float64), part)().float()
            for n, angle in (("rope3d", rows), ("rope1d", line)) for part in ("cos", "sin")}


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
        stages = [{} for _ in range(layers)]
        between = (lambda i, x, r=rows_of, s=stages: published_order(
            net.blocks[i].action_attn, x, *r, frames, s[i])) if actions else None
        for dtype, end in ((torch.float32, ""), (torch.bfloat16, "_bf16")):
            t = frame_times(tensors["in.timestep"].to(dtype).float(), batch, frames, first)
            with torch.no_grad():
                tensors[f"out.{name}{end}"] = WanDiT.forward(
                    net, tensors["in.latents"], t, tensors["in.context"], between=between
                ).to(dtype)
            if name == "full" and dtype is torch.float32:
                tensors |= {f"mid.b{i}.{n}": v.clone() for i in range(layers)
                            for n, v in stages[i].items()}
    turns = rotations(frames, (2, 3), width)
    tensors |= {n: v for n, v in turns.items() if actions or "rope1d" not in n}
    save_file(weights, folder / "dit_other_weights.safetensors")
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "dit_other_io.safetensors")
    (folder / "dit_other_io.json").write_text(json.dumps(
        {"kind": "scope.dit", "config": cfg, "tolerance": "max abs 1e-4 (Wan2.2)"}))
    (folder / "dit_other_weights.json").write_text(json.dumps(
        {"kind": "scope.weights", "config": cfg, "n_tensors": len(weights),
         "n_params": sum(v.numel() for v in weights.values())}))


def test_no_stage_is_passed_over(tmp_path):
    """Every inner tensor that the fixture holds is compared."""
    dit_fixture(tmp_path, batch=1, layers=1, frames=2)
    path = tmp_path / "dit_other_io.safetensors"
    names = [n for n in load_file(path) if n.startswith("mid.")]
    assert len(names) == 20
    fixture = golden.Fixture(tmp_path, path.stem, json.loads(path.with_suffix(".json").read_text()),
                             load_file(path))
    with torch.no_grad():
        assert set(names) <= {c.name for c in golden.kinds()["scope.dit"](fixture)}


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
    ("dit_other_io.json", lambda d: d["config"].update(num_heads=6), "rope3d"),
    ("dit_other_io.json", lambda d: d["config"]["action_config"].update(windows_size=1), "shape"),
    ("dit_other_io.json", lambda d: d["config"].update(num_layers=2), "extra tensor"),
    ("dit_other_io.safetensors", lambda d: d["out.full_bf16"].mul_(1.1), "relative RMS"),
    ("dit_other_io.safetensors", lambda d: d["out.mouse_only"][0, 0, 0].add_(1e-2), "mouse_only"),
    ("dit_other_io.safetensors", lambda d: d["mid.b2.mouse_sdpa"][0].add_(1e-2), "b2.mouse_sdpa"),
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


# ------------------------------------------------------------------------- in float64, as stand-in


def put(folder, name, meta, tensors, weights=None):
    if weights is not None:
        meta["weights"] = f"{name}_w.safetensors"
        save_file(weights, folder / meta["weights"])
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_text_encoders_and_autoencoders(tmp_path, dtype):
    rng = torch.Generator().manual_seed(0)
    held = layout.t5_tensors(dim=12, heads=3, layers=3, vocab=40, inner=24, ffn=20)
    held = {k: v if "norm" in k else 0.5 * v for k, v in held.items()}  # a softer attention
    net = TextEncoder.load(held, dtype=torch.float64)
    ids = torch.randint(2, 40, (3, 9), generator=rng)
    mask = (torch.arange(9) < torch.tensor([9, 4, 1])[:, None]).long()
    made = {"in.ids": ids, "in.mask": mask, "out.raw": net.raw(ids, mask).to(dtype),
            "out.zeroed": net.encode(ids, mask).to(dtype)}
    put(tmp_path, "text", {"kind": "scope.t5"}, made, held)
    sizes = dict(layout.VAE_SIZES, base_dim=8, decoder_base_dim=6, z_dim=8, dim_mult=[1, 2, 2],
                 num_res_blocks=2, temperal_downsample=[True, True], scale_factor_spatial=8)
    held = layout.vae_tensors(sizes)
    told = {"latent_mean": [i / 10 for i in range(8)], "latent_std": [1 + i / 10 for i in range(8)]}
    net = WanVAE.load(held, dtype=torch.float64, mean=told["latent_mean"], std=told["latent_std"])
    video = (torch.rand(2, 3, 5, 16, 40, generator=rng) * 2 - 1).to(dtype)
    z = torch.randn(2, 8, 2, 2, 5, generator=rng).to(dtype)
    made = {"in.video": video, "out.latent": net.encode(video).to(dtype), "in.latent": z,
            "out.latent_first_frame": net.encode(video[:, :, :1]).to(dtype),
            "out.video_unclamped": net.decode(z).to(dtype)}
    put(tmp_path, "pictures", {"kind": "scope.vae", "tolerance": "1e-4", **told}, made, held)
    got = results(tmp_path)
    assert set(got) == {"text", "pictures"} and not any(r.reason for r in got.values()), got
    edit(tmp_path / "text.safetensors", lambda d: d["out.zeroed"][0].mul_(1.1))
    edit(tmp_path / "pictures.safetensors", lambda d: d["out.video_unclamped"][0].add_(1))
    assert all(r.reason for r in results(tmp_path).values())
    edit(tmp_path / "text.safetensors", lambda d: d.update({"out.other": torch.ones(1)}))
    assert "without a rule" in results(tmp_path)["text"].reason


@pytest.mark.parametrize("case", [
    dict(), dict(image=False, paths=(), frames=5),
    dict(image=False, paths=("mouse",), frames=1, guidance=1.0),
    dict(clips=2, paths=("keyboard",), steps=2, shift=3.0, frames=17, strength=0.7),
    dict(dtype=torch.bfloat16, layers=1)], ids=str)
def test_other_samplers(tmp_path, case):
    """A fixture of the whole sampler whose numbers our own parts made in float64."""
    case = dict(image=True, paths=("mouse", "keyboard"), frames=9, guidance=3.0, clips=1, steps=3,
                shift=5.0, strength=1.0, dtype=torch.float32, layers=3) | case
    rng, dtype = torch.Generator().manual_seed(1), case["dtype"]
    cfg = dict(layout.CONFIG, num_layers=case["layers"], num_heads=4, dim=96, ffn_dim=40)
    cfg["action_config"] = dict(cfg["action_config"], num_heads=4, dim=96, windows_size=2)
    held, pixels = layout.network_tensors(cfg), layout.vae_tensors()
    dit = ScopeDiT(ScopeConfig.from_dict({**cfg, "text_len": 6})).double().eval()
    dit.load_state_dict(held)
    vae, size = WanVAE.load(pixels, dtype=torch.float64), ClipSize(32, 96, case["frames"])
    b, rows = case["clips"], max(1, case["frames"])
    given = {"in.context_pos": torch.randn(b, 6, 16, generator=rng),
             "in.context_neg": torch.randn(b, 6, 16, generator=rng)}
    dims = {"mouse": 4, "keyboard": 6}
    given |= {f"in.{p}": torch.rand(1, rows, dims[p], generator=rng) for p in case["paths"]}
    if case["image"]:
        given["in.image"] = torch.randint(0, 256, (50, 70, 3), generator=rng, dtype=torch.uint8)
    sampler = Sampler(steps=case["steps"], shift=case["shift"], guidance=case["guidance"],
                      strength=case["strength"], timestep_dtype=dtype)
    flows = {}
    latents = make_latents(
        dit, vae, Prompt(given["in.context_pos"], given["in.context_neg"]), size, sampler=sampler,
        image_HWC=given["in.image"].numpy() if case["image"] else None, seed=11,
        mouse_BNJ=given.get("in.mouse"), keyboard_BNK=given.get("in.keyboard"),
        flows=lambda i, v, _: flows.__setitem__(f"mid.v_pos_step{i}", v.to(dtype)))
    frames = to_uint8(vae.decode(latents))
    put(tmp_path, "clip", {
        "kind": "scope.denoise", "config": cfg, "dit_weights": "dit.safetensors",
        "vae_weights": "vae.safetensors", "seed": 11, "steps": case["steps"],
        "cfg_scale": case["guidance"], "shift": case["shift"], "height": 32, "width": 96,
        "num_frames": case["frames"], "denoising_strength": case["strength"],
        "tolerance": "latents 1e-3; uint8 frames +-1"},
        {**given, **flows, "out.latents": latents.to(dtype),
         "in.noise": draw_noise(tuple(latents.shape), 11),
         "out.frames_uint8": frames if b > 1 else frames[0]})
    save_file(held, tmp_path / "dit.safetensors")
    save_file(pixels, tmp_path / "vae.safetensors")
    got = results(tmp_path)
    assert set(got) == {"clip"} and not got["clip"].reason, got
    edit(tmp_path / "clip.json", lambda d: d.update(cfg_scale=case["guidance"] + 0.5, shift=4.0))
    assert results(tmp_path)["clip"].reason
