"""WorldPlay's golden kinds in other sizes than the published fixtures: the runner must cope.

What the fixtures hold is made by a plain reading of the specification (``worldplay_plain``), the
autoencoder's by diffusers; the Hunyuan network's by ourselves, so that only the runner is tested.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import golden  # noqa: E402
import worldplay_plain as plain  # noqa: E402

TIMES = torch.tensor([14.0, 960.0, 500.0, 727.2728, 1000.0])


def write(folder, stem, kind, meta, tensors):
    (folder / f"{stem}.json").write_text(json.dumps({"kind": f"worldplay.{kind}", **meta}))
    if tensors:
        save_file({k: v.contiguous().clone() for k, v in tensors.items()},
                  folder / f"{stem}.safetensors")


def passes(folder):
    got = list(golden.run([folder]))
    assert got and not any(r.reason for r in got), got


def config(heads, head_dim, layers, text_dim=6, channels=4):
    return {"heads": heads, "head_dim": head_dim, "in_channels": channels,
            "out_channels": channels, "text_dim": text_dim, "freq_dim": 16,
            "ffn_dim": 20, "num_layers": layers}


def clip(rng, batch, frames, hw, channels=4):
    """Latents, labels, cameras of a clip."""
    labels = torch.randint(0, 81, (batch, frames), generator=rng)
    c2w = np.stack([plain.walk([{"yaw": 0.2 * float(n % 5 - 2), "forward": 0.3, "pitch": 0.01 * i}
                                for i, n in enumerate(row)])[1:] for row in labels])
    K = torch.eye(3).repeat(batch, frames, 1, 1)
    K[..., 0, 0], K[..., 1, 1] = 0.5, 0.9
    return {"hidden_states": torch.randn(batch, channels, frames, *hw, generator=rng),
            "action": labels.float(), "viewmats": torch.from_numpy(np.linalg.inv(c2w)).float(),
            "Ks": K, "timestep": TIMES[:frames]}


def run(sd, cfg, at, row, text, start, cache=None):
    return plain.forward(sd, cfg, at["hidden_states"][row], at["timestep"], text,
                         at["viewmats"][row], at["Ks"][row], at["action"][row], start, cache)


@pytest.mark.parametrize("batch, sizes, frames, hw, start, words", [
    (1, (3, 12, 1), 3, (6, 2), 5, 1), (1, (1, 28, 3), 1, (2, 2), 0, 9),
    (2, (2, 20, 2), 5, (4, 8), 0, 4)], ids=str)
@torch.no_grad()
def test_first_chunks(tmp_path, batch, sizes, frames, hw, start, words):
    rng = torch.Generator().manual_seed(batch + frames)
    cfg = config(*sizes)
    sd, at = plain.weights(cfg, rng), clip(rng, batch, frames, hw)
    text = torch.randn(1, words, 6, generator=rng)
    out = [run(sd, cfg, at, row, text[0], start) for row in range(batch)]
    tensors = {f"sd.{k}": v for k, v in sd.items()} | {f"in.{k}": v for k, v in at.items()}
    write(tmp_path, "other", "dit_first_chunk", {"config": cfg, "rope_start_frame": start}, {
        **tensors, "in.text": text, "out.velocity": torch.stack([o[0] for o in out]),
        "mid.temb": torch.cat([o[2]["temb"] for o in out]),
        "mid.block0": torch.stack([o[2]["block0"] for o in out])})
    passes(tmp_path)


@pytest.mark.parametrize("batch, sizes, past, frames, times", [
    (1, (2, 12, 3), 5, 2, [14.0, 14, 30, 500, 14]), (2, (1, 24, 1), 4, 4, [14.0] * 4)], ids=str)
@torch.no_grad()
def test_cached_chunks(tmp_path, batch, sizes, past, frames, times):
    """Context frames with times of their own, weights in another file, several clips."""
    rng = torch.Generator().manual_seed(past)
    cfg = config(*sizes)
    sd, old, now = plain.weights(cfg, rng), clip(rng, batch, past, (4, 4)), clip(
        rng, batch, frames, (4, 4))
    old["timestep"], text = torch.tensor(times), torch.randn(batch, 3, 6, generator=rng)
    tensors = {f"in.ctx.{k}": v for k, v in old.items()} | {f"in.{k}": v for k, v in now.items()}
    cached = [run(sd, cfg, old, row, text[row], 0) for row in range(batch)]
    for i in range(cfg["num_layers"]):
        for j, name in enumerate("kv"):
            tensors[f"out.cache{i}.{name}"] = torch.stack([torch.cat(
                [c[1][i][0][j], c[1][i][1][j]], -1).transpose(0, 1) for c in cached])
    for name, cache in (("", True), ("_without_cache", False)):
        tensors[f"out.velocity{name}"] = torch.stack([
            run(sd, cfg, now, r, text[r], past, cached[r][1] if cache else None)[0]
            for r in range(batch)])
    tensors["mid.ctx.block0"] = torch.stack([c[2]["block0"] for c in cached])
    save_file({f"sd.{k}": v.contiguous() for k, v in sd.items()}, tmp_path / "w.safetensors")
    write(tmp_path, "other", "dit_cached_chunk", {
        "config": cfg, "rope_start_frame": past, "state_dict": "see w.safetensors, sd.*"},
        {**tensors, "in.text": text})
    passes(tmp_path)


@pytest.mark.parametrize("batch, image, switch, times", [
    (1, False, 6, [1000.0, 600.0, 0.0]), (2, True, None, [1000.0, 900.0, 700.0])], ids=str)
@torch.no_grad()
def test_rollouts(tmp_path, batch, image, switch, times):
    """Eight chunks, a prompt of another length late, retrieval over a walk out and back."""
    rng = torch.Generator().manual_seed(3)
    cfg, chunks = config(2, 12, 2), 8
    sd, hw = plain.weights(cfg, rng), (2, 4)
    motions = [{"yaw": 0.2}] * 12 + [{"forward": 0.1}] * 8 + [{"yaw": -0.2}] * 12
    c2w = plain.walk(motions)
    w2c = np.linalg.inv(c2w)[:32]
    points = np.random.default_rng(0).normal(0, 3, (600, 3)).astype(np.float32)
    labels = [0] + [1] * 12 + [9] * 8 + [2] * 11
    texts = [torch.randn(1, n, 6, generator=rng) for n in (3, 5)]
    noise = torch.randn(batch, 4, 32, *hw, generator=rng)
    given = torch.randn(batch, 4, 1, *hw, generator=rng)
    K = torch.eye(3, dtype=torch.float64).repeat(32, 1, 1)
    K[:, 0, 0], K[:, 1, 1] = 0.5, 0.9
    V, a, x = torch.from_numpy(w2c).float(), torch.tensor(labels), noise.clone()
    chosen, out, steps = [], {}, [t for t in times if t]
    for i in range(chunks):
        now = range(4 * i, 4 * i + 4)
        seen = plain.select(w2c, 4 * i, points)[0]
        chosen.append(seen or None)
        text = texts[switch is not None and i >= switch][0]
        for row in range(batch):
            def go(frames, t, start, cache=None, row=row, text=text, first=now[0]):
                f = list(frames)
                here = torch.linalg.inv(V[first])  # only the digits depend on the origin
                return plain.forward(sd, cfg, x[row][:, f], t, text, V[f] @ here, K[f].float(),
                                     a[f], start, cache)

            cache = go(seen, torch.full((len(seen),), 14.0), 0)[1] if seen else None
            for j, t in enumerate(steps):
                when = torch.full((4,), t)
                if image and i == 0:
                    x[row][:, 0], when[0] = given[row][:, 0], 14.0
                end = steps[j + 1] if j + 1 < len(steps) else 0.0
                x[row][:, now] += (end - t) / 1000 * go(now, when, len(seen), cache)[0]
            if image and i == 0:
                x[row][:, 0] = given[row][:, 0]
        out[f"out.chunk{i}.latents"] = x[:, :, now]
    assert any(c and c != list(range(len(c))) for c in chosen)
    tensors = {"in.text": texts[0], "in.noise_latents": noise, "in.Ks": K, "in.action": a,
               "in.viewmats": torch.from_numpy(w2c), "in.c2w": torch.from_numpy(c2w),
               "in.points": torch.from_numpy(points), **out}
    tensors |= {"in.first_image_condition": given} if image else {}
    tensors |= {"in.text_after_switch": texts[1]} if switch is not None else {}
    meta = {"config": cfg, "n_chunks": chunks, "motions": motions, "timesteps": times,
            "context_timestep": 14.0, "selected": chosen}
    meta |= {} if switch is None else {"prompt_switch_chunk": switch}
    write(tmp_path, "other", "rollout", meta, tensors | {f"sd.{k}": v for k, v in sd.items()})
    passes(tmp_path)


@pytest.mark.parametrize("context", [False, True])
def test_attention_among_other_cameras(tmp_path, context):
    rng = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(3, 1, 2 * 7, 8, generator=rng) for _ in range(3))
    at, old = clip(rng, 3, 2, (2, 2)), clip(rng, 3, 1, (2, 2))
    ok, ov = (torch.randn(3, 1, 7, 8, generator=rng) for _ in range(2))

    def one(row, with_old):
        P, inverse = plain.projections(at["viewmats"][row], at["Ks"][row])
        Po = plain.projections(old["viewmats"][row], old["Ks"][row])[1]
        rows = [x[row].transpose(0, 1) for x in (q, k, v, ok, ov)]
        keys, values = (plain.moved(inverse, x) for x in rows[1:3])
        if with_old:
            keys, values = (torch.cat([plain.moved(Po, o), x])
                            for o, x in ((rows[3], keys), (rows[4], values)))
        return plain.moved(P, plain.attend(plain.moved(P.mT, rows[0]), keys, values)
                           ).transpose(0, 1)

    tensors = {"in.q": q, "in.k": k, "in.v": v, "in.viewmats": at["viewmats"], "in.Ks": at["Ks"],
               "out.prope": torch.stack([one(i, False) for i in range(3)])}
    if context:
        tensors |= {"in.ctx.k": ok, "in.ctx.v": ov, "in.ctx.viewmats": old["viewmats"],
                    "in.ctx.Ks": old["Ks"],
                    "out.prope_with_ctx": torch.stack([one(i, True) for i in range(3)])}
    write(tmp_path, "other", "prope_attention", {}, tensors)
    passes(tmp_path)


def test_retrieval_along_other_walks(tmp_path):
    rng = np.random.default_rng(5)
    points = rng.normal(0, 3, (700, 3)).astype(np.float32)
    motions = [{"yaw": float(rng.normal(0, 0.3)), "forward": 0.4} for _ in range(57)]
    w2c = np.linalg.inv(plain.walk(motions)).astype(np.float32)  # 58: the last chunk is cut short
    cases = []
    for start in (0, 4, 16, 20, 24, 56):
        wan, candidates, far = plain.select(w2c.astype(float), start, points)
        near = np.sort(far)
        cases.append({"trajectory": "other", "current_frame_idx": start, "wan": wan,
                      "wan_candidates": candidates, "wan_distance": far,
                      "hunyuan": plain.select(w2c.astype(float), start, points, 20, True)[0],
                      "margin": float(near[1] - near[0]) if len(far) > 1 else None})
    write(tmp_path, "other", "memory_retrieval", {"cases": cases, "distance_atol": 0.002}, {
        "in.points": torch.from_numpy(points), "in.w2c.other": torch.from_numpy(w2c)})
    passes(tmp_path)


def test_other_steps_and_strings(tmp_path):
    """Keys that move and turn further, another lens, no timeline."""
    parts = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)]
    names = ("forward", "right"), ("yaw", "pitch")
    motions = [{n: size * x for pair, size, keys in ((a, 0.3, names[0]), (b, 0.1, names[1]))
                for n, x in zip(keys, pair, strict=True) if x} for a in parts for b in parts]
    ahead = plain.walk([{"forward": 0.08}] * 5)
    K = np.array([[500.0, 0, 300], [0, 400, 250], [0, 0, 1]])
    lens = np.array([[500 / 600, 0, 0.5], [0, 400 / 500, 0.5], [0, 0, 1]])
    far = np.linalg.inv(plain.walk([{"forward": 1.0, "yaw": 1.0}, {"right": 2.0}, {"pitch": 0.2}]))
    arrays = {"string0.c2w": ahead, "string0.w2c": np.linalg.inv(ahead),
              "string0.Ks": np.repeat(lens[None], 6, 0), "grid81.c2w": plain.walk(motions),
              "angles.c2w": ahead, "center.in.w2c": far[1:],
              "center.out.w2c": far[1:] @ np.linalg.inv(far[1]), "third.c2w": ahead}
    write(tmp_path, "other", "pose_conversion", {
        "K_pixels": K.tolist(), "atol": 1e-9, "labels": [], "angles": {"actions": [9] * 5},
        "strings": [{"pose_string": "w-5.7", "n_motions": 5, "n_poses": 6,
                     "actions": [0] + [9] * 5},
                    {"pose_string": "w-5-", "error": "ValueError"}],
        "grid81": {"motions": motions, "actions": [0, *range(81)]},
        "third_motions": [{"forward": 0.08}] * 5}, {
            k: torch.from_numpy(v) for k, v in arrays.items()})
    passes(tmp_path)


@pytest.mark.parametrize("u, rows, shift", [
    ([0.5, 0.001, 0.999, 0.626, 0.25, 0.3, 0.8124], [500, 984, 600, 601, 7], 5.0),
    ([0.2, 0.7], [500, 600, 700], 1.0)], ids=str)
def test_other_noise_of_training(tmp_path, u, rows, shift):
    index = [int(np.floor(1000 * x)) for x in u]
    table = [1000 - i for i in range(1000)]
    times = []
    for i in index:
        t = i / 1000
        times.append(float(table[int(1000 - 1000 * shift * t / (1 + (shift - 1) * t))]))
    counts = [2] * 2 + [2 + 3 * 5 * (1 + i // 15) for i in range(45)]
    write(tmp_path, "other", "training_schedule", {
        "time_shift": shift, "u": u, "u_index": index, "timesteps": times,
        "sigmas": [t / 1000 for t in times],
        "memory_context": {"index": rows, "timestep": [1000.0 - r for r in rows]},
        "chunk_causal_mask": {"text_tokens": 2, "latents": 9, "tokens_per_latent": 5,
                              "chunk_latents": 3, "row_true_counts": counts}}, {})
    passes(tmp_path)


@torch.no_grad()
def test_an_autoencoder_of_other_sizes(tmp_path):
    """Two clips; whole clips by diffusers' own decoder."""
    diffusers = pytest.importorskip("diffusers")
    sizes = {"base_dim": 8, "decoder_base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 2, 2],
             "num_res_blocks": 2, "attn_scales": [], "temperal_downsample": [False, True, True],
             "dropout": 0.0, "is_residual": True, "in_channels": 12, "out_channels": 12,
             "patch_size": 2, "scale_factor_temporal": 4, "scale_factor_spatial": 16}
    stats = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.5, 1.0, 2.0]}
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(**sizes, **stats).eval()
    z = torch.randn(2, 4, 4, 3, 2)
    mean, std = (torch.tensor(stats[f"latents_{n}"]).view(1, -1, 1, 1, 1) for n in ("mean", "std"))
    video = vae.decode(z * std + mean).sample.clamp(-1, 1)
    image = torch.rand(2, 3, 1, 48, 32) * 2 - 1
    latent = vae.encode(image).latent_dist
    write(tmp_path, "other", "vae_stream", {"config": {**sizes, **stats}, "atol": 2e-4}, {
        **{f"sd.{k}": v for k, v in vae.state_dict().items()}, "in.normalised_latents": z,
        "out.frames_per_latent0": video[:, :, :1], "out.frames_per_latent2": video[:, :, 5:9],
        "out.frames_per_latent3_last1": video[:, :, -1:], "in.image": image,
        "out.posterior_mean": latent.mean, "out.posterior_logvar": latent.logvar,
        "out.normalised_mean": (latent.mean - mean) / std})
    passes(tmp_path)


