"""Results files: every published figure with its command, commit, machine and interval."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from worldgym.data.store import one_writer
from worldgym.errors import ConfigError, DatasetError

PACKAGES = ("torch", "gymnasium", "stable-baselines3", "sb3-contrib", "vizdoom", "numpy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One figure: ``metric`` of ``what``, with its 95 % interval where there is one."""

    what: str
    metric: str
    value: float
    ci95: tuple[float, float] | None = None
    n: int = 1
    unit: str = ""
    seeds: str = ""
    sd: float | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The row as written to the file; empty fields are left out."""
        row: dict[str, Any] = {"what": self.what, "metric": self.metric,
                               "value": _plain(self.value)}
        if self.ci95 is not None:
            row["ci95"] = [_plain(x) for x in self.ci95]
        row["n"] = int(self.n)
        for key in ("unit", "seeds", "note"):
            if getattr(self, key):
                row[key] = getattr(self, key)
        if self.sd is not None:
            row["sd"] = _plain(self.sd)
        return row


def _plain(value: float) -> float:
    number = float(value)
    if not np.isfinite(number):
        raise ConfigError("a result is not a finite number", given=number,
                          expected="a finite number", fix="look at the measurement; nothing is "
                          "written that was not measured")
    return float(f"{number:.6g}")


def about(command: str | Sequence[str] | None = None) -> dict[str, Any]:
    """Who measured: command, commit, machine, versions, date."""
    argv = sys.argv if command is None else command
    text = argv if isinstance(argv, str) else " ".join([Path(argv[0]).name, *argv[1:]])
    return {
        "command": text,
        "commit": commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **versions()},
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that can change a figure."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Short commit of this checkout, with ``+`` if files differ from it; else ``unknown``."""
    root = Path(__file__).resolve().parent.parent
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        dirty = _git(root, "status", "--porcelain", "-uno")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head + ("+" if dirty else "")


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True,
                          timeout=10, check=True).stdout.strip()


def machine() -> str:
    """Processor, number of cores and memory, and the GPU in use if there is one."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    memory = ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    torch = sys.modules.get("torch")
    gpu = f", {torch.cuda.get_device_name()}" if torch and torch.cuda.is_available() else ""
    return f"{os.cpu_count()}x {name}{memory}{gpu}"


def read(path: str | Path) -> dict[str, Any]:
    """Read a results file; a broken one is a named error."""
    path = Path(path)
    try:
        data = json.loads(path.read_text())
        _ = [(row["what"], row["metric"], float(row["value"])) for row in data["rows"]]
        _ = data["about"]["command"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError("not a results file", given=f"{path} ({error!r})",
                           expected='{"about": {"command", ...}, "rows": [{"what", "metric", '
                           '"value"}]}',
                           fix="measure again with the command that wrote it") from None
    return data


def write(
    path: str | Path,
    rows: Iterable[Row],
    command: str | Sequence[str] | None = None,
    merge: bool = True,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``rows`` to ``path`` in one atomic step.

    With ``merge``, rows of an existing file with another (what, metric) stay, and each kept row
    that an earlier command measured says so under ``about``. Commands that end at the same time
    wait for each other, so that none takes away another's rows.
    """
    path = Path(path)
    new = [row.to_json() for row in rows]
    header = {**about(command), **(extra or {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    with one_writer(_waiting_room()):
        if merge and path.exists():
            old = read(path)
            fresh = {(row["what"], row["metric"]) for row in new}
            stamp = {k: old["about"].get(k) for k in ("command", "commit", "machine", "date")}
            new = [{**row, "about": row.get("about", stamp)} for row in old["rows"]
                   if (row["what"], row["metric"]) not in fresh] + new
        atomic_text(path, json.dumps({"about": header, "rows": new}, indent=1) + "\n")
    return path


def _waiting_room() -> Path:
    """A folder of this user's where commands wait for each other: no lock beside the results."""
    user = getattr(os, "getuid", int)()
    folder = Path(tempfile.gettempdir()) / f"worldgym-{user}"
    folder.mkdir(exist_ok=True)
    return folder


def atomic_text(path: str | Path, text: str) -> None:
    """Write ``text`` so that a reader sees the old file or the new one, never a part."""
    atomic_bytes(path, text.encode())


def atomic_bytes(path: str | Path, data: bytes) -> None:
    """Write ``data`` so that a reader sees the old file or the new one, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def by_metric(data: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """(what, metric) -> row of a results file."""
    return {(row["what"], row["metric"]): row for row in data["rows"]}


def figure(row: dict[str, Any] | None, digits: int, within: int | None = None) -> str:
    """A row's value (95 % interval, with ``within`` digits), a dash where there is no row."""
    if row is None:
        return "–"
    text = f"{row['value']:,.{digits}f}"
    if "ci95" in row:
        text += " ({:,.{d}f} to {:,.{d}f})".format(
            *row["ci95"], d=digits if within is None else within)
    return text


def told(row: dict[str, Any] | None, digits: int = 0, counted: str = "n = ") -> str:
    """A row's value ± standard deviation (95 % interval; n), a dash where there is no row."""
    if row is None:
        return "–"
    text = f"{row['value']:,.{digits}f}"
    if "sd" in row:
        text += f" ± {row['sd']:,.{digits}f}"
    if "ci95" in row:
        low, high = row["ci95"]
        text += f" ({low:,.{digits}f} to {high:,.{digits}f}; {counted}{row['n']})"
    return text
