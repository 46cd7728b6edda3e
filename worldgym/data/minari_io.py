"""Minari data sets in and out, bit for bit (needs ``pip install 'worldgym[minari]'``).

Minari stores images as lossy JPEG unless told otherwise and its ``DataCollector`` needs JAX, so
both directions go through its storage classes, one episode in memory at a time.
A Minari episode of T steps has T+1 observations but T actions, rewards and flags; ours have T+1
rows of everything, the first one empty.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from worldgym.actions import ActionSpec
from worldgym.data.store import Episodes
from worldgym.errors import DatasetError, MissingDependencyError

META = "worldgym"  # our key in Minari's metadata.json
SHARD_BYTES = 256 << 20  # frames of one imported shard


def _minari() -> tuple[Any, Any, str]:
    """``MinariStorage``, ``EpisodeBuffer`` and the version of Minari."""
    try:
        import h5py  # noqa: F401  (Minari itself imports without it, then fails late)
        import minari
        from minari.data_collector import EpisodeBuffer
        from minari.dataset.minari_storage import MinariStorage
    except ImportError as error:
        raise MissingDependencyError(
            "Minari is needed to read or write its data sets", given=str(error),
            expected="minari with HDF5", fix="pip install 'worldgym[minari]'",
        ) from error
    return MinariStorage, EpisodeBuffer, minari.__version__


def export_minari(episodes: Episodes, path: str | Path, dataset_id: str) -> Path:
    """Write ``episodes`` as a Minari data set in a new folder ``path``; returns the path.

    Open it with ``minari.MinariDataset(path)``; ``minari.load_dataset(dataset_id)`` finds it when
    ``path`` is ``$MINARI_DATASETS_PATH/<dataset_id>/data``.

    Args:
        episodes: at least one episode.
        path: must not exist; appears only when everything is written.
        dataset_id: Minari's name, ``(namespace/)name-v0``.
    """
    storage_class, buffer_class, version = _minari()
    from minari.dataset.minari_dataset import parse_dataset_id

    try:
        parse_dataset_id(dataset_id)
    except ValueError as error:
        raise DatasetError("bad Minari data set id", given=repr(dataset_id),
                           expected="(namespace/)name-v0", fix="e.g. 'worldgym/pong-v0'") from error
    path, episodes = Path(path), episodes.one_player()
    if path.exists() or not len(episodes):
        raise DatasetError(
            "cannot export", given=f"{len(episodes)} episodes to {path}",
            expected="at least one episode and a path that does not exist",
            fix="choose a new folder",
        )
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # of a killed export
    part.mkdir(parents=True)
    storage = storage_class.new(part, *_spaces(episodes), jpeg_encoding=False)
    info = [name for name in episodes.fields if name.startswith("info_")]
    storage.update_metadata({
        "dataset_id": dataset_id, "minari_version": version,
        META: {"format": 1, "env": episodes.env, "fps": episodes.fps,
               "action": asdict(episodes.action)},
    })
    storage.update_episodes(_buffers(episodes, info, buffer_class))
    storage.update_episode_metadata([{"policy": name} for name in episodes.policies])
    os.rename(part, path)
    return path


def _spaces(episodes: Episodes) -> tuple[Any, Any]:
    """Gymnasium observation and action space of the data set."""
    from gymnasium.spaces import Box

    from worldgym.envs.spaces import action_space  # the Gymnasium side; only needed here

    return Box(0, 255, (*episodes.frame_hw, 3), np.uint8), action_space(episodes.action)


def _buffers(episodes: Episodes, info: list[str], buffer_class: Any) -> Iterator[Any]:
    for i in range(len(episodes)):
        data = episodes.episode(i)
        yield buffer_class(
            id=i, seed=data["seed"], observations=data["frames"], actions=data["actions"][1:],
            rewards=data["rewards"][1:], terminations=data["terminated"][1:],
            truncations=data["truncated"][1:],
            infos={name[5:]: data[name] for name in info} or None,
        )


def import_minari(source: str | Path, path: str | Path, *, fps: float | None = None,
                  observation_key: str | None = None, infos: bool = True,
                  round_floats: bool = False) -> Episodes:
    """Read a Minari data set of images into a new data set at ``path``.

    Args:
        source: folder that holds Minari's ``metadata.json``.
        path: a new or empty folder; holds nothing before everything is imported.
        fps: frames per second; needed unless worldgym exported ``source``.
        observation_key: which entry of a Dict observation is the image.
        infos: also import the infos; they must be numbers with T+1 rows.
        round_floats: allow rewards and actions that float32 cannot hold exactly to be rounded.

    Raises:
        DatasetError: not images, or something cannot be imported without loss.
    """
    storage_class, _, _ = _minari()
    try:
        storage = storage_class.read(source)
    except (ValueError, AssertionError, KeyError) as error:
        raise DatasetError("not a Minari data set", given=f"{source} ({error})",
                           expected="a folder with metadata.json and its data",
                           fix="pass the folder named data inside the data set") from error
    space = storage.observation_space
    if observation_key is not None:
        space = getattr(space, "spaces", {}).get(observation_key)
    shape: Any = getattr(space, "shape", None) or ()
    if len(shape) != 3 or shape[2] != 3 or space.dtype != np.uint8:
        raise DatasetError(
            "observations are not RGB images", given=space, expected="Box of uint8 (H, W, 3)",
            fix="name the image of a Dict with observation_key=, or record rendered frames",
        )
    raw = storage.metadata
    head = raw.get(META, {})
    fps = head.get("fps") if fps is None else fps
    if fps is None:
        raise DatasetError("frames per second are unknown", given=str(source), expected="fps=",
                           fix="pass the steps per second of the recorded environment")
    env = head.get("env") or {"minari": raw.get("dataset_id"), "env_spec": raw.get("env_spec"),
                              "jpeg": storage.jpeg_encoding}
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DatasetError("the folder is not empty", given=str(path),
                           expected="a new or empty folder", fix="choose another path")
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # of a killed import
    out = Episodes.create(part, _action(head, storage.action_space), shape[:2], fps, env)
    batch, size = [], 0
    ids = range(storage.total_episodes)
    policy = raw.get("algorithm_name") or "unknown"
    for data, notes in zip(storage.get_episodes(ids), storage.get_episode_metadata(ids),
                           strict=True):
        frames = data["observations"]
        data["observations"] = frames if observation_key is None else frames[observation_key]
        episode = _episode(data, out.action, infos, round_floats)
        episode.update(seed=notes.get("seed"), policy=str(notes.get("policy", policy)))
        batch.append(episode)
        size += episode["frames"].nbytes
        if size >= SHARD_BYTES:
            out.append(batch)
            batch, size = [], 0
    if batch:
        out.append(batch)
    os.rename(part, path)
    return Episodes.open(path)


def _action(head: dict, space: Any) -> ActionSpec:
    if "action" in head:
        return ActionSpec.from_json(head["action"])
    from worldgym.envs.spaces import action_spec  # the Gymnasium side; only needed here

    return action_spec(space)


def _episode(data: dict, action: ActionSpec, infos: bool, round_floats: bool) -> dict[str, Any]:
    """One Minari episode with the empty first row put before actions, rewards and flags."""
    label = f"episode {data['id']}"
    steps = len(data["rewards"])
    wanted = {"actions": action.dtype, "rewards": np.dtype(np.float32)}
    out: dict[str, Any] = {"frames": np.asarray(data["observations"])}
    for name, source in (("actions", "actions"), ("rewards", "rewards"),
                         ("terminated", "terminations"), ("truncated", "truncations")):
        array = np.asarray(data[source])
        dtype = wanted.get(name, np.dtype(bool))
        exact = array.astype(dtype)
        if not round_floats and not np.array_equal(exact, array, equal_nan=dtype.kind == "f"):
            raise DatasetError(
                f"{dtype} cannot hold the {name} exactly", given=f"{label}: {array.dtype}",
                expected=f"values that {dtype} can hold",
                fix="pass round_floats=True to accept the rounding",
            )
        out[name] = np.concatenate([np.zeros((1, *exact.shape[1:]), dtype), exact])
    for key, value in ((data.get("infos") or {}) if infos else {}).items():
        array = np.asarray(value) if not isinstance(value, dict) else np.asarray(None)
        if array.dtype.kind not in "biuf" or array.shape[:1] != (steps + 1,):
            raise DatasetError(
                "an info cannot be imported",
                given=f"{label}: {key!r}, {array.dtype} {array.shape}",
                expected=f"numbers with {steps + 1} rows", fix="pass infos=False to leave them out",
            )
        out[f"info_{key}"] = array
    return out
