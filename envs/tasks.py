"""A task: a world, what it pays, when it ends, where it starts, and the real game behind it."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from worldgym.errors import CheckpointError, ConfigError

PACKAGED = Path(__file__).resolve().parent / "worlds"

# id -> folder of the shipped world and the facts that belong to the task, not to the network
TASKS: dict[str, dict[str, Any]] = {
    "worldgym/TakeCover-v0": {
        "folder": PACKAGED / "take_cover",
        "horizon": 525,  # agent steps: the real game stops after 2,100 tics, 4 tics a step
        "twin": "VizdoomTakeCover-v1",
    },
    "worldgym/TakeCover-WHAM-v0": {
        "folder": PACKAGED / "take_cover_wham", "horizon": 525, "twin": "VizdoomTakeCover-v1"},
    "worldgym/Rooms-v0": {"folder": PACKAGED / "rooms"},
}


def place(name: str | Path) -> Path:
    """The folder of a shipped world's id; any other name is a path already."""
    return Path(TASKS[str(name)]["folder"]) if str(name) in TASKS else Path(name)


Judge = Callable[[Any], Any]


def _positive_int(value: Any) -> bool:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and bool(value >= 1)


SPREADS = ("latent", "outcome")


@dataclass(frozen=True, kw_only=True)
class Task:
    """World + reward + end + start states (+ the real twin's id), and when not to believe.

    ``reward``: "head", or a callable ``chunk -> (B,) or (B, F)`` of finite numbers, B slots of the
    chunk in the order of ``chunk.slots``, F pixel frames. ``end``: "head", "danger" (the
    danger's share of a step, see ``worldgym.envs.outcome.danger_share``), "never", or a callable
    ``chunk -> bool (B,) or (B, F)``. With (B, F) the first True is the end frame, and rewards given
    per frame count up to and including it; with (B,) the chunk's last frame is the end frame. A
    head's reward for a whole chunk counts as it is. Callables must depend on the chunk alone:
    replay, forks and saved states repeat exactly only then.

    ``horizon``: steps after which an episode is truncated (None: never). ``distrust``: truncate
    when the uncertainty of a step (spread over ``forks`` forks with fresh noise) exceeds this.
    ``drift``: truncate when a step's frames have moved this far from the episode's first
    (``Chunk.drift_B``, for worlds that tell it).
    ``penalty``: uncertainty times this is taken off the reward. ``hazard``: the danger of a
    step (chance of an end within the next steps, as recorded play went on) times this is taken off
    its reward, so that an agent feels what it was lucky to survive, and what only a dream lets it
    survive. ``spread``: how uncertainty is measured, ``(world, state, actions, forks) -> (B,)``;
    "latent" (also None): by what forks show, "outcome": by what soon comes of them, reward and end
    (``worldgym.uncertainty``).
    """

    world: Any
    starts: Any
    name: str = "dream"
    reward: str | Judge = "head"
    end: str | Judge = "head"
    horizon: int | None = None
    distrust: float | None = None
    drift: float | None = None
    penalty: float = 0.0
    hazard: float = 0.0
    forks: int = 4
    spread: str | Callable[..., Any] | None = None
    twin: str | None = None
    facts: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.horizon is not None and not _positive_int(self.horizon):
            raise ConfigError("impossible horizon", given=repr(self.horizon),
                              expected="None or an int of at least 1", fix="pass horizon=525")
        if not _positive_int(self.forks) or self.forks < 2:
            raise ConfigError("impossible number of forks", given=repr(self.forks),
                              expected="an int of at least 2", fix="pass forks=4")
        value: Any
        for name, value in (("distrust", self.distrust), ("drift", self.drift),
                            ("penalty", self.penalty), ("hazard", self.hazard)):
            if value is None and name in ("distrust", "drift"):
                continue
            number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
            if not number or not np.isfinite(value) or value < 0:
                raise ConfigError(f"impossible {name}", given=repr(value),
                                  expected="a finite number of at least 0", fix=f"pass {name}=0.5")
        for name, value, words in (("reward", self.reward, ("head",)),
                                   ("end", self.end, ("head", "danger", "never")),
                                   ("spread", self.spread or "latent", SPREADS)):
            if not callable(value) and value not in words:
                raise ConfigError(f"unknown {name}", given=repr(value),
                                  expected=f"one of {words} or a callable",
                                  fix=f'pass {name}="{words[0]}"')

    @property
    def context_steps(self) -> int | None:
        """Steps that the world's memory can hold, None where it slides for ever."""
        return getattr(self.world, "max_steps", None)

    @property
    def wants_uncertainty(self) -> bool:
        """Whether a step must be measured by fork spread."""
        return self.distrust is not None or self.penalty > 0

    def uncertainty(self, state: Any, actions: np.ndarray) -> Any:
        """Spread (B,) of the step that ``actions`` would make from ``state``."""
        if callable(self.spread):
            return self.spread(self.world, state, actions, self.forks)
        from worldgym.uncertainty import fork_spread, outcome_spread

        measure = outcome_spread if self.spread == "outcome" else fork_spread
        return measure(self.world, state, actions, self.forks)


