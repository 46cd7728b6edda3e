"""Train one network for all players of a game, in the dream or in real Melting Pot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from worldgym.actions import ActionSpec
from worldgym.agents.train import TrainConfig, Trained, train
from worldgym.envs.party_tasks import PartyTask
from worldgym.envs.party_view import PartyView
from worldgym.errors import LicenceError

SLOTS = 16  # games side by side
# a step of all slots brings a row of every player: with rollouts of 64 at a rate of 0.0003 teams
# learned less from as many steps of the games (envs/worlds/party/LOG.md)
PPO = {"n_steps": 32, "batch_size": 256, "learning_rate": 1e-3}


def party_config(**changes: Any) -> TrainConfig:
    """A ``TrainConfig`` for parties; ``envs`` are slots (games), each with all its players."""
    known: dict[str, Any] = {"observation": "crop", "frame_stack": 2, "envs": SLOTS} | changes
    return TrainConfig(**known | {"hyperparameters": PPO | known.get("hyperparameters", {})})


def view_of(config: TrainConfig) -> PartyView:
    """What players are shown while training: crops of 11 x 11 cells of 4 pixels."""
    return PartyView(observation="crop", frame_stack=config.frame_stack, cell_px=4)


def train_party_in_dream(task: PartyTask, config: TrainConfig, folder: str | Path, *,
                         game: str | None = None, players: int | None = None, rivals: int = 0,
                         horizon: int | None = None, beginnings: bool = False) -> Trained:
    """Train inside the world only; the real game is never touched.

    Args:
        game, players: see ``PartyCore``. rivals: seats of every game that a frozen past copy of
            the learner plays (the newest checkpoint; at first the untrained network).
        horizon: steps of a dreamt episode; None: the task's. beginnings: see ``PartyCore``.

    Raises:
        LicenceError: the world's licence does not allow training on its outputs.
    """
    from worldgym.envs.party_rows import DreamPartyVecEnv

    licence = task.world.spec.licence
    if not licence.may_train_on_outputs:
        raise LicenceError("agents may not be trained on this world's outputs",
                           given=licence.name, expected="a licence that allows it",
                           fix="train a world of your own with `worldgym fit-party`")

    def make() -> Any:
        return DreamPartyVecEnv(task, game, players, config.envs, horizon=horizon, rivals=rivals,
                                view=view_of(config), seed=config.seed, beginnings=beginnings)

    facts = {"env": task.name, "where": "dream", "horizon": horizon or task.horizon,
             "beginnings": beginnings,
             "world": str(getattr(task.world, "fingerprint", task.world.spec.name))}
    return _train(make, config, folder, facts, rivals)


def train_party_in_game(config: TrainConfig, folder: str | Path, *, game: str,
                        players: int | None = None, rivals: int = 0, horizon: int | None = None,
                        cell_px: int = 8) -> Trained:
    """The same training in the real substrate, for comparison.

    Seeds do not hold in Melting Pot: going on after an interruption starts new episodes.
    """
    from worldgym.envs.party_rows import PartyVecEnv, RealParty

    def make() -> Any:
        return PartyVecEnv(RealParty(game, players, config.envs, view_of(config), cell_px=cell_px,
                                     horizon=horizon), rivals=rivals, seed=config.seed)

    return _train(make, config, folder, {"env": "meltingpot", "where": "real", "horizon": horizon},
                  rivals, {"game": game})


def _train(make: Callable[[], Any], config: TrainConfig, folder: str | Path,
           facts: dict[str, Any], rivals: int, more: dict[str, Any] | None = None) -> Trained:
    from worldgym.agents.party_learner import LiveRollout, PastSelf

    probe = make()
    source = probe.source
    name = more["game"] if more else source.game
    facts = facts | {
        "game": name, "players": source.players, "rivals": rivals,
        "frame_hw": [source.player_space.shape[0]] * 2,
        "action": asdict(ActionSpec.discrete(int(source.player_actions.n))),
        "view": asdict(source.seen)}
    waiting = [probe]

    def once() -> Any:
        return waiting.pop() if waiting else make()

    class Setup:
        """Hooks of ``train``."""

        options = {"rollout_buffer_class": LiveRollout}

        def built(self, model: Any, env: Any) -> None:
            self.env = env
            model.rollout_buffer.played = lambda: env.acted_R
            if rivals:
                env.rival = PastSelf(model.policy)

        def saved(self, checkpoint: Path) -> None:
            if rivals:
                self.env.rival.load(checkpoint)

    try:
        return train(once, config, folder, facts, Setup())
    finally:
        for unused in waiting:  # refused before it was asked for
            unused.close()
