"""The verdict of a report: plain sentences made from the numbers, and nothing beyond them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from worldgym.agents.evaluation_text import interval, number

PLACES = {"real": "real game", "dream": "dream"}
SHOWN = 5  # names in one sentence


def verdict(data: Mapping[str, Any], told: Mapping[str, Any] | None = None) -> list[str]:
    """Sentences on the best policy, on how far to believe the dream, and on where it is wrong.

    Args:
        data: content of evaluation.json.
        told: the ``diagnosis`` of diagnosis.json.
    """
    said = [_best(data, place_of(data))]
    if data["agreement"] is None:
        said.append("The real game was not played: nothing here says how far to believe the "
                    "dream.")
    else:
        said += [*_first_in_dream(data), _order(data), _optimism(data)]
    test = data["sequential"]
    if test is not None:
        said.append(f"The sequential test told {test['pairs_separated']} of {test['pairs']} pairs "
                    f"apart in the dream after {test['stopped_at']} of at most "
                    f"{data['planned_episodes']} episodes.")
    return said if told is None else [*said, *_diagnosed(told)]


def place_of(data: Mapping[str, Any]) -> str:
    """Where policies are compared: in the real game if it was played."""
    return "dream" if data["agreement"] is None else "real"


def ranked(data: Mapping[str, Any], place: str) -> list[Mapping[str, Any]]:
    """The policies, the best mean return first."""
    return sorted(data["policies"], key=lambda p: -p[place]["mean"])


def told_apart(pair: Mapping[str, Any]) -> bool | None:
    """Whether a difference is beyond chance; None where that cannot be said.

    The sequential test decides where there was one, else whether the 95 % interval leaves out 0.
    An interval of no width is no proof.

    >>> told_apart({"separated": None, "ci95": [1.0, 2.0]})
    True
    """
    if pair["separated"] is not None:
        return bool(pair["separated"])
    if pair["ci95"] is None or pair["ci95"][0] == pair["ci95"][1]:
        return None
    return bool(pair["ci95"][0] * pair["ci95"][1] > 0)


def names(these: Sequence[str]) -> str:
    """The first few names, and how many more there are.

    >>> names(list("abcdefg"))
    'a, b, c, d, e and 2 more'
    """
    more = len(these) - SHOWN
    return ", ".join(these[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def amount(data: Mapping[str, Any], value: float) -> str:
    """A return with its unit."""
    return f"{number(value)} {data['unit']}".strip()


def _best(data: Mapping[str, Any], place: str) -> str:
    first, where = ranked(data, place)[0], PLACES[place]
    name, at = first["name"], first[place]
    value = f"a mean return of {amount(data, at['mean'])} ({_known(at['ci95'])}, n = {at['n']})"
    others = {}
    for pair in data["pairs"]:
        if pair["place"] == place and name in (pair["first"], pair["second"]):
            other = pair["second"] if pair["first"] == name else pair["first"]
            others[other] = told_apart(pair)
    if not others:
        return f"In the {where} the only policy, {name}, has {value}; nothing to compare it with."
    doubtful = [other for other, apart in others.items() if not apart]
    if not doubtful:
        return (f"In the {where} {name} is the best of {len(others) + 1} policies, with {value}; "
                "its lead over every other policy is beyond chance (each pair by itself).")
    return (f"In the {where} {name} has the highest mean of {len(others) + 1} policies, {value}, "
            f"but these numbers do not tell it apart from {names(doubtful)}.")


def _first_in_dream(data: Mapping[str, Any]) -> list[str]:
    if len(data["policies"]) < 2:
        return []
    order = ranked(data, "dream")
    top = [p["name"] for p in order if p["dream"]["mean"] == order[0]["dream"]["mean"]]
    real = [p["name"] for p in ranked(data, "real")]
    if len(top) > 1:
        return [f"In the dream the highest mean is shared by {names(top)}."]
    if top[0] == real[0]:
        return ["The dream puts the same policy first."]
    return [f"The dream puts {top[0]} first, which is number {real.index(top[0]) + 1} in the real "
            "game."]


def _order(data: Mapping[str, Any]) -> str:
    parts = []
    for key, title in (("pearson_r", "Pearson's r"), ("kendall_tau", "Kendall's tau")):
        figure = data["agreement"][key]
        parts.append(f"{title} is undefined" if figure is None else
                     f"{title} is {number(figure['value'])} ({_known(figure['ci95'])})")
    said = f"Between dream and real means of {len(data['policies'])} policies " + " and ".join(
        parts)
    alike, pairs = _alike(data)
    return said + (f"; the dream orders {alike} of {pairs} pairs as the real game does."
                   if pairs else ".")


def _known(ci95: Sequence[float] | None) -> str:
    return "no interval" if ci95 is None else f"95% interval {interval(ci95)}"


def _alike(data: Mapping[str, Any]) -> tuple[int, int]:
    """Pairs that dream and real game order alike, and all of them; level ones are not alike."""
    gaps: dict[tuple[str, str], list[float]] = {}
    for pair in data["pairs"]:
        gaps.setdefault((pair["first"], pair["second"]), []).append(pair["difference"])
    return sum(a * b > 0 for a, b in gaps.values()), len(gaps)


def _optimism(data: Mapping[str, Any]) -> str:
    figure = data["agreement"]["optimism"]
    value, ci95 = figure["value"], figure["ci95"]
    way = "more" if value > 0 else "less"
    gap = f"{amount(data, abs(value))} {way} than" if value else "as much as"
    known = "no interval" if ci95 is None else (
        f"95% interval of dream minus real {interval(ci95, '+')}")
    said = f"On average the dream pays {gap} the real game ({known})"
    if ci95 is not None and ci95[0] <= 0 <= ci95[1]:
        said += ", which may be chance"
    order = sorted(data["policies"], key=lambda p: p["optimism"]["value"])
    if len(order) > 1:
        low, high = order[0], order[-1]
        said += (f"; by policy dream minus real goes from {number(low['optimism']['value'], '+')} "
                 f"({low['name']}) to {number(high['optimism']['value'], '+')} ({high['name']})")
    return said + "."


def _diagnosed(told: Mapping[str, Any]) -> list[str]:
    said, by_step = [], told["by_step"]
    steps = [s for s, (a, b) in enumerate(zip(by_step["psnr"], by_step["psnr_copy"], strict=True))
             if a is not None and b is not None]
    if steps:
        dream, copy = (by_step[k][steps[-1]] for k in ("psnr", "psnr_copy"))
        than = "more" if dream > copy else "no more"
        said.append(f"After {steps[-1] + 1} steps of replayed recordings the dream's frames have "
                    f"a PSNR of {number(dream)} dB over the {by_step['n'][steps[-1]]} clips still "
                    f"going on, {than} than the last real frame shown unchanged "
                    f"({number(copy)} dB).")
    ends = max(told["ends"], key=lambda b: (b["window"], b["windows"]), default=None)
    if ends is not None:
        auc = ends.get("auc")
        share = "undefined" if auc is None else number(auc)
        said.append(f"The AUC of its chance that the episode ends within {ends['window']} steps "
                    f"is {share} ({ends['ends']} of {ends['windows']} windows ended).")
    auroc, ci95 = (told["uncertainty"].get(key) for key in ("auroc", "auroc_ci95"))
    share = "undefined" if auroc is None else f"{number(auroc)} ({_known(ci95)})"
    said.append("The chance that forks differ more before a mistake than elsewhere is "
                f"{share}; 0.5 is no better than guessing.")
    return said
