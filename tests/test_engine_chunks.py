"""Chunks of several latent frames through paged memory: as without memory, to the bit per slot."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from engine_tools import actions, all_bytes, pages_used, start  # noqa: E402

from worldgym.engine import World  # noqa: E402
from worldgym.errors import ConfigError, ShapeError  # noqa: E402
from worldgym.memory import SinkWindow  # noqa: E402
from worldgym.models import nano  # noqa: E402
from worldgym.models.wan import causal_frame_mask, masked  # noqa: E402
from worldgym.rollout import Block, WholeWindow, few_step  # noqa: E402
from worldgym.schedule import FewStep  # noqa: E402
from worldgym.state import WorldState  # noqa: E402

N = 3


def build(latents=N, recent=0, window=12, outcome=None):
    made = nano.tiny(recent=recent, wan=nano.dit_config(4, recent, 32, 2, 16), window=window)
    spec = replace(made.spec, latents_per_chunk=latents, frames_per_chunk=latents)
    return World(spec, made.codec, made.dynamics, outcome, SinkWindow(window),
                 FewStep.even(2), fingerprint="chunks")


def begin(world, slots=2, frames=3):
    starts = start(world, frames, slots)
    return starts, world.begin(starts, range(slots))


@torch.no_grad()
def test_steps_are_those_without_memory():
    world = build()
    starts, state = begin(world)
    rng = np.random.default_rng(0)
    past = starts.latents_BKChw
    led = world.spec.action.encode(starts.actions.reshape(-1), starts.null_BK.reshape(-1))
    led = torch.from_numpy(led).unflatten(0, (2, 3))
    blocks = [0, 1, 2]  # who saw whom: a chunk's last frame is committed after the others
    for _ in range(2):
        dense = rng.integers(0, 3, (2, N))
        keys, k = state.keys_B4, past.shape[1]
        state, chunk = world.step(state, dense, per_frame=True)
        new = torch.from_numpy(world.spec.action.encode(dense.reshape(-1))).unflatten(0, (2, N))
        led = torch.cat([led, new], 1)
        mask = causal_frame_mask(torch.tensor(blocks + [k] * N))
        blocks += [k] * (N - 1) + [k + 1]
        index = np.broadcast_to(np.arange(k + N), (2, k + N)).copy()
        whole = WholeWindow(
            world.dynamics.network, past.transpose(1, 2), world.context_t,
            Block(index, {"cond_BFD": world.dynamics.condition(led)}),
            masked(mask, world.pool.spec.tokens))
        want = few_step(whole, world.noise(keys, 0), world.schedule,
                        lambda i, keys=keys: world.noise(keys, i), None, None)
        torch.testing.assert_close(chunk.latents_BFChw, want.transpose(1, 2), atol=2e-4, rtol=0)
        past = torch.cat([past, chunk.latents_BFChw], 1)
    assert state.index_B.tolist() == [8, 8] and state.step_B.tolist() == [2, 2]
    assert chunk.frames().shape == (2, N, *world.spec.frame_hw, 3)
    assert chunk.end_frame_B.tolist() == [N - 1] * 2


def test_slots_states_and_pages(tmp_path):
    world = build(window=7)  # the window slides
    _, state = begin(world, 3)
    for number in range(5):
        given = actions(world, 3, number)
        new, chunk = world.step(state, given)
        for slot in range(3):
            one, alone = world.step(state.select([slot]), given[slot:slot + 1])
            assert torch.equal(alone.latents_BFChw[0], chunk.latents_BFChw[slot])
            assert all_bytes(one)[0] == all_bytes(new)[slot]
            one.release()
        state = new
    state.save(tmp_path / "state.safetensors")
    back = WorldState.load(tmp_path / "state.safetensors", world)
    given = actions(world, 3, 9)
    assert torch.equal(world.step(back, given)[1].latents_BFChw,
                       world.step(state, given)[1].latents_BFChw)
    held = []
    for number in range(6):
        state, _ = world.step(state, actions(world, 3, number))
        held.append(pages_used(world))
    assert held[-1] == held[-2] == held[-3]
    state.release()
    back.release()
    del state, back, new, one, alone, chunk
    assert pages_used(world) == 0


def test_held_is_dense_repeated():
    world = build()
    _, state = begin(world)
    held = actions(world, 2)
    a = world.step(state, held)[1].latents_BFChw
    assert torch.equal(
        world.step(state, np.repeat(held[:, None], N, 1), per_frame=True)[1].latents_BFChw, a)
    with pytest.raises(ShapeError, match="per-frame"):
        world.step(state, held[:, None], per_frame=True)


@pytest.mark.parametrize("wrong", [dict(recent=2), dict(outcome=nano.tiny().outcome),
                                   dict(window=3), dict(latents=0)])
def test_what_cannot_be_stepped_in_chunks(wrong):
    with pytest.raises(ConfigError):
        build(**wrong)
