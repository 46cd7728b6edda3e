"""What a team is worth: in real Melting Pot, in the dream, side by side.

A team's return is the sum over its players and steps. Dreams begin where recorded episodes began,
and both places cut episodes after the same number of steps. Dream episode e follows from
(seed + e) alone; Melting Pot's seeds do not hold, so real episodes are fresh draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from worldgym.agents.compare import aligned
from worldgym.agents.course import check_count
from worldgym.agents.party_agent import team
from worldgym.agents.results import Row
from worldgym.agents.score import REAL_SEEDS, Played, better
from worldgym.envs.party_core import PartyCore
from worldgym.envs.party_tasks import PartyTask
from worldgym.errors import ConfigError

PLACES = ("real", "dream")
Scores = dict[str, dict[str, Played]]


def play_team_real(game: str, players: int | None, policy: str | Sequence[str], episodes: int, *,
                   seed: int = REAL_SEEDS, horizon: int | None = None, cell_px: int = 8,
                   draw: bool = True, progress: Callable[[int], None] | None = None) -> Played:
    """Play real episodes with a team.

    Args:
        game, players, cell_px: see ``MeltingPotEnv``. horizon: steps until an episode is cut.
        policy: see ``worldgym.agents.party_agent.team``. seed: of the players' own choices.
    """
    from worldgym.envs.meltingpot import MeltingPotEnv
    from worldgym.envs.party_record import play_rows

    check_count(episodes, "episodes")
    env = MeltingPotEnv(game, players, max_cycles=horizon, cell_px=cell_px)
    rewards, truncated = [], []
    try:
        makers = team(policy, env.players, draw)
        for number in range(episodes):
            rows = play_rows(env, _ready(makers, seed, number))
            rewards.append(rows["rewards"][1:].sum(1, dtype=np.float64))
            truncated.append(bool(rows["truncated"][-1]))
            if progress:
                progress(1)
    finally:
        env.close()
    return Played.of(_said(policy), "real", range(seed, seed + episodes), rewards, truncated)


def play_team_dream(task: PartyTask, game: str | None, players: int | None,
                    policy: str | Sequence[str], episodes: int, *, seed: int = REAL_SEEDS,
                    horizon: int | None = None, slots: int = 16, draw: bool = True,
                    progress: Callable[[int], None] | None = None) -> Played:
    """Play dreamt episodes with a team; arguments as in ``play_team_real``."""
    check_count(episodes, "episodes")
    if (horizon or task.horizon) is None:
        raise ConfigError("dream return without a horizon", given="horizon None",
                          expected="a horizon, so that every episode ends", fix="pass horizon=100")
    parts = []
    for first in range(0, episodes, slots):
        block = range(first, min(first + slots, episodes))
        core = PartyCore(task, game, players, len(block), beginnings=True,
                         horizon=horizon or task.horizon)
        makers = team(policy, core.players, draw)
        core.reset(seeds=[seed + e for e in block])
        parts.append(_dreamt(core, [_ready(makers, seed, e) for e in block], _said(policy),
                             [seed + e for e in block], progress))
        core.close()
    return Played.join(parts)


def _ready(makers: Sequence[Callable[[], Any]], seed: int, number: int) -> list[Any]:
    """The players of one episode, whose choices follow from (seed, episode, seat) alone."""
    players = [make() for make in makers]
    for i, player in enumerate(players):
        player.reset(np.random.default_rng([seed, number, i]))
    return players


def _dreamt(core: PartyCore, players: list[list[Any]], name: str, seeds: list[int],
            progress: Callable[[int], None] | None) -> Played:
    """One batch of episodes, to the end of the last."""
    rewards: list[list[float]] = [[] for _ in seeds]
    cut = np.zeros(len(seeds), bool)
    while True:
        over, joint = core.done_B, np.zeros((core.num_slots, core.players), np.int64)
        if over.all():
            break
        plays, scenes = core.playing_BP, core.scenes()
        for b in np.flatnonzero(~over):
            for i in np.flatnonzero(plays[b]):
                players[b][i].watch(scenes[b], int(i))
                if scenes[b].alive_N[i]:
                    joint[b, i] = players[b][i].act(scenes[b], int(i))
        batch = core.step(joint, "Stay")
        for b in np.flatnonzero(~over):
            rewards[b].append(float(batch.rewards_BP[b].sum()))  # type: ignore[index]
        cut |= batch.truncated_B & ~over
        if progress:
            progress(int((core.done_B & ~over).sum()))
    return Played.of(name, "dream", seeds, rewards, cut)


def _said(policy: str | Sequence[str]) -> str:
    return policy if isinstance(policy, str) else "+".join(policy)


def score_party(task: PartyTask | None, game: str, players: int | None,
                policies: Mapping[str, str], episodes: int, *, seed: int = REAL_SEEDS,
                horizon: int | None = None, where: Sequence[str] = PLACES, cell_px: int = 8,
                draw: bool = True, progress: bool = True) -> Scores:
    """Name -> place -> episodes of every team, in the same game with the same horizon."""
    if task is None and "dream" in where:
        raise ConfigError("no world to dream in", given="no task", expected="a PartyTask",
                          fix="score in the real game only, or pass a world")
    horizon = horizon or (None if task is None else task.horizon)
    if "dream" in where:
        players = PartyCore(task, game, players).players  # type: ignore[arg-type]
    for policy in policies.values():  # a wrong name is told now, not after an hour of episodes
        team(policy, players or policy.count("+") + 1, draw)
    scores: Scores = {}
    bar = tqdm(total=len(policies) * len(where) * episodes, unit=" episodes", disable=not progress)
    for name, policy in policies.items():
        scores[name] = {}
        for place in where:
            bar.set_description(f"{name} in the {place}")
            if place == "real":
                scores[name][place] = play_team_real(
                    game, players, policy, episodes, seed=seed, horizon=horizon, draw=draw,
                    cell_px=cell_px, progress=bar.update)
            else:
                scores[name][place] = play_team_dream(
                    task, game, players, policy, episodes,  # type: ignore[arg-type]
                    seed=seed, horizon=horizon, draw=draw, progress=bar.update)
    bar.close()
    return scores


def rows_of(scores: Scores, game: str, unit: str = "reward of the team") -> list[Row]:
    """Lines of a results file, the dream's beside the real ones; and the gain share, if told."""
    rows = [played.row(f"{game}/{name}", unit) for name, at in scores.items()
            for played in at.values()]
    share = gain_share(scores)
    if share is not None:
        value, low, high, n = share
        rows.append(Row(what=f"{game}/dream", metric="gain_share", value=value, ci95=(low, high),
                        n=n, unit="of the real-trained team's gain over random",
                        note="real returns; percentile bootstrap, 10,000 draws"))
    return rows