@pytest.mark.parametrize("layers, past, vision", [(1, 3, True), (3, 12, False)], ids=str)
@torch.no_grad()
def test_hunyuan_networks_of_other_sizes(tmp_path, layers, past, vision):
    from worldgym.models.hunyuan import HunyuanConfig, HunyuanDiT
    from worldgym.models.prope import Cameras

    sizes = {"hidden_size": 48, "heads_num": 3, "mm_double_blocks_depth": layers,
             "rope_dim_list": [4, 8, 4], "rope_theta": 100.0, "in_channels": 3, "out_channels": 3,
             "text_states_dim": 5, "vision_states_dim": 6, "glyph_byT5_v2": False,
             "use_cond_type_embedding": False, "mlp_width_ratio": 2.0}
    rng = torch.Generator().manual_seed(layers)
    model = HunyuanDiT(HunyuanConfig.from_dict(sizes)).eval()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=rng) / (p.shape[-1] ** 0.5 if p.ndim > 1 else 5)
    at, old = (clip(rng, 1, n, (2, 5), 7) for n in (4, past))
    old["timestep"] = torch.linspace(14, 50, past)
    states, mask = torch.randn(1, 6, 5, generator=rng), torch.tensor([[1, 1, 0, 1, 0, 0]])
    picture = torch.randn(1, 2, 6, generator=rng) if vision else None
    text = model.text(model.tokens(states, mask, picture))
    rows = [dict(x_BCFHW=c["hidden_states"], t=c["timestep"][None], labels_BF=c["action"],
                 cameras=Cameras(c["viewmats"], c["Ks"]), text_kv=text) for c in (at, old)]
    context = model.context(**rows[1])
    out = model(**rows[0], context=context, frame_index_BF=past + torch.arange(4))
    write(tmp_path, "other", "hunyuan_cached_chunk", {
        "config": sizes, "n_ctx": past, "latent_hw": [2, 5]}, {
        **{f"sd.{k}": v for k, v in model.state_dict().items()},
        **{f"in.{k}": v for k, v in at.items()}, **{f"in.ctx.{k}": v for k, v in old.items()},
        "in.text_states": states, "in.text_mask": mask, "out.velocity": out,
        "out.velocity_chunk0": model(**rows[0]),
        **({"in.vision_states": picture} if vision else {}),
        "out.cache0.k_txt": text[0][0].transpose(1, 2),
        "out.cache0.k_vision": torch.cat([context.position[0][0], context.camera[0][0]]
                                         ).transpose(1, 2)})
    passes(tmp_path)
