"""The subcommands of ``worldgym`` as dataclasses; heavy imports happen inside ``run``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from worldgym.agents import commands_party as party
from worldgym.agents.commands_bench import TAKE_COVER, Bench
from worldgym.agents.commands_binding import Binding, LearnTiles
from worldgym.agents.commands_clip import Clip
from worldgym.agents.commands_diagnose import Diagnose
from worldgym.agents.commands_evaluate import Evaluate
from worldgym.agents.commands_fit import Fit
from worldgym.agents.commands_report import Report
from worldgym.agents.commands_rooms import FitRooms, Revisit
from worldgym.agents.commands_wham import Convert, Dream
from worldgym.agents.ladder import named
from worldgym.errors import ConfigError

DESCRIPTION = "Learned video world models as ordinary reinforcement-learning environments."


@dataclass(kw_only=True)
class Collect:
    """Record episodes of a real game.

    Args:
        out: data folder; further recordings are added to it.
        env: world id (its real game is recorded) or any Gymnasium id with image observations.
        steps: record until the folder holds this many steps; what is there counts.
        policy: who plays; POLICY@0.3 gives one a share of the episodes.
        seed: seed of the whole recording.
        frame_hw: height and width to resize frames to; default 48 80, Take Cover 32 80.
        world: world folder; needed only if a policy was trained on latents.
    """

    out: Path
    env: str = TAKE_COVER
    steps: int = 20_000
    policy: tuple[str, ...] = ("random", "sticky:0.2")
    seed: int = 0
    frame_hw: tuple[int, int] | None = None
    world: str | None = None

    def run(self) -> None:
        """Record."""
        from worldgym.agents.games import record
        from worldgym.envs import rooms

        if self.env in (rooms.ID, rooms.GAME):  # frame by frame, with poses, by its own players
            print(rooms.record_rooms(self.out, frames_in_all=self.steps, seed=self.seed,
                                     frame_hw=self.frame_hw or rooms.FRAME_HW))
            return
        print(record(self.env, self.out, self.steps, self.policy, seed=self.seed,
                     frame_hw=self.frame_hw, world=self.world))


@dataclass(kw_only=True)
class Train:
    """Train an agent inside a dream; run it again to go on after an interruption.

    Args:
        out: run folder: agent.zip, checkpoints, run.json, log.
        world: world id or folder.
        algorithm: any class of stable-baselines3 or sb3-contrib.
        steps: dream steps, all slots together.
        minutes: stop earlier, after this time.
        envs: dreams in parallel.
        seed: seed of agent and dreams.
        observation: latent (fast) or frame.
        frame_stack: observations side by side.
        horizon: steps after which a dream is cut; default: the world's.
        distrust: cut a dream when fork spread exceeds this.
        penalty: reward taken off per unit of fork spread.
        temperature: of the dream's noise; default: the world's; above it, dreams are harder.
        slide: frames that a small WHAM drops at once from a full window; default: the world's.
        hazard: reward taken off per unit of danger, the chance of an end soon.
        save_every: steps between checkpoints.
        init: agent.zip whose weights the training begins with.
        set: hyperparameters of the algorithm, as name=value.
        real: train in the real game instead, for comparison.
        right_to_train: you state that you hold this right, which the published licence denies.
    """

    out: Path
    world: str = TAKE_COVER
    algorithm: str = "PPO"
    steps: int = 1_000_000
    minutes: float | None = None
    envs: int = 64
    seed: int = 0
    observation: str = "latent"
    frame_stack: int = 4
    horizon: int | None = None
    distrust: float | None = None
    penalty: float = 0.0
    temperature: float | None = None
    slide: int | None = None
    hazard: float = 0.0
    save_every: int = 50_000
    init: Path | None = None
    set: tuple[str, ...] = ()
    real: bool = False
    right_to_train: bool = False

    def run(self) -> None:
        """Train."""
        from worldgym.agents import train
        from worldgym.agents.games import game_maker
        from worldgym.envs.tasks import load_task

        config = train.TrainConfig(
            algorithm=self.algorithm, steps=self.steps, minutes=self.minutes, envs=self.envs,
            seed=self.seed, observation=self.observation, frame_stack=self.frame_stack,
            save_every=self.save_every, init=None if self.init is None else str(self.init),
            hyperparameters=settings(self.set))
        changes: dict[str, Any] = {n: getattr(self, n) for n in ("distrust", "penalty", "hazard")}
        changes |= {} if self.horizon is None else {"horizon": self.horizon}
        task = load_task(self.world, temperature=self.temperature, slide=self.slide, **changes)
        if self.real:
            spec = task.world.spec
            done = train.train_in_game(game_maker(task), spec.action, spec.frame_hw, config,
                                       self.out, name=str(task.twin), world=task.world)
        else:
            done = train.train_in_dream(task, config, self.out, right_to_train=self.right_to_train)
        print(f"{done.steps} steps in {done.seconds:.0f} s; agent written to {done.agent}")


@dataclass(kw_only=True)
class Score:
    """Score policies in the real game and in the dream, side by side.

    Args:
        policy: name=policy or policy, one or more.
        world: world id or folder.
        episodes: episodes each.
        seed: first seed; scoring seeds start at 1,000,000, recordings use those from 2,000,000.
        games: real games in lockstep.
        where: both, real or dream.
        out: results file to write or add to.
        draw: draw actions from the policy instead of taking the most probable one.
    """

    policy: tuple[str, ...] = ("random", "noop", "sweep:20", "dodger")
    world: str = TAKE_COVER
    episodes: int = 20
    seed: int = 1_000_000
    games: int = 8
    where: str = "both"
    out: Path | None = None
    draw: bool = False

    def run(self) -> None:
        """Score."""
        from worldgym.agents import results
        from worldgym.agents.compare import score_all, text_table
        from worldgym.agents.games import unit
        from worldgym.envs.tasks import load_task

        places = {"both": ("real", "dream"), "real": ("real",), "dream": ("dream",)}
        if self.where not in places:
            raise ConfigError("unknown place to score in", given=self.where,
                              expected="both, real or dream", fix="leave --where out")
        task = load_task(self.world)
        scores = score_all(task, named(self.policy), self.episodes, seed=self.seed,
                           games=self.games, where=places[self.where], draw=self.draw)
        print(text_table(scores))
        if self.out is not None:
            rows = [p.row(name, unit(task)) for name, at in scores.items() for p in at.values()]
            print("written:", results.write(self.out, rows))


@dataclass(kw_only=True)
class Video:
    """Film dream and real game side by side.

    Args:
        out: mp4 file.
        world: world id or folder.
        policy: who plays.
        mode: same-actions, agents, real or dream.
        seed: seed of the episode.
        steps: length at most.
        context: real frames the dream is shown first (same-actions).
    """

    out: Path = Path("runs/video.mp4")
    world: str = TAKE_COVER
    policy: str = "sweep:20"
    mode: str = "same-actions"
    seed: int = 7
    steps: int = 200
    context: int = 4

    def run(self) -> None:
        """Film."""
        from worldgym.agents.games import game_maker
        from worldgym.agents.scripted import parse_policy
        from worldgym.agents.video import side_by_side
        from worldgym.envs.tasks import load_task

        task = load_task(self.world)
        policy = parse_policy(self.policy, task.world.spec.action, task.world, task)
        print("written:", side_by_side(task, game_maker(task), policy, self.out, seed=self.seed,
                                       steps=self.steps, context=self.context, mode=self.mode))


@dataclass(kw_only=True)
class Inspect:
    """Say what is in a checkpoint, a world folder, an agent zip or a results file.

    Args:
        path: the file or folder.
    """

    path: Path

    def run(self) -> None:
        """Inspect."""
        from worldgym.agents.inspect import describe

        print(describe(self.path))


@dataclass(kw_only=True)
class Demo:
    """Train an agent in the dream from scratch, and see what it is worth in the real game.

    Args:
        out: folder for results; default: runs/demo-DATE.
        world: world id or folder.
        minutes: training time.
        episodes: scoring episodes per policy.
        quick: seconds of training and three episodes, to try the machinery.
        seed: seed of everything.
    """

    out: Path | None = None
    world: str = TAKE_COVER
    minutes: float = 6.0
    episodes: int = 20
    quick: bool = False
    seed: int = 0

    def run(self) -> None:
        """Run the demo."""
        from worldgym.agents.demo import demo

        demo(self.world, self.out, minutes=self.minutes, episodes=self.episodes, quick=self.quick,
             seed=self.seed)


@dataclass(kw_only=True)
class Iterate:
    """Collect with the agent, refit the world, train again; every real step is counted.

    Args:
        world: world id or folder to begin with.
        data: the recordings it was fitted to; new ones are added.
        out: folder for worlds and agents of every round.
        rounds: how often.
        real_steps: real steps recorded per round.
        steps: dream steps of training per round.
        fit: settings of ``worldgym fit`` as name=value.
        seed: seed of everything.
    """

    data: Path
    out: Path
    world: str = TAKE_COVER
    rounds: int = 1
    real_steps: int = 20_000
    steps: int = 500_000
    fit: tuple[str, ...] = field(default_factory=tuple)
    seed: int = 0

    def run(self) -> None:
        """Iterate."""
        from worldgym.agents.iterate import from_command

        from_command(self, settings(self.fit))


COMMANDS: dict[str, Callable[..., Any]] = {
    "collect": Collect, "fit": Fit, "train": Train, "score": Score, "video": Video, "bench": Bench,
    "inspect": Inspect, "convert": Convert, "dream": Dream, "demo": Demo, "iterate": Iterate,
    "evaluate": Evaluate, "diagnose": Diagnose, "report": Report,
    "collect-party": party.CollectParty, "fit-party": party.FitParty,
    "train-party": party.TrainParty, "score-party": party.ScoreParty, "rollout": party.Rollout,
    "binding": Binding, "tiles": LearnTiles, "clip": Clip, "fit-rooms": FitRooms,
    "revisit": Revisit,
}


def settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    """``("gamma=0.99", "n_steps=32")`` as a dict of Python values.

    >>> settings(("gamma=0.99", "n_steps=32"))
    {'gamma': 0.99, 'n_steps': 32}
    """
    import ast

    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError("a setting cannot be read", given=pair, expected="name=value",
                              fix="write for instance gamma=0.99")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found
