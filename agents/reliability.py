"""How far a world's chances can be believed: its ends, and its uncertainty.

Everything here is arithmetic on a replay (``worldgym.agents.replays``). A dream is one draw of what
may follow, so that a single step cannot be called wrong because it differs. What is judged are
*chances over a window*. The window of step s is the ``k`` steps from s on, cut short by a recorded
end. The dream says that the episode ends in it with chance ``1 - product of (1 - end chance)``; the
recording says whether it did. A window that neither ends nor is recorded in full is left out. The
dream goes on for as long as the recording does, whatever ends it draws.

*End wrong*: that chance is on the wrong side of one half. *Reward wrong*: at some step of the
window that neither recording nor dream ended, dreamt and recorded reward differ by more than a
tolerance (what an ending pays is a matter of the end). *Wrong soon*: one of the two.
Shapes: S steps, B clips, W windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from worldgym.agents.replays import Replayed
from worldgym.train.metrics import auc, average_precision

BINS = 10
RESAMPLES = 500


def windows(replayed: Replayed, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(chance to end, whether it ended, whether the window counts) of the window of every step."""
    there, ended = replayed.there_SB, replayed.ended_SB
    steps = len(there)
    survive, came = np.ones(there.shape), np.zeros(there.shape, bool)
    whole = np.zeros(there.shape, bool)
    for ahead in range(min(k, steps)):
        here, later = slice(0, steps - ahead), slice(ahead, steps)
        survive[here] *= np.where(there[later], 1 - replayed.chance_SB[later], 1.0)
        came[here] |= ended[later] & there[later]
        if ahead == k - 1:
            whole[here] = there[later]
    return 1 - survive, came, there & (came | whole)


def end_prediction(replayed: Replayed, k: int, bands: Sequence[tuple[int, int]]) -> list[dict]:
    """How well ends are foreseen, for windows of 1 and ``k`` steps and for bands of the replay.

    Keys: ``from``, ``to`` (steps of the band, counted from 1), ``window``, ``windows`` (their
    number), ``ends`` (windows in which the recording ended), ``predicted`` (mean chance),
    ``recorded`` (share that ended); where both kinds occur ``auc`` and ``average_precision``; where
    an end was recorded ``recall`` and where one was foretold ``precision``, for chances of one half
    and above. What is not defined is left out.
    """
    out = []
    for size in sorted({1, k}):
        chance_SB, came_SB, counts_SB = windows(replayed, size)
        for first, last in bands:
            rows = slice(first - 1, last)
            counts = counts_SB[rows]
            if counts.any():
                out.append({"from": first, "to": last, "window": size}
                           | _ends(chance_SB[rows][counts], came_SB[rows][counts]))
    return out


def _ends(chance_W: np.ndarray, came_W: np.ndarray) -> dict:
    told, n = chance_W >= 0.5, int(came_W.sum())
    out = {"windows": len(came_W), "ends": n, "predicted": float(chance_W.mean()),
           "recorded": n / len(came_W)}
    if 0 < n < len(came_W):
        out["auc"] = auc(chance_W, came_W)
    if n:
        out["average_precision"] = average_precision(chance_W, came_W)
        out["recall"] = float(told[came_W].mean())
    if told.any():
        out["precision"] = float(came_W[told].mean())
    return out


def end_reliability(replayed: Replayed, k: int) -> dict:
    """Chance to end against how often it ended, in ten bins of chance; empty bins left out."""
    chance_SB, came_SB, counts_SB = windows(replayed, k)
    chance, came = chance_SB[counts_SB], came_SB[counts_SB]
    bins = np.minimum((chance * BINS).astype(int), BINS - 1)
    used = np.unique(bins)
    return {"predicted": [float(chance[bins == b].mean()) for b in used],
            "recorded": [float(came[bins == b].mean()) for b in used],
            "n": [int((bins == b).sum()) for b in used]}


def reward_tolerance(rewards: np.ndarray) -> float:
    """Half the median of the rewards that are not zero: less is no event; 0 without any."""
    paid = np.abs(rewards[rewards != 0])
    return float(np.median(paid) / 2) if len(paid) else 0.0


