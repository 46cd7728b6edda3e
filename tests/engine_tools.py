"""What the tests of engine and state share: tiny worlds, starts, and results as bytes."""

import gc

import numpy as np
from state_fuzz import outcome, random_action, random_starts

from worldgym.state import Starts


def begin(world, slots=3, seed=0, seeds=None, episodes=None):
    """A state of random starts with contexts of different lengths."""
    starts = random_starts(world, slots, seed)
    return world.begin(starts, range(slots) if seeds is None else seeds, episodes)


def actions(world, slots, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([random_action(world, rng) for _ in range(slots)])


def play(world, state, steps, first=0, slots=None):
    """(state, results of every step and slot as bytes); actions depend on the step number alone.

    ``slots``: which slots of a batch of 8 these are.
    """
    told = []
    for number in range(first, first + steps):
        every = actions(world, 8, number)
        state, chunk = world.step(state, every[:state.num_slots] if slots is None else every[slots])
        told.append([outcome(chunk, row) for row in range(state.num_slots)])
    return state, told


def column(told, slot):
    """The results of one slot."""
    return [step[slot] for step in told]


def bytes_of(state, slot):
    """Everything a slot is, as bytes (pages by value, not by number)."""
    pages = state.tables.pages_BP[slot]
    pages = pages[pages >= 0]
    frames = state.tables.frames_BP[slot]
    stores = state.pool.k + state.pool.v
    return (tuple(int(getattr(state, name)[slot]) for name in state.COUNTERS),
            state.history_BKChw[slot].numpy().tobytes(), state.pending_BA[slot].numpy().tobytes(),
            frames[frames >= 0].tobytes(), tuple(s[pages].numpy().tobytes() for s in stores))


def all_bytes(state):
    return [bytes_of(state, slot) for slot in range(state.num_slots)]


def pages_used(world):
    gc.collect()
    return world.pool.stats()["pages_used"]


def start(world, frames=2, slots=1, **changes):
    """Full starts of ``frames`` frames, with fields changed."""
    made = random_starts(world, slots, 1)
    k = world.spec.context_frames
    fields = {"latents_BKChw": made.latents_BKChw[:, k - frames:],
              "actions": made.actions[:, k - frames:], "null_BK": np.zeros((slots, frames), bool),
              "length_B": np.full(slots, frames)}
    return Starts(**{**fields, **changes})
