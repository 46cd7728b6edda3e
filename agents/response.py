"""Does the dream obey its actions, and does it hold still when nothing is done?

Shapes: B clips, A probed actions, S steps, C channel, h w latent grid.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

from worldgym.actions import ActionSpec
from worldgym.agents.encode import as_numpy
from worldgym.agents.policy import idle_action
from worldgym.agents.replays import Clips, rms
from worldgym.errors import ConfigError
from worldgym.train.metrics import real_context

MOST_PROBES = 32


def probe_actions(action: ActionSpec) -> np.ndarray:
    """Actions (A, *shape) that differ from the idle one in one component; the idle one is first.

    Every choice of a discrete component, each button of a MultiBinary, both bounds of a Box.

    >>> probe_actions(ActionSpec(kind="multi_binary", shape=(2,), sizes=(2,))).tolist()
    [[0, 0], [1, 0], [0, 1]]

    Raises:
        ConfigError: more than 32 actions to try.
    """
    idle = idle_action(action).astype(action.dtype).reshape(-1)
    if action.kind == "box":
        choices: list[list[float]] = [list(pair) for pair in
                                      zip(action.low, action.high, strict=True)]
    elif action.kind == "multi_binary":
        choices = [[0, 1]] * len(idle)
    else:
        choices = [[action.start + i for i in range(size)] for size in action.sizes]
    probes = [idle]
    for component, values in enumerate(choices):
        for value in values:
            probe = idle.copy()
            probe[component] = value
            if value != idle[component]:
                probes.append(probe)
    if len(probes) > MOST_PROBES:
        raise ConfigError("too many actions to try each of them", given=len(probes),
                          expected=f"at most {MOST_PROBES}", fix="pass actions= to try")
    return np.stack(probes).reshape(-1, *action.shape)


def action_response(world: Any, episodes: Any, clips: Clips, hold: int = 4, seed: int = 0,
                    actions: np.ndarray | None = None) -> dict:
    """From one state, two actions held with the same noise, against two noises with one action.

    For every pair of actions: ``action_distance``, root mean square difference of the latents after
    ``hold`` steps of the one and of the other, with equal noise; ``noise_distance``, that of two
    noise seeds under either action; and ``ratio`` of the two (left out where noise changes
    nothing). Above 1 the action matters more than chance; near 0 the dream does not listen.

    Args:
        actions: (A, *shape), two or more; default: ``probe_actions``.
    """
    probes = probe_actions(world.spec.action) if actions is None else world.spec.action.check(
        actions)
    if len(probes) < 2 or hold < 1:
        raise ConfigError("no actions to compare", given=f"{len(probes)} actions, hold {hold}",
                          expected="two actions or more, held for a step or more",
                          fix="pass actions=[low, high]")
    b, a = len(clips), len(probes)
    state = world.begin(real_context(world, episodes, clips.firsts_B, clips.context),
                        [seed] * b, list(range(b)))
    noises = state.fork(2, fresh=True)
    forks = noises.fork(a)  # (B, 2 noises, A): the actions of one noise share it
    state.release()
    noises.release()
    held = np.concatenate([probes] * (2 * b))
    for _ in range(hold):
        after, chunk = world.step(forks, held)
        forks.release()
        forks = after
    forks.release()
    latents = as_numpy(chunk.latents_BFChw)[:, -1].astype(np.float64).reshape(b, 2, a, -1)
    noise_A = ((latents[:, 0] - latents[:, 1])**2).mean((0, 2))
    pairs = []
    for i, j in combinations(range(a), 2):
        moved = float(np.sqrt(((latents[:, :, i] - latents[:, :, j])**2).mean()))
        noise = float(np.sqrt((noise_A[i] + noise_A[j]) / 2))
        pair = {"actions": [probes[i].tolist(), probes[j].tolist()], "action_distance": moved,
                "noise_distance": noise}
        pairs.append(pair | ({"ratio": moved / noise} if noise > 0 else {}))
    return {"hold": hold, "clips": b, "pairs": pairs}


def idle_runs(episodes: Any, ids: np.ndarray, context: int, steps: int, count: int) -> Clips:
    """The ``count`` longest stretches of recorded idling, at most ``steps`` each; maybe none."""
    idle = idle_action(episodes.action).astype(episodes.action.dtype)
    firsts, lengths = [], []
    for i in np.asarray(ids).tolist():
        start, length = int(episodes.starts[i]), int(episodes.lengths[i])
        actions = episodes.take("actions", start + np.arange(length + 1))
        still = (actions == idle).reshape(length + 1, -1).all(1)
        still[:context] = False  # before them lies the context
        edges = np.flatnonzero(np.diff(np.concatenate([[False], still, [False]]).astype(int)))
        for begin, end in edges.reshape(-1, 2).tolist():
            firsts.append(start + begin - context)
            lengths.append(min(end - begin, steps))
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")[:count]
    return Clips(np.asarray(firsts, np.int64)[order], np.asarray(lengths, np.int64)[order], context)


def idle_drift(world: Any, episodes: Any, clips: Clips, steps: int, seed: int = 0) -> dict:
    """The idle action held for ``steps`` steps: how far the picture wanders, by step.

    Root mean square distance of latents. ``dream_from_start``: of the dream from the real frame
    that it starts with. For the stretches in which the recording idles as well (``n`` of them at
    each step; the lists end where none is left): ``real_from_start``, and for the same stretches
    ``same_from_start`` and ``dream_from_real``. Ends are ignored, but not recorded ones.

    Args:
        clips: where to start; ``steps_B`` says how long each recording idles (0: it does not).
    """
    idle = idle_action(world.spec.action).astype(world.spec.action.dtype)
    state = world.begin(real_context(world, episodes, clips.firsts_B, clips.context),
                        [seed] * len(clips), list(range(len(clips))))
    last_B = clips.firsts_B + clips.context - 1
    start = world.encode(episodes.take("frames", last_B))
    out: dict[str, list] = {name: [] for name in ("dream_from_start", "n", "real_from_start",
                                                  "same_from_start", "dream_from_real")}
    for step in range(1, steps + 1):
        after, chunk = world.step(state, np.stack([idle] * len(clips)))
        state.release()
        state, dream = after, chunk.latents_BFChw[:, -1]
        out["dream_from_start"].append(float(rms(dream, start).mean()))
        still = np.flatnonzero(clips.steps_B >= step)
        if len(still):  # the frame after an ending is no frame of the game
            still = still[~episodes.take("terminated", last_B[still] + step).astype(bool)]
        if len(still):
            real = world.encode(episodes.take("frames", last_B[still] + step))
            out["n"].append(len(still))
            out["real_from_start"].append(float(rms(real, start[still]).mean()))
            out["same_from_start"].append(float(rms(dream[still], start[still]).mean()))
            out["dream_from_real"].append(float(rms(dream[still], real).mean()))
    state.release()
    return out | {"steps": steps, "clips": len(clips)}
