"""Recorded episodes on disk: a folder of memory-mapped shards and one JSON index.

The index names every shard and episode; whatever it does not name does not exist, so an append
that is killed half-way leaves the data set as it was. Layout of a row: ``worldgym.data.shards``.
Legend: E episodes, R rows, T steps of an episode (T + 1 rows), H W pixels, N player slots.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from worldgym.actions import ActionSpec
from worldgym.data.shards import (
    check_actions,
    check_episode,
    check_flags,
    layout_of,
    open_shard,
    sync_folder,
    write_shard,
)
from worldgym.errors import DatasetError, WorldGymError

try:
    import fcntl
except ImportError:  # Windows: one writer at a time is up to the caller
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
INDEX = "index.json"


class Episodes:
    """A data set of recorded episodes; row numbers run over all shards.

    Attributes: ``lengths_E`` steps per episode and ``starts_E`` first rows (as ``lengths`` and
    ``starts``, int64), ``policies`` and ``seeds`` (lists), ``action``, ``frame_hw``, ``fps``
    (frames per second), ``env`` (how the environment was made), ``fields`` (name -> dtype, shape),
    ``agents`` (player slots N, 0 in recordings of one player).

    >>> import tempfile
    >>> from worldgym.actions import ActionSpec
    >>> row = dict(frames=np.zeros((3, 4, 4, 3), np.uint8), actions=np.array([0, 1, 0]),
    ...            rewards=np.float32([0, 1, 1]), terminated=np.array([False, False, True]),
    ...            truncated=np.zeros(3, bool), seed=7, policy="random")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = Episodes.create(f"{folder}/d", ActionSpec.discrete(2), (4, 4), 10.0, {})
    ...     ids = store.append([row, row])
    ...     print(len(store), store.steps, store.rows, store.take("rewards", [5, 0]).tolist())
    2 4 6 [1.0, 0.0]
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._load()

    @classmethod
    def open(cls, path: str | Path) -> "Episodes":
        """Open an existing data set; ``DatasetError`` when a file is missing or does not fit."""
        return cls(path)

    @classmethod
    def create(cls, path: str | Path, action: ActionSpec, frame_hw: tuple[int, int], fps: float,
               env: Mapping[str, Any], agents: int = 0) -> "Episodes":
        """Start an empty data set in a new or empty folder.

        Args:
            path: folder to make.
            action: layout of the actions.
            frame_hw: height and width of the frames, in pixels.
            fps: frames per second, i.e. environment steps per second.
            env: how the environment was made; plain JSON data.
            agents: player slots, each with its own action and reward; 0: one player, no slots.
        """
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise DatasetError(
                "the folder is not empty", given=str(path), expected="a new or empty folder",
                fix="open it with Episodes.open, or choose another path",
            )
        index = {
            "format": FORMAT, "env": dict(env), "action": asdict(action),
            "frame_hw": [int(n) for n in frame_hw], "fps": float(fps), "info": {}, "shards": [],
        } | ({"agents": int(agents)} if agents else {})
        _parse_head(index, path)
        path.mkdir(parents=True, exist_ok=True)
        _write_index(path, index)
        return cls(path)

    def _load(self) -> None:
        index = _read_index(self.path)
        self.action, self.frame_hw, self.fps, self.env, self.fields = _parse_head(index, self.path)
        self.agents = int(index.get("agents", 0))
        shards, first, starts, lengths, seeds, policies = [], [0], [], [], [], []
        for entry in index["shards"]:
            name, rows, table = _parse_shard(entry, self.path)
            shards.append(open_shard(self.path / name, rows, self.fields))
            starts += [first[-1] + row for row, *_ in table]
            lengths += [steps for _, steps, *_ in table]
            seeds += [seed for *_, seed, _ in table]
            policies += [policy for *_, policy in table]
            first.append(first[-1] + rows)
        self._shards, self._first = shards, np.asarray(first, np.int64)
        self.starts, self.lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
        self.seeds: list[int | None] = seeds
        self.policies: list[str] = policies

    def __reduce__(self) -> tuple:
        return (Episodes, (self.path,))  # workers map the files again, bytes do not travel

    def __repr__(self) -> str:
        return f"Episodes({str(self.path)!r}: {len(self)} episodes, {self.steps} steps)"

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def steps(self) -> int:
        """Environment steps in all episodes."""
        return int(self.lengths.sum())

    @property
    def rows(self) -> int:
        """Rows of every field: steps + episodes."""
        return int(self._first[-1])

    def episode(self, i: int) -> dict[str, Any]:
        """Read-only arrays (T+1, ...) of episode ``i``, plus its ``seed`` and ``policy``."""
        if not -len(self) <= i < len(self):
            raise DatasetError(
                "no such episode", given=i, expected=f"0..{len(self) - 1} ({len(self)} episodes)",
                fix="use range(len(episodes))",
            )
        shard = int(np.searchsorted(self._first, self.starts[i], side="right")) - 1
        row = int(self.starts[i] - self._first[shard])
        part = slice(row, row + int(self.lengths[i]) + 1)
        out: dict[str, Any] = {name: maps[part] for name, maps in self._shards[shard].items()}
        return {**out, "seed": self.seeds[i], "policy": self.policies[i]}

    def take(self, field: str, rows: Any) -> np.ndarray:
        """Copy of ``field`` at global ``rows`` (any shape, any order): shape (*rows.shape, ...).

        Rows are read in ascending order, shard by shard, so that a spinning disk or a network
        file system sees one forward pass.
        """
        if field not in self.fields:
            raise DatasetError(
                "no such field", given=field, expected=f"one of {list(self.fields)}",
                fix="record the field, or pass it as extra= to the sampler",
            )
        wanted = np.asarray(rows)
        if wanted.size and wanted.dtype.kind not in "iu":
            raise DatasetError("row numbers are not integers", given=f"dtype {wanted.dtype}",
                               expected="int64", fix="use np.flatnonzero(mask) for a mask")
        flat = wanted.ravel().astype(np.int64)
        if flat.size and (flat.min() < 0 or flat.max() >= self.rows):
            raise DatasetError(
                "row number out of range", given=f"{flat.min()}..{flat.max()}",
                expected=f"0..{self.rows - 1}", fix="rows come from starts and lengths",
            )
        dtype, shape = self.fields[field]
        order = np.argsort(flat, kind="stable")
        ordered = flat[order]
        cuts = np.searchsorted(ordered, self._first)
        out = np.empty((flat.size, *shape), dtype)
        for shard, (lo, hi) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
            if hi > lo:
                out[order[lo:hi]] = self._shards[shard][field][ordered[lo:hi] - self._first[shard]]
        return out.reshape((*wanted.shape, *shape))

    def split(self, holdout: float = 0.05, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Episode numbers (train, held out), ascending.

        Every episode draws its own side, so an append never moves an old episode across; with two
        episodes or more both sides have at least one.
        """
        if len(self) < 2 or not 0 < holdout < 1:
            raise DatasetError(
                "cannot hold episodes out", given=f"{len(self)} episodes, holdout {holdout}",
                expected="at least 2 episodes and 0 < holdout < 1", fix="record more episodes",
            )
        draws = np.random.default_rng(seed).random(len(self))
        held = draws < holdout
        held[np.argmin(draws)] = True
        held[np.argmax(draws)] = False
        return np.flatnonzero(~held), np.flatnonzero(held)

    def append(self, episodes: Sequence[Mapping[str, Any]]) -> range:
        """Add episodes as one new shard; all of them or, on any failure, none.

        Args:
            episodes: each maps every field to an array of T+1 rows, ``seed`` to an int or None and
                ``policy`` to a name. The first append fixes which ``info_*`` fields there are.

        Returns:
            the numbers of the new episodes.
        """
        if not len(episodes):
            raise DatasetError("nothing to append", given="0 episodes", expected="at least 1",
                               fix="skip the call when nothing was recorded")
        with one_writer(self.path):
            self._load()  # another process may have appended
            index = _read_index(self.path)
            if not index["shards"]:
                extra = {k: np.asarray(v) for k, v in episodes[0].items() if k.startswith("info_")}
                index["info"] = {k: [v.dtype.str, list(v.shape[1:])] for k, v in extra.items()}
            table = layout_of(self.action, self.frame_hw, index["info"], self.agents)
            checked = [
                check_episode(e, self.action, table, f"episode {i} of the list", self.agents)
                for i, e in enumerate(episodes)
            ]
            before, name = len(self), f"shard-{len(index['shards']):05d}"
            for left in (*self.path.glob(".tmp-*"), self.path / name):  # of a killed append
                if left.is_dir():
                    shutil.rmtree(left)
            temporary = self.path / f".tmp-{name}"
            write_shard(temporary, checked, table)
            os.rename(temporary, self.path / name)
            sync_folder(self.path)
            entries, row = [], 0
            for episode in checked:
                steps = len(episode["frames"]) - 1
                entries.append([row, steps, episode["seed"], episode["policy"]])
                row += steps + 1
            index["shards"].append({"name": name, "rows": row, "episodes": entries})
            _write_index(self.path, index)
            self._load()
        return range(before, len(self))

    append_episodes = append

    def one_player(self) -> "Episodes":
        """Itself, if it has no player slots; else a DatasetError, for what knows one player."""
        if self.agents:
            raise DatasetError("a recording of several players", expected="one player",
                               given=f"{self.path} with {self.agents} slots",
                               fix="read it with worldgym.data.party")
        return self

    def verify(self) -> None:
        """Read everything but the frames and refuse flags, rewards or actions without sense."""
        for i in range(len(self)):
            data = self.episode(i)
            flags = data["terminated"], data["truncated"]
            check_flags(*flags, data["rewards"], data["actions"], f"episode {i}", self.agents)
            check_actions(data["actions"][1:], self.action, self.agents)


@contextmanager
def one_writer(path: Path) -> Iterator[None]:
    """One process at a time writes in this folder; the lock dies with its process."""
    if fcntl is None:
        yield
        return
    with open(path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_index(path: Path, index: dict) -> None:
    temporary = path / f".{INDEX}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(index, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path / INDEX)
    sync_folder(path)


def _read_index(path: Path) -> dict:
    file = path / INDEX
    if not file.is_file():
        raise DatasetError(
            "no data set here", given=str(path), expected=f"a folder with {INDEX}",
            fix="check the path, or start one with Episodes.create",
        )
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DatasetError(
            "the index is not JSON", given=f"{file}, {file.stat().st_size} bytes ({error})",
            expected="the index that Episodes.create wrote", fix="restore index.json from a copy",
        ) from error
    form = index.get("format") if isinstance(index, dict) else None
    if form != FORMAT:
        raise DatasetError(
            "unknown data set format", given=f"format {form!r} in {file}", expected=f"{FORMAT}",
            fix="open it with the version of worldgym that wrote it",
        )
    return index


def _parse_head(index: dict, path: Path) -> tuple[ActionSpec, tuple[int, int], float, dict, dict]:
    """Action, frame size, frames per second, environment and fields of a raw index."""
    try:
        json.dumps(index)
        action = ActionSpec.from_json(index["action"])
        (height, width), fps = (int(n) for n in index["frame_hw"]), float(index["fps"])
        if height < 1 or width < 1 or not 0 < fps < float("inf"):
            raise ValueError(f"frame_hw {(height, width)}, fps {fps}")
        if not isinstance(index["shards"], list):
            raise TypeError("shards is not a list")
        fields = layout_of(action, (height, width), index.get("info", {}), index.get("agents", 0))
        return action, (height, width), fps, dict(index["env"]), fields
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DatasetError):
            raise
        named = isinstance(error, WorldGymError)
        reason = str(error) if named else f"{type(error).__name__}: {error}"
        raise DatasetError(
            "the description of the data set is inconsistent", given=f"{path}: {reason}",
            expected="env (JSON data), action, frame_hw [H, W] >= 1, fps > 0, shards",
            fix="correct the arguments, or restore index.json from a copy",
        ) from error


def _parse_shard(entry: Any, path: Path) -> tuple[str, int, list]:
    """Name, rows and episode table of one shard; the episodes must tile the rows exactly."""
    try:
        name, rows, table = entry["name"], entry["rows"], entry["episodes"]
        row = 0
        for first, steps, seed, policy in table:
            numbers = isinstance(first, int) and isinstance(steps, int)
            if not numbers or first != row or steps < 1 or not isinstance(policy, str) or not (
                seed is None or isinstance(seed, int)
            ):
                raise ValueError(f"episode {[first, steps, seed, policy]} at row {row}")
            row += steps + 1
        if row != rows or not table or Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"shard {name!r}: episodes cover {row} of {rows} rows")
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(
            "a shard in the index is inconsistent", given=f"{path}: {error}",
            expected="episodes [first_row, steps, seed, policy] that cover every row once",
            fix="restore index.json from a copy",
        ) from error
    return name, rows, table
