"""A party task: a world of several games and players, and where its episodes begin."""

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from worldgym.envs.tasks import PACKAGED
from worldgym.errors import CheckpointError, ConfigError

HORIZON = 100  # steps of an episode, where nothing else is said
FILES = ("world.safetensors", "world.json", "starts.safetensors")

# id -> folder of the shipped world
PARTIES: dict[str, Path] = {"worldgym/MeltingPotMini-v0": PACKAGED / "party"}


@dataclass(frozen=True, kw_only=True)
class PartyTask:
    """``world``: a ``PartyWorld``; ``starts``: a ``StartBank`` with players, of all games.

    ``games``: names, in the order of the world's game numbers (``starts.game_N``); ``cells``: of
    each game (offset x, offset y, width, height) of the first cell of the frame, over the frame's
    two units; ``horizon``: steps after which an episode is truncated; ``facing``: states hold
    facing and alive besides the position; ``facts``: the card's "task" entry.
    """

    world: Any
    starts: Any
    games: tuple[str, ...]
    cells: tuple[tuple[float, float, float, float], ...] = ()
    horizon: int = HORIZON
    facing: bool = False
    name: str = "party"
    facts: dict = field(default_factory=dict)

    def game_id(self, game: str) -> int:
        """Number of a game, or ConfigError."""
        if game not in self.games:
            raise ConfigError("the world has not learned this game", given=repr(game),
                              expected=f"one of {list(self.games)}", fix="check the spelling")
        return self.games.index(game)


@functools.lru_cache(maxsize=4)
def _load(folder: str, stamp: int, device: str, name: str) -> PartyTask:
    from worldgym.data.starts import StartBank
    from worldgym.models import party_nano

    starts = StartBank.load(Path(folder) / "starts.safetensors")
    if starts.game_N is None:
        raise CheckpointError("a start bank without players", given=folder,
                              expected="the bank of a world of several players",
                              fix="fit the world with `worldgym fit-party`")
    party = party_nano.load_party(folder)
    facts = dict(json.loads((Path(folder) / "world.json").read_text()).get("task", {}))
    return PartyTask(world=party.world(device), starts=starts, games=party.cfg.games,
                     cells=party.cfg.cells, horizon=int(facts.get("horizon", HORIZON)),
                     facing=party.cfg.dynamics.subjects.facing, name=name, facts=facts)


def place(name: str | Path) -> Path:
    """The folder of a shipped party world's id; any other name is a path already."""
    return PARTIES.get(str(name), Path(name))


def load_party(name: str | Path, *, device: str = "cpu") -> PartyTask:
    """The task of a registered id or of a party world's folder; shared within a process.

    Args:
        name: an id from ``PARTIES`` or a folder that ``worldgym fit-party`` wrote.
        device: torch device of the world.

    Raises:
        ConfigError: unknown id. CheckpointError: a file is missing or does not fit.
    """
    folder = place(name)
    missing = [f for f in FILES if not (folder / f).is_file()]
    if missing and str(name) not in PARTIES and not folder.exists():
        raise ConfigError("unknown party world", given=repr(str(name)),
                          expected=f"a folder, or one of {sorted(PARTIES)}",
                          fix="check the spelling, or pass the folder `worldgym fit-party` wrote")
    if missing:
        raise CheckpointError("a world's file is missing", given=f"{folder} without {missing}",
                              expected=", ".join(FILES),
                              fix="fit the world again, or restore the folder")
    stamp = (folder / "world.safetensors").stat().st_mtime_ns
    return _load(str(folder.resolve()), stamp, str(device), str(name))
