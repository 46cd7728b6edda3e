"""The subcommands for multi-player games: record, fit, train, score, roll out."""

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
        init: world to start from, id or folder; its codec stays.
        fresh: take codec and heads of init only; the dynamics begin anew.
        games: names of games; default: all that are in data.
        codec_iterations: length of the codec's training.
        dynamics_iterations: length of the dynamics' training.
        outcome_iterations: length of the training of the reward and end heads.
        video_share: share of the dynamics' training on the video alone, before players join.
        alone_share: share of the dynamics' training on single frames, cheaper than clips.
        balance: "games": each is drawn equally often, or "players": by how many play it.
        eventful: share of the dynamics' batches in which something happens to a player soon.
        compile: fuse the network's operations: faster after minutes (needs a C++ compiler).
        batch: clips per iteration.
        clip: frames per clip.
        width: model width.
        layers: blocks of the network.
        patch: cells of a side that share a token.
        ablation: no-msa, no-mca or pooled: a network to compare with, without what binds actions.
        recent: frames before it that every frame sees.
        window: frames the model remembers.
        steps: denoising timesteps of a step.
        book_frames: frames of each game whose tiles drawn cells are replaced by; 0: none.
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
    init: str | None = None
    fresh: bool = False
    games: tuple[str, ...] | None = None
    codec_iterations: int | None = None
    dynamics_iterations: int | None = None
    outcome_iterations: int | None = None
    video_share: float | None = None
    alone_share: float | None = None
    balance: str | None = None
    eventful: float | None = None
    compile: bool = False
    batch: int | None = None
    clip: int | None = None
    width: int | None = None
    layers: int | None = None
    patch: int | None = None
    ablation: str | None = None
    recent: int | None = None
    window: int | None = None
    steps: tuple[float, ...] | None = None
    book_frames: int | None = None
    starts: int | None = None
    horizon: int | None = None
    quick: bool = False
    seed: int = 0
    device: str = "cpu"
    snapshot: str | None = None

    def run(self) -> None:
        """Fit."""
        from worldgym.envs.party_tasks import place
        from worldgym.train.fit_party import FitPartyConfig, fit_party

        given = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.init is not None:
            given["init"] = str(place(self.init))
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


PARTY_WORLD = "worldgym/MeltingPotMini-v0"


@dataclass(kw_only=True)
class TrainParty:
    """Train one network for all players of a game, inside a dream; run it again to go on.

    Args:
        out: run folder: agent.zip, checkpoints, run.json, log.
        world: world id or folder.
        game: name of the game; default: the world's first.
        players: how many; default: the most that the world's starts have.
        steps: steps of players, all slots together; those of players that are out count.
        minutes: stop earlier, after this time.
        slots: games side by side.
        seed: seed of agent and dreams.
        horizon: steps after which a game is cut; default: the world's.
        beginnings: dream only from where recorded episodes began, as real ones do.
        rivals: seats of every game that the newest checkpoint plays instead of the learner.
        save_every: steps between checkpoints.
        init: agent.zip whose weights the training begins with.
        set: hyperparameters of PPO, as name=value.
        real: train in real Melting Pot instead, for comparison.
        device: torch device of the world.
    """

    out: Path
    world: str = PARTY_WORLD
    game: str | None = None
    players: int | None = None
    steps: int = 500_000
    minutes: float | None = None
    slots: int = 16
    seed: int = 0
    horizon: int | None = None
    beginnings: bool = False
    rivals: int = 0
    save_every: int = 50_000
    init: Path | None = None
    set: tuple[str, ...] = ()
    real: bool = False
    device: str = "cpu"

    def run(self) -> None:
        """Train."""
        from worldgym.agents import party_train
        from worldgym.agents.commands import settings
        from worldgym.envs.party_tasks import load_party

        if self.real and self.beginnings:
            raise ConfigError("the real game always starts at the beginning",
                              given="--real --beginnings", expected="one of them",
                              fix="leave out --beginnings")
        config = party_train.party_config(
            steps=self.steps, minutes=self.minutes, envs=self.slots, seed=self.seed,
            save_every=self.save_every, init=None if self.init is None else str(self.init),
            hyperparameters=settings(self.set))
        if self.real:
            done = party_train.train_party_in_game(
                config, self.out, game=self.game or "coins", players=self.players,
                rivals=self.rivals, horizon=self.horizon)
        else:
            done = party_train.train_party_in_dream(
                load_party(self.world, device=self.device), config, self.out, game=self.game,
                players=self.players, rivals=self.rivals, horizon=self.horizon,
                beginnings=self.beginnings)
        print(f"{done.steps} steps in {done.seconds:.0f} s; agent written to {done.agent}")


