"""Where a dream is wrong: recorded play dreamt again, its chances, its uncertainty, its actions.

LPIPS is not among the measures. The packages that compute it (lpips, torchmetrics, piq, pyiqa) hold
at most the few kilobytes of its linear layers and download the network below them when it is
first used; a measurement here needs nothing but its package.
Shapes: S steps of the replay, B clips.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from worldgym.agents import reliability, response
from worldgym.agents.compare import aligned
from worldgym.agents.replays import (
    Clips,
    Replayed,
    check_counts,
    check_recordings,
    choose_clips,
    context_of,
    replay_clips,
)
from worldgym.agents.results import Row, about, atomic_text
from worldgym.agents.stats import METHOD, summary

PICTURES = ("psnr", "psnr_copy", "psnr_codec", "ssim", "ssim_copy", "ssim_codec")
RESPONSE_CLIPS = 16  # starting points for actions and drift; every one is tried many times


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What ``diagnose`` found, as plain numbers; what is not defined is absent or None.

    ``by_step``: lists over the steps 1..S of means over the ``n`` clips that are still going on
    (see ``Replayed``; ``reward_error`` is the mean absolute difference, ``reward_bias`` the mean of
    dreamt minus recorded). ``ends``, ``end_reliability``, ``uncertainty``: see
    ``worldgym.agents.reliability``. ``response``, ``drift``: see ``worldgym.agents.response``.
    """

    settings: dict[str, Any]
    by_step: dict[str, list]
    ends: list[dict]
    end_reliability: dict
    uncertainty: dict
    response: dict
    drift: dict
    figures: list[Row] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Everything but the rows, as JSON data."""
        return {k: v for k, v in asdict(self).items() if k != "figures"}

    def rows(self) -> list[Row]:
        """The main figures for a results file."""
        return list(self.figures)

    def write(self, path: str | Path) -> Path:
        """Write a results file that also holds ``to_json()`` under ``diagnosis``."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"about": about(), "rows": [row.to_json() for row in self.figures],
                   "diagnosis": self.to_json()}
        atomic_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
        return path

    def table(self) -> str:
        """The figures as aligned text."""
        lines = [["figure", "value", "95% interval", "n"]]
        for row in self.figures:
            between = "" if row.ci95 is None else "{:.3g} to {:.3g}".format(*row.ci95)
            lines.append([row.metric, f"{row.value:.4g} {row.unit}".strip(), between, str(row.n)])
        return aligned(lines)


def diagnose(task: Any, episodes: Any, ids: Sequence[int] | np.ndarray | None = None, *,
             steps: int = 50, clips: int = 64, forks: int = 8, window: int = 8, hold: int = 4,
             seed: int = 0, progress: bool = False) -> Diagnosis:
    """Compare a task's dream with recorded play of its game.

    Costs about ``clips * steps * (forks + 1)`` world steps.

    Args:
        task: world, reward and end.
        episodes: recordings, as ``worldgym collect`` writes them (``worldgym.data.store``).
        ids: episodes to use; default all. ``Episodes.split(holdout, seed=0)[1]`` are those that
            ``worldgym fit`` did not learn from.
        steps: length of the replay, S.
        clips: places to start from, B.
        forks: forks of every step; what they do not agree on is the uncertainty.
        window: steps within which an end or a mistake counts as foreseen.
        hold: steps for which compared actions are held.
        seed: of the choice of clips and of the dream's noise.

    Raises:
        ConfigError: impossible numbers. DatasetError: recordings of another game, frame size or
        action space, or too short or too few for what is asked. MissingDependencyError: without
        scikit-image or SciPy.
    """
    check_counts(steps, clips, forks, window)
    check_recordings(task, episodes)
    chosen = np.arange(len(episodes)) if ids is None else np.asarray(ids, np.int64)
    context = context_of(task.world)
    pieces = choose_clips(episodes, chosen, context, steps, clips, seed)
    with tqdm(total=steps + 2, unit=" steps", desc="replay", disable=not progress) as bar:
        replayed = replay_clips(task, episodes, pieces, forks, seed, bar.update)
        bar.set_description("actions")
        obeyed = response.action_response(task.world, episodes, _some(pieces), hold, seed)
        bar.update(1)
        bar.set_description("idling")
        drift = _drift(task.world, episodes, chosen, pieces, steps, seed)
        bar.update(1)
    tolerance = reliability.reward_tolerance(replayed.real_reward_SB[replayed.there_SB])
    settings = {"world": task.world.spec.name,
                "fingerprint": getattr(task.world, "fingerprint", ""),
                "data": str(episodes.path), "episodes": len(chosen), "steps": steps,
                "clips": clips, "context": context, "forks": forks, "window": window,
                "seed": seed}
    found = Diagnosis(
        settings=settings, by_step=_by_step(replayed),
        ends=reliability.end_prediction(replayed, window, _bands(steps)),
        end_reliability=reliability.end_reliability(replayed, window),
        uncertainty=reliability.uncertainty(replayed, window, tolerance),
        response=obeyed, drift=drift)
    found.figures.extend(_figures(found, replayed))
    return found


