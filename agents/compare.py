"""Several policies at once: played in the real game and in the dream, printed as one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from worldgym.agents.games import game_maker
from worldgym.agents.policy import Policy
from worldgym.agents.score import REAL_SEEDS, Played, better, optimism, play_dream, play_real
from worldgym.agents.scripted import parse_policy

Scores = dict[str, dict[str, Played]]


def score_all(task: Any, policies: Mapping[str, str | Policy], episodes: int, *,
              seed: int = REAL_SEEDS, games: int = 8, where: Sequence[str] = ("real", "dream"),
              draw: bool = False, progress: bool = True) -> Scores:
    """Name -> place -> episodes of every policy, all on the same seeds."""
    scores: Scores = {}
    action = task.world.spec.action
    bar = tqdm(total=len(policies) * len(where) * episodes, unit=" episodes", disable=not progress)
    for name, source in policies.items():
        policy = (parse_policy(source, action, task.world, task) if isinstance(source, str)
                  else source)
        if draw and hasattr(policy, "deterministic"):
            policy.deterministic = False
        scores[name] = {}
        for place in where:
            bar.set_description(f"{name} in the {place}")
            if place == "real":
                scores[name][place] = play_real(game_maker(task), policy, episodes, seed, games,
                                                bar.update)
            else:
                scores[name][place] = play_dream(task, policy, episodes, seed, progress=bar.update)
    bar.close()
    return scores


def text_table(scores: Scores, against: str | None = "random") -> str:
    """The scores as aligned text: real, dream, optimism, and the gain over ``against``."""
    head = ["policy", "real mean ± sd", "95% interval", "n", "dream mean", "dream - real",
            f"real gain over {against}"]
    lines = [head]
    means = [abs(played.summary.mean) for at in scores.values() for played in at.values()]
    d = 0 if max(means, default=0) >= 10 else 2  # digits: games that pay 1 are told apart, too
    for name, at in scores.items():
        real, dream = at.get("real"), at.get("dream")
        line = [name, "-", "-", "-", "-", "-", "-"]
        if real is not None:
            s = real.summary
            line[1:4] = [f"{s.mean:.{d}f} ± {s.sd:.{d}f}", f"{s.low:.{d}f} to {s.high:.{d}f}",
                         str(s.n)]
        if dream is not None:
            line[4] = f"{dream.summary.mean:.{d}f}"
        if real is not None and dream is not None:
            line[5] = f"{optimism(dream, real).mean:+.{d}f}"
        base = scores.get(against, {}).get("real") if against else None
        if real is not None and base is not None and name != against:
            gain = better(real, base)
            line[6] = f"{gain.mean:+.{d}f} ({gain.low:+.{d}f} to {gain.high:+.{d}f})"
        lines.append(line)
    if against not in scores:
        lines = [line[:6] for line in lines]
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text with straight columns."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip()
                     for line in lines)
