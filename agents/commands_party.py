"""The subcommands that record multi-player games and fit a world to them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
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


@dataclass(kw_only=True)
class FitParty:
    """Train one world model on recorded multi-player games; run it again to go on.

    Args:
        data: folder that ``worldgym collect-party`` wrote.
        out: world folder to make.
        name: name of the world.
        games: names of games; default: all that are in data.
        codec_iterations: length of the codec's training.
        dynamics_iterations: length of the dynamics' training.
        outcome_iterations: length of the training of the reward and end heads.
        alone_share: share of the dynamics' training on single frames, cheaper than clips.
        batch: clips per iteration.
        clip: frames per clip.
        width: model width.
        layers: blocks of the network.
        window: frames the model sees.
        starts: start states to keep of each game.
        horizon: steps of a dreamt episode.
        quick: fifty iterations of each part, to try the machinery.
        seed: seed of data order, noise and first weights.
        device: cpu or cuda.
        snapshot: write the world as trained so far into this folder, and train nothing.
    """

    data: str
    out: str
    name: str | None = None
    games: tuple[str, ...] | None = None
    codec_iterations: int | None = None
    dynamics_iterations: int | None = None
    outcome_iterations: int | None = None
    alone_share: float | None = None
    batch: int | None = None
    clip: int | None = None
    width: int | None = None
    layers: int | None = None
    window: int | None = None
    starts: int | None = None
    horizon: int | None = None
    quick: bool = False
    seed: int = 0
    device: str = "cpu"
    snapshot: str | None = None

    def run(self) -> None:
        """Fit."""
        from worldgym.train.fit_party import FitPartyConfig, fit_party

        given = {f.name: getattr(self, f.name) for f in fields(self)}
        folder = fit_party(FitPartyConfig(**{k: v for k, v in given.items() if v is not None}))
        if not int(os.environ.get("RANK", "0")):
            print(f"world written to {folder}")


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
