"""How much to believe a step: what forks that differ in noise alone do not agree on.

Shapes: B slot, K fork, F frame, C channel, h w latent grid.
"""

import numpy as np
import torch

from worldgym.engine import World
from worldgym.errors import ConfigError, ShapeError
from worldgym.state import WorldState

AHEAD = 2  # steps of a fork: what the first one's noise made is what the second one is judged by


def fork_spread(world: World, state: WorldState, actions: object, forks: int = 4) -> np.ndarray:
    """Spread (B,) float32 of the next latents over ``forks`` copies with fresh noise.

    The root of the latents' variance over forks, averaged over the frame: latents have about unit
    variance, so 0 means the next frame is certain and values near 1 mean anything may follow. A
    game with chance in it has a spread of its own; compare with the spread on recorded episodes.
    Where latents are ids, it is the share of ids on which two forks differ.
    The state is untouched; the cost is that of ``forks`` steps.
    """
    return _forked(world, state, actions, forks, 1)[0]


def outcome_spread(world: World, state: WorldState, actions: object, forks: int = 4) -> np.ndarray:
    """Spread (B,) float32, in [0, 1], of what soon comes of the step: its end, its reward.

    Forks take the step and one more with the same actions. The chance of an end in them, or soon
    after them where the world foretells danger (``Chunk.danger_B``), is p, their mean; what they
    pay has a variance v, as a share of the most that one of them pays. The spread is the root of
    p (1 - p) + v. It foretells wrong rewards and ends better than the spread of the latents
    does (``worldgym diagnose`` measures both). The cost is that of ``2 * forks`` steps.
    """
    return _forked(world, state, actions, forks, AHEAD)[1]


def both_spreads(world: World, state: WorldState, actions: object,
                 forks: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """``fork_spread`` and ``outcome_spread``, from the same forks."""
    return _forked(world, state, actions, forks, AHEAD)


@torch.no_grad()
def _forked(world: World, state: WorldState, actions: object, forks: int,
            ahead: int) -> tuple[np.ndarray, np.ndarray]:
    if forks < 2:
        raise ConfigError("spread of too few forks", given=forks, expected="at least 2",
                          fix="use 4")
    actions = np.asarray(actions)
    if actions.shape[:1] != (state.num_slots,):
        raise ShapeError("action batch has the wrong shape", given=actions.shape,
                         expected=(state.num_slots, "..."), fix="give one action for every slot")
    held = np.repeat(actions, forks, axis=0)  # the step checks the rest
    copies, chunks = state.fork(forks, fresh=True), []
    try:
        for _ in range(ahead):
            new, chunk = world.step(copies, held)
            copies.release()
            copies = new
            chunks.append(chunk)
    finally:
        copies.release()
    latents = chunks[0].latents_BFChw.unflatten(0, (state.num_slots, forks))
    if latents.is_floating_point():
        spread = latents.var(1).mean(dim=(1, 2, 3, 4)).sqrt().cpu().numpy()
    else:
        differ = (latents[:, :, None] != latents[:, None]).double().flatten(3).mean(3)
        spread = (differ.sum((1, 2)) / (forks * (forks - 1))).cpu().numpy()
    last = chunks[-1].end_probability_B if chunks[-1].danger_B is None else chunks[-1].danger_B
    survive = np.prod([1 - c.end_probability_B for c in chunks[:-1]] + [1 - last], axis=0)
    end = 1 - survive.reshape(-1, forks).mean(1)
    paid = np.sum([c.reward_B for c in chunks], axis=0, dtype=np.float64).reshape(-1, forks)
    most = np.abs(paid).max(1)
    share = np.divide(paid.var(1), most**2, out=np.zeros(len(most)), where=most > 0)
    return spread.astype(np.float32), np.sqrt(
        np.clip(end * (1 - end) + share, 0, None)).astype(np.float32)
