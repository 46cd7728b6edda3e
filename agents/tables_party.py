"""README tables of the world of several players: binding, transfer, speed."""

from __future__ import annotations

from typing import Any

from worldgym.agents.results import by_metric, figure, told

ROLLERS = {
    "model": "the shipped world", "snapped": "the same, its states snapped to cells",
    "unsnapped": "the same, its states as drawn", "real": "the recording itself (what judges see)",
    "copy": "last frame copied", "model-1000": "the same network from nothing, 1,000 iterations",
    "no-msa": "no MSA, 1,000 iterations", "no-mca": "no MCA, 1,000 iterations",
    "pooled": "actions as one pooled embedding, 1,000 iterations"}
JUDGED = {"ma_4": "MA, 4 actions", "ma_20": "MA, 20", "sp_4": "SP, 4", "sp_20": "SP, 20",
          "detection": "detection", "interact": "interact"}
TEAMS = {"dream": "trained only in the dream", "real": "trained in Melting Pot, as many steps",
         "random": "random"}
BENCH = {"seven_over_two_players": "step with 7 players ÷ step with 2 (same frame)",
         "dream_joint_steps_per_s": "joint steps/s of 32 dreams, 7 players, frames drawn",
         "real_joint_steps_per_s": "joint steps/s of Melting Pot, one process, 7 players",
         "dream_over_real_steps": "dream ÷ real"}


def binding(data: dict[str, Any]) -> str:
    """Whether the right player moves: pooled over the games, then game by game."""
    rows, games = by_metric(data), data["about"]["pooled"]
    head = ["| | " + " | ".join(JUDGED.values()) + " |", "|---" * (len(JUDGED) + 1) + "|"]

    def line(what: str, label: str) -> str:
        cells = [figure(rows.get((what, metric)), 3, 2) for metric in JUDGED]
        return f"| {label} | " + " | ".join(cells) + " |"

    lines = head + [line(what, label) for what, label in ROLLERS.items() if (what, "ma_4") in rows]
    counted = rows["model", "ma_4"]["n"]
    without = [game for game in data["about"]["games"] if game not in games]
    apart = f" (without {', '.join(without)}: judges miss real players there)" if without else ""
    lines += ["", f"Pooled over {len(games)} games{apart}, held-out episodes, {counted:,} movement "
              "steps within 4 actions; judged on pixels by classifiers that saw real frames only.",
              "",
              "<details><summary>Every game (the shipped world)</summary>", "", *head]
    lines += [line(f"model/{game}", game) for game in data["about"]["games"]]
    return "\n".join([*lines, "", "</details>", ""])


def transfer(data: dict[str, Any]) -> str:
    """Teams of every game: real beside dream returns, and the share of the real gain."""
    rows = by_metric(data)
    games = list(dict.fromkeys(what.split("/")[0] for what, _ in rows))
    lines = ["| game | team | in Melting Pot | in the dream | share of the real gain |",
             "|---|---|---|---|---|"]
    for game in games:
        for team, label in TEAMS.items():
            if (f"{game}/{team}", "real_return") not in rows:
                continue
            cells = [told(rows.get((f"{game}/{team}", f"{place}_return")), 1, "")
                     for place in ("real", "dream")]
            share = figure(rows.get((f"{game}/{team}", "gain_share")), 3, 2) * (team == "dream")
            lines.append(f"| {game} | {label} | {cells[0]} | {cells[1]} | {share} |")
    return "\n".join([*lines, "", "Reward of the whole team in an episode of 100 steps: mean ± "
                      "standard deviation (95 % interval; n).", ""])


def bench(data: dict[str, Any]) -> str:
    """What players cost, and speed beside the real game."""
    rows = by_metric(data)
    lines = ["| what | value |", "|---|---|"]
    for metric, label in BENCH.items():
        row = rows.get(("nano", metric))
        if row is not None:
            value = f"{row['value']:,.0f}" if row["value"] >= 10 else f"{row['value']:.2f}"
            lines.append(f"| {label} | {value} |")
    return "\n".join([*lines, ""])
