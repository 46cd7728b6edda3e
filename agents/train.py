"""Train a Stable-Baselines3 agent, in the dream or (for comparison) in the real game.

Everything is decided by ``TrainConfig`` and its seed. A run that is killed goes on from its last
checkpoint, bit for bit, when the same call is made again.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from worldgym.actions import ActionSpec
from worldgym.agents import results
from worldgym.agents.model import (
    NEEDED,
    algorithm_class,
    load_weights,
    policy_kwargs,
    read_facts,
    save_agent,
)
from worldgym.errors import CheckpointError, ConfigError, MissingDependencyError

PPO = {"n_steps": 64, "batch_size": 512, "n_epochs": 4, "gamma": 0.99, "gae_lambda": 0.95,
       "learning_rate": 3e-4, "ent_coef": 0.01, "clip_range": 0.2, "vf_coef": 0.5,
       "max_grad_norm": 0.5}
DEFAULTS: dict[str, dict[str, Any]] = {
    "PPO": PPO,
    "RecurrentPPO": PPO,
    "MaskablePPO": PPO,
    "A2C": {"n_steps": 16, "gamma": 0.99, "ent_coef": 0.01},
    "DQN": {"buffer_size": 100_000, "learning_starts": 5_000, "train_freq": 4, "gradient_steps": 4,
            "batch_size": 128, "target_update_interval": 2_000, "gamma": 0.99},
    "QRDQN": {"buffer_size": 100_000, "learning_starts": 5_000, "train_freq": 4,
              "gradient_steps": 4, "batch_size": 128, "target_update_interval": 2_000},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """What to train, and for how long.

    ``steps``: env steps, all slots together; ``minutes``: stop earlier when this time is spent;
    ``hyperparameters``: overrides for the algorithm, ``lin_0.0005`` for a rate that falls to zero;
    ``network``: ``net_arch``, ``extractor`` ("latent", "tokens" or None), ``extractor_kwargs``,
    ``activation``; ``save_every``: steps between checkpoints, all of which stay as agents, so that
    one can be chosen afterwards; ``init``: an agent.zip of the same network, whose weights the
    training begins with.
    """

    algorithm: str = "PPO"
    steps: int = 1_000_000
    minutes: float | None = None
    envs: int = 64
    seed: int = 0
    observation: str = "latent"
    frame_stack: int = 4
    save_every: int = 50_000
    scale_rewards: bool = True
    policy: str | None = None
    init: str | None = None
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)
    tensorboard: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "envs", "frame_stack", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"impossible {name}", given=getattr(self, name),
                                  expected="1 or more", fix=f"pass {name} as a positive number")
        if self.minutes is not None and not self.minutes > 0:
            raise ConfigError("impossible minutes", given=self.minutes, expected="more than 0",
                              fix="leave it out for no limit")
        if self.observation not in ("latent", "frame", "crop"):
            raise ConfigError("unknown observation", given=self.observation,
                              expected="latent or frame (parties: crop)",
                              fix="pass observation='latent'")

    def resolved(self) -> TrainConfig:
        """The same with every default written out."""
        network = {"net_arch": [64, 64], "activation": "ReLU", **self.network}
        if self.observation == "latent":
            network = {"extractor": "latent",
                       "extractor_kwargs": {"width": 32, "features_dim": 128}, **network}
        if self.observation == "crop":
            network = {"extractor": "crop", "extractor_kwargs": {}, **network}
        plain = "CnnPolicy" if self.observation == "frame" else "MlpPolicy"
        if self.algorithm == "RecurrentPPO":
            plain = plain.replace("Policy", "LstmPolicy")
        return replace(self, network=network, policy=self.policy or plain, hyperparameters={
            **DEFAULTS.get(self.algorithm, {}), **self.hyperparameters})


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training left: the last agent, all checkpoints, and the learning curve."""

    agent: Path
    checkpoints: list[Path]
    curve: list[dict[str, float]]
    steps: int
    seconds: float


