"""WorldPlay read off its specification in plain torch: the Wan variant, retrieval, walks.

Nothing of the package is used, so that both can be compared. One clip at a time; tensor names as
published. Shapes: F latent frame, T token, N head, E head width, D width.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F


def linear(sd, name, x):
    return x @ sd[name + ".weight"].T + sd[name + ".bias"]


def weights(cfg, rng):
    """Random weights under the published names."""
    d, wide = cfg["heads"] * cfg["head_dim"], cfg["ffn_dim"]
    sd, time = {}, "condition_embedder."

    def add(name, out, into):
        sd[name + ".weight"] = torch.randn(out, into, generator=rng) / into**0.5
        sd[name + ".bias"] = torch.randn(out, generator=rng) / 5

    sd["patch_embedding.weight"] = torch.randn(d, cfg["in_channels"], 1, 2, 2, generator=rng) / 4
    sd["patch_embedding.bias"] = torch.randn(d, generator=rng) / 5
    for name, into in (("time", cfg["freq_dim"]), ("action", cfg["freq_dim"]),
                       ("text", cfg["text_dim"])):
        add(f"{time}{name}_embedder.linear_1", d, into)
        add(f"{time}{name}_embedder.linear_2", d, d)
    add(time + "time_proj", 6 * d, d)
    for i in range(cfg["num_layers"]):
        b = f"blocks.{i}."
        sd[b + "scale_shift_table"] = torch.randn(1, 6, d, generator=rng) / 5
        for attn in ("attn1.", "attn2."):
            for n in ("to_q", "to_k", "to_v", "to_out.0"):
                add(b + attn + n, d, d)
            for n in ("norm_q", "norm_k"):
                sd[f"{b}{attn}{n}.weight"] = 1 + torch.randn(d, generator=rng) / 5
        add(b + "attn1.to_out_prope.0", d, d)
        for n in ("weight", "bias"):
            sd[f"{b}norm2.{n}"] = torch.randn(d, generator=rng) / 5
        add(b + "ffn.net.0.proj", wide, d)
        add(b + "ffn.net.2", d, wide)
    add("proj_out", 4 * cfg["out_channels"], d)
    sd["scale_shift_table"] = torch.randn(1, 2, d, generator=rng) / 5
    return sd


def wave(value, size):
    half = size // 2
    rate = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angle = value.float()[:, None] * rate
    return torch.cat([angle.cos(), angle.sin()], 1)


def turn(x_TNE, start, grid, frames):
    """Rotary branch: pairs of channels, [time | row | column]."""
    e = x_TNE.shape[-1]
    side = 2 * (e // 6)
    place = torch.cartesian_prod(start + torch.arange(frames), *(torch.arange(n) for n in grid))
    angles = torch.cat([place[:, i, None].double() * 10000 ** (
        -2 * torch.arange(n // 2, dtype=torch.float64) / n)
        for i, n in enumerate((e - 2 * side, side, side))], 1)[:, None]
    cos, sin = angles.cos().float(), angles.sin().float()
    a, b = x_TNE[..., ::2], x_TNE[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def moved(m_F44, x_TNE):
    """Every group of four channels of a frame's tokens through the frame's matrix."""
    f = len(m_F44)
    u = x_TNE.reshape(f, -1, *x_TNE.shape[1:-1], x_TNE.shape[-1] // 4, 4)
    return torch.einsum("fij,fsngj->fsngi", m_F44, u).reshape(x_TNE.shape)


def projections(V_F44, K_F33):
    lift = torch.eye(4).repeat(len(V_F44), 1, 1)
    if K_F33 is not None:
        lift[:, 0, 0], lift[:, 1, 1] = K_F33[:, 0, 0], K_F33[:, 1, 1]
    P = lift @ V_F44
    return P, torch.linalg.inv(P)


def attend(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v))
                                          )[0].transpose(0, 1)


def forward(sd, cfg, x_CFHW, t_F, text_LD, V_F44, K_F33, a_F, start, cache=None):
    """Velocity, keys and values per layer ([rotary | camera] on the last axis), inner tensors."""
    c, f, height, width = x_CFHW.shape
    n, d, grid = cfg["heads"], cfg["heads"] * cfg["head_dim"], (height // 2, width // 2)
    s = grid[0] * grid[1]
    z = F.conv3d(x_CFHW[None], sd["patch_embedding.weight"], sd["patch_embedding.bias"],
                 stride=(1, 2, 2))[0].permute(1, 2, 3, 0).reshape(f * s, d)

    def two(name, y, act):
        return linear(sd, f"condition_embedder.{name}_embedder.linear_2", act(
            linear(sd, f"condition_embedder.{name}_embedder.linear_1", y)))

    e = two("time", wave(t_F, cfg["freq_dim"]), F.silu) + two(
        "action", wave(a_F, cfg["freq_dim"]), F.silu)
    M = linear(sd, "condition_embedder.time_proj", F.silu(e)).reshape(f, 6, d)
    text = two("text", text_LD, lambda y: F.gelu(y, approximate="tanh"))
    P, inverse = projections(V_F44, K_F33)
    kept, mids = [], {"temb": e}
    for i in range(cfg["num_layers"]):
        b = f"blocks.{i}."
        m = (sd[b + "scale_shift_table"] + M).repeat_interleave(s, 0).unbind(1)

        def qkv(attn, y, other, b=b):
            def normed(name, y):
                y = linear(sd, f"{b}{attn}.to_{name}", y)
                y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
                return (y * sd[f"{b}{attn}.norm_{name}.weight"]).unflatten(-1, (n, -1))

            return normed("q", y), normed("k", other), linear(
                sd, f"{b}{attn}.to_v", other).unflatten(-1, (n, -1))

        y = F.layer_norm(z, (d,), eps=1e-6) * (1 + m[1]) + m[0]
        q, k, v = qkv("attn1", y, y)
        new = [(turn(k, start, grid, f), v), (moved(inverse, k), moved(inverse, v))]
        kept.append(new)
        if cache is not None:
            new = [tuple(torch.cat(p) for p in zip(old, own, strict=True))
                   for old, own in zip(cache[i], new, strict=True)]
        one = attend(turn(q, start, grid, f), *new[0])
        both = linear(sd, b + "attn1.to_out.0", one.flatten(1)) + linear(
            sd, b + "attn1.to_out_prope.0",
            moved(P, attend(moved(P.mT, q), *new[1])).flatten(1))
        z = z + m[2] * both
        y = F.layer_norm(z, (d,), sd[b + "norm2.weight"], sd[b + "norm2.bias"], 1e-6)
        z = z + linear(sd, b + "attn2.to_out.0", attend(*qkv("attn2", y, text)).flatten(1))
        y = F.layer_norm(z, (d,), eps=1e-6) * (1 + m[4]) + m[3]
        z = z + m[5] * linear(sd, b + "ffn.net.2", F.gelu(
            linear(sd, b + "ffn.net.0.proj", y), approximate="tanh"))
        mids[f"block{i}"] = z
    shift, scale = (sd["scale_shift_table"] + e[:, None]).repeat_interleave(s, 0).unbind(1)
    y = linear(sd, "proj_out", F.layer_norm(z, (d,), eps=1e-6) * (1 + scale) + shift)
    y = y.reshape(f, *grid, 2, 2, -1).permute(5, 0, 1, 3, 2, 4).reshape(-1, f, height, width)
    return y, kept, mids


def seen_by(X_M3, at, yaw, pitch, limit):
    """Which points a camera sees: 60 by 35 degrees, and not too far."""
    x, y, z = (X_M3 - at).T
    dy = (np.arctan2(x, z) - yaw + np.pi) % (2 * np.pi) - np.pi
    dp = (np.arctan2(y, np.hypot(x, z)) - pitch + np.pi) % (2 * np.pi) - np.pi
    near = np.sqrt(x * x + y * y + z * z) < limit
    return (np.abs(dy) < np.deg2rad(30)) & (np.abs(dp) < np.deg2rad(17.5)) & near


def overlap(q_44, b_44, X_M3):
    G = q_44 @ np.linalg.inv(b_44)
    own = seen_by(X_M3, np.zeros(3), 0, 0, np.inf)
    other = seen_by(X_M3, G[:3, 3], np.arctan2(G[0, 2], G[2, 2]),
                    np.arctan2(G[1, 2], np.hypot(G[0, 2], G[2, 2])), 8)
    return (own & other).sum() / max(1, own.sum())


def select(w2c, start, X_M3, total=16, keep_first=False):
    """Context of the chunk at ``start``; candidates and their distances."""
    if start <= total:
        return list(range(start)), [], []
    candidates = list(range(4 * keep_first, start - 12, 4))
    far = [np.mean([1 - (overlap(q, w2c[b], X_M3) + overlap(q, w2c[b + 2], X_M3)) / 2
                    for q in w2c[start:start + 4]]) for b in candidates]
    best = candidates[int(np.argmin(np.round(far, 9)))]
    return sorted({*range(4 * keep_first), *range(best, best + 4),
                   *range(start - 12, start)}), candidates, far


def walk(motions):
    """c2w poses of motions with keys forward, right, yaw, pitch."""
    T = [np.eye(4)]
    for m in motions:
        new = T[-1].copy()
        a, b = m.get("yaw", 0.0), m.get("pitch", 0.0)
        new[:3, :3] = new[:3, :3] @ [[np.cos(a), 0, np.sin(a)], [0, 1, 0],
                                     [-np.sin(a), 0, np.cos(a)]]
        new[:3, :3] = new[:3, :3] @ [[1, 0, 0], [0, np.cos(b), -np.sin(b)],
                                     [0, np.sin(b), np.cos(b)]]
        new[:3, 3] += new[:3, :3] @ [m.get("right", 0.0), 0, m.get("forward", 0.0)]
        T.append(new)
    return np.stack(T)
