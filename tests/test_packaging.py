"""What is installed is what is in the repository, under one name, and imports stay light."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())


def folders():
    for top, name in (("worldgym", "worldgym"), ("envs", "worldgym.envs"),
                      ("agents", "worldgym.agents")):
        for init in (ROOT / top).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / top).parts
            yield ".".join((name, *inner))


def test_every_package_is_listed():
    assert sorted(folders()) == sorted(CONFIG["tool"]["setuptools"]["packages"])


def test_command_exists():
    module, _, name = CONFIG["project"]["scripts"]["worldgym"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("name", ["envs", "agents"])
def test_no_stray_modules(name):
    code = f"import {name}"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0 and "worldgym" in run.stderr or "No module" in run.stderr


def test_import_is_light():
    code = ("import sys, worldgym, worldgym.agents.cli, worldgym.agents.commands; "
            "heavy = {'torch', 'stable_baselines3', 'matplotlib', 'cv2'} & set(sys.modules);"
            "assert not heavy, heavy")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_files_and_functions_are_small():
    import ast

    long = []
    for top in ("worldgym", "envs", "agents"):
        for path in (ROOT / top).rglob("*.py"):
            text = path.read_text()
            if len(text.splitlines()) > 400:
                long.append(f"{path.name}: {len(text.splitlines())} lines")
    assert not long
    for path in (ROOT / "agents").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno > 50:
                long.append(f"{path.name}:{node.name}")
    assert not long


def test_nothing_large_but_weights():
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, run.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and path.suffix not in (".safetensors", ".zip", ".mp4", ".gif", ".png"):
            assert path.stat().st_size <= 500_000, name