def wrong_soon(replayed: Replayed, k: int, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """(wrong_SB, counts_SB): reward or end wrong in the window of each step, as defined above."""
    chance_SB, came_SB, counts_SB = windows(replayed, k)
    plain = replayed.there_SB & ~replayed.ended_SB & ~replayed.drawn_SB
    off = plain & (np.abs(replayed.reward_SB - replayed.real_reward_SB) > tolerance)
    wrong = (chance_SB >= 0.5) != came_SB
    for ahead in range(min(k, len(off))):
        wrong[:len(off) - ahead] |= off[ahead:]
    return wrong & counts_SB, counts_SB


def uncertainty(replayed: Replayed, k: int, tolerance: float) -> dict:
    """Does the spread of a step's forks foretell how wrong the dream is there and soon after?

    ``reliability``: mean spread and root mean square error of the latents, in bins of equally many
    steps. ``rank_correlation`` of spread and error (Spearman). ``error_over_spread``: root mean
    square error over sqrt(2) times that of the spread; recording and dream are two draws, so 1 is
    right where both come from the same state, as at the first step (``error_over_spread_1``), and
    what lies above 1 later has gathered on the way. ``wrong_share`` and ``auroc``: how often the
    dream is wrong soon, and the chance that before a wrong one the forks differ more in reward and
    end than elsewhere; ``auroc_of_latents`` and ``auroc_of_time`` are the same for the spread of
    the latents and for the mere number of the step. Undefined ones are left out.
    """
    seen = replayed.seen_SB
    spread, error = replayed.spread_SB[seen], replayed.error_SB[seen]
    out: dict = {}
    if len(spread):
        out = {"reliability": _reliability(spread, error)}
        first = seen[0]
        for name, s, e in (("error_over_spread", spread, error),
                           ("error_over_spread_1", replayed.spread_SB[0][first],
                            replayed.error_SB[0][first])):
            if len(s) and (s > 0).any():
                out[name] = float(np.sqrt((e**2).mean() / (2 * (s**2).mean())))
        if spread.std() > 0 and error.std() > 0:
            out["rank_correlation"] = float(np.corrcoef(_ranks(spread), _ranks(error))[0, 1])
    wrong_SB, counts_SB = wrong_soon(replayed, k, tolerance)
    wrong = wrong_SB[counts_SB]
    out |= {"window": k, "tolerance": tolerance, "windows": len(wrong)}
    if len(wrong):
        out["wrong_share"] = float(wrong.mean())
    if wrong.any() and not wrong.all():
        clip_SB = np.broadcast_to(np.arange(counts_SB.shape[1]), counts_SB.shape)
        time_SB = np.broadcast_to(np.arange(len(counts_SB))[:, None], counts_SB.shape)
        score = replayed.doubt_SB[counts_SB]
        out["auroc"] = auc(score, wrong)
        out["auroc_ci95"] = over_clips(auc, score, wrong, clip_SB[counts_SB])
        out["auroc_of_latents"] = auc(replayed.spread_SB[counts_SB], wrong)
        out["auroc_of_time"] = auc(time_SB[counts_SB].astype(float), wrong)
    return out


def _reliability(spread: np.ndarray, error: np.ndarray) -> dict:
    parts = [p for p in np.array_split(np.argsort(spread, kind="stable"), BINS) if len(p)]
    return {"spread": [float(spread[p].mean()) for p in parts],
            "error": [float(np.sqrt((error[p]**2).mean())) for p in parts],
            "n": [len(p) for p in parts]}


def _ranks(x: np.ndarray) -> np.ndarray:
    _, inverse, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[inverse]


def over_clips(statistic: Callable[[np.ndarray, np.ndarray], float], score: np.ndarray,
               truth: np.ndarray, clip: np.ndarray) -> list[float] | None:
    """95 % percentile interval of a statistic, drawing whole clips; None where it is undefined.

    Steps of one clip resemble each other, so that clips are drawn and not steps.
    """
    rng = np.random.default_rng(0)
    rows = [np.flatnonzero(clip == c) for c in np.unique(clip)]
    values = []
    for _ in range(RESAMPLES):
        pick = np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))])
        value = statistic(score[pick], truth[pick])
        if np.isfinite(value):
            values.append(value)
    if len(values) < RESAMPLES // 2:
        return None
    return [float(v) for v in np.percentile(values, [2.5, 97.5])]
