"""Tables of a report: cells hold the text that is shown and the value that is sorted by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from worldgym.agents.evaluation_text import TITLES, interval, number
from worldgym.agents.report_words import PLACES, place_of, ranked, told_apart

STEPS = 12  # rows of a table over steps; the JSON holds every step
MEANING = {
    "pearson_r": "1: dream means lie on a rising line over the real ones",
    "kendall_tau": "1: all pairs of policies in the real order, -1: all the other way round",
    "spearman": "1: the same ranks",
    "mmrv": "real return that a wrong order costs at worst, mean over policies; 0: none",
    "optimism": "mean over policies; 0: the dream pays what the game pays"}
UNCERTAIN = {
    "error_over_spread_1": "error over spread, first step (1 is right)",
    "error_over_spread": "error over spread, all steps",
    "rank_correlation": "rank correlation of spread and error",
    "wrong_share": "share of steps before a mistake",
    "auroc": "AUROC: spread of reward and end foretells a mistake (0.5 is chance)",
    "auroc_of_latents": "the same for the spread of the latents",
    "auroc_of_time": "the same for the mere number of the step"}


@dataclass(frozen=True)
class Cell:
    """``value``: a number or text to sort by; None where there is none."""

    text: str
    value: float | str | None = None


@dataclass(frozen=True)
class Table:
    """A table with a title, a remark, heads and rows."""

    id: str
    title: str
    remark: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def evaluation_tables(data: Mapping[str, Any]) -> list[Table]:
    """Tables of an evaluation; those of dream against real only where both were played."""
    tables = [_policies(data)]
    if data["pairs"]:
        tables.append(_pairs(data))
    if data["agreement"] is not None:
        tables += [_agreement(data), _growth(data)]
    return tables


def diagnosis_tables(told: Mapping[str, Any]) -> list[Table]:
    """Tables of a diagnosis."""
    return [_frames(told), _rewards(told), _ends(told), _reliability(told), _uncertainty(told),
            _actions(told), _idling(told)]


def _word(text: str) -> Cell:
    return Cell(text, text)


def _count(value: int | None) -> Cell:
    return Cell("undefined" if value is None else f"{value:,}", value)


def _number(value: float | None, sign: str = "") -> Cell:
    return Cell("undefined" if value is None else number(value, sign), value)


def _between(ci95: Sequence[float] | None, sign: str = "") -> Cell:
    return Cell("undefined" if ci95 is None else interval(ci95, sign),
                None if ci95 is None else ci95[0])


def _share(part: int, whole: int) -> Cell:
    return Cell(f"{part / whole:.0%} ({part} of {whole})", part / whole)


def _policies(data: Mapping[str, Any]) -> Table:
    real = data["agreement"] is not None
    unit = f" ({data['unit']})" if data["unit"] else ""
    told = any(p["name"] != p["source"] for p in data["policies"])
    heads = ["policy", "made from"] if told else ["policy"]
    places = ["dream", "real"] if real else ["dream"]
    for place in places:
        heads += [f"{place} return{unit}", f"{place} 95% interval", f"{place} sd", f"{place} n",
                  f"{place} cut before its end"]
    heads += ["optimism (dream - real)", "optimism 95% interval"] if real else []
    rows = []
    for policy in ranked(data, place_of(data)):
        row = [_word(policy[key]) for key in (("name", "source") if told else ("name",))]
        for at in (policy[place] for place in places):
            row += [_number(at["mean"]), _between(at["ci95"]), _number(at["sd"]), _count(at["n"]),
                    _share(at["truncated"], at["n"])]
        if real:
            gap = policy["optimism"]
            row += [_number(gap["value"], "+"), _between(gap["ci95"], "+")]
        rows.append(row)
    return Table("policies", "Policies", "Mean return of an episode, the best in the "
                 f"{PLACES[place_of(data)]} first.", heads, rows)


def _pairs(data: Mapping[str, Any]) -> Table:
    answer = {True: "yes", False: "no", None: "undefined"}
    rows = [[_word(p["first"]), _word(p["second"]), _word(PLACES[p["place"]]),
             _number(p["difference"], "+"), _between(p["ci95"], "+"),
             _word(answer[told_apart(p)]), _count(p["episodes_needed"]),
             _count(p["episodes_needed_unpaired"])] for p in data["pairs"]]
    return Table("pairs", "Pairs of policies", "First minus second, paired by start and noise. "
                 "Told apart: the interval leaves out 0, each pair by itself, or the sequential "
                 "test decided. Episodes needed: of each policy, for 80% power at 5% error, were "
                 "the difference as measured.",
                 ["first", "second", "where", "difference", "95% interval", "told apart",
                  "episodes needed", "episodes needed if not paired"], rows)


def _agreement(data: Mapping[str, Any]) -> Table:
    rows = []
    for group, who in (("agreement", ""), ("agreement_outside", ", policies from outside")):
        for key, figure in (data.get(group) or {}).items():
            known = figure or {"value": None, "ci95": None}
            rows.append([_word(TITLES.get(key, key) + who), _number(known["value"]),
                         _between(known["ci95"]), _word(MEANING.get(key, ""))])
    return Table("agreement", "Agreement of dream and real game",
                 "Intervals say how far the chance of the episodes moves a figure; the policies "
                 "are taken as given. Policies from outside did not learn in a dream.",
                 ["measure", "value", "95% interval", "how to read it"],
                 rows)


def _growth(data: Mapping[str, Any]) -> Table:
    rows = []
    for at in data["drift"]:
        ratio = at["dream"] / at["real"] if at["real"] else None
        rows.append([_count(at["step"]), _number(at["dream"]), _between(at["dream_ci95"]),
                     _number(at["real"]), _between(at["real_ci95"]), _number(ratio)])
    return Table("drift", "Return as episodes grow",
                 "Mean return within the first steps of an episode, over all policies.",
                 ["first steps", "dream", "dream 95% interval", "real", "real 95% interval",
                  "dream / real"], rows)


def _some_steps(count: int) -> Iterable[int]:
    """Positions of at most ``STEPS`` steps, denser at the beginning, with the last one."""
    return [] if not count else (
        np.unique(np.geomspace(1, count, STEPS).round().astype(int)) - 1).tolist()


def _by_step(lists: Mapping[str, Any],
             columns: Mapping[str, str]) -> tuple[list[str], list[list[Cell]]]:
    rows = []
    for s in _some_steps(max(len(lists[name]) for name in columns)):
        values = [lists[name][s] if s < len(lists[name]) else None for name in columns]
        rows.append([_count(s + 1), *(_count(v) if name == "n" else _number(v)
                                      for name, v in zip(columns, values, strict=True))])
    return ["step", *columns.values()], rows


def _frames(told: Mapping[str, Any]) -> Table:
    columns = {"n": "clips"}
    for key, title in (("psnr", "PSNR (dB)"), ("ssim", "SSIM")):
        columns |= {key: f"{title} dream", f"{key}_copy": f"{title} copied frame",
                    f"{key}_codec": f"{title} codec alone"}
    return Table("frames", "Frames by step", "Dreamt against recorded frames, after the same "
                 "actions. Copied frame: the last real one shown unchanged. Codec alone: the best "
                 "that the world can draw.", *_by_step(told["by_step"], columns))


def _rewards(told: Mapping[str, Any]) -> Table:
    columns = {"reward_error": "reward error", "reward_bias": "reward bias",
               "end_chance": "dreamt chance to end", "end_recorded": "share that ended",
               "latent_error": "latent error", "spread": "fork spread"}
    return Table("rewards", "Rewards, ends and spread by step", "Reward error: mean absolute "
                 "difference; bias: dream minus recording. Latent units for error and spread.",
                 *_by_step(told["by_step"], columns))


def _ends(told: Mapping[str, Any]) -> Table:
    keys = {"auc": "AUC", "average_precision": "average precision", "precision": "precision",
            "recall": "recall", "predicted": "dreamt chance", "recorded": "share that ended"}
    rows = [[Cell(f"{b['from']} to {b['to']}", b["from"]), _count(b["window"]),
             _count(b["windows"]), _count(b["ends"]), *(_number(b.get(k)) for k in keys)]
            for b in told["ends"]]
    return Table("ends", "Ends", "Does the episode end within the window? The dream's chance "
                 "against what was recorded.",
                 ["steps", "window (steps)", "windows", "ended", *keys.values()], rows)


def _reliability(told: Mapping[str, Any]) -> Table:
    curve = told["end_reliability"]
    rows = [[_number(a), _number(b), _count(n)] for a, b, n in
            zip(curve["predicted"], curve["recorded"], curve["n"], strict=True)]
    return Table("reliability", "Reliability of the chance to end", "Equal columns would be "
                 "perfect.", ["dreamt chance", "share that ended", "windows"], rows)


def _uncertainty(told: Mapping[str, Any]) -> Table:
    found = told["uncertainty"]
    rows = [[_word(title), _number(found.get(key)), _between(found.get(f"{key}_ci95"))]
            for key, title in UNCERTAIN.items()]
    return Table("uncertainty", "Uncertainty", f"Fork spread against error; {found['windows']} "
                 f"windows of {found['window']} steps. Intervals are known for the AUROC alone.",
                 ["measure", "value", "95% interval"], rows)


def _actions(told: Mapping[str, Any]) -> Table:
    rows = [[_word("{} / {}".format(*p["actions"])), _number(p["action_distance"]),
             _number(p["noise_distance"]), _number(p.get("ratio"))]
            for p in told["response"]["pairs"]]
    return Table("actions", "Response to actions", "How far two actions lead apart, and how far "
                 "noise alone does (latent units). A ratio near 0: the dream does not listen.",
                 ["actions", "by action", "by noise", "ratio"], rows)


def _idling(told: Mapping[str, Any]) -> Table:
    columns = {"dream_from_start": "dream from start", "n": "recordings that idle",
               "same_from_start": "dream of those from start",
               "real_from_start": "recording from start",
               "dream_from_real": "dream from recording"}
    return Table("idling", "Idle drift", "How far the picture wanders while nothing is done "
                 "(root mean square of latents).",
                 *_by_step(told["drift"], columns))
