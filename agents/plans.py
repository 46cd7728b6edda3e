"""Distributions over action sequences, for planners: draw plans, keep the best, fit them again.

Shapes: M plans, E elite plans, H steps ahead, C action components, k choices of a component.
"""

from __future__ import annotations

import numpy as np

from worldgym.actions import ActionSpec

KEEP = 0.1  # share of the old distribution in a refit, so that no choice is lost at once
NARROW = 0.05  # least standard deviation of a Box component, as a share of its half range


class PlanDraws:
    """What every distribution shares: persistent draws.

    A plan keeps the random draw of the step before with chance ``repeat``, and otherwise draws
    anew. It is the draw that is kept, not the action: where the distribution is the same at both
    steps the action repeats, and at every single step the plans follow the distribution exactly.
    """

    def __init__(self, action: ActionSpec, horizon: int, repeat: float) -> None:
        self.action, self.horizon, self.repeat = action, horizon, repeat

    def _source(self, rng: np.random.Generator, plans: int) -> np.ndarray:
        """Which step's draw each step uses, (M, H)."""
        fresh = rng.random((plans, self.horizon)) >= self.repeat
        fresh[:, 0] = True
        steps = np.where(fresh, np.arange(self.horizon), 0)
        return np.maximum.accumulate(steps, axis=1)

    def _held(self, draws_MHC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return np.take_along_axis(draws_MHC, self._source(rng, len(draws_MHC))[..., None], axis=1)


class Choices(PlanDraws):
    """Independent categorical choices per step and component; for all kinds but Box.

    ``chance_HCk``: chance of every choice; zero beyond a component's number of choices.
    """

    def __init__(self, action: ActionSpec, horizon: int, repeat: float,
                 chance_HCk: np.ndarray | None = None) -> None:
        super().__init__(action, horizon, repeat)
        binary = action.kind == "multi_binary"
        sizes = np.full(action.sizes[0], 2) if binary else np.asarray(action.sizes)
        legal_Ck = np.arange(sizes.max()) < sizes[:, None]
        self.uniform_Ck = legal_Ck / sizes[:, None]
        self.chance_HCk = (np.tile(self.uniform_Ck, (horizon, 1, 1)) if chance_HCk is None
                           else chance_HCk)

    def draw(self, rng: np.random.Generator, plans: int) -> np.ndarray:
        """Actions (M, H, *shape)."""
        u_MHC = self._held(rng.random((plans, *self.chance_HCk.shape[:2])), rng)
        edges_HCk = np.cumsum(self.chance_HCk, axis=-1)[..., :-1]  # above the last edge: the last
        return self._actions((u_MHC[..., None] >= edges_HCk).sum(-1))

    def refit(self, elite: np.ndarray) -> Choices:
        """The distribution of these plans (E, H, *shape), with a share of the old one."""
        pick_EHC = (elite - self.action.start).reshape(len(elite), self.horizon, -1)
        share_HCk = (pick_EHC[..., None] == np.arange(self.chance_HCk.shape[-1])).mean(0)
        return self._with((1 - KEEP) * share_HCk + KEEP * self.chance_HCk)

    def later(self, warm: float, steps: int = 1) -> Choices:
        """``steps`` on: what was planned next comes first; ``1 - warm`` of it is uniform again."""
        new_HCk = np.tile(self.uniform_Ck, (steps, 1, 1))
        next_HCk = np.concatenate([self.chance_HCk[steps:], new_HCk])
        return self._with(warm * next_HCk + (1 - warm) * self.uniform_Ck)

    def mode(self) -> np.ndarray:
        """The most probable plan (H, *shape)."""
        return self._actions(self.chance_HCk.argmax(-1)[None])[0]

    def _with(self, chance_HCk: np.ndarray) -> Choices:
        return Choices(self.action, self.horizon, self.repeat, chance_HCk)

    def _actions(self, pick_MHC: np.ndarray) -> np.ndarray:
        # rounding may leave the last edge below 1: a pick beyond the legal choices is the last one
        last_C = (self.uniform_Ck > 0).sum(-1) - 1
        legal = np.minimum(pick_MHC, last_C) + self.action.start
        return legal.reshape(*pick_MHC.shape[:2], *self.action.shape).astype(self.action.dtype)


class Gaussians(PlanDraws):
    """Independent Gaussians per step and component, clipped to the bounds; for Box actions.

    ``mean_HC`` and ``sd_HC`` are on the scale where the bounds are -1 and 1.
    """

    def __init__(self, action: ActionSpec, horizon: int, repeat: float,
                 mean_HC: np.ndarray | None = None, sd_HC: np.ndarray | None = None) -> None:
        super().__init__(action, horizon, repeat)
        shape = (horizon, len(action.low))
        self.mean_HC = np.zeros(shape) if mean_HC is None else mean_HC
        self.sd_HC = np.ones(shape) if sd_HC is None else sd_HC
        low, high = np.asarray(action.low), np.asarray(action.high)
        self._middle, self._half = (low + high) / 2, np.maximum((high - low) / 2, 1e-12)

    def draw(self, rng: np.random.Generator, plans: int) -> np.ndarray:
        """Actions (M, H, *shape)."""
        noise_MHC = self._held(rng.standard_normal((plans, *self.mean_HC.shape)), rng)
        return self._actions(self.mean_HC + self.sd_HC * noise_MHC)

    def refit(self, elite: np.ndarray) -> Gaussians:
        """The distribution of these plans (E, H, *shape), with a share of the old one."""
        flat_EHC = (elite.reshape(len(elite), self.horizon, -1) - self._middle) / self._half
        mean = (1 - KEEP) * flat_EHC.mean(0) + KEEP * self.mean_HC
        sd = (1 - KEEP) * flat_EHC.std(0) + KEEP * self.sd_HC
        return self._with(mean, np.maximum(sd, NARROW))

    def later(self, warm: float, steps: int = 1) -> Gaussians:
        """``steps`` on: what was planned next comes first, with ``1 - warm`` of the first doubt."""
        mean = np.concatenate([self.mean_HC[steps:], np.zeros_like(self.mean_HC[:steps])])
        sd = np.concatenate([self.sd_HC[steps:], np.ones_like(self.sd_HC[:steps])])
        return self._with(warm * mean, warm * sd + (1 - warm))

    def mode(self) -> np.ndarray:
        """The most probable plan (H, *shape)."""
        return self._actions(self.mean_HC[None])[0]

    def _with(self, mean_HC: np.ndarray, sd_HC: np.ndarray) -> Gaussians:
        return Gaussians(self.action, self.horizon, self.repeat, mean_HC, sd_HC)

    def _actions(self, scaled_MHC: np.ndarray) -> np.ndarray:
        flat = self._middle + self._half * np.clip(scaled_MHC, -1, 1)
        return flat.reshape(*scaled_MHC.shape[:2], *self.action.shape).astype(self.action.dtype)


def any_plan(action: ActionSpec, horizon: int, repeat: float) -> Choices | Gaussians:
    """The distribution before anything is known: every choice alike, or the whole Box."""
    kind = Gaussians if action.kind == "box" else Choices
    return kind(action, horizon, repeat)
