"""Pictures of dream against real game: value against value, and return as episodes grow."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from worldgym.agents.evaluation import Evaluation
from worldgym.agents.results import atomic_bytes
from worldgym.errors import ConfigError


def calibration_plot(found: Evaluation, path: str | Path) -> Path:
    """PNG: dream value of every policy over its real value, with both 95 % intervals.

    Raises:
        ConfigError: the real game was not played.
    """
    figure, axes = _paper(found)
    values = []
    order = np.argsort(-found.returns("real").mean(1), kind="stable")
    for rank, name in enumerate(found.names[k] for k in order):
        real, dream = found.summaries[name, "real"], found.summaries[name, "dream"]
        axes.errorbar(real.mean, dream.mean, fmt="os^DvPX"[rank % 7], markersize=5,
                      capsize=2, elinewidth=1, xerr=_bars(real), yerr=_bars(dream),
                      color=f"C{rank % 10}", label=name)
        values += [real.low, real.high, dream.low, dream.high]
    room = 0.05 * (max(values) - min(values)) or 1.0
    low, high = min(values) - room, max(values) + room
    axes.plot([low, high], [low, high], color="grey", linestyle="--", linewidth=1,
              label="dream = real")
    axes.set(xlim=(low, high), ylim=(low, high), title="  ".join(_measures(found)),
             xlabel=f"real return{_unit(found)}", ylabel=f"dream return{_unit(found)}")
    axes.title.set_fontsize(9)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1), title="real best first",
                title_fontsize=7)
    return _save(figure, path)


def drift_plot(found: Evaluation, path: str | Path) -> Path:
    """PNG: mean return within the first steps of an episode, dream and real, over all policies.

    Raises:
        ConfigError: the real game was not played.
    """
    figure, axes = _paper(found)
    table = found.drift or []
    steps = [line["step"] for line in table]
    for place in ("dream", "real"):
        axes.plot(steps, [line[place] for line in table], marker=".", label=place)
        if all(line[f"{place}_ci95"] for line in table):
            low, high = np.array([line[f"{place}_ci95"] for line in table]).T
            axes.fill_between(steps, low, high, alpha=0.2)
    axes.set(xlabel="first steps of an episode", ylabel=f"mean return so far{_unit(found)}",
             title=f"{found.world}: return as episodes grow, mean over policies")
    axes.title.set_fontsize(9)
    axes.legend(fontsize=8)
    return _save(figure, path)


def _measures(found: Evaluation) -> list[str]:
    said = []
    for key, short in (("pearson_r", "r"), ("kendall_tau", "tau"), ("mmrv", "MMRV")):
        figure = (found.agreement or {}).get(key)
        said.append(f"{short} = undefined" if figure is None else f"{short} = {figure.value:.3g}")
    return said


def _bars(value: Any) -> np.ndarray:
    """Lengths (2, 1) of an error bar; an interval need not hold the mean in the middle."""
    return np.maximum(0.0, [[value.mean - value.low], [value.high - value.mean]])


def _unit(found: Evaluation) -> str:
    return f" ({found.unit})" if found.unit else ""


def _paper(found: Evaluation) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not found.real:
        raise ConfigError("nothing to hold the dream against", given="dreamt episodes only",
                          expected="real episodes too", fix="evaluate(..., real=True)")
    figure = Figure(figsize=(8, 6), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, path: str | Path) -> Path:
    path, buffer = Path(path), io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_bytes(path, buffer.getvalue())
    return path
