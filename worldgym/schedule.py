"""Noise levels of flow matching: the table, the few-step list, Euler steps and the UniPC solver.

Convention (actionparty spec 3.2): ``x_t = (1 - sigma) x0 + sigma eps`` and the network predicts
the flow ``v = eps - x0``, so ``x0 = x_t - sigma v``. Timesteps are ``1000 sigma``.

Shape suffixes: B slot, F frame, R table row, S sampler step; ``...`` any further axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worldgym.errors import ConfigError, NotFiniteError, ShapeError

TRAIN_STEPS = 1000  # timesteps live in 0..1000


def _need_shift(shift: float) -> float:
    shift = float(shift)
    if not (math.isfinite(shift) and shift > 0):
        raise ConfigError(
            "impossible timestep shift",
            given=shift,
            expected="a finite number above 0",
            fix="use 5.0 (Self-Forcing), or 1.0 for an unshifted schedule",
        )
    return shift


def _spread(sigma: Tensor | float, x: Tensor) -> Tensor | float:
    """Give sigma (a float, or [B], [B, F]...) trailing axes so that it broadcasts over x."""
    if not isinstance(sigma, Tensor) or sigma.ndim == 0:
        return sigma
    if sigma.ndim > x.ndim or any(
        s not in (1, n) for s, n in zip(sigma.shape, x.shape, strict=False)
    ):
        raise ShapeError(
            "noise levels do not fit the sample",
            given=f"sigma {tuple(sigma.shape)} for a sample {tuple(x.shape)}",
            expected="one sigma, or one for each of the sample's leading axes",
            fix="pass sigma as [B] or [B, F] for a sample [B, F, ...]",
        )
    return sigma.reshape(*sigma.shape, *(1,) * (x.ndim - sigma.ndim))


def add_noise(x0: Tensor, eps: Tensor, sigma: Tensor | float) -> Tensor:
    """Noise a clean sample: ``(1 - sigma) x0 + sigma eps``, worked out in at least float32.

    Args:
        x0: clean sample [B, ...].
        eps: standard normal noise, same shape.
        sigma: one level, or one for each leading axis ([B] or [B, F]).
    """
    level = _spread(sigma, x0)
    high = torch.promote_types(x0.dtype, torch.float32)
    return ((1 - level) * x0.to(high) + level * eps.to(high)).to(x0.dtype)


def x0_from_flow(x: Tensor, flow: Tensor, sigma: Tensor | float) -> Tensor:
    """Clean sample that a flow prediction implies: ``x - sigma v``, in at least float32."""
    level = _spread(sigma, x)
    high = torch.promote_types(x.dtype, torch.float32)
    return (x.to(high) - level * flow.to(high)).to(x.dtype)


class FlowTable:
    """Shifted flow-matching table of 1000 rows (actionparty spec 3.3), noisiest row first.

    Attributes:
        sigmas_R: noise levels, float32 [1000].
        timesteps_R: ``1000 sigma``, float32 [1000].
        weights_R: training weight of each row, float32 [1000], mean 1.

    Example:
        >>> table = FlowTable(shift=5.0)
        >>> round(float(table.sigma(937.5)), 4)
        0.9375
        >>> table.warp([1000, 750, 500, 250])[1]
        937.5
    """

    def __init__(self, shift: float = 5.0) -> None:
        self.shift = shift = _need_shift(shift)
        u_R = torch.linspace(1.0, 0.0, TRAIN_STEPS + 1)[:-1]
        self.sigmas_R = shift * u_R / (1 + (shift - 1) * u_R)
        self.timesteps_R = TRAIN_STEPS * self.sigmas_R
        bell_R = torch.exp(-2 * ((self.timesteps_R - TRAIN_STEPS / 2) / TRAIN_STEPS) ** 2)
        bell_R = bell_R - bell_R.min()
        self.weights_R = bell_R * (TRAIN_STEPS / bell_R.sum())

    def row(self, t: Tensor | float) -> Tensor:
        """Rows whose timestep lies nearest to t (any shape), int64 of the same shape."""
        t = torch.as_tensor(t)
        if not bool(torch.isfinite(t).all()):
            raise NotFiniteError(
                "timestep is not finite",
                given="NaN or inf",
                expected="timesteps in 0..1000",
                fix="check where the timestep comes from",
            )
        # The rows fall strictly, so the nearest one is a neighbour of the insertion point.
        up_R = self.timesteps_R.to(t.device).double().flip(0)
        t = t.double().contiguous()
        right = torch.searchsorted(up_R, t).clamp(1, TRAIN_STEPS - 1)
        low, high = up_R[right - 1], up_R[right]
        # A tie goes to the lower row number (the higher timestep), as argmin would choose.
        nearest = torch.where((t - low).abs() < (high - t).abs(), right - 1, right)
        return TRAIN_STEPS - 1 - nearest

    def sigma(self, t: Tensor | float) -> Tensor:
        """Noise level of timestep t: the table entry with the nearest timestep."""
        row = self.row(t)
        return self.sigmas_R.to(row.device)[row]

    def weight(self, t: Tensor | float) -> Tensor:
        """Training weight of timestep t (same lookup as :meth:`sigma`)."""
        row = self.row(t)
        return self.weights_R.to(row.device)[row]

    def warp(self, steps: Sequence[float]) -> list[float]:
        """Move unshifted steps onto the shifted table: row ``1000 - step``; step 0 stays 0."""
        rows = [TRAIN_STEPS - int(step) for step in steps]
        for row, step in zip(rows, steps, strict=True):
            if not 0 <= row <= TRAIN_STEPS or step != int(step):
                raise ConfigError(
                    "step to warp is not in the table",
                    given=step,
                    expected="whole numbers in 0..1000",
                    fix="list unshifted steps such as [1000, 750, 500, 250]",
                )
        return [float(self.timesteps_R[row]) if row < TRAIN_STEPS else 0.0 for row in rows]


@dataclass(frozen=True)
class FewStep:
    """Few-step sampler: at each timestep predict x0, then noise it again for the next one.

    Attributes:
        timesteps: network timesteps, falling, in (0, 1000].
        sigmas: noise level of each.

    Example:
        >>> schedule = FewStep.of([1000, 500], shift=5.0)
        >>> [round(t, 2) for t in schedule.timesteps]
        [1000.0, 833.33]
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in zip(self.timesteps, self.timesteps[1:], strict=False))
        inside = all(0 < t <= TRAIN_STEPS for t in self.timesteps)
        paired = len(self.timesteps) == len(self.sigmas) > 0
        if not (falling and inside and paired):
            raise ConfigError(
                "impossible list of denoising steps",
                given=f"timesteps {list(self.timesteps)}, sigmas {list(self.sigmas)}",
                expected="at least one timestep, falling, in (0, 1000], one sigma each",
                fix="use FewStep.of([1000, 750, 500, 250]) or FewStep.even(4)",
            )

    @classmethod
    def of(cls, steps: Sequence[float], *, shift: float = 5.0, warp: bool = True) -> FewStep:
        """Schedule of a list of steps; ``warp`` moves them onto the shifted table first.

        A closing 0, which some published lists carry, stands for the clean end and is left out.
        """
        steps = list(steps)[:-1] if len(steps) > 1 and steps[-1] == 0 else list(steps)
        table = FlowTable(shift)
        timesteps = table.warp(steps) if warp else [float(step) for step in steps]
        return cls(tuple(timesteps), tuple(float(table.sigma(t)) for t in timesteps))

    @classmethod
    def even(cls, count: int, *, shift: float = 5.0) -> FewStep:
        """Schedule of ``count`` steps spread evenly before the shift (4: 1000, 750, 500, 250)."""
        if count < 1:
            raise ConfigError(
                "no denoising step", given=count, expected="1 or more", fix="use 1 to 4 steps"
            )
        return cls.of([round(TRAIN_STEPS * (count - i) / count) for i in range(count)], shift=shift)

    def __len__(self) -> int:
        return len(self.timesteps)

    def next_input(self, x0: Tensor, eps: Tensor, step: int) -> Tensor:
        """Network input of step ``step + 1``, from the x0 predicted at ``step`` and fresh noise."""
        return add_noise(x0, eps, self.sigmas[step + 1])