def gain_share(scores: Scores, names: tuple[str, str, str] = ("dream", "real", "random"),
               draws: int = 10_000) -> tuple[float, float, float, int] | None:
    """(dream - random) / (real - random) in real returns: share, 95 % interval, n; None if one of
    the three was not scored in the real game, or training there gained nothing."""
    if any("real" not in scores.get(name, {}) for name in names):
        return None
    samples = [scores[name]["real"].returns for name in names]
    dream, real, base = (x.mean() for x in samples)
    if real <= base:
        return None
    rng = np.random.default_rng(0)
    means = [x[rng.integers(len(x), size=(draws, len(x)))].mean(1) for x in samples]
    gains = means[1] - means[2]
    drawn = (means[0] - means[2])[gains > 0] / gains[gains > 0]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float((dream - base) / (real - base)), float(low), float(high), min(map(len, samples))


def party_table(scores: Scores, against: str = "random") -> str:
    """The scores as aligned text: real beside dream, and the real gain over ``against``."""
    lines = [["team", "real mean ± sd", "95% interval", "n", "dream mean ± sd", "n",
              f"real gain over {against}"]]
    for name, at in scores.items():
        line = [name, *["-"] * 6]
        for place, column in (("real", 1), ("dream", 4)):
            if place in at:
                s = at[place].summary
                line[column] = f"{s.mean:.2f} ± {s.sd:.2f}"
                line[3 if place == "real" else 5] = str(s.n)
                if place == "real":
                    line[2] = f"{s.low:.2f} to {s.high:.2f}"
        if "real" in at and "real" in scores.get(against, {}) and name != against:
            gain = better(at["real"], scores[against]["real"])
            line[6] = f"{gain.mean:+.2f} ({gain.low:+.2f} to {gain.high:+.2f})"
        lines.append(line)
    return aligned(lines)
