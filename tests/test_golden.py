"""The golden runner: reproduces what is there, and fails loudly on everything it should."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import golden  # noqa: E402

from worldgym.attention import attention  # noqa: E402
from worldgym.models.wan import WanConfig, WanDiT  # noqa: E402

SHARED = HERE.parents[1] / "shared" / "golden"
WAN = SHARED / "wan_causal"
needs_wan = pytest.mark.skipif(not WAN.is_dir(), reason=f"{WAN} is absent")


def results(*folders):
    return {r.case.rpartition("/")[2]: r for r in golden.run(folders)}


def folders():
    """Golden folders all of whose kinds we know."""
    known, found = golden.kinds(), []
    for folder in sorted(p for p in SHARED.glob("*") if p.is_dir()):
        metas = [json.loads(p.read_text()) for p in folder.glob("*.json")]
        if metas and all(m.get("kind") in known for m in metas):
            found.append(folder)
    return found


def test_every_supported_folder_is_reproduced():
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent")
    assert WAN in folders()
    done = subprocess.run(
        [sys.executable, str(HERE / "golden.py"), *map(str, folders())],
        capture_output=True,
        text=True,
        cwd="/",
        env={"PATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == sum(len(list(f.glob("*.json"))) for f in folders())
    for line in lines:
        system, case, error, tolerance, verdict = line.split()
        assert verdict == "ok" and float(error) <= float(tolerance) and "/" in case


# ------------------------------------------------------------------------- what must fail


def copy(folder, *stems):
    for stem in stems:
        for suffix in (".json", ".safetensors"):
            (folder / (stem + suffix)).write_bytes((WAN / (stem + suffix)).read_bytes())
    return folder


def edit(path, change):
    """Change the JSON or the tensors of a fixture in place."""
    if path.suffix == ".json":
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
    else:
        data = load_file(path)
        change(data)
        save_file(data, path)


UNIPC, GLOBAL = "unipc", "kv_rollout_global"
SPOILED = {
    "unknown kind": ("unipc.json", lambda d: d.update(kind="wan.future"), "unknown kind"),
    "no kind": ("unipc.json", lambda d: d.pop("kind"), "has no kind"),
    "missing field": ("unipc.json", lambda d: d.pop("steps"), "no field 'steps'"),
    "other shift": ("unipc.json", lambda d: d.update(shift=4.0), "sigmas"),
    "tight tolerance": ("unipc.json", lambda d: d.update(tolerance=1e-12), "times the tolerance"),
    "changed value": ("unipc.safetensors", lambda d: d["samples"][3].add_(1e-2), "samples"),
    "missing tensor": ("unipc.safetensors", lambda d: d.pop("samples"), "no tensor 'samples'"),
    "NaN reference": ("unipc.safetensors", lambda d: d["samples"].fill_(float("nan")), "finite"),
    "NaN input": ("unipc.safetensors", lambda d: d["x0_sample"].fill_(float("nan")), "finite"),
    "wrong shape": ("unipc.safetensors", lambda d: d.update(sigmas=torch.ones(3)), "shape"),
    "a call less": (
        "kv_rollout_global.safetensors",
        lambda d: [d.pop(k) for k in [*d] if k.startswith("call14")],
        "14 calls, we made 15",
    ),
    "changed cache": (
        "kv_rollout_global.safetensors",
        lambda d: d["final_cache.1.k"][0, -1].add_(1),
        "final_cache.1.k",
    ),
    "other window": ("kv_rollout_global.json", lambda d: d.update(local_attn_frames=6), "call10"),
    "other list": (
        "kv_rollout_global.json", lambda d: d.update(timestep_shift=3.0), "warped_steps"
    ),
    "no weights": ("kv_rollout_global.json", lambda d: d.pop("state_dict"), "no tensor sd.*"),
    "lost weights": (
        "kv_rollout_global.json", lambda d: d.update(state_dict="sd.* of lost.safetensors"), "lost"
    ),
    "odd weights": ("kv_rollout_global.json", lambda d: d.update(state_dict="the usual"), "usual"),
    "other config": (
        "kv_rollout_global.json", lambda d: d["config"].update(num_layers=3), "missing tensors"
    ),
}  # fmt: skip


@needs_wan
@pytest.mark.parametrize(("name", "change", "words"), SPOILED.values(), ids=SPOILED.keys())
def test_spoiled_fixtures_fail(tmp_path, capsys, name, change, words):
    weights = ["causal_train"] if name.startswith("kv_") else []
    copy(tmp_path, "scheduler", Path(name).stem, *weights)
    edit(tmp_path / name, change)
    assert golden.main([str(tmp_path)]) == 1
    lines = {
        line.split()[1].rpartition("/")[2]: line for line in capsys.readouterr().out.splitlines()
    }
    bad = lines.pop(Path(name).stem)
    assert bad.split()[4] == "FAIL" and words in bad
    assert lines and all(line.endswith(" ok") for line in lines.values())


@needs_wan
@pytest.mark.parametrize("lost", [".json", ".safetensors"])
def test_half_a_pair_fails(tmp_path, lost):
    copy(tmp_path, "unipc", "scheduler")
    (tmp_path / f"unipc{lost}").unlink()
    got = results(tmp_path)
    assert f"unipc{lost} is missing" in got["unipc"].reason and not got["scheduler"].reason


@needs_wan
@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 0.5])
def test_broken_files_fail(tmp_path, suffix, keep):
    path = copy(tmp_path, "unipc") / f"unipc{suffix}"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    assert f"unipc{suffix} is broken" in results(tmp_path)["unipc"].reason


def test_nothing_found_fails(tmp_path, capsys):
    assert golden.main([str(tmp_path), str(tmp_path / "absent")]) == 1
    out = capsys.readouterr().out
    assert "holds no fixtures" in out and "is not a folder" in out and out.count("FAIL") == 2


def test_default_tolerance(tmp_path):
    fixture = golden.Fixture(tmp_path, "x", {})
    assert fixture.tolerance() == (1e-4, 0.0)
    fixture.meta = {"tolerance": {"atol": 1e-3, "rtol": 1e-2}}
    assert fixture.tolerance() == (1e-3, 1e-2)
    fixture.meta = {"tolerance": 0.5}
    assert fixture.tolerance() == (0.5, 0.0)


# ------------------------------------------------- other sizes, against a plain contiguous cache


class PlainCache:
    """Per layer one growing tensor of rotated keys and values; eviction by slicing."""

    def __init__(self, layers, window, sink, tokens):
        self.kv = [None] * layers
        self.window, self.sink, self.tokens = window, sink, tokens

    def make_room(self, frames):
        for i, kv in enumerate(self.kv):
            over = 0 if kv is None else kv.shape[2] // self.tokens + frames - self.window
            if self.window > 0 and over > 0:
                s, d = self.sink * self.tokens, over * self.tokens
                self.kv[i] = torch.cat([kv[:, :, :s], kv[:, :, s + d :]], 2)

    def attend(self, keep):
        def see(layer, q, k, v):
            new = torch.stack([k, v])
            both = new if self.kv[layer] is None else torch.cat([self.kv[layer], new], 2)
            if keep:
                self.kv[layer] = both
            return attention(q, both[0], both[1])

        return see


def plain_rollout(folder, *, batch, per_block, blocks, window, sink, alone, initial, noise_t, shift,
                  raw, calls):  # fmt: skip
    """Write a wan.kv_rollout fixture made by a straightforward reading of the spec."""
    rng = torch.Generator().manual_seed(batch + 10 * per_block + 100 * blocks)
    cfg = dict(dim=24, ffn_dim=40, num_heads=2, num_layers=3, in_dim=4, out_dim=4, freq_dim=8,
               text_dim=6, text_len=5, patch_size=[1, 2, 2])  # fmt: skip
    model = WanDiT(WanConfig.from_dict(cfg))
    sd = {k: torch.randn(v.shape, generator=rng) * 0.3 for k, v in model.state_dict().items()}
    model.load_state_dict(sd)
    lead = [1] if alone and not initial else []
    sizes = lead + [per_block] * blocks
    c, h, w = 4, 4, 6
    f = sum(sizes)
    noise = torch.randn(batch, f, c, h, w, generator=rng)
    renoise = torch.randn(len(sizes), len(raw) - 1, batch, per_block, c, h, w, generator=rng)
    given = torch.randn(batch, initial, c, h, w, generator=rng)
    context = torch.randn(batch, 3, 6, generator=rng)
    u = torch.linspace(1, 0, 1001)[:-1]
    sigmas = shift * u / (1 + (shift - 1) * u)
    steps = [float(1000 * sigmas[1000 - s]) for s in raw]
    cache, out, log, start = PlainCache(3, window, sink, h * w // 4), [], [], 0

    def call(x, t, keep):  # x [B,f,C,H,W]
        index = torch.arange(start, start + x.shape[1])
        t_BF = torch.full(x.shape[:2], t)
        v = model(x.transpose(1, 2), t_BF, context, attend=cache.attend(keep), frame_index_BF=index)
        v = v.transpose(1, 2)
        x0 = x - sigmas[(1000 * sigmas - t).abs().argmin()] * v
        log.append((t, start, x.shape[1], x, v, x0))
        return x0

    given_sizes = ([1] if alone and initial else []) + [per_block] * initial
    while start < initial:
        n = given_sizes.pop(0)
        cache.make_room(n)
        call(given[:, start : start + n], 0.0, True)
        out.append(given[:, start : start + n])
        start += n
    for b, n in enumerate(sizes):
        cache.make_room(n)
        x = noise[:, start - initial : start - initial + n]
        for i, t in enumerate(steps):
            x0 = call(x, t, False)
            if i + 1 < len(steps):
                s = sigmas[(1000 * sigmas - steps[i + 1]).abs().argmin()]
                x = (1 - s) * x0 + s * renoise[b, i][:, :n]
        call(x0, float(noise_t), True)
        out.append(x0)
        start += n
    tensors = {"noise": noise, "renoise": renoise, "context": context, "latents": torch.cat(out, 1)}
    if initial:
        tensors["initial_latent"] = given
    tensors |= {f"call{i:02d}.{k}": v for i, r in enumerate(log)
                for k, v in zip(("input", "flow", "x0"), r[3:], strict=True)}  # fmt: skip
    spare = (0, 0, 0, 0, 0, 2)  # the published buffer is longer than what was written
    for i, (k, v) in enumerate(cache.kv):
        tensors |= {
            f"final_cache.{i}.{n}": torch.nn.functional.pad(x, spare)
            for n, x in zip("kv", (k, v), strict=True)
        }
    meta = {
        "kind": "wan.kv_rollout", "state_dict": "w.* of weights.safetensors", "config": cfg,
        "local_attn_frames": window, "sink_frames": sink, "frames_per_block": per_block,
        "independent_first_frame": alone, "initial_frames": initial, "context_noise": noise_t,
        "timestep_shift": shift, "raw_steps": raw, "warped_steps": steps,
        "final_indices": {"local_end_index": cache.kv[0].shape[2]},
        "tolerance": {"atol": 1e-4, "rtol": 1e-4},
    }  # fmt: skip
    if calls:
        meta["calls"] = [{"t": [r[0]], "frame_start": r[1], "frames": r[2]} for r in log]
    save_file({f"w.{k}": v for k, v in sd.items()}, folder / "weights.safetensors")
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "other.safetensors")
    (folder / "other.json").write_text(json.dumps(meta))


FOUR = [1000, 750, 500, 250]
OTHER = {
    "first frame alone": dict(batch=2, per_block=3, blocks=2, window=-1, sink=0, alone=True,
                              initial=0, noise_t=0, shift=5.0, raw=FOUR, calls=True),
    "no call list": dict(batch=1, per_block=2, blocks=3, window=5, sink=1, alone=True,
                         initial=1, noise_t=0, shift=5.0, raw=FOUR, calls=False),
    "given blocks, odd window": dict(batch=3, per_block=2, blocks=4, window=5, sink=2, alone=False,
                                     initial=4, noise_t=0, shift=3.0, raw=[1000, 500], calls=True),
    "context noise": dict(batch=1, per_block=1, blocks=5, window=3, sink=2, alone=False,
                          initial=1, noise_t=100, shift=8.0, raw=[1000, 600, 200], calls=True),
    "given frame alone, then blocks": dict(batch=2, per_block=3, blocks=2, window=6, sink=0,
                                           alone=True, initial=4, noise_t=0, shift=1.0,
                                           raw=[900], calls=False),
}  # fmt: skip


@pytest.mark.parametrize("layout", OTHER.values(), ids=OTHER.keys())
@torch.no_grad()
def test_other_layouts(tmp_path, layout):
    plain_rollout(tmp_path, **layout)
    got = results(tmp_path)
    assert set(got) == {"other"} and not got["other"].reason, got
