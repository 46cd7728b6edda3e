"""The subcommand that records multi-player games."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from worldgym.errors import ConfigError


@dataclass(kw_only=True)
class CollectParty:
    """Record the multi-player mini-map games of Melting Pot, one data set per game.

    Run it again to go on after an interruption.

    Args:
        out: folder; one data set per game in it.
        games: names of games, or all.
        steps: record until every game's data set holds this many steps; what is there counts.
        policy: who plays, drawn for every player; POLICY@0.3 gives one a share; default: a mix.
        players: numbers of players to draw from; default: all that a game takes.
        seed: of who plays.
        cell_px: pixels of a map cell, 8 (frames of 64 x 80) or 4.
        max_cycles: longest episode; default: the game's.
        max_gb: stop before the folder grows beyond this many gigabytes.
    """

    out: Path
    games: tuple[str, ...] = ("all",)
    steps: int = 30_000
    policy: tuple[str, ...] = ()
    players: tuple[int, ...] = ()
    seed: int = 0
    cell_px: int = 8
    max_cycles: int | None = None
    max_gb: float = 8.0

    def run(self) -> None:
        """Record."""
        from worldgym.agents.party import mixture
        from worldgym.envs.party_games import CELLS_HW, GAMES, game_named

        names = [*GAMES] if "all" in self.games else list(self.games)
        games = [game_named(name) for name in names]
        chosen = _mix(self.policy)
        size = self.steps * len(games) * CELLS_HW[0] * CELLS_HW[1] * self.cell_px**2 * 3 / 1e9
        wish = f"{self.steps} steps of {len(games)} games at {self.cell_px} px"
        if self.steps < 1 or self.cell_px not in (4, 8) or size > self.max_gb:
            raise ConfigError(
                "impossible recording", expected=f"at most {self.max_gb:g} GB, cells of 4 or 8 px",
                given=f"{wish}: {size:.1f} GB",
                fix="record fewer steps or smaller frames, or raise --max-gb")
        from worldgym.envs.party_record import collect_party

        for game in games:
            counts = [n for n in self.players or game.players if n in game.players]
            if not counts:
                raise ConfigError("no such number of players", given=self.players,
                                  expected=f"{game.players} in {game.name}", fix="leave it out")
            print(collect_party(game, Path(self.out) / game.name, steps=self.steps,
                                policies=chosen or _mix(mixture(game)), seed=self.seed,
                                players=counts, cell_px=self.cell_px,
                                max_cycles=self.max_cycles), flush=True)


def _mix(texts: tuple[str, ...]) -> list[tuple[str, float, Callable[[], Any]]]:
    """(name, weight, factory) of every ``POLICY@SHARE``."""
    from worldgym.agents.party import party_policy

    mix: list[tuple[str, float, Callable[[], Any]]] = []
    for text in texts:
        name, _, share = text.rpartition("@")
        name, share = (name, share) if name else (share, "1")
        try:
            weight = float(share)
        except ValueError:
            raise ConfigError("a share cannot be read", given=text, expected="POLICY@0.3",
                              fix="give a number after @") from None
        party_policy(name)  # a misspelt one is refused before anything is recorded
        mix.append((name, weight, partial(party_policy, name)))
    return mix