class Euler:
    """Euler steps along the flow (scope spec 9): ``x + (sigma_next - sigma) v``.

    Attributes:
        sigmas_S: noise levels, float32 [n]; after the last comes 0.
        timesteps_S: exact ``1000 sigma``, float32 [n], not whole numbers.

    Example:
        >>> Euler(4, shift=5.0).sigmas_S.tolist()
        [1.0, 0.9375, 0.8333333134651184, 0.625]
    """

    def __init__(self, steps: int, *, shift: float = 5.0, strength: float = 1.0) -> None:
        shift = _need_shift(shift)
        if steps < 1 or not 0 < strength <= 1:
            raise ConfigError(
                "impossible number of steps or strength", given=f"{steps} steps, {strength}",
                expected="1 step or more, a strength in (0, 1]", fix="use 30 steps, strength 1",
            )
        u_S = torch.linspace(strength, 0.0, steps + 1)[:-1]
        self.sigmas_S = shift * u_S / (1 + (shift - 1) * u_S)
        self.timesteps_S = TRAIN_STEPS * self.sigmas_S

    @classmethod
    def at(cls, timesteps: Sequence[float]) -> Euler:
        """The steps of a list of falling timesteps in (0, 1000]; a closing 0 is left out."""
        steps = [float(t) for t in timesteps if t != 0]
        FewStep(tuple(steps), tuple(steps))  # refuses impossible lists
        made = cls(len(steps))
        made.timesteps_S = torch.tensor(steps)
        made.sigmas_S = made.timesteps_S / TRAIN_STEPS
        return made

    def __len__(self) -> int:
        return len(self.sigmas_S)

    def step(self, x: Tensor, flow: Tensor, i: int) -> Tensor:
        """Sample after step ``i``, in the dtype of ``x``."""
        end = self.sigmas_S[i + 1] if i + 1 < len(self) else torch.zeros(())
        return x + flow * (end - self.sigmas_S[i]).to(x.device)