@functools.lru_cache(maxsize=8)
def _load(folder: str, stamp: int, device: str,
          settings: tuple[tuple[str, Any], ...]) -> tuple[Any, Any, dict]:
    from worldgym.data.starts import StartBank
    from worldgym.models import nano, wham_nano

    described = json.loads((Path(folder) / "world.json").read_text())
    kind = described.get("kind")
    files: Any = wham_nano if kind == wham_nano.KIND else nano
    if files is nano and "slide" in dict(settings):
        raise ConfigError("this world has no window that slides by steps", given=folder,
                          expected="a WHAM world's folder", fix="leave slide out")
    if kind == "worldgym.rooms":
        from worldgym.envs.worldplay_starts import WorldPlayStarts
        from worldgym.models import rooms

        small = rooms.load(Path(folder), device, **dict(settings))
        saved = rooms.RoomsStarts.load(folder)
        pictures = list(saved.frames_NHWC)
        return small, WorldPlayStarts(small, pictures, [""] * len(pictures), None,
                                      saved.pasts()), dict(described.get("task", {}))
    world = files.load(Path(folder), device, **dict(settings))
    starts = StartBank.load(Path(folder) / "starts.safetensors")
    return world, starts, dict(described.get("task", {}))


def load_task(name: str | Path, *, device: str = "cpu", temperature: float | None = None,
              slide: int | None = None, **changes: Any) -> Task:
    """The task of a registered id or of a world's folder; the world is shared within a process.

    Args:
        name: an id from ``TASKS`` or a folder with world.safetensors, world.json and
            starts.safetensors; the json's "task" entry may give horizon and twin. Or a WHAM file
            (``worldgym.envs.wham.load_wham`` takes its starts, too).
        device: torch device of the world.
        temperature: of the sampler's noise; None: the world's own. Above it, dreams are harder:
            agents find fewer faults to live on (Ha and Schmidhuber, 2018, section 4).
        slide: of a small WHAM: frames dropped at once from a full window; None: the world's own.
            Above it a step costs less, and sees fewer frames now and then.
        changes: fields of ``Task`` to replace, such as ``horizon=200``.

    Raises:
        ConfigError: unknown id or field. CheckpointError: a file is missing.
    """
    if str(name) not in TASKS and Path(name).is_file():
        from worldgym.envs.wham import load_wham

        check_names(changes, [f.name for f in fields(Task)], "task setting")
        return replace(load_wham(name, device=device, temperature=temperature, slide=slide),
                       **changes)
    facts = dict(TASKS.get(str(name), {"folder": Path(name)}))
    folder = Path(facts.pop("folder"))
    missing = [f for f in ("world.safetensors", "world.json", "starts.safetensors")
               if not (folder / f).is_file()]
    if missing and str(name) not in TASKS and not folder.exists():
        raise ConfigError("unknown world", given=repr(str(name)),
                          expected=f"a folder, or one of {sorted(TASKS)}",
                          fix="check the spelling, or pass the folder that `worldgym fit` wrote")
    if missing:
        raise CheckpointError("a world's file is missing", given=f"{folder} without {missing}",
                              expected="world.safetensors, world.json, starts.safetensors",
                              fix="fit the world again, or restore the folder")
    check_names(changes, [f.name for f in fields(Task)], "task setting")
    stamp = (folder / "world.safetensors").stat().st_mtime_ns
    given = (("temperature", temperature), ("slide", slide))
    world, starts, described = _load(str(folder.resolve()), stamp, str(device),
                                     tuple(pair for pair in given if pair[1] is not None))
    known = {f.name for f in fields(Task)}
    facts = {**{k: v for k, v in described.items() if k in known}, **facts}
    return replace(Task(world=world, starts=starts, name=str(name), **facts), **changes)


def check_names(given: Any, known: list[str], what: str) -> None:
    """Raise ConfigError when ``given`` has a name that is not in ``known``."""
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigError(f"unknown {what}", given=unknown, expected=f"some of {sorted(known)}",
                          fix="check the spelling")
