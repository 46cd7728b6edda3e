"""What is in a file: checkpoint, world folder, agent, data set or results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from worldgym.errors import CheckpointError, DatasetError


def describe(path: str | Path) -> str:
    """A few lines on what ``path`` holds."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError("nothing to inspect", given=path,
                              expected="an existing file or folder", fix="check the path")
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".zip":
        from worldgym.agents.model import read_facts

        facts = read_facts(path)
        return _lines(f"agent {path}", {k: v for k, v in facts.items() if k != "config"})
    if path.suffix == ".json":
        return _json(path)
    from worldgym import checkpoint
    from worldgym.models import wham_checkpoint

    if wham_checkpoint.is_wham(path):
        return _lines(f"checkpoint {path}", wham_checkpoint.describe(path))
    return _lines(f"checkpoint {path}", checkpoint.describe(path))


def _folder(path: Path) -> str:
    if (path / "world.json").is_file():
        card = _read(path / "world.json")
        size = sum(f.stat().st_size for f in path.glob("*.safetensors")) / 2**20
        return _lines(f"world {path} ({size:.1f} MiB)", card)
    if (path / "run.json").is_file():
        run = _read(path / "run.json")
        return _lines(f"training {path}", {**run.get("done", {}), **run.get("run", {})})
    if (path / "index.json").is_file():
        from worldgym.data.store import Episodes

        data = Episodes.open(path)
        return _lines(f"recordings {path}", {"episodes": len(data), "steps": data.steps})
    from worldgym.models import scope_files

    scope = scope_files.find(path)
    if scope is not None:
        return _lines(f"SCOPE, the published FPS world model, in {path}", _flat(scope.facts()))
    from worldgym.models import worldplay_files

    play = worldplay_files.find(path)
    if play is not None:
        return _lines(f"WorldPlay (HY-World 1.5), as published, in {path}", _flat(play.facts()))
    raise CheckpointError("nothing that worldgym wrote or knows", given=path,
                          expected="a world, a training, a data set or published weights",
                          fix="give the folder that holds world.json, run.json, index.json or "
                          "model.safetensors.index.json")


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts of facts on lines of their own."""
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        flat |= {f"{key} {name}".strip().replace("_", " "): v for name, v in inner}
    return flat


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise DatasetError("JSON cannot be read", given=f"{path} ({error})", expected="valid JSON",
                           fix="write the file again") from error


def _json(path: Path) -> str:
    return _lines(str(path), _read(path))


def _lines(title: str, facts: Any) -> str:
    out = [title]
    for key, value in facts.items() if isinstance(facts, dict) else enumerate(facts):
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        out.append(f"  {key}: {text if len(text) < 300 else text[:297] + '...'}")
    return "\n".join(out)