def train_in_dream(task: Any, config: TrainConfig, folder: str | Path, *,
                   right_to_train: bool = False) -> Trained:
    """Train inside ``task``'s world only; the real game is never touched.

    Args:
        task: what to train on.
        config: how.
        folder: where the run is kept.
        right_to_train: you state that you hold the right to train on this world's outputs though
            its licence as published forbids it; the run's facts say so.

    Raises:
        LicenceError: the world's licence does not allow training on its outputs.
    """
    from worldgym.envs.sb3 import DreamVecEnv
    from worldgym.errors import LicenceError

    licence = task.world.spec.licence
    if not licence.may_train_on_outputs and not right_to_train:
        raise LicenceError("agents may not be trained on this world's outputs",
                           given=licence.name, expected="a licence that allows it",
                           fix="train a world of your own with `worldgym fit`, or state that you "
                           "hold the right (right_to_train=True, --right-to-train)")

    def make() -> Any:
        return DreamVecEnv(task, config.envs, observation=config.observation,
                           frame_stack=config.frame_stack)

    facts = {"env": task.name, "where": "dream", "frame_hw": list(task.world.spec.frame_hw),
             "action": asdict(task.world.spec.action), "horizon": task.horizon,
             "distrust": task.distrust, "penalty": task.penalty,
             "hazard": task.hazard, "forks": task.forks,
             "world": str(getattr(task.world, "fingerprint", task.world.spec.name))}
    if not licence.may_train_on_outputs:
        facts["right_to_train"] = f"stated by the user; {licence.name} as published forbids it"
    return train(make, *_tokens(task.world, config, folder, facts))


def train_in_game(make_game: Callable[[], Any], action: ActionSpec, frame_hw: tuple[int, int],
                  config: TrainConfig, folder: str | Path, name: str = "game",
                  world: Any = None) -> Trained:
    """Train in the real game, on frames or (given a ``world``) on its latents, for comparison."""
    from worldgym.agents.real import RealVecEnv

    def make() -> Any:
        return RealVecEnv(make_game, config.envs, observation=config.observation,
                          frame_stack=config.frame_stack, world=world, seed=config.seed)

    facts = {"env": name, "where": "real", "frame_hw": list(frame_hw), "action": asdict(action)}
    return train(make, *_tokens(world, config, folder, facts))


class Hooks(Protocol):
    """What a training may add: ``options`` of the algorithm, a look at what was built (``env``:
    what ``make_env`` made), and at every checkpoint (also the one that it goes on from)."""

    options: dict[str, Any]

    def built(self, model: Any, env: Any) -> None:
        """Called once, before anything is restored."""

    def saved(self, checkpoint: Path) -> None:
        """Called between two rollouts."""


class _Codebook:
    """Lets an agent that reads ids begin with the codes that they name."""

    def __init__(self, codes: Any) -> None:
        self.options: dict[str, Any] = {}
        self.codes = codes

    def built(self, model: Any, env: Any) -> None:
        """Copy the codes into every extractor."""
        from worldgym.agents.extractor import TokenExtractor

        for part in model.policy.modules():
            if isinstance(part, TokenExtractor):
                part.begin_with(self.codes)

    def saved(self, checkpoint: Path) -> None:
        """Nothing to do."""


def _tokens(world: Any, config: TrainConfig, folder: str | Path,
            facts: dict[str, Any]) -> tuple[TrainConfig, str | Path, dict[str, Any], Hooks | None]:
    """What ``train`` needs; where latents are ids, the network reads the codes that they name."""
    numbers = getattr(getattr(world, "latent_dtype", None), "is_floating_point", True)
    if numbers or config.observation != "latent" or "extractor" in config.network:
        return config, folder, facts, None
    codes = world.codec.codes().detach()
    network = {"extractor": "tokens", "extractor_kwargs": {
        "codes": len(codes), "code_width": codes.shape[1], "features_dim": 128}, **config.network}
    return replace(config, network=network), folder, facts, _Codebook(codes)


def train(make_env: Callable[[], Any], config: TrainConfig, folder: str | Path,
          facts: dict[str, Any], hooks: Hooks | None = None) -> Trained:
    """Train in the VecEnv that ``make_env`` makes; resume if ``folder`` holds a checkpoint."""
    try:
        from worldgym.agents.bookkeeper import Bookkeeper
    except ImportError as error:
        raise MissingDependencyError("training needs Stable-Baselines3", given=str(error),
                                     expected="stable-baselines3",
                                     fix="pip install 'worldgym[rl]'") from error
    from worldgym.agents.keeper import Keeper
    from worldgym.agents.watch import TimeUp, Watch

    folder, config = Path(folder), config.resolved()
    run = {**facts, "config": asdict(config), **_used(config)}
    _same_run(folder, run)
    algorithm = algorithm_class(config.algorithm)
    env, logger = make_env(), None
    try:
        book = Bookkeeper(env, config.hyperparameters.get("gamma", 0.99), config.scale_rewards)
        model = _model(algorithm, book, config, {} if hooks is None else hooks.options)
        if hooks is not None:
            hooks.built(model, env)
        run["observation_shape"] = list(model.observation_space.shape)
        keeper = Keeper(folder, run)
        latest, seconds = keeper.latest(), 0.0
        curve: list[Any] = []
        if latest is not None:
            curve, seconds = keeper.restore(latest, model, book)
            if hooks is not None:
                hooks.saved(latest)
        elif config.init is not None:
            _begin_with(model, config.init, run)
        logger = _logger(folder, config, model.num_timesteps)
        model.set_logger(logger)
        watch = Watch(keeper, book, config, curve, seconds,
                      None if hooks is None else hooks.saved)
        _write_run(folder, run, watch, model)
        left = config.steps - model.num_timesteps
        if left > 0 and not watch.late():
            with contextlib.suppress(TimeUp):
                model.learn(left, callback=watch, reset_num_timesteps=latest is None)
        last = watch.close(model)
        _write_run(folder, run, watch, model)
        agent = save_agent(model, folder / "agent.zip", {**run, "steps": model.num_timesteps})
        return Trained(agent, [p / "agent.zip" for p in keeper.all() if p <= last], watch.curve,
                       model.num_timesteps, watch.seconds)
    finally:
        if logger is not None:
            logger.close()
        env.close()


