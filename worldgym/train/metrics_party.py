"""How well a party world binds players to their actions, by its own told positions, held out.

Shapes: B clip, K context frame, F frame of a clip, N player slot, S state channel.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from worldgym.data.party import PartySampler
from worldgym.data.store import Episodes
from worldgym.models.party_loss import states_of
from worldgym.models.party_world import PartyWorld
from worldgym.state import Starts
from worldgym.train.metrics import psnr

Cells = Sequence[tuple[float, float, float, float]]


def recorded_states(store: Episodes, rows: np.ndarray, facing: bool) -> np.ndarray:
    """States (*rows.shape, N, S) of the players in these rows; zeros in free slots."""
    where = np.nan_to_num(store.take("info_position", rows), nan=0.0)
    given = [torch.from_numpy(x) for x in (where, store.take("info_orientation", rows),
                                           store.take("info_alive", rows))]
    states = states_of(given[0], given[1], given[2], facing)
    return np.where(store.take("info_valid", rows)[..., None], states.numpy(), 0)


def cell_of(states: np.ndarray, cells: tuple[float, float, float, float]) -> np.ndarray:
    """Cell (x, y) of the map that each position lies in, int64."""
    at = (states[..., :2].astype(np.float64) + 1 - cells[:2]) / cells[2:] - 0.5
    return np.round(at).astype(np.int64)


def measure_party(world: PartyWorld, stores: Mapping[str, Episodes],
                  ids: Mapping[str, np.ndarray], *, cells: Cells,
                  view: Callable[[np.ndarray], np.ndarray] = np.asarray, clips: int = 64,
                  steps: int = 4, seed: int = 0) -> dict[str, dict[str, float | None]]:
    """Per game and ``pooled`` (mean over games): rollouts under the recorded actions.

    Of players that are on the map before and after a step, for steps 1 and ``steps``:
    ``position_1``: told in the cell where they really are; ``moved_1``: the same, of those that
    really moved in this step; ``displacement_1``: told to have gone as far as they really went;
    ``facing_1``; ``position_1_copy``: in the cell where they began. ``alive_1``: of all players.
    ``psnr_1``, ``psnr_1_copy``: of the picture, in dB. None where there was nobody to judge.
    """
    out: dict[str, dict[str, float | None]] = {}
    context = max(1, world.spec.context_frames)
    for number, (game, store) in enumerate(stores.items()):
        sampler = PartySampler({game: store}, {game: ids[game]}, context + steps, clips, seed,
                               permute=False)
        out[game] = _game(world, sampler(0), number, cells[number], view, context, seed)
    names = list(next(iter(out.values())))
    pooled: dict[str, float | None] = {}
    for name in names:
        found = [v for m in out.values() if (v := m[name]) is not None]
        pooled[name] = round(float(np.mean(found)), 4) if found else None
    return out | {"pooled": pooled}


def _game(world: PartyWorld, clip: dict[str, np.ndarray], number: int,
          cells: tuple[float, float, float, float], view: Callable[[np.ndarray], np.ndarray],
          context: int, seed: int) -> dict[str, float | None]:
    """Rollouts of one game's clips (B, context + steps)."""
    b = len(clip["rows"])
    valid, facing = clip["valid"], world.sub.facing
    places, ways, alive = (torch.from_numpy(clip[k])
                           for k in ("positions", "orientation", "alive"))
    real = torch.where(torch.from_numpy(valid)[:, None, :, None],
                       states_of(places, ways, alive, facing), 0)
    frames = view(clip["frames"])
    latents = torch.stack([world.encode(np.ascontiguousarray(frames[:, k]))
                           for k in range(context)], 1)
    null = np.zeros((b, context), bool)
    null[:, 0] = True
    actions = np.where(valid[:, None], clip["actions"], 0)
    starts = Starts(latents, np.maximum(actions[:, :context], 0), null, np.full(b, context),
                    real[:, :context], valid, np.full(b, number))
    state = world.begin(starts, [seed] * b, list(range(b)))
    at = cell_of(real.numpy(), cells)
    alive = clip["alive"] & valid[:, None]
    out: dict[str, float | None] = {}
    steps = at.shape[1] - context
    told_before = at[:, context - 1]
    for step in range(1, steps + 1):
        f = context + step - 1
        old, state = state, world.step(state, actions[:, f])[0]
        told_states = state.extra["subjects"][:, -1].cpu().numpy()
        told = cell_of(told_states, cells)
        if step in (1, steps):
            there = alive[:, f] & alive[:, f - 1]
            moved = there & (at[:, f] != at[:, f - 1]).any(-1)
            right = (told == at[:, f]).all(-1)
            gone = ((told - told_before) == (at[:, f] - at[:, f - 1])).all(-1)
            copy = (at[:, context - 1] == at[:, f]).all(-1)
            found = {"position": right[there], "moved": right[moved],
                     "displacement": gone[there], "position_copy": copy[there]}
            if facing:
                turned = told_states[..., 2:6].argmax(-1) == clip["orientation"][:, f]
                found["facing"] = turned[there]
                found["alive"] = ((told_states[..., 6] > 0) == alive[:, f])[valid]
            for name, values in found.items():
                kind, _, copied = name.partition("_")
                key = f"{kind}_{step}" + ("_copy" if copied else "")
                out[key] = round(float(values.mean()), 4) if len(values) else None
            drawn = world.decode(state.history_BKChw[:, -1]).cpu().numpy()
            shown = frames[:, context - 1]
            out[f"psnr_{step}"] = round(float(psnr(drawn, frames[:, f]).mean()), 2)
            out[f"psnr_{step}_copy"] = round(float(psnr(shown, frames[:, f]).mean()), 2)
        told_before = told
        old.release()
    state.release()
    return out