def chunk_times(u: Tensor, *, shift: float = 3.0) -> Tensor:
    """Training timesteps of chunks (worldplay spec 12), whole numbers in 1..1000.

    Args:
        u: numbers in (0, 1), e.g. the sigmoid of standard normal ones, one per chunk; cut down to
            thousandths first.
        shift: time shift; 1 = none.
    """
    shift = _need_shift(shift)
    part = torch.floor(u.double() * TRAIN_STEPS) / TRAIN_STEPS
    shifted = TRAIN_STEPS * shift * part / (1 + (shift - 1) * part)
    # a row of the falling table 1000, 999, ... is chosen by cutting 1000 - t down
    return TRAIN_STEPS - torch.floor(TRAIN_STEPS - shifted)


def context_times(row: Tensor) -> Tensor:
    """Timestep of rows of the unshifted falling table: 1000 - row (memory training, rows 500..984).
    """
    return TRAIN_STEPS - row.double()


class UniPC:
    """Multi-step solver of order 2 ("bh2", x0 form; actionparty spec 3.4), one chunk at a time.

    The object is the schedule and never changes; :meth:`begin` gives a run, whose ``step(flow)``
    returns the next sample. All slots of the batch walk the same noise levels.

    Attributes:
        sigmas: n + 1 noise levels, the last 0 (float32 values).
        timesteps: n whole network timesteps, ``int(1000 sigma)``.

    Example:
        >>> solver = UniPC(steps=4, shift=5.0)
        >>> run = solver.begin(torch.ones(2, 3))
        >>> for t in solver.timesteps:
        ...     x = run.step(torch.zeros(2, 3))
        >>> bool((x == 1).all())
        True
    """

    def __init__(self, steps: int, *, shift: float = 5.0) -> None:
        shift = _need_shift(shift)
        if steps < 1:
            raise ConfigError(
                "no sampling step", given=steps, expected="1 or more", fix="use 6 to 50 steps"
            )
        # The published table starts at float32(0.999); the rounding decides some truncations.
        top = float(torch.tensor(1 - 1 / TRAIN_STEPS, dtype=torch.float32))
        u_S = torch.linspace(top, 0.0, steps + 1, dtype=torch.float64)[:-1]
        sigma_S = shift * u_S / (1 + (shift - 1) * u_S)
        self.timesteps: tuple[int, ...] = tuple(int(t) for t in (TRAIN_STEPS * sigma_S).tolist())
        self.sigmas: tuple[float, ...] = (*sigma_S.float().tolist(), 0.0)

    def __len__(self) -> int:
        return len(self.timesteps)

    def begin(self, x: Tensor) -> UniPCRun:
        """Start denoising from noise x [B, ...]."""
        return UniPCRun(self, x)