def _used(config: TrainConfig) -> dict[str, Any]:
    return {"algorithm": config.algorithm, "policy": config.policy, "network": config.network,
            "hyperparameters": config.hyperparameters, "observation": config.observation,
            "frame_stack": config.frame_stack, "seed": config.seed}


def _model(algorithm: Any, book: Any, config: TrainConfig, options: dict[str, Any]) -> Any:
    settings = {k: _schedule(v) for k, v in config.hyperparameters.items()} | options
    try:
        return algorithm(config.policy, book, seed=config.seed, device="cpu", verbose=0,
                         policy_kwargs=policy_kwargs(config.network), **settings)
    except TypeError as error:
        raise ConfigError(f"{config.algorithm} refuses a hyperparameter", given=str(error),
                          expected=f"arguments of {config.algorithm}",
                          fix="check the names in hyperparameters") from error


def _schedule(value: Any) -> Any:
    """``lin_0.0005``, as in rl-zoo3: from this value down to zero at the last step."""
    if not (isinstance(value, str) and value.startswith("lin_")):
        return value
    try:
        first = float(value.removeprefix("lin_"))
    except ValueError:
        raise ConfigError("a schedule cannot be read", given=value, expected="lin_NUMBER",
                          fix="write for instance learning_rate=lin_0.0005") from None
    return lambda left: first * left


def _begin_with(model: Any, path: str, run: dict[str, Any]) -> None:
    """Load the weights of the agent in ``path``, which must see and do the same."""
    facts, mine = read_facts(path), json.loads(json.dumps(run))
    wrong = [k for k in NEEDED if facts[k] != mine[k]]
    if wrong:
        raise ConfigError("the agent to begin with does not fit",
                          given=f"{path} with {({k: facts[k] for k in wrong})}",
                          expected={k: mine[k] for k in wrong},
                          fix="train with that agent's settings, or without init")
    load_weights(model.policy, path)


def _logger(folder: Path, config: TrainConfig, step: int) -> Any:
    from stable_baselines3.common.logger import Logger, make_output_format

    logs = folder / "log"
    logs.mkdir(parents=True, exist_ok=True)
    kinds = ["csv", *(["tensorboard"] if config.tensorboard else [])]
    return Logger(str(logs), [make_output_format(k, str(logs), f"-{step:09d}" if step else "")
                              for k in kinds])


def _same_run(folder: Path, run: dict[str, Any]) -> None:
    """Refuse to go on with other settings than the run in ``folder`` was begun with."""
    path = folder / "run.json"
    if not path.exists():
        return
    try:
        old = json.loads(path.read_text())["run"]
    except (ValueError, KeyError) as error:
        raise CheckpointError("run.json is broken", given=path, expected="JSON written by train",
                              fix="use another folder") from error
    new = json.loads(json.dumps(run))
    free = {"steps", "minutes", "save_every", "tensorboard", "progress"}
    changed = [k for k in new if k != "config" and old.get(k) != new[k]]
    changed += [k for k, v in new["config"].items()
                if k not in free and old["config"].get(k) != v]
    if changed:
        raise ConfigError("this folder holds a run with other settings",
                          given={k: new.get(k, new["config"].get(k)) for k in changed},
                          expected={k: old.get(k, old["config"].get(k)) for k in changed},
                          fix=f"give another folder, or delete {folder} to begin anew")


def _write_run(folder: Path, run: dict[str, Any], watch: Any, model: Any) -> None:
    done = {"steps": int(model.num_timesteps), "seconds": round(watch.seconds, 1)}
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    text = json.dumps({"run": run, "done": done, "written": started,
                       "about": results.about(), "curve": watch.curve}, indent=1)
    results.atomic_text(folder / "run.json", text + "\n")