def _some(clips: Clips, count: int = RESPONSE_CLIPS) -> Clips:
    """At most ``count`` of the clips, evenly from long to short."""
    pick = np.unique(np.linspace(0, len(clips) - 1, min(count, len(clips))).astype(int))
    return Clips(clips.firsts_B[pick], clips.steps_B[pick], clips.context)


def _drift(world: Any, episodes: Any, ids: np.ndarray, clips: Clips, steps: int,
           seed: int) -> dict:
    """Idle drift beside recorded idling; where nobody idles, the dream alone can be told."""
    runs = response.idle_runs(episodes, ids, clips.context, steps, RESPONSE_CLIPS)
    if not len(runs):
        some = _some(clips)
        runs = Clips(some.firsts_B, np.zeros(len(some), np.int64), clips.context)
    return response.idle_drift(world, episodes, runs, steps, seed)


def _bands(steps: int) -> list[tuple[int, int]]:
    """The whole replay, then early, middle and late steps where there are five or more."""
    if steps < 5:
        return [(1, steps)]
    return [(1, steps), (1, steps // 5), (steps // 5 + 1, steps // 2), (steps // 2 + 1, steps)]


def _by_step(replayed: Replayed) -> dict[str, list]:
    seen, there = replayed.seen_SB, replayed.there_SB
    gap = replayed.reward_SB - replayed.real_reward_SB
    columns = {name: (replayed.frame_SB[name], seen) for name in PICTURES}
    columns |= {"latent_error": (replayed.error_SB, seen), "spread": (replayed.spread_SB, there),
                "reward_error": (np.abs(gap), there), "reward_bias": (gap, there),
                "end_chance": (replayed.chance_SB, there),
                "end_recorded": (replayed.ended_SB.astype(float), there)}
    return {"n": there.sum(1).tolist()} | {
        name: [float(row[ok].mean()) if ok.any() else None
               for row, ok in zip(values, mask, strict=True)]
        for name, (values, mask) in columns.items()}


def _figures(found: Diagnosis, replayed: Replayed) -> list[Row]:
    """The rows: pictures and reward at a few steps, ends, uncertainty, actions, drift."""
    what, steps = found.settings["world"], found.settings["steps"]
    seeds = str(found.settings["seed"])
    rows = []

    def add(metric: str, value: float | None, n: int, **more: Any) -> None:
        if value is not None:
            rows.append(Row(what=what, metric=metric, value=value, n=n, seeds=seeds, **more))

    for step in sorted({1, max(1, steps // 5), max(1, steps // 2), steps}):
        seen, there = replayed.seen_SB[step - 1], replayed.there_SB[step - 1]
        for name in PICTURES:
            if seen.any():
                s = summary(replayed.frame_SB[name][step - 1][seen])
                add(f"{name}_{step}", s.mean, s.n, ci95=s.ci95, note=METHOD,
                    unit="dB" if name.startswith("psnr") else "")
        add(f"reward_error_{step}", found.by_step["reward_error"][step - 1], int(there.sum()))
    for band in found.ends:
        if (band["from"], band["to"]) != (1, steps):
            continue
        for name in ("auc", "average_precision", "precision", "recall", "predicted", "recorded"):
            add(f"end_{name}_within_{band['window']}", band.get(name), band["windows"])
    told, spread = found.uncertainty, "uncertainty_"
    seen = int(replayed.seen_SB.sum())
    for name in ("error_over_spread_1", "error_over_spread", "rank_correlation"):
        first = name == "error_over_spread_1"
        add(spread + name, told.get(name), int(replayed.seen_SB[0].sum()) if first else seen)
    add(spread + "auroc", told.get("auroc"), told["windows"],
        ci95=told.get("auroc_ci95"), note="95% percentile interval, whole clips drawn")
    for name in ("auroc_of_latents", "auroc_of_time", "wrong_share"):
        add(spread + name, told.get(name), told["windows"])
    ratios = [p["ratio"] for p in found.response["pairs"] if "ratio" in p]
    if ratios:
        add("action_response_least", min(ratios), found.response["clips"])
        add("action_response_most", max(ratios), found.response["clips"])
    add(f"idle_drift_{steps}", found.drift["dream_from_start"][-1], found.drift["clips"])
    return rows
