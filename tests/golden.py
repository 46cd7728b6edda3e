"""Golden runner: reproduce tensors that published implementations made.

    python tests/golden.py DIR [DIR...]

finds the ``NAME.json`` / ``NAME.safetensors`` pairs below each folder, runs the function that
``KINDS`` holds for the pair's ``kind`` and prints one line a pair:

    system case max_abs_err tolerance ok|FAIL

An error is within tolerance where ``|got - ref| <= atol + rtol |ref|`` element by element. A kind
that is unknown, half a pair, a broken file or an empty folder is a FAIL; any FAIL exits with 1.

Further systems add a file ``tests/golden_NAME.py`` with a table ``KINDS`` and a line in ``TABLES``;
kinds in its set ``JSON_ONLY`` (if it has one) need no tensor file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

# modules beside this file, each with a dict KINDS
TABLES = ("golden_wan", "golden_scope", "golden_scope_dit", "golden_wham", "golden_worldplay",
          "golden_worldplay_poses")
DEFAULT_ATOL = 1e-4


class FixtureError(Exception):
    """A fixture cannot be used; the message says what is wrong with it."""


class Check(NamedTuple):
    """One comparison: what is compared, what we computed, what the fixture holds.

    ``tolerance``: (atol, rtol) where it is not that of the fixture.
    """

    name: str
    got: Tensor
    want: Tensor
    tolerance: tuple[float, float] | None = None


@dataclass
class Fixture:
    """A fixture pair: the JSON as ``meta``, the tensors by name."""

    folder: Path
    stem: str
    meta: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise FixtureError(f"{self.stem}.safetensors has no tensor {name!r}")
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def get(self, *names: str) -> Any:
        """The first of these JSON fields that is there."""
        for name in names:
            if name in self.meta:
                return self.meta[name]
        raise FixtureError(f"{self.stem}.json has no field {' or '.join(map(repr, names))}")

    def state_dict(self) -> dict[str, Tensor]:
        """The weights: ``sd.*`` here, or as the field ``state_dict`` says ("sd.* of FILE")."""
        where, source, pattern = self.meta.get("state_dict"), self.tensors, "sd.*"
        if where is not None:
            found = re.fullmatch(r"\s*(\S*\*)\s+of\s+(\S+\.safetensors)\s*", str(where))
            if not found:
                raise FixtureError(f"field state_dict is not 'PREFIX* of FILE': {where!r}")
            pattern, name = found.groups()
            source = _tensors(self.folder / name)
        prefix = pattern.removesuffix("*")
        weights = {k.removeprefix(prefix): v for k, v in source.items() if k.startswith(prefix)}
        if not weights:
            raise FixtureError(f"no tensor {pattern} for {self.stem}")
        return weights

    def tolerance(self) -> tuple[float, float]:
        """(atol, rtol): the field ``tolerance``, a number or a dict, or atol and rtol beside it.

        1e-4 and 0 if the JSON names none.
        """
        given = self.meta.get("tolerance", self.meta)
        if not isinstance(given, dict):
            given = {"atol": given}
        atol, rtol = given.get("atol"), given.get("rtol")
        if not all(value is None or isinstance(value, int | float) for value in (atol, rtol)):
            raise FixtureError(f"{self.stem}.json: tolerance is not a number: {given}")
        if atol is None:
            atol = 0.0 if rtol is not None else DEFAULT_ATOL
        return float(atol), float(rtol or 0.0)


class Result(NamedTuple):
    """One printed line."""

    system: str
    case: str
    error: float
    tolerance: float
    reason: str  # empty: ok

    def line(self) -> str:
        verdict = f"FAIL  ({self.reason})" if self.reason else "ok"
        return f"{self.system} {self.case} {self.error:.3e} {self.tolerance:.3e} {verdict}"


Run = Callable[[Fixture], Iterable[Check]]


def kinds() -> dict[str, Run]:
    """Every kind that can be run, from all ``TABLES``."""
    table: dict[str, Run] = {}
    for name in TABLES:
        table.update(importlib.import_module(name).KINDS)
    return table


def json_only() -> set[str]:
    """Kinds that need no tensor file."""
    return {kind for name in TABLES
            for kind in getattr(importlib.import_module(name), "JSON_ONLY", ())}


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FixtureError(f"{path.name} is missing")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise FixtureError(f"{path.name} is broken: {error}") from error


def _meta(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FixtureError(f"{path.name} is missing")
    try:
        meta = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FixtureError(f"{path.name} is broken: {error}") from error
    if not isinstance(meta, dict) or not isinstance(meta.get("kind"), str):
        raise FixtureError(f"{path.name} has no kind")
    return meta


def stems(folder: Path) -> list[Path]:
    """Paths without suffix of all pairs below a folder, half pairs included.

    A tensor file without JSON that another JSON of its folder names, or NAME_weights beside
    NAME_io.json, holds weights only: no pair.
    """
    jsons = [p for p in folder.rglob("*.json") if not p.name.endswith(".index.json")]
    found = {p.with_suffix("") for p in jsons}
    for path in folder.rglob("*.safetensors"):
        beside = [p for p in jsons if p.parent == path.parent]
        owner = re.sub(r"_weights$", "_io", path.stem)
        if owner != path.stem and path.with_name(owner + ".json") in beside:
            continue
        if not any(path.name in p.read_text(errors="replace") for p in beside):
            found.add(path.with_suffix(""))
    return sorted(found)


def run_case(base: Path, table: dict[str, Run]) -> Result:
    """Run one pair; whatever goes wrong becomes a FAIL with its reason."""
    system, case = base.parent.name, f"{base.parent.name}/{base.name}"
    tolerance = DEFAULT_ATOL
    try:
        meta = _meta(base.with_name(base.name + ".json"))
        system = meta["kind"].partition(".")[0]
        fixture = Fixture(base.parent, base.name, meta)
        run = table.get(meta["kind"])
        if run is None:
            raise FixtureError(f"unknown kind {meta['kind']!r}")
        path = base.with_name(base.name + ".safetensors")
        if path.exists() or meta["kind"] not in json_only():
            fixture.tensors = _tensors(path)
        with torch.no_grad():
            error, tolerance, reason = judge(run(fixture), fixture.tolerance)
        return Result(system, case, error, tolerance, reason)
    except FixtureError as error:
        return Result(system, case, float("nan"), tolerance, str(error))
    except Exception as error:  # a runner reports; it does not stop at the first bad case
        text = " ".join(str(error).split())[:300]
        return Result(system, case, float("nan"), tolerance, f"{type(error).__name__}: {text}")


def judge(
    checks: Iterable[Check], usual: Callable[[], tuple[float, float]]
) -> tuple[float, float, str]:
    """(largest error, tolerance at that place, first reason to fail or "") over all checks."""
    largest, there, reasons = -1.0, DEFAULT_ATOL, []
    for name, got, want, own in checks:
        atol, rtol = own or usual()
        got, want = got.detach().double().cpu(), want.double()
        if reason := _unfit(got, want):
            reasons.append(f"{name}: {reason}")
            continue
        errors, allowed = (got - want).abs().flatten(), (atol + rtol * want.abs()).flatten()
        place = int(errors.argmax())
        if float(errors[place]) > largest:
            largest, there = float(errors[place]), float(allowed[place])
        if bool((errors > allowed).any()):
            ratio = float((errors / allowed.clamp_min(1e-300)).max())
            reasons.append(f"{name}: {ratio:.3g} times the tolerance")
    if largest < 0 and not reasons:
        reasons.append("nothing was compared")
    return (largest if largest >= 0 else float("nan")), there, reasons[0] if reasons else ""


def _unfit(got: Tensor, want: Tensor) -> str:
    """Why two tensors cannot be compared, or ""."""
    if got.shape != want.shape:
        return f"shape {[*got.shape]}, reference {[*want.shape]}"
    if not want.numel():
        return "the reference is empty"
    if not bool(torch.isfinite(want).all()):
        return "the reference is not finite"
    return "" if bool(torch.isfinite(got).all()) else "our value is not finite"


def run(folders: Sequence[str | Path]) -> Iterator[Result]:
    """Results of every pair below the folders."""
    table = kinds()
    for folder in map(Path, folders):
        bases = stems(folder) if folder.is_dir() else []
        if not bases:
            why = "holds no fixtures" if folder.is_dir() else "is not a folder"
            yield Result("golden", folder.name, float("nan"), DEFAULT_ATOL, f"{folder} {why}")
        for base in bases:
            yield run_case(base, table)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dirs", nargs="+", metavar="DIR", help="folder with fixture pairs")
    failed = total = 0
    for result in run(parser.parse_args(argv).dirs):
        print(result.line(), flush=True)
        total, failed = total + 1, failed + bool(result.reason)
    print(f"{total - failed} of {total} ok", file=sys.stderr)
    return 1 if failed or not total else 0


if __name__ == "__main__":
    if __spec__ is None:  # golden_NAME.py import this module by name: let them find this one
        sys.modules["golden"] = sys.modules["__main__"]
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    sys.exit(main())
