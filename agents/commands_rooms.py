"""The subcommands ``fit-rooms`` and ``revisit``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal


@dataclass(kw_only=True)
class FitRooms:
    """Train a small WorldPlay on recorded rooms; run it again to go on after an interruption.

    Args:
        data: folder that `worldgym collect --env worldgym/RoomsGame-v0` wrote.
        out: world folder to make.
        stage: how the dynamics are trained: whole, in one go; or in the stages of the paper, causal
            (the student), teacher, forcing (the student of --init by the teacher of --teacher).
        init: world folder to start from; its codec, heads and sizes are kept.
        teacher: world folder of the teacher, over the same codec (forcing).
        name: name of the world.
        codec_iterations: length of the codec's training.
        dynamics_iterations: length of the dynamics' training.
        outcome_iterations: length of the training of the heads.
        batch: clips per iteration.
        draws: noisy versions of a chunk per context pass.
        width: model width.
        layers: blocks of the network.
        channels: of the latents.
        stem: 2 for latent cells of 4 pixels, 4 for 8.
        total: frames of a context.
        temporal: the newest of them.
        positions: reframed or plain.
        dynamics_lr: learning rate of the dynamics.
        student_lr: learning rate of the student (forcing).
        critic_lr: learning rate of the critic (forcing).
        critic_updates: of the critic for each of the student (forcing).
        quick: fifty iterations of each part, to try the machinery.
        seed: seed of data order, noise and first weights.
        device: cpu or cuda.
    """

    data: str
    out: str
    stage: Literal["whole", "causal", "teacher", "forcing"] = "whole"
    init: str | None = None
    teacher: str | None = None
    name: str | None = None
    codec_iterations: int | None = None
    dynamics_iterations: int | None = None
    outcome_iterations: int | None = None
    batch: int | None = None
    draws: int | None = None
    width: int | None = None
    layers: int | None = None
    channels: int | None = None
    stem: int | None = None
    total: int | None = None
    temporal: int | None = None
    positions: str | None = None
    dynamics_lr: float | None = None
    student_lr: float | None = None
    critic_lr: float | None = None
    critic_updates: int | None = None
    quick: bool = False
    seed: int = 0
    device: str = "cpu"

    def run(self) -> None:
        """Fit."""
        from worldgym.train.fit_rooms import FitRoomsConfig, fit_rooms

        given = {f.name: getattr(self, f.name) for f in fields(self)}
        folder = fit_rooms(FitRoomsConfig(**{k: v for k, v in given.items() if v is not None}))
        print(f"world written to {folder}")


@dataclass(kw_only=True)
class Revisit:
    """Measure whether a world of rooms brings old views back: out and back on the same way.

    Args:
        world: id, or folder that `worldgym fit-rooms` wrote.
        plain: world fitted with --positions plain; default: the same weights.
        out: results file to write.
        routes: how many ways.
        steps: lengths of the ways out; 120 out and back are four of the longest recorded walks.
        device: cpu or cuda.
    """

    world: str = "worldgym/Rooms-v0"
    plain: Path | None = None
    out: Path | None = Path("results/rooms_revisit.json")
    routes: int = 32
    steps: tuple[int, ...] = (24, 6, 120)
    device: str = "cpu"

    def run(self) -> None:
        """Measure."""
        from worldgym.agents.revisit import revisit
        from worldgym.envs.tasks import place

        folder = place(self.world)
        for row in revisit(folder, self.out, plain=self.plain, routes=self.routes,
                           steps=self.steps, device=self.device):
            low, high = row.ci95 or (row.value, row.value)
            print(f"{row.what:22} {row.metric:9} {row.value:8.3f} [{low:.3f}, {high:.3f}] "
                  f"{row.unit}")