@dataclass(kw_only=True)
class ScoreParty:
    """Score teams in real Melting Pot and in the dream, side by side.

    Teams called random, dream and real give the share of the real-trained team's gain over random
    that the dream-trained one has: --policy random dream=a/agent.zip real=b/agent.zip

    Args:
        policy: name=team or team; a team is one policy for all players, or one each joined by +.
        world: world id or folder.
        game: name of the game; default: the world's first.
        players: how many; default: the most that the world's starts have.
        episodes: episodes each.
        seed: first seed of dreams, and of the players' choices.
        horizon: steps after which a game is cut, in both places; default: the world's.
        where: both, real or dream.
        out: results file to write or add to.
        best: take the most probable action instead of drawing one, where players are trained.
        device: torch device of the world.
    """

    policy: tuple[str, ...] = ("random", "gather")
    world: str = PARTY_WORLD
    game: str | None = None
    players: int | None = None
    episodes: int = 20
    seed: int = 1_000_000
    horizon: int | None = None
    where: str = "both"
    out: Path | None = None
    best: bool = False
    device: str = "cpu"

    def run(self) -> None:
        """Score."""
        from worldgym.agents import party_score, results
        from worldgym.agents.ladder import named
        from worldgym.envs.party_tasks import load_party

        places = {"both": ("real", "dream"), "real": ("real",), "dream": ("dream",)}
        if self.where not in places:
            raise ConfigError("unknown place to score in", given=self.where,
                              expected="both, real or dream", fix="leave --where out")
        if self.where == "real":
            task, game, horizon = None, self.game or "coins", self.horizon
        else:
            task = load_party(self.world, device=self.device)
            game, horizon = self.game or task.games[0], self.horizon
        scores = party_score.score_party(
            task, game, self.players, named(self.policy), self.episodes, seed=self.seed,
            horizon=horizon, where=places[self.where], draw=not self.best)
        print(party_score.party_table(scores))
        share = party_score.gain_share(scores)
        if share is not None:
            print(f"share of the real-trained gain: {share[0]:.2f} ({share[1]:.2f} to "
                  f"{share[2]:.2f}; n = {share[3]})")
        if self.out is not None:
            print("written:", results.write(self.out, party_score.rows_of(scores, game)))


@dataclass(kw_only=True)
class Rollout:
    """Record episodes of a dream or a real game with a policy per player, and film them.

    Run it again to go on after an interruption. A WHAM world without policies is left to itself:
    it draws frames and actions.

    Args:
        out: folder of the recording (the format of collect-party; WHAM: of collect) and of
            rollout.mp4.
        env: world id or folder, or real for Melting Pot itself; or a WHAM file or folder.
        game: name of the game; default: the world's first.
        players: how many; default: the most that the world's starts have.
        policies: one for everybody, or one for each player: gather, slips:0.1:chase, agent.zip;
            default: random, or WHAM itself.
        episodes: episodes in all; what is there counts.
        seed: of the first episode.
        max_cycles: steps after which an episode is cut; default: the world's.
        film: episodes in the film; 0 for none.
        best: take the most probable action instead of drawing one, where players are trained.
        starts: .npz episodes that a WHAM file starts from.
    """

    out: Path
    env: str = PARTY_WORLD
    game: str | None = None
    players: int | None = None
    policies: tuple[str, ...] = ()
    episodes: int = 10
    seed: int = 0
    max_cycles: int | None = None
    film: int = 4
    best: bool = False
    starts: Path | None = None

    def run(self) -> None:
        """Play, record, film."""
        from worldgym.agents.rollout import REAL, film, game_env, rollout
        from worldgym.agents.wham_rollout import is_wham_world

        if is_wham_world(self.env):
            self._wham()
            return
        from worldgym.envs.party_record import returns_by_player

        env = game_env(self.env, self.game, self.players, max_cycles=self.max_cycles)
        try:
            store = rollout(env, self.policies or ("random",), self.out, self.episodes,
                            seed=self.seed, where=self.env, draw=not self.best)
        finally:
            env.close()
        print(f"{self.out}: {len(store)} episodes, {store.steps} steps")
        for name, got in returns_by_player(store).items():
            print(f"  {name}: mean return {got['mean_return']:.2f} (std {got['std_return']:.2f}, "
                  f"n = {got['n']} players' episodes)")
        if self.film:
            label = "real" if self.env == REAL else "dream"
            print("written:", film(store, Path(self.out) / "rollout.mp4", self.film, label=label))

    def _wham(self) -> None:
        from worldgym.agents.scripted import parse_policy
        from worldgym.agents.wham_rollout import film, open_task, rollout
        from worldgym.envs.record import by_policy

        if self.game is not None or self.players is not None or len(self.policies) > 1 or self.best:
            raise ConfigError("a WHAM world has one player", fix="leave these options out",
                              given=f"game {self.game}, players {self.players}, policies "
                              f"{self.policies}, best {self.best}",
                              expected="at most one policy, no game, no players")
        task = open_task(self.env, starts=self.starts, horizon=self.max_cycles)
        policy = parse_policy(self.policies[0], task.world.spec.action, task.world,
                              task) if self.policies else None
        store = rollout(task, self.out, self.episodes, seed=self.seed, policy=policy)
        print(f"{self.out}: {len(store)} episodes, {store.steps} steps")
        for name, got in by_policy(store).items():
            print(f"  {name}: mean return {got['mean_return']:.2f} (n = {got['episodes']})")
        if self.film:
            published = not task.world.spec.licence.may_ship_weights
            print("written:", film(store, Path(self.out) / "rollout.mp4", self.film,
                                   watermark=published))
