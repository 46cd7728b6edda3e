"""WorldPlay's networks and chunk loop: exact, slot by slot independent, cameras without drift."""

import numpy as np
import pytest
import torch

from worldgym import camera
from worldgym.errors import ActionError, ConfigError, NotFiniteError, ShapeError
from worldgym.models.hunyuan import HunyuanConfig, HunyuanDiT
from worldgym.models.prope import Cameras
from worldgym.models.wan import WanConfig, WanDiT
from worldgym.models.worldplay import WorldPlayDiT
from worldgym.models.worldplay_rollout import (
    HUNYUAN_TIMESTEPS,
    ChunkStepper,
    Moves,
    start_image,
)
from worldgym.reconstituted import History, Reconstituted, Scoring
from worldgym.schedule import Euler

CFG = WanConfig(dim=64, ffn_dim=96, num_heads=2, num_layers=2, in_dim=4, out_dim=4, freq_dim=16,
                text_dim=8, text_len=4)
MEMORY = Reconstituted(scoring=Scoring(points=2000))


def spread(model, seed=0):
    """Random weights everywhere, the additions included."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g) / (p.shape[-1] ** 0.5 if p.ndim > 1 else 5)
    return model.eval()


@pytest.fixture(scope="module")
def dit():
    return spread(WorldPlayDiT(CFG))


def walked(labels, turned=0.0):
    """Moves of one slot: its start and what these labels make of it."""
    start = camera.walk(camera.motions([{"yaw": turned}]))[-1]
    c2w = camera.walk(camera.motions_of(np.array(labels[1:], np.int64)), start)
    K = camera.normalised(camera.DEFAULT_K)[None].repeat(len(c2w), 0)
    return camera.inverse(c2w), K, np.array(labels)


def moves(slots, part):
    w2c, K, labels = (np.stack([s[i][part] for s in slots]) for i in range(3))
    return Moves(Cameras(torch.from_numpy(w2c), torch.from_numpy(K)), labels)


def noise(b, seed=1):
    return torch.randn(b, 4, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


def texts(b, seed=2):
    return torch.randn(b, 4, 8, generator=torch.Generator().manual_seed(seed))


def run(dit, slots, chunks, text, memory=MEMORY, histories=None, **options):
    stepper = ChunkStepper(dit, memory, **options)
    histories = histories or [History.empty() for _ in slots]
    made, chosen = [], []
    for i in range(chunks):
        latents, histories, picked = stepper.step(
            histories, noise(len(slots), i), moves(slots, slice(4 * i, 4 * i + 4)), text)
        made.append(latents)
        chosen.append(picked)
    return made, histories, chosen


RIGHT, AHEAD = [0] + [1] * 23, [0] + [9] * 23
BACK = [0] + [1] * 7 + [0] * 4 + [9] * 4 + [2] * 8


def test_a_fresh_network_is_the_plain_wan_network_bit_for_bit(dit):
    fresh, plain = WorldPlayDiT(CFG), WanDiT(CFG)
    fresh.initialize(torch.Generator().manual_seed(3))
    plain.angles = fresh.angles  # of the sinusoids: float32 here
    plain.load_state_dict({k: v for k, v in fresh.state_dict().items()
                           if "o_camera" not in k and "action_embedding" not in k})
    for p, q in zip(fresh.head.parameters(), plain.head.parameters(), strict=True):
        q.data = p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(4))
    m = moves([walked(RIGHT)], slice(4))
    with torch.no_grad():
        want = plain(noise(1), torch.full((1,), 500.0), texts(1))
        got = fresh(noise(1), torch.full((1,), 500.0), texts(1),
                    labels_BF=torch.from_numpy(m.labels_Bn), cameras=m.cameras)
    assert torch.equal(got, want) and bool(want.abs().max() > 0)


def test_gradients_reach_the_additions_at_the_first_step():
    fresh = WorldPlayDiT(CFG)
    fresh.initialize(torch.Generator().manual_seed(3))
    torch.nn.init.normal_(fresh.head.head.weight)
    m = moves([walked(RIGHT)], slice(4))
    out = fresh(noise(1), torch.full((1,), 500.0), texts(1),
                labels_BF=torch.from_numpy(m.labels_Bn), cameras=m.cameras)
    out.square().mean().backward()
    for layer in (fresh.action_embedding[2], fresh.blocks[0].self_attn.o_camera):
        assert float(layer.weight.grad.abs().max()) > 0


def test_slots_of_any_age_are_independent_bit_for_bit(dit):
    """Alone, or beside others with other lengths, choices and prompts."""
    slots, text = [walked(BACK), walked(AHEAD, 0.3), walked(RIGHT)], texts(3)
    alone = [run(dit, [s], 6, text[i:i + 1]) for i, s in enumerate(slots)]
    assert len({tuple(a[2][5][0]) for a in alone}) > 1  # selections differ within the batch
    stepper = ChunkStepper(dit, MEMORY)
    # slot 1 is at its first chunk when the others are at their sixth
    histories = [run(dit, [slots[0]], 5, text[:1])[1][0], History.empty(),
                 run(dit, [slots[2]], 5, text[2:])[1][0]]
    where = [5, 0, 5]
    parts = [moves([s], slice(4 * w, 4 * w + 4)) for s, w in zip(slots, where, strict=True)]
    joint = Moves(Cameras(*(torch.cat([getattr(p.cameras, n) for p in parts])
                            for n in ("w2c_BF44", "K_BF33"))),
                  np.concatenate([p.labels_Bn for p in parts]))
    z = torch.cat([noise(1, w) for w in where])
    latents, grown, chosen = stepper.step(histories, z, joint, text)
    for i, w in enumerate(where):
        assert torch.equal(latents[i], alone[i][0][w][0])
        assert chosen[i].tolist() == alone[i][2][w][0].tolist()
        assert len(grown[i]) == 4 * w + 4


def test_fork_and_restore_go_on_with_the_same_bits(dit):
    slots, text = [walked(BACK)], texts(1)
    made, _, _ = run(dit, slots, 6, text)
    _, histories, _ = run(dit, slots, 4, text)
    stepper = ChunkStepper(dit, MEMORY)
    other = moves([walked(AHEAD)], slice(16, 20))
    stepper.step(histories, noise(1, 9), other, text)  # a fork that goes another way
    for past in (histories[0], History.from_arrays(histories[0].to_arrays())):
        h = [past]
        for i in (4, 5):
            latents, h, _ = stepper.step(h, noise(1, i), moves(slots, slice(4 * i, 4 * i + 4)),
                                         text)
            assert torch.equal(latents, made[i])
    assert len(histories[0]) == 16


def test_another_prompt_takes_effect_in_the_next_chunk(dit):
    slots = [walked(RIGHT)]
    _, histories, _ = run(dit, slots, 2, texts(1))
    stepper, part = ChunkStepper(dit, MEMORY), moves(slots, slice(8, 12))
    same, *_ = stepper.step(histories, noise(1, 2), part, texts(1))
    other, *_ = stepper.step(histories, noise(1, 2), part, texts(1, seed=7))
    assert torch.equal(same, run(dit, slots, 3, texts(1))[0][2])
    assert not torch.allclose(same, other, atol=1e-3)


def test_poses_far_from_the_origin_do_not_lose_their_digits(dit):
    """Bfloat16 has three digits: 300 units out, steps of 0.08 would be lost without the shift."""
    near = walked(AHEAD)
    far = (near[0] @ camera.inverse(camera.walk(camera.motions([{"forward": 300.0}]))[1]),
           *near[1:])
    a, b = (run(dit, [s], 6, texts(1))[0][5] for s in (near, far))
    assert float((a - b).abs().max()) < 1e-4
    low = spread(WorldPlayDiT(CFG)).bfloat16()
    a, b = (run(low, [s], 2, texts(1))[0][1] for s in (near, far))
    cast = Cameras(torch.from_numpy(far[0][None]).bfloat16().double())
    lost = (cast.seen_from(cast.w2c_BF44[:, 0]).w2c_BF44
            - torch.from_numpy(far[0] @ camera.inverse(far[0][:1]))).abs().max()
    assert float((a - b).abs().max()) < 1e-5 < float(lost)


def test_a_start_image_stays_as_it_is(dit):
    first, slots = torch.randn(1, 4, 1, 4, 4, generator=torch.Generator().manual_seed(5)), [
        walked(RIGHT)]
    stepper = ChunkStepper(dit, MEMORY)
    latents, h, _ = stepper.step([History.empty()], noise(1), moves(slots, slice(4)), texts(1),
                                 first)
    assert torch.equal(latents[:, :, :1], first) and torch.equal(h[0].latents([0])[0],
                                                                  first[0, :, 0])
    with pytest.raises(ConfigError, match="middle of an episode"):
        stepper.step(h, noise(1), moves(slots, slice(4, 8)), texts(1), first)
    pixels = start_image(np.full((30, 61, 3), 255, np.uint8), (32, 48))
    assert pixels.shape == (1, 3, 1, 32, 48) and bool((pixels == 1).all())


def test_actions_inside_a_chunk_count_one_by_one(dit):
    slots = [walked(RIGHT)]
    m = moves(slots, slice(4))
    stepper, first = ChunkStepper(dit, MEMORY), None
    for k in range(1, 4):
        labels = m.labels_Bn.copy()
        labels[0, k] = 9
        latents, *_ = stepper.step([History.empty()], noise(1), Moves(m.cameras, labels), texts(1))
        assert first is None or not torch.allclose(latents, first, atol=1e-4)
        first = latents


@pytest.mark.parametrize("change, error", [
    (lambda m: Moves(m.cameras, m.labels_Bn + 81), ActionError),
    (lambda m: Moves(m.cameras, m.labels_Bn[:, :3]), ShapeError),
    (lambda m: Moves(Cameras(m.cameras.w2c_BF44[:, :1], None), m.labels_Bn), ShapeError),
    (lambda m: Moves(Cameras(m.cameras.w2c_BF44, m.cameras.K_BF33 * 0), m.labels_Bn),
     NotFiniteError),
    (lambda m: Moves(Cameras(m.cameras.w2c_BF44 * float("nan")), m.labels_Bn), NotFiniteError),
], ids=["label", "few labels", "one pose left", "zero focal length", "nan pose"])
def test_bad_moves_have_named_errors(dit, change, error):
    with pytest.raises(error):
        ChunkStepper(dit, MEMORY).step([History.empty()], noise(1),
                                       change(moves([walked(RIGHT)], slice(4))), texts(1))


def test_a_slot_keeps_its_own_latents_and_nothing_of_the_batch(dit):
    """Of every latent frame its numbers, pose, lens and label: no keys and values, no neighbours.
    """
    _, histories, _ = run(dit, [walked(RIGHT), walked(AHEAD), walked(BACK)], 3, texts(3))
    for h in histories:
        kept = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
                for x in h.rows.latents[:12]}
        assert sum(kept.values()) == 12 * 4 * 4 * 4 * 4  # frames, channels, grid, bytes
        assert sum(h.of(n).nbytes for n in h.rows.numbers) < 12 * 300


HUNYUAN = HunyuanConfig(hidden_size=64, heads_num=2, mm_double_blocks_depth=2, in_channels=4,
                        out_channels=4, rope_dim_list=(8, 12, 12), text_states_dim=10,
                        vision_states_dim=6, byt5_states_dim=8, byt5_hidden=12)


@pytest.mark.parametrize("change, error", [
    (lambda m: Moves(m.cameras, m.labels_Bn + 81), ActionError),
    (lambda m: Moves(Cameras(m.cameras.w2c_BF44[:, :1], m.cameras.K_BF33[:, :1]), m.labels_Bn),
     ShapeError)], ids=["label", "one pose left"])
def test_bad_moves_have_named_errors_in_the_hunyuan_variant(change, error):
    """One pose left used to be repeated over all frames in silence."""
    other, tokens = spread(HunyuanDiT(HUNYUAN)), torch.randn(1, 5, 64)
    bad = change(moves([walked(RIGHT)], slice(4)))
    with pytest.raises(error):
        ChunkStepper(other, MEMORY).step([History.empty()], noise(1), bad, tokens)
    with pytest.raises(error), torch.no_grad():
        other(other.inputs(noise(1), torch.arange(4)[None], None), torch.zeros(1, 4),
              labels_BF=torch.from_numpy(bad.labels_Bn), cameras=bad.cameras,
              text_kv=other.text(tokens))


def test_plain_positions_and_a_time_per_context_frame_in_the_hunyuan_variant():
    other, slots = spread(HunyuanDiT(HUNYUAN)), [walked(BACK)]
    tokens = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1))
    plain, _, chosen = run(other, slots, 6, tokens, positions="plain")
    ranks, *_ = run(other, slots, 6, tokens)
    gaps = [i for i, c in enumerate(chosen) if c[0].tolist() != list(range(len(c[0])))]
    assert gaps == [5] and not torch.allclose(plain[5], ranks[5], atol=1e-4)
    assert all(torch.equal(plain[i], ranks[i]) for i in range(5))  # nothing is left out before
    m = moves(slots, slice(4))
    given = dict(labels_BF=torch.from_numpy(m.labels_Bn), cameras=m.cameras)
    with torch.no_grad():
        x, kv = other.inputs(noise(1), torch.arange(4)[None], None), other.text(tokens)
        one, each, later = (other.context(x, text_kv=kv, t=t, **given).position[1][0] for t in (
            14.0, torch.full((1, 4), 14.0), torch.tensor([[14.0, 14, 14, 400]])))
    assert torch.equal(one, each) and not torch.allclose(each, later, atol=1e-4)


def test_the_hunyuan_variant_runs_the_same_loop():
    dit = spread(HunyuanDiT(HUNYUAN))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        tokens = dit.tokens(torch.randn(2, 5, 10, generator=g),
                            torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 1, 0]]),
                            torch.randn(2, 3, 6, generator=g), torch.randn(2, 2, 8, generator=g),
                            torch.tensor([[1, 0], [1, 0]]))
    assert tokens.shape == (2, 7, 64)
    memory = Reconstituted(total=20, keep_first=True, scoring=Scoring(points=2000))
    slots = [walked([0] + [1] * 27), walked([0] + [9] * 27)]
    first = torch.randn(2, 4, 1, 4, 4, generator=g)

    def play(some, first):
        stepper = ChunkStepper(dit, memory, Euler.at(HUNYUAN_TIMESTEPS))
        h, made = [History.empty() for _ in some], []
        for i in range(7):
            z = noise(2, i)[some]
            latents, h, chosen = stepper.step(
                h, z, moves([slots[s] for s in some], slice(4 * i, 4 * i + 4)), tokens[some],
                first[some])
            made.append(latents)
        assert all(c[:4].tolist() == [0, 1, 2, 3] and len(c) == 20 for c in chosen)
        return made

    both, one = play([0, 1], first), play([1], first)
    assert all(torch.equal(a[1:], b) for a, b in zip(both, one, strict=True))
    changed = play([1], first + 1)  # the picture is seen at every step, through frame 0
    assert not torch.allclose(changed[-1], one[-1], atol=1e-4)
    with pytest.raises(ShapeError, match="different length"), torch.no_grad():
        dit.tokens(torch.randn(2, 5, 10), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]))