class UniPCRun:
    """One denoising run of :class:`UniPC`; feed it the flow at ``timestep`` again and again."""

    def __init__(self, solver: UniPC, x: Tensor) -> None:
        self.solver, self.i, self.x = solver, 0, x
        self._high = torch.promote_types(x.dtype, torch.float32)
        self._before = x.to(self._high)  # corrected sample that the last prediction started from
        self._now = self._before  # sample at level i, not yet corrected
        self._order = 0  # order of the last predictor
        self._m: list[Tensor] = []  # x0 predictions, oldest first, at most 2 kept

    @property
    def done(self) -> bool:
        """True once the last step was taken."""
        return self.i >= len(self.solver)

    @property
    def timestep(self) -> int:
        """Network timestep of the coming step."""
        return self.solver.timesteps[min(self.i, len(self.solver) - 1)]

    def _lam(self, i: int) -> float:
        """Half log signal-to-noise ratio of level i (infinite at sigma 0)."""
        sigma = self.solver.sigmas[i]
        return math.log(1 - sigma) - math.log(sigma) if sigma > 0 else math.inf

    def step(self, flow: Tensor) -> Tensor:
        """Take the flow predicted for the current sample; return the next sample [B, ...]."""
        n, i, sigma = len(self.solver), self.i, self.solver.sigmas
        if self.done:
            raise ConfigError(
                "the run is over",
                given=f"step {i + 1} of {n}",
                expected=f"at most {n} steps",
                fix="call UniPC.begin(noise) for the next chunk",
            )
        if flow.shape != self._now.shape:
            raise ShapeError(
                "flow does not fit the sample",
                given=tuple(flow.shape),
                expected=tuple(self._now.shape),
                fix="pass the network's output for the whole batch",
            )
        m = self._now - sigma[i] * flow.to(self._high)
        x = self._correct(m) if i > 0 else self._now
        order = min(2, i + 1, n - i)
        y = self._predict(x, m, order)
        self._before, self._now, self._order = x, y, order
        self._m = [*self._m[-1:], m]
        self.i += 1
        self.x = y.to(self.x.dtype)
        return self.x

    def _correct(self, m: Tensor) -> Tensor:
        """Repeat the last prediction with the x0 that is known now (the "UniC" half)."""
        i, sigma = self.i, self.solver.sigmas
        h = self._lam(i) - self._lam(i - 1)
        a, big_b = 1 - sigma[i], math.expm1(-h)
        last = self._m[-1]
        base = (sigma[i] / sigma[i - 1]) * self._before - a * big_b * last
        if self._order == 1:
            return base - a * big_b * 0.5 * (m - last)
        r = (self._lam(i - 2) - self._lam(i - 1)) / h
        slope = (self._m[-2] - last) / r
        q = -h
        b1 = (big_b / q - 1) / big_b
        b2 = 2 * ((big_b / q - 1) / q - 0.5) / big_b
        rho1 = (b1 - b2) / (1 - r)  # rho1 + rho2 = b1; r rho1 + rho2 = b2
        return base - a * big_b * (rho1 * slope + (b1 - rho1) * (m - last))

    def _predict(self, x: Tensor, m: Tensor, order: int) -> Tensor:
        """Step from level i to i + 1 (the "UniP" half)."""
        i, sigma = self.i, self.solver.sigmas
        h = self._lam(i + 1) - self._lam(i)
        a, big_b = 1 - sigma[i + 1], math.expm1(-h)
        y = (sigma[i + 1] / sigma[i]) * x - a * big_b * m
        if order == 2:
            r = (self._lam(i - 1) - self._lam(i)) / h
            y = y - a * big_b * 0.5 * (self._m[-1] - m) / r
        return y
