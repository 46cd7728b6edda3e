"""What the benchmark compares is the same work: a step without a cache gives the same frame."""

import numpy as np
import torch

from worldgym.agents.bench import recompute_step
from worldgym.models import nano
from worldgym.state import Starts


def test_a_step_without_a_cache_gives_the_same_frame():
    world, slots = nano.tiny(), 3
    frames = world.spec.context_frames
    rng = np.random.default_rng(0)
    latents = torch.from_numpy(rng.normal(size=(slots, frames, *world.spec.latent_chw)))
    actions = rng.integers(0, 2, (slots, frames))
    window = Starts(latents.float(), actions, np.zeros((slots, frames), bool),
                    np.full(slots, frames))
    state = world.begin(window, [3, 4, 5])
    action = np.array([1, 0, 1])
    _, chunk = world.step(state, action)
    again = recompute_step(world, window, action, state.keys_B4)
    torch.testing.assert_close(again, chunk.latents_BFChw[:, 0], atol=1e-4, rtol=1e-4)
    other = recompute_step(world, window, 1 - action, state.keys_B4)
    assert (other - again).abs().max() > 1e-3
