"""How much to believe a step: the spread of forks that differ in noise alone.

Shapes: B slot, K fork, F frame, C channel, h w latent grid.
"""

import numpy as np
import torch

from worldgym.engine import World
from worldgym.errors import ConfigError
from worldgym.state import WorldState


@torch.no_grad()
def fork_spread(world: World, state: WorldState, actions: object, forks: int = 4) -> np.ndarray:
    """Spread (B,) float32 of the next latents over ``forks`` copies with fresh noise.

    The root of the latents' variance over forks, averaged over the frame: latents have about unit
    variance, so 0 means the next frame is certain and values near 1 mean anything may follow. A
    game with chance in it has a spread of its own; compare with the spread on recorded episodes.
    The state is untouched; the cost is that of ``forks`` steps.
    """
    if forks < 2:
        raise ConfigError("spread of too few forks", given=forks, expected="at least 2",
                          fix="use 4")
    actions = np.asarray(actions)
    world.controls(actions, state, np.arange(state.num_slots))  # refused here, not among copies
    copies = state.fork(forks, fresh=True)
    try:
        _, chunk = world.step(copies, np.repeat(actions, forks, axis=0))
    finally:
        copies.release()
    latents = chunk.latents_BFChw.unflatten(0, (state.num_slots, forks))
    return latents.var(1).mean(dim=(1, 2, 3, 4)).sqrt().cpu().numpy().astype(np.float32)
