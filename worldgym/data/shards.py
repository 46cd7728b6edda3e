"""One shard of recorded episodes: a folder with one memory-mapped ``.npy`` per field.

Rows are aligned: row t of an episode holds frame t AND the action that led to it from frame t-1,
the reward received on arriving, and the end flags. Row 0 has the zero (null) action.
Legend: R rows, H W pixels, N player slots; an episode of T steps has T + 1 rows.

A recording of several players (``agents`` = N > 0) has one action and one reward per slot: actions
int16 (N,), ``ABSENT`` in slots nobody takes and in row 0, rewards float32 (N,). All else is shared.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from worldgym.actions import ActionSpec
from worldgym.errors import DatasetError

Layout = dict[str, tuple[np.dtype, tuple[int, ...]]]
INFO_KINDS = "biuf"
ABSENT = -1


def layout_of(
    action: ActionSpec, frame_hw: tuple[int, int], info: Mapping[str, Sequence], agents: int = 0
) -> Layout:
    """Dtype and row shape of every field; ``info`` maps ``info_*`` names to (dtype, shape)."""
    if agents < 0 or (agents and (action.kind != "discrete" or action.start)):
        raise DatasetError(
            "impossible player slots", given=f"{agents} with {action.kind} actions",
            expected="0 (one player) or more, several only with Discrete(n) from 0",
            fix="give every player one discrete action",
        )
    slots = (agents,) if agents else ()
    table: Layout = {
        "frames": (np.dtype(np.uint8), (*frame_hw, 3)),
        "actions": (np.dtype(np.int16) if agents else action.dtype, (*slots, *action.shape)),
        "rewards": (np.dtype(np.float32), slots),
        "terminated": (np.dtype(bool), ()),
        "truncated": (np.dtype(bool), ()),
    }
    for name, (dtype, shape) in sorted(info.items()):
        kind = np.dtype(dtype)
        if not name.startswith("info_") or not name.isidentifier() or kind.kind not in INFO_KINDS:
            raise DatasetError(
                "bad extra field", given=f"{name} of dtype {kind}",
                expected="a name info_* made of letters, digits and _, and a numeric dtype",
                fix="rename the field, or record it as numbers",
            )
        table[name] = (kind, tuple(int(n) for n in shape))
    return table


def check_actions(actions: np.ndarray, action: ActionSpec, agents: int) -> None:
    """Refuse actions (rows T, the first row left out) outside their space."""
    if not agents:
        action.check(actions)
        return
    taken = actions[0] != ABSENT
    flat = actions[:, taken].ravel()  # a slot that is taken acts at every step
    action.check(flat)
    if (actions[:, ~taken] != ABSENT).any():
        raise DatasetError(
            "a player joins in the middle", given=f"slots taken at first: {taken.tolist()}",
            expected=f"{ABSENT} at every step of a free slot, an action at every step of others",
            fix="begin a new episode when somebody joins; record noop for players who are out",
        )


def check_flags(terminated: np.ndarray, truncated: np.ndarray, rewards: np.ndarray,
                actions: np.ndarray, label: str, agents: int = 0) -> None:
    """Refuse one episode (rows T+1) whose ends, rewards or first row make no sense."""
    for name, flags in (("terminated", terminated), ("truncated", truncated)):
        early = np.flatnonzero(flags[:-1])
        if len(early):
            raise DatasetError(
                f"{name} is set before the last row", given=f"{label}, row {early[0]}",
                expected=f"at most the last of {len(flags)} rows",
                fix="cut the recording into one episode per reset",
            )
    if not np.isfinite(rewards).all():
        raise DatasetError(
            "reward is not finite",
            given=f"{label}, row {np.argwhere(~np.isfinite(rewards))[0][0]}",
            expected="finite numbers", fix="look at the environment's reward",
        )
    if (actions[0] != (ABSENT if agents else 0)).any() or (rewards[0] != 0).any():
        raise DatasetError(
            "row 0 is not a reset row", given=f"{label}: action {actions[0]}, reward {rewards[0]}",
            expected=f"action {ABSENT if agents else 0}, reward 0: nothing led to the first frame",
            fix="put the action and reward of step t on row t + 1, beside the frame it led to",
        )


def check_episode(episode: Mapping, action: ActionSpec, table: Layout, label: str,
                  agents: int = 0) -> dict:
    """Arrays of one episode in the dtypes of ``table``, plus ``seed`` and ``policy``."""
    fields = set(episode) - {"seed", "policy"}
    if fields != set(table) or "policy" not in episode or "seed" not in episode:
        raise DatasetError(
            "episode has the wrong fields", given=f"{label}: {sorted(episode)}",
            expected=f"{[*table, 'seed', 'policy']}",
            fix="record every field for every episode of a data set",
        )
    seed, policy = episode["seed"], episode["policy"]
    if not isinstance(policy, str) or isinstance(seed, (bool, np.bool_)) or not (
        seed is None or isinstance(seed, (int, np.integer))
    ):
        raise DatasetError(
            "seed or policy of the wrong type", given=f"{label}: seed {seed!r}, policy {policy!r}",
            expected="seed: int or None; policy: str", fix="pass the reset seed and a policy name",
        )
    rows = len(np.asarray(episode["frames"]))
    out: dict = {"seed": None if seed is None else int(seed), "policy": policy}
    for name, (dtype, shape) in table.items():
        array = np.asarray(episode[name])
        whole = dtype == np.int64 and array.dtype.kind in "iu" and array.dtype != np.uint64
        if array.dtype != dtype and not whole:
            raise DatasetError(
                f"{name} has the wrong dtype", given=f"{label}: {array.dtype}", expected=str(dtype),
                fix=f"convert on purpose, e.g. array.astype(np.{dtype.name})",
            )
        if array.shape != (rows, *shape) or rows < 2:
            raise DatasetError(
                f"{name} has the wrong shape", given=f"{label}: {array.shape}",
                expected=f"(T + 1, {', '.join(map(str, shape))}), T >= 1, frames have {rows} rows",
                fix="an episode of T steps has T + 1 rows in every field",
            )
        out[name] = array.astype(dtype, copy=False)
    check_actions(out["actions"][1:], action, agents)
    check_flags(out["terminated"], out["truncated"], out["rewards"], out["actions"], label, agents)
    return out


def write_shard(folder: Path, episodes: Sequence[Mapping], table: Layout) -> None:
    """Write checked episodes into a new ``folder``, one file per field, and flush to disk."""
    folder.mkdir()
    rows = sum(len(e["frames"]) for e in episodes)
    for name, (dtype, shape) in table.items():
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False,
                  "shape": (rows, *shape)}
        with open(folder / f"{name}.npy", "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for episode in episodes:  # never the whole shard in memory twice
                file.write(np.ascontiguousarray(episode[name]).data)
            file.flush()
            os.fsync(file.fileno())
    sync_folder(folder)


def open_shard(folder: Path, rows: int, table: Layout) -> dict[str, np.ndarray]:
    """Memory maps of every field, checked against the index: presence, size, dtype, shape."""
    return {name: _open_field(folder / f"{name}.npy", rows, *spec) for name, spec in table.items()}


def _open_field(path: Path, rows: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    where = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        raise DatasetError(
            "a file of the data set is missing", given=str(path),
            expected=f"{rows} rows of {dtype}",
            fix="copy the whole folder again, or record again",
        )
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0}[version]
            have_shape, fortran, have = read(file)
            start = file.tell()
    except (ValueError, KeyError, EOFError, OSError) as error:
        raise DatasetError(
            "a file of the data set is not a .npy array",
            given=f"{where}, {size} bytes ({error})", expected="a NumPy 1.0 or 2.0 array file",
            fix="copy the file again, or record again",
        ) from error
    if have != dtype or have_shape != (rows, *shape) or fortran:
        raise DatasetError(
            "a file does not match index.json", given=f"{where}: {have} {have_shape}",
            expected=f"{dtype} {(rows, *shape)}, C order",
            fix="restore the shard and its index.json from the same recording",
        )
    need = start + rows * int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size != need:
        raise DatasetError(
            "a file of the data set is truncated" if size < need else "a file has trailing bytes",
            given=f"{where}: {size} bytes", expected=f"{need} bytes for {rows} rows",
            fix="copy the file again, or record again",
        )
    return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=(rows, *shape))


def sync_folder(folder: Path) -> None:
    """Make names in ``folder`` survive a power cut."""
    if os.name == "nt":  # Windows cannot open folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
