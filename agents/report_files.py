"""The files that a report is made from, read and checked: every broken one is a named error."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldgym.errors import DatasetError


@dataclass(frozen=True)
class Maybe:
    """A form that may also be null."""

    form: Any


# A form is a type (float: any number), a dict of keys that must be there, [form] for a list, or
# (form, form) for a list of as many.
INTERVAL = Maybe((float, float))
FIGURE = {"value": float, "ci95": INTERVAL}
PLACE = {"mean": float, "sd": float, "ci95": INTERVAL, "n": int, "truncated": int}
ABOUT = {"command": str, "commit": str, "machine": str, "date": str}
EVALUATION = {
    "about": ABOUT, "world": str, "unit": str, "episodes": int, "planned_episodes": int,
    "policies": [{"name": str, "source": str, "dream": PLACE}],
    "pairs": [{"first": str, "second": str, "place": str, "difference": float, "ci95": INTERVAL,
               "separated": Maybe(bool), "episodes_needed": Maybe(int),
               "episodes_needed_unpaired": Maybe(int)}],
    "agreement": Maybe(dict), "notes": [str],
    "sequential": Maybe({"stopped_at": int, "pairs_separated": int, "pairs": int})}
COMPARED = {  # where the real game was played
    "policies": [{"real": PLACE, "optimism": FIGURE}],
    "agreement": {"pearson_r": Maybe(FIGURE), "kendall_tau": Maybe(FIGURE),
                  "spearman": Maybe(FIGURE), "mmrv": Maybe(FIGURE), "optimism": FIGURE},
    "drift": [{"step": int, "dream": float, "dream_ci95": INTERVAL, "real": float,
               "real_ci95": INTERVAL}]}
SETTINGS = {"world": str, "fingerprint": str, "seed": int, "episodes": int, "draw": bool,
            "policies": [(str, str, str)]}
STEPS = ("psnr", "psnr_copy", "psnr_codec", "ssim", "ssim_copy", "ssim_codec", "latent_error",
         "spread", "reward_error", "reward_bias", "end_chance", "end_recorded")
DIAGNOSIS = {"about": ABOUT, "diagnosis": {
    "settings": {"world": str, "fingerprint": str},
    "by_step": {"n": [int], **{name: [Maybe(float)] for name in STEPS}},
    "ends": [{"from": int, "to": int, "window": int, "windows": int, "ends": int}],
    "end_reliability": {"predicted": [float], "recorded": [float], "n": [int]},
    "uncertainty": {"window": int, "windows": int},
    "response": {"pairs": [{"actions": (object, object), "action_distance": float,
                            "noise_distance": float}]},
    "drift": {"n": [int], **{name: [float] for name in (
        "dream_from_start", "real_from_start", "same_from_start", "dream_from_real")}}}}


def read_evaluation(folder: Path) -> dict[str, Any]:
    """evaluation.json of a folder.

    Raises:
        DatasetError: it is not there, or not what ``worldgym evaluate`` writes.
    """
    path, fix = folder / "evaluation.json", "run worldgym evaluate with this folder as --out"
    data = _read(path, EVALUATION, "no evaluation", fix)
    wrong = None if data["agreement"] is None else misfit(data, COMPARED)
    _refuse(path, wrong or (None if data["policies"] else "policies: none"), fix)
    return data


def read_settings(folder: Path) -> dict[str, Any]:
    """settings.json of an evaluation's folder, which names the world and its fingerprint.

    Raises:
        DatasetError: it is not there, or not what ``worldgym evaluate`` writes.
    """
    return _read(folder / "settings.json", SETTINGS, "no settings of the evaluation",
                 "use the folder that worldgym evaluate wrote, whole")


def read_diagnosis(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """diagnosis.json of a folder, of the world that was evaluated.

    Raises:
        DatasetError: it is not there, not what ``worldgym diagnose`` writes, or of another world.
    """
    path, fix = folder / "diagnosis.json", "run worldgym diagnose with this folder as --out"
    data = _read(path, DIAGNOSIS, "no diagnosis", fix)
    told = data["diagnosis"]
    groups = {"by_step": told["by_step"], "end_reliability": told["end_reliability"]}
    uneven = [name for name, lists in groups.items() if len({*map(len, lists.values())}) > 1]
    _refuse(path, f"{uneven[0]}: lists of different lengths" if uneven else None, fix)
    if told["settings"]["fingerprint"] != settings["fingerprint"]:
        raise DatasetError(
            "a diagnosis of another world",
            given=f"{told['settings']['world']} ({told['settings']['fingerprint']})",
            expected=f"{settings['world']} ({settings['fingerprint']}), which was evaluated",
            fix="diagnose the world that was evaluated, or leave the diagnosis out")
    return data


def _read(path: Path, form: Any, missing: str, fix: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_not_json)
    except OSError as error:
        raise DatasetError(missing, given=f"{path} ({error.strerror})", expected="a readable file",
                           fix=fix) from None
    except ValueError as error:
        raise DatasetError("a file is broken", given=f"{path} ({error})", expected="JSON",
                           fix=fix) from None
    _refuse(path, misfit(data, form), fix)
    return data


def _refuse(path: Path, wrong: str | None, fix: str) -> None:
    if wrong is not None:
        raise DatasetError("a file of another format", given=f"{path} ({wrong})",
                           expected="what this version of worldgym writes", fix=fix)


def _not_json(word: str) -> None:
    raise ValueError(f"{word} is no number")


def misfit(value: Any, form: Any, where: str = "") -> str | None:
    """Where a value does not have a form; None if it does.

    >>> misfit({"a": [1, "x"]}, {"a": [float]})
    'a.1: no number'
    """
    name = where or "all"
    if isinstance(form, Maybe):
        return None if value is None else misfit(value, form.form, where)
    if isinstance(form, type):
        return None if _is(value, form) else f"{name}: no {_title(form)}"
    kind: Any = dict if isinstance(form, dict) else list
    if not isinstance(value, kind):
        return f"{name}: no {_title(kind)}"
    if isinstance(form, dict):
        parts = [(k, f, value.get(k)) for k, f in form.items()]
        missing = [k for k in form if k not in value]
        if missing:
            return f"{name}: without {missing[0]}"
    elif isinstance(form, tuple) and len(form) != len(value):
        return f"{name}: {len(value)} values for {len(form)}"
    else:
        forms = form if isinstance(form, tuple) else form * len(value)
        parts = [(str(i), f, v) for i, (f, v) in enumerate(zip(forms, value, strict=True))]
    found = (misfit(v, f, f"{where}.{k}".lstrip(".")) for k, f, v in parts)
    return next((wrong for wrong in found if wrong), None)


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool) and kind in (int, float):
        return False
    return isinstance(value, int | float if kind is float else kind)


def _title(kind: type) -> str:
    return {float: "number", int: "whole number", str: "text", bool: "true or false",
            dict: "object"}.get(kind, "list")
