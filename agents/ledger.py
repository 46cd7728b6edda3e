"""The folder of an evaluation: its settings, and every block of episodes as soon as it is over.

Shapes: K policies, N episodes of a block, S steps of all of them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldgym.agents.results import atomic_bytes, atomic_text
from worldgym.agents.score import Played
from worldgym.errors import ConfigError, DatasetError

SETTINGS = "settings.json"


class Ledger:
    """Blocks of finished episodes on disk; each file appears whole or not at all.

    Args:
        folder: made if it is not there.
        settings: everything the numbers depend on, as plain data.

    Raises:
        ConfigError: the folder was begun with other settings; the message names them.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.settings = json.loads(json.dumps(settings))
        (self.folder / "blocks").mkdir(parents=True, exist_ok=True)
        path = self.folder / SETTINGS
        if not path.exists():
            atomic_text(path, json.dumps(self.settings, indent=1) + "\n")
            return
        try:
            begun = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise DatasetError("evaluation settings are broken", given=f"{path} ({error})",
                               expected="the file that worldgym evaluate wrote",
                               fix="delete the folder, or choose another --out") from None
        keys = sorted(k for k in {*begun, *self.settings}
                      if begun.get(k) != self.settings.get(k))
        if keys:
            raise ConfigError(
                "this folder holds an evaluation with other settings",
                given=f"{self.folder}, now with { {k: self.settings.get(k) for k in keys} }",
                expected=f"{ {k: begun.get(k) for k in keys} }, as it was begun",
                fix="choose another --out, or give the settings it was begun with")

    def _path(self, place: str, block: range) -> Path:
        return self.folder / "blocks" / f"{place}-{block.start:06d}-{block.stop:06d}.npz"

    def write(self, place: str, block: range, played: Sequence[Played]) -> None:
        """Keep what every policy did in the episodes of ``block``."""
        buffer = io.BytesIO()
        told = [p.drawn for p in played if p.drawn is not None]
        drawn: dict[str, Any] = {"drawn_KN": np.stack(told)} if told else {}
        np.savez_compressed(
            buffer, rewards_S=np.concatenate([r for p in played for r in p.rewards]),
            lengths_KN=np.stack([p.lengths for p in played]),
            truncated_KN=np.stack([np.asarray(p.truncated) for p in played]), **drawn)
        atomic_bytes(self._path(place, block), buffer.getvalue())

    def read(self, place: str, block: range, names: Sequence[str],
             seeds: Sequence[int]) -> list[Played] | None:
        """What every policy did in ``block``; None if it has not been played.

        Raises:
            DatasetError: the file is not one that ``write`` made for these policies.
        """
        path = self._path(place, block)
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as data:
                drawn = data["drawn_KN"] if "drawn_KN" in data else None
                rewards_S, lengths, cut = (data[k] for k in ("rewards_S", "lengths_KN",
                                                              "truncated_KN"))
            fits = lengths.shape == cut.shape == (len(names), len(block))
            if not fits or lengths.sum() != len(rewards_S) or not np.isfinite(rewards_S).all():
                raise ValueError(f"lengths {lengths.shape}, {len(rewards_S)} rewards")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DatasetError("a block of episodes is broken", given=f"{path} ({error})",
                               expected=f"{len(block)} episodes of {len(names)} policies",
                               fix="delete that file; the same command plays it again") from None
        steps = np.split(rewards_S, np.cumsum(lengths.ravel())[:-1])
        n = len(block)
        return [Played.of(name, place, [int(seeds[e]) for e in block], steps[k * n:(k + 1) * n],
                          cut[k], None if drawn is None else drawn[k])
                for k, name in enumerate(names)]


def fingerprint(source: str) -> str:
    """Hash of the file that a policy's name points to; empty where it points to none.

    >>> fingerprint("sticky:0.2")
    ''
    """
    source = re.sub(r"^(noisy:[^:]*:)+", "", source)
    head, _, function = source.rpartition(":")
    file = Path(source if source.endswith(".zip") else head)
    if function and head and not head.endswith(".py"):
        try:
            spec = importlib.util.find_spec(head)
        except (ImportError, ValueError):
            return ""
        file = Path(spec.origin) if spec is not None and spec.origin else Path()
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else ""
