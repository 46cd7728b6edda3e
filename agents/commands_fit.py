"""The subcommand ``fit``."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields

from worldgym.errors import ConfigError


@dataclass(kw_only=True)
class Fit:
    """Train a world model on recorded episodes; run it again to go on after an interruption.

    Args:
        data: folder that ``worldgym collect`` wrote.
        out: world folder to make.
        dynamics: nano, or wham: a small WHAM, world and players in one (no init, clip).
        init: world folder to start from; its codec stays.
        name: name of the world.
        codec_iterations: length of the codec's training.
        dynamics_iterations: length of the dynamics' training.
        outcome_iterations: length of the training of the reward and end heads.
        batch: clips per iteration.
        clip: frames per clip.
        width: model width.
        layers: blocks of the network.
        patch: latent cells of a token, height and width (wham: pixels).
        window: frames the model sees (wham: and actions).
        temperature: of the sampler's noise; above 1 what is rare happens more often.
        ahead: steps that the danger looks ahead.
        quick: fifty iterations of each part, to try the machinery.
        seed: seed of data order, noise and first weights.
        device: cpu or cuda.
        compile: fuse the network's operations: faster after minutes (needs a C++ compiler).
        shard: shard the network over processes under torchrun.
        codes: wham: size of the codebook.
        tokenizer: wham: vit, or conv for square frames.
        slide: wham: frames dropped at once from a full window; above 1 faster.
    """

    data: str
    out: str
    dynamics: str = "nano"
    init: str | None = None
    name: str | None = None
    codec_iterations: int | None = None
    dynamics_iterations: int | None = None
    outcome_iterations: int | None = None
    batch: int | None = None
    clip: int | None = None
    width: int | None = None
    layers: int | None = None
    patch: tuple[int, int] | None = None
    window: int | None = None
    temperature: float | None = None
    ahead: int | None = None
    quick: bool = False
    seed: int = 0
    device: str = "cpu"
    compile: bool = False
    shard: bool = False
    codes: int | None = None
    tokenizer: str | None = None
    slide: int | None = None

    def run(self) -> None:
        """Fit."""
        from worldgym.agents.games import remember_task
        from worldgym.train.fit import FitConfig, fit
        from worldgym.train.fit_wham import FitWhamConfig

        configs = {"nano": FitConfig, "wham": FitWhamConfig}
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "dynamics"}
        given = {k: v for k, v in given.items() if v is not None}
        config = configs.get(self.dynamics)
        known = {f.name for f in fields(config)} if config else set()
        if config is None or not set(given) <= known:
            raise ConfigError("these dynamics cannot be fitted so", fix="leave the others out",
                              given=f"{self.dynamics} with {sorted(set(given) - known)}",
                              expected=f"one of {list(configs)}, with its own settings")
        folder = fit(config(**given))
        if int(os.environ.get("RANK", "0")):  # under torchrun the first process writes the card
            return
        task = remember_task(self.data, folder)
        print(f"world written to {folder}; real game {task['twin']}, horizon {task['horizon']}")
