"""SCOPE's network and sampler: published sizes, action windows, both paths, guidance, resuming."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from worldgym import clip  # noqa: E402
from worldgym.clip import ClipSize, Sampler, denoise, draw_noise, prepare_image  # noqa: E402
from worldgym.errors import (  # noqa: E402
    CheckpointError,
    ConfigError,
    DTypeError,
    ShapeError,
)
from worldgym.models.action_module import ActionConfig, windows  # noqa: E402
from worldgym.models.scope import (  # noqa: E402
    ScopeConfig,
    ScopeDiT,
    frame_times,
    is_scope,
    published_shapes,
)
from worldgym.models.scope_files import layout_fingerprint  # noqa: E402
from worldgym.models.wan import WanConfig, WanDiT  # noqa: E402
from worldgym.schedule import Euler  # noqa: E402

TINY = dict(dim=48, ffn_dim=64, num_heads=2, num_layers=2, in_dim=48, out_dim=48, freq_dim=16,
            text_dim=8, text_len=5)


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


TWO = ActionConfig(window=2)


def tiny(seed=0, action=TWO, **changes):
    net = ScopeDiT(ScopeConfig(wan=WanConfig(**{**TINY, **changes}), action=action))
    rng = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        torch.nn.init.normal_(p, std=0.15, generator=rng)
        if "norm" in name and name.endswith("weight"):
            p.data += 1
    return net.eval().requires_grad_(False)


def inputs(batch=1, frames=3, seed=0, rows=None, hw=(4, 6)):
    rng = torch.Generator().manual_seed(seed)
    n = 4 * (frames - 1) + 1 if rows is None else rows
    return dict(x=torch.randn(batch, 48, frames, *hw, generator=rng),
                context=torch.randn(batch, 5, 8, generator=rng),
                mouse=torch.rand(batch, n, 4, generator=rng) * 2 - 1,
                keyboard=(torch.rand(batch, n, 6, generator=rng) < 0.5).float())


def run(net, given, t=600.0, paths=("mouse", "keyboard"), first_frame=True):
    b, _, frames = given["x"].shape[:3]
    controls = net.controls(*(given[p] if p in paths else None for p in ("mouse", "keyboard")),
                            frames)
    return net(given["x"], frame_times(torch.tensor([t]), b, frames, first_frame),
               given["context"], controls=controls)


# ------------------------------------------------------------------------- sizes


def test_the_published_network():
    shapes = published_shapes()
    assert len(shapes) == 1575
    assert sum(torch.Size(s).numel() for s in shapes.values()) == 7_839_099_072
    assert layout_fingerprint(shapes) == "8776d493d559edb3c31854ba1537d90b"
    assert is_scope(shapes) and ScopeConfig.from_shapes(shapes) == ScopeConfig()
    base = {k: v for k, v in shapes.items() if ".action_attn." not in k}
    assert len(base) == 825
    assert sum(torch.Size(s).numel() for s in base.values()) == 4_999_787_712
    assert layout_fingerprint(base) == "1f5ab7703c6fc803fdded85ff040c316"
    assert not is_scope(base) and ScopeConfig.from_shapes(base).action is None


@pytest.mark.parametrize("action", [ActionConfig(window=2), ActionConfig(window=3, ratio=2),
                                    ActionConfig(keyboard_dim=0, window=2), None])
def test_sizes_are_read_off_the_tensors(action):
    net = tiny(action=action)
    shapes = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    told = {"num_heads": 2, "text_len": 5}
    if action is not None:
        told["action_config"] = {"vae_time_compression_ratio": action.ratio,
                                 "windows_size": action.window}
    seen = ScopeConfig.from_shapes(shapes, told)
    assert seen.wan == net.cfg and seen.action == action


def test_sizes_that_cannot_be_told():
    shapes = {k: tuple(v.shape) for k, v in tiny().state_dict().items()}
    with pytest.raises(ConfigError, match="number of heads"):
        ScopeConfig.from_shapes(shapes)
    with pytest.raises(ConfigError, match="contradicts"):
        ScopeConfig.from_shapes(shapes, {"num_heads": 2, "dim": 64})
    with pytest.raises(ConfigError, match="action window"):
        ScopeConfig.from_shapes(shapes, {"num_heads": 2, "action_config": {"windows_size": 4}})
    with pytest.raises(CheckpointError, match="not the tensors of a Wan network"):
        ScopeConfig.from_shapes({"a": (1,)})
    with pytest.raises(ConfigError, match="action window"):
        tiny(dim=36)  # 36 is no multiple of 8 rows


# ------------------------------------------------------------------------- actions


def test_windows():
    rows = torch.arange(9.0)[None, :, None]
    assert windows(rows, 3, 4, 8)[0].tolist() == [
        [0] * 8, [0, 0, 0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert torch.equal(windows(rows[:, :8], 3, 4, 8), windows(rows, 3, 4, 8))
    two = torch.stack([torch.arange(5.0), -torch.arange(5.0)], -1)[None]
    assert windows(two, 2, 4, 4)[0, 1].tolist() == [0, 0, 1, -1, 2, -2, 3, -3]
    with pytest.raises(ShapeError, match="do not cover the clip"):
        windows(rows[:, :7], 3, 4, 8)


def test_which_rows_matter():
    net, given = tiny(), inputs()
    want = run(net, given)
    short = {**given, "mouse": given["mouse"][:, :8], "keyboard": given["keyboard"][:, :8]}
    assert torch.equal(run(net, short), want)
    for path in ("mouse", "keyboard"):  # the whole clip hears the last row that is used
        change = given[path].clone()
        change[:, 7] = 1 - change[:, 7]
        moved = (run(net, {**given, path: change}) - want).abs().amax((0, 1, 3, 4))
        assert (moved > 1e-4).all()
    with pytest.raises(ShapeError, match="do not cover"):
        run(net, {**given, "mouse": given["mouse"][:, :7]})
    with pytest.raises(ShapeError, match="joystick rows"):
        run(net, {**given, "mouse": given["keyboard"]})
    with pytest.raises(ShapeError, match="no such path"):
        run(tiny(action=None), given)


def published_order(module, x_BTD, mouse, keyboard, frames, seen=None):
    """Section 4 word by word: positions as sequences, repeated windows, complex rotation.

    ``seen``: receives the stages under the names of the fixtures.
    """
    seen = {} if seen is None else seen
    act, heads = module.action, module.heads
    b, tokens, d = x_BTD.shape
    s, p, e = tokens // frames, act.rows, d // heads
    y = x_BTD.reshape(b, frames, s, d).transpose(1, 2).reshape(b * s, frames, d)
    angle = torch.arange(frames).double()[:, None] * 10000 ** (
        -torch.arange(0, e, 2).double() / e)
    turn = torch.polar(torch.ones_like(angle), angle)[None, :, None]

    def rope(z):
        z = torch.view_as_complex(z.reshape(b * s, frames, heads, e // 2, 2).double())
        return torch.view_as_real(z * turn).flatten(2).float()

    def attend(q, k, v):
        q, k, v = (z.reshape(b * s, frames, heads, e).transpose(1, 2) for z in (q, k, v))
        return ((q @ k.mT / e**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)

    def window(rows):
        padded = torch.cat([rows[:, :1].repeat(1, p, 1), rows], 1)
        out = torch.stack([padded[:, act.ratio * i:act.ratio * i + p] for i in range(frames)], 1)
        return out.flatten(2).repeat_interleave(s, 0)

    if mouse is not None:
        t = module.mouse_mlp(torch.cat([y, window(mouse)], -1))
        a = module.mouse_attn
        q, k, v = rope(a.norm_q(a.q(t))), rope(a.norm_k(a.k(t))), a.v(t)
        out = attend(q, k, v)
        seen |= {"mouse_window": window(mouse)[0], "mouse_mlp.out": t, "mouse_q_roped": q,
                 "mouse_k_roped": k, "mouse_v": v, "mouse_sdpa": out, "mouse_attn": a.o(out)}
        y = y + a.o(out)
    if keyboard is not None:
        rows = window(module.keyboard_embed(keyboard))
        both, q = module.keyboard_kv_proj(rows), module.keyboard_q_proj(y)
        k, v = module.key_attn_k_norm(both[..., :d]), both[..., d:]
        out = attend(rope(module.key_attn_q_norm(q)), rope(k), v)
        seen |= {"keyboard_embed": module.keyboard_embed(keyboard), "after_mouse_path": y,
                 "keyboard_q_proj.out": q, "key_q_normed": module.key_attn_q_norm(q),
                 "keyboard_kv_proj.in": rows[::s], "keyboard_kv_proj.out": both[::s],
                 "key_k_normed": k[::s], "keyboard_o_proj.in": out,
                 "keyboard_o_proj.out": module.keyboard_o_proj(out)}
        y = y + module.keyboard_o_proj(out)
    return y.reshape(b, s, frames, d).transpose(1, 2).reshape(b, tokens, d)


@pytest.mark.parametrize("batch,frames,window,ratio,heads,paths", [
    (1, 3, 2, 4, 2, "both"), (2, 5, 4, 4, 4, "both"), (2, 1, 2, 4, 2, "both"),
    (1, 4, 3, 2, 2, "mouse"), (3, 2, 1, 4, 2, "keyboard")])
def test_the_action_module_against_the_published_order(batch, frames, window, ratio, heads, paths):
    net = tiny(action=ActionConfig(window=window, ratio=ratio, num_heads=heads))
    module, given = net.blocks[1].action_attn, inputs(batch, frames, rows=4 * frames)
    mouse = given["mouse"] if paths != "keyboard" else None
    keyboard = given["keyboard"] if paths != "mouse" else None
    x = torch.randn(batch, frames * 6, 48, generator=torch.Generator().manual_seed(5))
    controls = net.controls(mouse, keyboard, frames)[1]
    table = tuple(t.repeat_interleave(6, 1) for t in module.table(
        frames, torch.device("cpu"), torch.float32))
    close(module(x, controls, table), published_order(module, x, mouse, keyboard, frames), 2e-5)


def test_without_actions_it_is_the_plain_network():
    net, given = tiny(), inputs(2)
    plain = WanDiT(net.cfg).eval()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if "action_attn" not in k})
    t = frame_times(torch.tensor([600.0]), 2, 3, True)
    assert torch.equal(run(net, given, paths=()), plain(given["x"], t, given["context"]))
    assert (run(net, given) - run(net, given, paths=("mouse",))).abs().max() > 1e-2


def test_a_batch_is_its_items():
    for frames in (2, 3):
        net, given = tiny(dim=64), inputs(3, frames)
        whole = run(net, given)
        for i in range(3):  # to the bit
            one = {k: v[i:i + 1] for k, v in given.items()}
            assert torch.equal(run(net, one), whole[i:i + 1])


def test_bfloat16_is_near():
    net, given = tiny(), inputs()
    want = run(net, given, 608.0)
    got = run(tiny().bfloat16(), {k: v.bfloat16() for k, v in given.items()}, 608.0)
    assert got.dtype == torch.bfloat16 and (got.float() - want).norm() / want.norm() < 0.03


# ------------------------------------------------------------------------- sampler


def sampled(net, given, first=None, sampler=None, **options):
    sampler = sampler or Sampler(steps=3, timestep_dtype=torch.float32)
    text = net.text(given["context"])
    controls = net.controls(given["mouse"], given["keyboard"], given["x"].shape[2])
    return denoise(net, given["x"], text, net.text(-given["context"]), first_BC1hw=first,
                   controls=controls, sampler=sampler, **options)


def test_the_loop_step_by_step():
    net, given = tiny(), inputs()
    first = torch.randn(1, 48, 1, 4, 6, generator=torch.Generator().manual_seed(9))
    x, sigmas = given["x"].clone(), [*Euler(3).sigmas_S.tolist(), 0.0]
    x[:, :, :1] = first
    for i in range(3):
        flows = [run(net, {**given, "x": x, "context": c}, 1000 * sigmas[i])
                 for c in (given["context"], -given["context"])]
        x = x + (sigmas[i + 1] - sigmas[i]) * (flows[1] + 5.0 * (flows[0] - flows[1]))
        x[:, :, :1] = first
    close(sampled(net, given, first), x, 1e-4)
    free = sampled(net, given)
    assert (free[:, :, :1] - first).abs().max() > 0.1


def test_timesteps_are_rounded_for_the_network_alone():
    net, given = tiny(), inputs()
    asked = []
    old = net.forward
    net.forward = lambda x, t, *a, **k: (asked.append(t), old(x, t, *a, **k))[1]
    exact = sampled(net, given, sampler=Sampler(steps=4, timestep_dtype=torch.float32))
    assert [t[0, 0].item() for t in asked[::2]] == [1000.0, 937.5, 833.3333129882812, 625.0]
    asked.clear()
    rounded = sampled(net, given, sampler=Sampler(steps=4))
    assert [t[0, 0].item() for t in asked[::2]] == [1000, 936, 832, 624]
    assert (rounded - exact).abs().max() > 1e-5
    asked.clear()
    sampled(net, given, given["x"][:, :, :1], sampler=Sampler(steps=1))
    assert [t[0].tolist() for t in asked] == [[0, 1000, 1000]] * 2


def test_guidance_one_skips_the_negative_pass():
    net, given = tiny(), inputs()
    calls = []
    old = net.forward
    net.forward = lambda *a, **k: (calls.append(k["text_kv"]), old(*a, **k))[1]
    sampler = Sampler(steps=2, guidance=1.0)
    text = net.text(given["context"])
    denoise(net, given["x"], text, None, sampler=sampler)
    assert len(calls) == 2
    with pytest.raises(ConfigError, match="guidance without"):
        denoise(net, given["x"], text, None)


def test_guidance_one_is_guidance_without_its_second_pass():
    net, given = tiny(), inputs()
    one, nearly = (sampled(net, given, given["x"][:, :, :1], Sampler(steps=3, guidance=g))
                   for g in (1.0, 1 + 1e-9))
    close(one, nearly, 1e-4)


def test_going_on_gives_the_same_bits():
    net, given = tiny(), inputs()
    seen = {}
    want = sampled(net, given, given["x"][:, :, :1],
                   watch=lambda i, x: seen.__setitem__(i, x.clone()))
    assert sorted(seen) == [0, 1, 2, 3]
    for done in seen:
        assert torch.equal(
            sampled(net, given, given["x"][:, :, :1], start=(done, seen[done])), want)
    with pytest.raises(ConfigError, match="cannot go on"):
        sampled(net, given, start=(4, seen[0]))


def test_noise_is_the_published_draw():
    want = torch.randn(1, 2, 3, 4, 5, generator=torch.Generator("cpu").manual_seed(7))
    state = torch.random.get_rng_state()
    assert torch.equal(draw_noise((1, 2, 3, 4, 5), 7), want)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("wrong", [dict(steps=0), dict(shift=0.0), dict(strength=0.0),
                                   dict(strength=1.5), dict(guidance=float("nan"))])
def test_impossible_samplers(wrong):
    with pytest.raises(ConfigError):
        Sampler(**wrong)


# ------------------------------------------------------------------------- sizes and images


@pytest.mark.parametrize("size,words", [
    ((480, 832, 80), "use 77 or 81"), ((470, 832, 81), "use 480 x 832"), ((480, 0, 81), "32"),
    ((480, 832, 401), "too long"), ((480, 832, 0), "frames")])
def test_impossible_clips(size, words):
    with pytest.raises(ShapeError, match=words):
        ClipSize(*size)


def test_rounding_is_asked_for():
    assert ClipSize.fitting(480, 832, 80, "down").frames == 77
    assert ClipSize.fitting(480, 832, 80, "up").frames == 81
    assert ClipSize.fitting(480, 832, 82, "up").frames == 85
    assert ClipSize.fitting(33, 1, 81, "down") == ClipSize(64, 32, 81)
    assert ClipSize.fitting(480, 832, 81, None).latent_frames == 21
    with pytest.raises(ShapeError):
        ClipSize.fitting(480, 832, 80, None)
    with pytest.raises(ShapeError):
        ClipSize.fitting(-5, 832, 81, "down")


def test_images_are_cropped_to_the_aspect():
    image = np.zeros((40, 200, 3), np.uint8)
    image[:, 70:130] = 255  # crop of 40 x 60 keeps columns 70..129: all white
    x = prepare_image(image, ClipSize(64, 96, 5))
    assert x.shape == (1, 3, 1, 64, 96) and x.min() == x.max() == 1
    tall = np.zeros((201, 30, 3), np.uint8)
    tall[90:110] = 255
    assert prepare_image(tall, ClipSize(64, 96, 5)).min() == 1
    same = np.arange(64 * 96 * 3, dtype=np.uint8).reshape(64, 96, 3)
    close(prepare_image(same, ClipSize(64, 96, 5))[0, :, 0].permute(1, 2, 0),
          torch.from_numpy(same) * (2 / 255) - 1, 1e-6)
    with pytest.raises(ShapeError):
        prepare_image(same[..., :2], ClipSize(64, 96, 5))
    with pytest.raises(DTypeError):
        prepare_image(same.astype(np.float32), ClipSize(64, 96, 5))


def test_the_negative_prompt():
    import hashlib

    text = clip.NEGATIVE_PROMPT
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e")


def test_text_network_without_action_config():
    cfg = ScopeConfig.from_dict({"dim": 48, "num_heads": 2})
    assert cfg.action is None and replace(cfg, action=ActionConfig()).action.rows == 16
