"""An evaluation as one HTML file that needs no network: verdict, tables, plots, films, JSON."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldgym.agents.report_files import read_diagnosis, read_evaluation, read_settings
from worldgym.agents.report_tables import diagnosis_tables, evaluation_tables
from worldgym.agents.report_words import verdict
from worldgym.agents.results import atomic_text
from worldgym.errors import MissingDependencyError, WorldGymError

if TYPE_CHECKING:
    from worldgym.agents.report_films import Film

MOST_BYTES = 5_000_000  # of all films; as text they take a third more
PLOTS = {"calibration": "Dream against real return, with 95% intervals.",
         "drift": "Return as episodes grow, mean over policies."}
DIAGNOSIS_PLOTS = {"frames": "PSNR and SSIM by step.", "ends": "Chance to end against ends.",
                   "uncertainty": "Fork spread against error.",
                   "actions": "Response to actions, and idle drift."}


@dataclass(frozen=True)
class Picture:
    """A PNG as a data URI; ``uri`` is None where the file is not there."""

    name: str
    caption: str
    uri: str | None


def write_report(out: str | Path, *, evaluation: str | Path, diagnosis: str | Path | None = None,
                 films: bool = True, task: Any = None) -> Path:
    """Write the report and return its path.

    Plots are those that lie in the two folders. Films (at most six seconds each) need the world,
    the policies and the real game once more; where one of these is missing the report has no
    films and says why.

    Args:
        out: the HTML file.
        evaluation: folder that ``worldgym evaluate`` wrote.
        diagnosis: folder that ``worldgym diagnose`` wrote, of the same world.
        films: show where dream and real game differ most and least (``report_films``).
        task: the world's task, where it has no id or folder; only films need it.

    Raises:
        DatasetError: a folder without its JSON file, a broken one, one of another format, or a
        diagnosis of another world. MissingDependencyError: without Jinja2.
    """
    folder, out = Path(evaluation), Path(out)
    data = read_evaluation(folder)
    found = None
    if diagnosis is not None:
        found = read_diagnosis(Path(diagnosis), read_settings(folder))
    shots, remark = _films(data, folder, task) if films else ([], "They were not asked for.")
    pictures = _pictures(folder, PLOTS) if data["agreement"] is not None else []
    complete = {"evaluation": data, "diagnosis": found, "films": [f.to_json() for f in shots]}
    page = template().render(
        data=data, about=data["about"], complete=complete, download=_uri(
            "application/json", json.dumps(complete, indent=1, allow_nan=False).encode()),
        verdict=verdict(data, found and found["diagnosis"]), tables=evaluation_tables(data),
        pictures=pictures, films=[(f, _uri("video/mp4", f.mp4)) for f in shots], remark=remark,
        found=found, diagnosis_tables=diagnosis_tables(found["diagnosis"]) if found else [],
        diagnosis_pictures=_pictures(Path(diagnosis), DIAGNOSIS_PLOTS) if diagnosis else [])
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_text(out, page)
    return out


def template() -> Any:
    """The page, to be rendered; every value is escaped.

    Raises:
        MissingDependencyError: without Jinja2.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise MissingDependencyError("a report needs Jinja2", given="no module jinja2",
                                     expected="jinja2", fix="pip install 'worldgym[rl]'") from error
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True,
                        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False}
    return pages.get_template("report.html.j2")


def _films(data: Mapping[str, Any], folder: Path, task: Any) -> tuple[Sequence[Film], str]:
    """Films, and what a reader must know about them; without films, why."""
    if data["agreement"] is None:
        return [], "The real game was not played."
    from worldgym.agents.report_films import disagreements  # torch, which the rest does not need

    try:
        made = disagreements(data, read_settings(folder), task)
    except WorldGymError as error:
        return [], str(error)
    kept: list[Film] = []
    for film in made:
        if sum(len(f.mp4) for f in kept) + len(film.mp4) <= MOST_BYTES:
            kept.append(film)
    left = len(made) - len(kept)
    return kept, f"{left} more would have made this file too large." if left else ""


def _pictures(folder: Path, captions: Mapping[str, str]) -> list[Picture]:
    made = []
    for name, caption in captions.items():
        path = folder / f"{name}.png"
        uri = _uri("image/png", path.read_bytes()) if path.is_file() else None
        made.append(Picture(name, caption, uri))
    return made


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
