"""SCOPE as a world: states, batches, actions, prompts, and every switch against the plain way."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
pytest.importorskip("diffusers")

import scope_folder as layout  # noqa: E402

from worldgym.agents import bench_scope, results  # noqa: E402
from worldgym.clip import Prompt, Sampler, denoise, make_latents  # noqa: E402
from worldgym.errors import ConfigError, NotFiniteError, ShapeError, StateError  # noqa: E402
from worldgym.models.action_module import windows  # noqa: E402
from worldgym.models.offload import offload, resident_bytes  # noqa: E402
from worldgym.models.scope import ScopeConfig, ScopeDiT  # noqa: E402
from worldgym.models.scope_world import ScopeWorld, statistics  # noqa: E402
from worldgym.models.wan_vae import WanVAE, to_uint8  # noqa: E402
from worldgym.noise import normal  # noqa: E402
from worldgym.rope import cos_sin, rotate, rotation  # noqa: E402
from worldgym.state import WorldState  # noqa: E402

HW = (32, 64)
RESULTS = Path(__file__).resolve().parents[1] / "results" / "scope_bench.json"


def network():
    net = ScopeDiT(ScopeConfig.from_dict(layout.CONFIG))
    net.load_state_dict(layout.network_tensors())
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def parts():
    return network(), WanVAE.load(layout.vae_tensors())


def world(parts, sampler=None, **settings):
    return ScopeWorld(*parts, height=HW[0], width=HW[1], sampler=sampler or Sampler(steps=2),
                      **{"latents": 2, **settings})


def texts(count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, 24, 16, generator=rng)


def begin(w, slots=3, seeds=(1, 2, 3), same=False):
    frames = np.random.default_rng(0).integers(0, 256, (3, *HW, 3), np.uint8)[:slots]
    context = texts(3)[:1] if same else texts(3)[:slots]
    return w.begin(w.starts(frames, context, texts(1, 9)), list(seeds)[:slots])


def actions(slots=3, frames=None, seed=5):
    shape = (slots, 10) if frames is None else (slots, frames, 10)
    pressed = np.random.default_rng(seed).random(shape).astype(np.float32)
    pressed[..., :6] = pressed[..., :6] < 0.5
    return pressed


def same(a, b):
    assert torch.equal(a.latents_BFChw, b.latents_BFChw) and torch.equal(a.frames(), b.frames())


# ------------------------------------------------------------------------- the step


@torch.no_grad()
def test_a_step_is_a_short_clip_of_the_published_pipeline(parts):
    dit, vae = parts
    w = world(parts, Sampler(steps=3, guidance=4.0))
    state, rows = begin(w, 1), actions(1, 8)
    new, chunk = w.step(state, rows, per_frame=True)
    picture = np.random.default_rng(0).integers(0, 256, (1, *HW, 3), np.uint8)[0]
    x = torch.from_numpy(picture).permute(2, 0, 1)[None, :, None] * (2 / 255) - 1
    rows = torch.from_numpy(rows)
    latents = denoise(
        dit, normal(state.keys_B4, 0, (48, 3, 2, 4)), dit.text(texts(1)), dit.text(texts(1, 9)),
        first_BC1hw=vae.encode(x), controls=dit.controls(rows[..., 6:], rows[..., :6], 3),
        sampler=w.sampler)
    assert torch.equal(chunk.latents_BFChw, latents[:, :, 1:].transpose(1, 2))
    video = to_uint8(vae.decode(latents))
    assert torch.equal(chunk.frames(), video[:, 1:]) and chunk.frames().shape == (1, 8, *HW, 3)
    assert torch.equal(new.latents_BCHW, w.encode(video[:, -1].numpy()))  # the next first frame
    assert chunk.end_frame_B.tolist() == [7] and not chunk.terminated_B.any()


def test_held_and_dense_actions(parts):
    w = world(parts)
    state, held = begin(w), actions()
    _, chunk = w.step(state, held)
    dense = held[:, None].repeat(8, 1)
    same(w.step(state, dense, per_frame=True)[1], chunk)
    for row in (0, 7):  # every row of the step is heard
        changed = dense.copy()
        changed[:, row, 0] = 1 - changed[:, row, 0]
        other = w.step(state, changed, per_frame=True)[1]
        assert (other.latents_BFChw != chunk.latents_BFChw).any()
    for wrong in (dense[:, :7], dense[:2], dense[..., :9]):
        with pytest.raises(ShapeError):
            w.step(state, wrong, per_frame=True)
    with pytest.raises(ShapeError):
        w.step(state, dense)
    with pytest.raises(NotFiniteError):
        w.step(state, held * np.nan)


@pytest.mark.parametrize("settings", [{}, {"carry": "latent", "remember": True}])
def test_batches_and_states_to_the_bit(parts, settings, tmp_path):
    w = world(parts, **settings)
    state, first = begin(w), actions()
    kept = state.snapshot()
    then, chunk = w.step(state, first)
    for slot in range(3):  # slot by slot, prompts of their own included
        one, alone = w.step(state.select([slot]), first[slot:slot + 1])
        assert torch.equal(alone.latents_BFChw[0], chunk.latents_BFChw[slot])
        assert torch.equal(alone.frames()[0], chunk.frames()[slot])
        assert torch.equal(one.latents_BCHW[0], then.latents_BCHW[slot])
    part, some = w.step(state, first[[2, 0]], slots=[2, 0])
    assert torch.equal(some.frames(), chunk.frames()[[2, 0]])
    assert torch.equal(part.latents_BCHW[1], state.latents_BCHW[1])
    want, after = w.step(then, actions(seed=6))
    same(w.step(w.step(kept, first)[0], actions(seed=6))[1], after)
    then.save(tmp_path / "state.safetensors")
    other = world(parts, **settings)  # as in another process
    back = WorldState.load(tmp_path / "state.safetensors", other)
    same(other.step(back, actions(seed=6))[1], after)
    with pytest.raises(StateError, match="another world"):
        WorldState.load(tmp_path / "state.safetensors", world(parts, latents=1))
    twins = then.fork(2)
    _, forked = w.step(twins, actions(seed=6).repeat(2, 0))
    assert torch.equal(forked.frames()[::2], after.frames())
    assert torch.equal(forked.frames()[1::2], after.frames())
    _, fresh = w.step(then.fork(2, fresh=True), actions(seed=6).repeat(2, 0))
    assert (fresh.frames()[::2] != fresh.frames()[1::2]).any()
    again = w.restart(then, [1], w.starts(np.zeros((1, *HW, 3), np.uint8), texts(1), texts(1, 9)))
    assert again.step_B.tolist() == [1, 0, 1] and again.episode_B.tolist() == [0, 1, 0]
    rest = w.step(again, actions(seed=6))[1]
    assert torch.equal(rest.frames()[[0, 2]], after.frames()[[0, 2]])
    assert (want.step_B == 2).all() and want.index_B.tolist() == [4] * 3


def test_chunk_lengths(parts):
    for latents in (1, 3):
        w = world(parts, Sampler(steps=1, guidance=1.0), latents=latents)
        _, chunk = w.step(begin(w, 1), actions(1))
        assert chunk.frames().shape == (1, 4 * latents, *HW, 3)
        assert chunk.latents_BFChw.shape == (1, latents, 48, 2, 4)
        assert w.spec.frames_per_chunk == 4 * latents and "negative" not in w.extra


# ------------------------------------------------------------------------- switches


def test_action_history(parts):
    """Off: a step sees copies of its own first row. On: the rows that really came before it."""
    rows = torch.arange(13.0)[None, :, None]
    assert windows(rows, 2, 4, 8, before=8)[0].tolist() == [
        list(range(8)), [4, 5, 6, 7, 8, 9, 10, 11]]
    plain, w = world(parts, latents=1), world(parts, latents=1, remember=True)
    state, held = begin(w), actions()
    new, chunk = w.step(state, held)
    begun = begin(plain)
    first, published = plain.step(begun, held)
    # nothing came before the first step (other row counts in the action products: other last bits)
    torch.testing.assert_close(chunk.latents_BFChw, published.latents_BFChw, atol=1e-5, rtol=0)
    padded = w._with_past(new, torch.full((3, 4, 10), 0.5))
    assert torch.equal(padded[:, 12:16], torch.from_numpy(held)[:, None].expand(-1, 4, -1))
    assert torch.equal(padded[:, :12], padded[:, 12:13].expand(-1, 12, -1))
    later = actions(seed=8)
    a, b = w.step(new, later)[1], plain.step(first, later)[1]
    assert (a.latents_BFChw - b.latents_BFChw).abs().max() > 1e-4
    assert torch.equal(first.pending_BA, new.pending_BA) and new.pending_BA.shape == (3, 16, 10)


def test_carrying_latents_decodes_only_when_asked(parts, monkeypatch):
    frame, w = world(parts), world(parts, carry="latent")
    state, held = begin(w), actions()
    want = frame.step(begin(frame), held)[1]
    calls = []
    monkeypatch.setattr(w, "vae", None)
    new, chunk = w.step(state, held)  # no autoencoder at all
    assert torch.equal(chunk.latents_BFChw, want.latents_BFChw)
    assert torch.equal(new.latents_BCHW, chunk.latents_BFChw[:, -1])
    w.step(new, held)
    monkeypatch.setattr(w, "vae", parts[1])
    assert torch.equal(chunk.frames(), want.frames()) and not calls


def test_prompts_are_computed_once(parts, monkeypatch):
    w, counted = world(parts, prompts=4), []
    text = w.dit.text
    monkeypatch.setattr(w.dit, "text", lambda c: (counted.append(len(c)), text(c))[1])
    state = begin(w)
    for _ in range(2):
        state, chunk = w.step(state, actions())
    assert counted == [1] * 4  # three prompts and the negative one, one by one
    one = begin(w, same=True)
    for slot in range(3):  # a shared prompt is the same as prompts of one's own
        a = w.step(one.select([slot]), actions(1))[1]
        b = w.step(one, actions(1).repeat(3, 0))[1]
        assert torch.equal(a.latents_BFChw[0], b.latents_BFChw[slot])
    assert len(w._texts) <= 4


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_guidance_in_one_batch_is_that_in_two_passes(parts, solver):
    two = world(parts, Sampler(steps=3, solver=solver))
    one = world(parts, Sampler(steps=3, solver=solver, together=True))
    a, b = (w.step(begin(w), actions())[1].latents_BFChw for w in (two, one))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_unipc_comes_to_the_same_clip(parts):
    """With many steps both solvers follow one path; with few they part."""
    far = [world(parts, Sampler(steps=n, solver=s, guidance=1.0, timestep_dtype=torch.float32))
           for n, s in ((4, "unipc"), (40, "unipc"), (40, "euler"), (200, "euler"))]
    few, many, euler, exact = (w.step(begin(w, 1), actions(1))[1].latents_BFChw for w in far)
    assert (many - exact).norm() < (euler - exact).norm() + 0.02 * exact.norm()
    assert (many - exact).norm() < 0.05 * exact.norm() and (few - many).norm() > 0
    with pytest.raises(ConfigError):
        Sampler(solver="unipc", strength=0.5)


def test_rotations_by_complex_product_have_the_same_bits():
    x = torch.randn(2, 15, 3, 32, generator=torch.Generator().manual_seed(0))
    table = cos_sin(rotation(torch.arange(3)[None], (1, 5), 32), torch.float32)
    cos, sin = table
    plain = x * cos + x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * sin
    with torch.no_grad():
        assert torch.equal(rotate(x, table), plain)
        for b, t, n, e in ((1, 1, 1, 32), (2, 7, 3, 64), (3, 11, 1, 96), (1, 5, 1, 6),
                           (1, 13, 5, 22), (2, 3, 24, 128)):
            y = torch.randn(b, t, n, e, generator=torch.Generator().manual_seed(e))
            cos, sin = turn = cos_sin(rotation(torch.arange(t)[None], (1, 1), e), torch.float32)
            want = y * cos + y.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * sin
            assert torch.equal(rotate(y, turn), want)
    exact = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    exact = exact * rotation(torch.arange(3)[None], (1, 5), 32)[:, :, None]
    torch.testing.assert_close(plain, torch.view_as_real(exact).flatten(-2).float(), atol=1e-5,
                               rtol=0)


def test_offload_changes_places_only(parts):
    net = offload(network(), "cpu")
    w, plain = world((net, parts[1])), world(parts)
    homes = [p.data_ptr() for p in net.blocks.parameters()]
    near = []
    inner = net.near

    def watched(block):
        near.append(block)
        return inner(block)

    net.near = watched
    same(w.step(begin(w), actions())[1], plain.step(begin(plain), actions())[1])
    assert [p.data_ptr() for p in net.blocks.parameters()] == homes
    assert len(near) == 2 * (4 + 1 + 4)  # four texts, the actions, two steps with guidance
    with net.near(net.blocks[0]):
        assert net.blocks[0].modulation.data_ptr() != homes[0]
    device, host = resident_bytes(net, True)
    whole = resident_bytes(net, False)[0]
    assert device + host == whole + max(
        sum(4 * p.numel() for p in b.parameters()) for b in net.blocks)


def test_the_published_order_gives_the_same_numbers():
    net = bench_scope.tiny()
    given = bench_scope.inputs(net, 3, (4, 6))
    torch.testing.assert_close(bench_scope.published(net, given), bench_scope.our_pass(net, given),
                               atol=2e-5, rtol=0)
    rows = {r.metric: r.value for r in bench_scope.timed(0.0)}
    assert rows["speedup_over_published_order"] > 1


def test_work_at_the_real_size():
    """Counted anew: a pass over the published clip; the results file tells the same."""
    net = bench_scope.real()
    given = bench_scope.inputs(net, bench_scope.CLIP, (30, 52))
    ours, theirs = (bench_scope.flops(lambda c=c: c(net, given)) / 1e12
                    for c in (bench_scope.our_pass, bench_scope.published))
    assert ours <= 134.8 and theirs == pytest.approx(136.4, abs=0.1)
    rows = results.by_metric(results.read(RESULTS))
    assert rows["real-config", "tflop_per_pass"]["value"] == pytest.approx(ours, rel=1e-4)
    assert rows["tiny", "speedup_over_published_order"]["value"] >= 1.3
    assert rows["real-config", "device_gb_offload"]["value"] < 24
    for new, passes in itertools.product((4, 8, 16), (4, 10)):
        for kind in ("tflop", "gb_moved"):
            name = f"{kind}_per_env_step_{new}_{passes}"
            value = rows["real-config", name]["value"]
            assert 0 < value < rows["real-config", f"{name}_published_order"]["value"]
            alone = sum(rows["real-config", f"{kind}_{part}"]["value"] * n for part, n in (
                ("encode_picture", 1), ("decode_first", 1), ("decode_later", new // 4)))
            assert value > alone  # the autoencoder's share is in it


def test_seconds_on_a_gpu(monkeypatch, capsys):
    """Refused where there is none; the measuring itself runs anywhere, at a tiny size."""
    from worldgym.agents import bench_scope_gpu, cli

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words, told in ((["scope", "--gpu"], "no GPU to measure on"),
                        (["party", "--gpu"], "nothing to measure on a GPU")):
        assert cli.main(["bench", *words]) == 2
        assert told in capsys.readouterr().err
    with torch.device("meta"):
        net = ScopeDiT(ScopeConfig.from_dict(layout.CONFIG))
    net = bench_scope_gpu.filled(net, "cpu")
    vae = WanVAE(bench_scope_gpu.filled(WanVAE.build(layout.VAE_SIZES), "cpu"))
    said = []
    rows = bench_scope_gpu.measured(
        net, vae, hw=HW, frames=5, latents=1, passes=(2, 4), steps=1, rounds=1, say=said.append,
        ways=("sdpa", "flash"))
    assert [r.metric for r in rows] == [
        "seconds_per_clip_5_no_decode_sdpa", "seconds_per_env_step_4_2_no_decode_sdpa",
        "seconds_per_env_step_4_4_no_decode_sdpa", "seconds_per_clip_5_sdpa",
        "seconds_per_env_step_4_2_sdpa", "seconds_per_env_step_4_4_sdpa"]
    assert all(r.value > 0 and r.unit == "s" for r in rows)
    assert said[-1].startswith("flash was not measured: flash-attn cannot be used")


def test_a_compiled_pass_is_the_pass(monkeypatch):
    """The whole network is one graph, with the rotation that a GPU takes."""
    from worldgym.agents.bench_scope_gpu import way
    from worldgym.models import action_module, wan

    def turned(x, table):
        return x * table[0] + x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * table[1]

    net, graphs = bench_scope.tiny(), []
    given = bench_scope.inputs(net, 2, (4, 4))
    want = bench_scope.our_pass(net, given)
    for module in (wan, action_module):
        monkeypatch.setattr(module, "rotate", turned)
    with way(net, "compile", backend=lambda graph, _: graphs.append(graph) or graph.forward):
        torch.testing.assert_close(bench_scope.our_pass(net, given), want, atol=1e-5, rtol=0)
    products = [n for n in graphs[0].graph.nodes if "linear" in str(n.target)]
    assert len(graphs) == 1 and len(products) == 37 and "forward" not in vars(net)


def test_counters_count():
    a = torch.zeros(8, 16, device="meta")
    assert bench_scope.flops(lambda: a @ a.T) == 2 * 8 * 8 * 16
    seen = bench_scope.traffic(lambda: (a + a).T + 1)
    assert seen.moved == 4 * 128 * (3 + 2) and seen.peak == 4 * 128 * 2 and seen.alive == 0


def test_drift(parts):
    w = world(parts)
    state = begin(w)
    new, chunk = w.step(state, actions())
    gap = statistics(new.latents_BCHW) - statistics(state.latents_BCHW)
    np.testing.assert_allclose(chunk.drift_B, gap.pow(2).mean(1).sqrt(), rtol=1e-5)
    far = w.step(new, actions())[1]
    assert far.drift_B.shape == (3,) and (far.drift_B > 0).all()


# ------------------------------------------------------------------------- refusals


def test_refusals(parts):
    for wrong in (dict(latents=0), dict(latents=100), dict(carry="no"), dict(temperature=0)):
        with pytest.raises((ConfigError, ShapeError)):
            world(parts, **wrong)
    with pytest.raises(ShapeError, match="32"):
        ScopeWorld(*parts, height=40, width=64)
    w, frames = world(parts), np.zeros((1, *HW, 3), np.uint8)
    with pytest.raises(ShapeError, match="negative"):
        w.begin(w.starts(frames, texts(1)), [0])
    with pytest.raises(ShapeError, match="context"):
        w.begin(w.starts(frames, texts(1)[..., :8], texts(1)), [0])
    with pytest.raises(NotFiniteError):
        w.begin(w.starts(frames, texts(1) * float("nan"), texts(1)), [0])
    with pytest.raises(ShapeError, match="frames do not fit"):
        w.encode(frames[:, :16])
    deaf = ScopeDiT(ScopeConfig.from_dict({k: v for k, v in layout.CONFIG.items()
                                           if k != "action_config"}))
    with pytest.raises(ConfigError, match="gamepad"):
        ScopeWorld(deaf, parts[1])


def test_together_is_also_a_switch_of_clips(parts):
    from worldgym.clip import ClipSize

    dit, vae = parts
    prompt, size = Prompt(texts(1), texts(1, 9)), ClipSize(*HW, 9)
    rows = torch.from_numpy(actions(1, 9))
    given = dict(image_HWC=np.zeros((*HW, 3), np.uint8), mouse_BNJ=rows[..., 6:],
                 keyboard_BNK=rows[..., :6])
    a, b = (make_latents(dit, vae, prompt, size, sampler=Sampler(steps=2, together=t), **given)
            for t in (False, True))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
