"""Pictures of a diagnosis: frames by step, ends, uncertainty, actions and idling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from worldgym.agents.diagnose import Diagnosis
from worldgym.errors import MissingDependencyError

FEW = 3  # recorded idling is drawn where this many stretches of it still last
LABELS = {"": "dream", "_copy": "copy of the last frame", "_codec": "codec alone"}


def plot(found: Diagnosis, folder: str | Path) -> list[Path]:
    """Write the PNG files and return their paths.

    Raises:
        MissingDependencyError: without Matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("plots need Matplotlib", given="no module matplotlib",
                                     expected="matplotlib",
                                     fix="pip install 'worldgym[rl]'") from error
    folder, made = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    pages: dict[str, Callable[[Diagnosis, Any, Any], None]] = {
        "frames": _frames, "ends": _ends, "uncertainty": _uncertainty, "actions": _actions}
    for name, draw in pages.items():
        figure = Figure(figsize=(10, 4), layout="constrained")
        FigureCanvasAgg(figure)
        draw(found, *figure.subplots(1, 2))
        made.append(folder / f"{name}.png")
        figure.savefig(made[-1], dpi=110)
    return made


def _steps(found: Diagnosis) -> range:
    return range(1, found.settings["steps"] + 1)


def _lines(axes: Any, found: Diagnosis, names: dict[str, str], ylabel: str) -> None:
    for name, label in names.items():
        values = [float("nan") if v is None else v for v in found.by_step[name]]
        axes.plot(_steps(found), values, label=label)
    axes.set(xlabel="dreamt steps", ylabel=ylabel)
    axes.legend(frameon=False)


def _frames(found: Diagnosis, left: Any, right: Any) -> None:
    _lines(left, found, {f"psnr{k}": v for k, v in LABELS.items()}, "PSNR (dB)")
    _lines(right, found, {f"ssim{k}": v for k, v in LABELS.items()}, "SSIM")


def _ends(found: Diagnosis, left: Any, right: Any) -> None:
    told, window = found.end_reliability, found.settings["window"]
    left.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    left.plot(told["predicted"], told["recorded"], marker="o")
    for x, y, n in zip(told["predicted"], told["recorded"], told["n"], strict=True):
        left.annotate(str(n), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    left.set(xlabel=f"dreamt chance to end within {window} steps", ylabel="share that ended")
    _lines(right, found, {"end_chance": "dream", "end_recorded": "recorded"}, "ends per step")


def _uncertainty(found: Diagnosis, left: Any, right: Any) -> None:
    curve = found.uncertainty.get("reliability")
    if curve:
        top = max(curve["spread"])
        left.plot([0, top], [0, 2**0.5 * top], color="0.7", linewidth=1,
                  label="two draws of one law")
        left.plot(curve["spread"], curve["error"], marker="o", label="dream")
        left.legend(frameon=False)
    left.set(xlabel="fork spread of the step", ylabel="error of the latents (root mean square)")
    _lines(right, found, {"spread": "fork spread", "latent_error": "error"}, "latent units")


def _actions(found: Diagnosis, left: Any, right: Any) -> None:
    pairs = [p for p in found.response["pairs"] if "ratio" in p]
    names = ["{} / {}".format(*p["actions"]) for p in pairs]
    left.barh(names, [p["ratio"] for p in pairs])
    left.axvline(1, color="0.5", linewidth=1)
    left.set(xlabel="difference by action ÷ difference by noise")
    left.tick_params(axis="y", labelsize=8 if len(pairs) <= 20 else 4)
    drift = found.drift
    right.plot(_steps(found), drift["dream_from_start"], label="dream, all")
    last = sum(n >= FEW for n in drift["n"])
    if last:
        for name, label in (("same_from_start", "dream, where the recording idles"),
                            ("real_from_start", "recording"),
                            ("dream_from_real", "dream to recording")):
            right.plot(range(1, last + 1), drift[name][:last], label=label)
    right.set(xlabel="idle steps", ylabel="distance from the first frame")
    right.legend(frameon=False)
