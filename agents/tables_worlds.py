"""README tables of the small WorldPlay and the small WHAM: what they show, cost and are worth."""

from __future__ import annotations

from typing import Any

from worldgym.agents.results import by_metric, figure

MEMORIES = {"memory": "with its memory", "no-memory": "the newest frames only",
            "plain-positions": "with its memory, plain positions"}
REVISIT = {"psnr": ("PSNR (dB)", 1), "ssim": ("SSIM", 2), "r_dist": ("rotation off (rad)", 2),
           "t_dist": ("position off (units)", 2)}
WALK = {"chunk500_over_chunk10": "time of chunk 500 ÷ chunk 10",
        "retrieval_ms_2000": "finding old views among 2,000 latent frames (ms)"}
PLAYED = {"wham": "small WHAM: its own behaviour", "wham-agent": "PPO, trained only in small WHAM",
          "nano": "nano, and the agent trained in it",
          "nano-temperature-1": "nano at temperature 1", "copy": "the last frame copied",
          "uniform": "actions at random",
          "recorded": "half of the recordings beside the other half"}
WHAM = {"psnr_50": ("PSNR, 50 steps (dB)", 1), "action_wasserstein_8": (
    "distance of 8 actions from players'", 3), "real_return": ("in the real game (tics)", 0)}


def _table(rows: dict[tuple[str, str], dict[str, Any]], names: dict[str, str],
           columns: dict[str, tuple[str, int]]) -> list[str]:
    lines = ["| | " + " | ".join(label for label, _ in columns.values()) + " |",
             "|---" * (len(columns) + 1) + "|"]
    for what, label in names.items():
        if any((what, metric) in rows for metric in columns):
            lines.append(f"| {label} | " + " | ".join(
                figure(rows.get((what, metric)), digits)
                for metric, (_, digits) in columns.items()) + " |")
    return lines


def revisit(data: dict[str, Any]) -> str:
    """Return views against first views, by what the world sees, for every length of the way."""
    rows = by_metric(data)
    names = {}
    for what in dict.fromkeys(what for what, _ in rows):
        kind = max((k for k in MEMORIES if what.startswith(k)), key=len)
        length = rows[what, "psnr"].get("note", "").partition(" steps")[0]
        names[what] = f"{MEMORIES[kind]}, {length} steps out"
    counted = max(row["n"] for row in rows.values())
    return "\n".join([*_table(rows, names, REVISIT), "",
                      f"{counted} ways in new rooms, a step is 4 frames (95 % interval).", ""])


def walk(data: dict[str, Any]) -> str:
    """What a long walk costs."""
    rows = by_metric(data)
    return "\n".join(["| what | value |", "|---|---|", *(
        f"| {label} | {figure(rows.get(('tiny', metric)), 3)} |"
        for metric, label in WALK.items()), ""])


def wham(data: dict[str, Any]) -> str:
    """The small WHAM beside nano: as a world, as players, and what agents are worth."""
    rows = by_metric(data)
    return "\n".join([*_table(rows, PLAYED, WHAM), "",
                      "Recordings that neither has seen; mean (95 % interval).", ""])
