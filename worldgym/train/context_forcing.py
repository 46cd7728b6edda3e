"""Context forcing: a few-step student with memory learns a teacher's distribution.

Source: specs/worldplay.md section 12 (the paper's section 3.4 and Algorithm 1). The student makes
four chunks after a true past, each from what its own memory retrieves; the teacher, bidirectional,
judges the four together and sees what the student saw, no more and no less. What moves the student
is the difference of two predictions: the teacher's, and that of a critic (the fake score) which
learns all the time what the student makes now (distribution matching distillation).
Shapes: B clip, F frame of a clip, K context frame, N frame of the window, C channel, h w latent
grid, L text token, D text width.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from worldgym.errors import ConfigError, DatasetError, ShapeError
from worldgym.models.dynamics import drawer
from worldgym.models.worldplay import WorldPlayDiT
from worldgym.models.worldplay_loss import (
    LENGTHS,
    Draw,
    Frames,
    encode,
    flow_of,
    joint_flow,
    joint_loss,
    length_at,
    noised,
    with_latents,
)
from worldgym.models.worldplay_rollout import TIMESTEPS
from worldgym.reconstituted import Reconstituted
from worldgym.schedule import Euler, x0_from_flow
from worldgym.train.loop import Loop, LoopConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ForcingConfig:
    """Settings of context forcing; the defaults are the published ones, for real sizes.

    ``iterations``: updates of the student; ``critic_updates``: of the critic for each of them;
    ``chunks``: of a rollout; ``steps``: the student's denoising timesteps; ``shift``, ``least``,
    ``most``: of the timesteps at which the scores are compared; ``guidance``: of the teacher by its
    text (1 for networks without text); ``ema``, ``ema_from``: the student's average, and the
    iteration it starts at; ``lengths``: most frames of a clip from an iteration on, history and
    rollout together; ``least_history``: chunks.
    """

    iterations: int = 2000
    batch: int = 64
    lr: float = 1e-6
    critic_lr: float = 2e-7
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.01
    clip: float = 10.0
    critic_updates: int = 5
    chunks: int = 4
    steps: tuple[float, ...] = TIMESTEPS
    shift: float = 5.0
    least: float = 20.0
    most: float = 980.0
    guidance: float = 3.0
    ema: float = 0.99
    ema_from: int = 200
    lengths: tuple[tuple[int, int], ...] = LENGTHS
    least_history: int = 0

    def __post_init__(self) -> None:
        whole = min(self.iterations, self.batch, self.critic_updates, self.chunks,
                    self.least_history + 1)
        if whole < 1 or min(self.lr, self.critic_lr) <= 0 or not 0 <= self.ema < 1:
            raise ConfigError(
                "impossible context forcing", given=f"iterations {self.iterations}, batch "
                f"{self.batch}, critic_updates {self.critic_updates}, chunks {self.chunks}, "
                f"least_history {self.least_history}, lr {self.lr}, critic_lr {self.critic_lr}, "
                f"ema {self.ema}", expected="whole numbers of 1 or more (history 0 or more), rates "
                "above 0, 0 <= ema < 1", fix="leave them out")
        if not 0 < self.least < self.most < 1000 or self.guidance < 1:
            raise ConfigError(
                "impossible score timesteps", given=f"{self.least} to {self.most}, guidance "
                f"{self.guidance}", expected="0 < least < most < 1000, guidance 1 or more",
                fix="use 20, 980, and guidance 3, or 1 without text")
        Euler.at(self.steps)  # refuses lists that do not fall
        if not self.lengths or self.lengths[0][0] != 0:
            raise ConfigError("lengths do not begin at iteration 0", given=self.lengths,
                              expected="((0, frames), (later, more), ...)", fix="leave them out")


def teacher_set(contexts: Sequence[np.ndarray], start: int, chunks: int = 4,
                chunk: int = 4) -> np.ndarray:
    """What the teacher sees of one clip: the union of the chunks' contexts less the chunks made.

    Whole chunks are counted: C_tea = (C_j u .. u C_j+3) minus {x_j .. x_j+3}.

    >>> teacher_set([np.array([0, 1, 2, 3, 8, 9, 10, 11]), np.arange(8, 16)], 12, chunks=2).tolist()
    [0, 1, 2, 3, 8, 9, 10, 11]
    """
    seen = np.unique(np.concatenate([np.asarray(c, np.int64) for c in contexts]) // chunk)
    old = seen[(seen < start // chunk) | (seen >= start // chunk + chunks)]
    return (old[:, None] * chunk + np.arange(chunk)).ravel()


@dataclass(frozen=True, slots=True)
class Window:
    """Chunks to be made, from frame ``start`` on: what each sees (``contexts``: per chunk (B, K)),
    and what the teacher sees (per clip)."""

    start: int
    chunk: int
    contexts: tuple[np.ndarray, ...]
    teacher: tuple[np.ndarray, ...]

    @classmethod
    def choose(cls, policy: Reconstituted, w2c_BF44: np.ndarray, start: int, chunks: int = 4,
               K_33: np.ndarray | None = None,
               teacher_policy: Reconstituted | None = None) -> "Window":
        """Retrieve for every chunk from ``start`` on, as the student will while it steps.

        ``teacher_policy``: chooses what the teacher sees instead (an ablation: misaligned context).
        """
        n = policy.chunk
        if start % n or w2c_BF44.ndim != 4 or w2c_BF44.shape[1] < start + chunks * n:
            raise ShapeError("poses do not reach the end of the rollout",
                             given=f"poses {w2c_BF44.shape}, start {start}",
                             expected=f"a start that is a multiple of {n}, and {start + chunks * n}"
                             " poses of every clip", fix="choose an earlier start")
        starts = range(start, start + chunks * n, n)

        def chosen(by: Reconstituted) -> list[list[np.ndarray]]:
            return [[by.select(w2c, s, K_33) for s in starts] for w2c in w2c_BF44]

        return cls.of(chosen(policy), start, n,
                      None if teacher_policy is None else chosen(teacher_policy))

    @classmethod
    def of(cls, seen: Sequence[Sequence[np.ndarray]], start: int, chunk: int,
           told: Sequence[Sequence[np.ndarray]] | None = None) -> "Window":
        """From what every chunk of every clip sees; ``told``: what the teacher's set is made of
        instead."""
        chunks = len(seen[0])
        return cls(start, chunk, tuple(np.stack([c[i] for c in seen]) for i in range(chunks)),
                   tuple(teacher_set(c, start, chunks, chunk) for c in told or seen))


class ContextForcing:
    """The two losses of stage three.

    Args:
        student: trained; steps chunk by chunk. teacher: bidirectional; frozen here.
        critic: the fake score; starts as a copy of the teacher.
        cfg: settings. plain: positions are true frame numbers instead of ranks.
        empty_LD: the text of no prompt, for ``cfg.guidance`` above 1.
    """

    def __init__(self, student: WorldPlayDiT, teacher: WorldPlayDiT, critic: WorldPlayDiT,
                 cfg: ForcingConfig, *, plain: bool = False,
                 empty_LD: Tensor | None = None) -> None:
        weights = [{id(p) for p in d.parameters()} for d in (student, teacher, critic)]
        if len(set.union(*weights)) < sum(map(len, weights)):
            raise ConfigError("networks share weights", given="student, teacher, critic",
                              expected="three networks of their own",
                              fix="use copy.deepcopy(teacher) as the critic")
        if cfg.guidance > 1 and empty_LD is None:
            raise ConfigError("guidance by text without the text of no prompt",
                              given=f"guidance {cfg.guidance}, empty_LD None",
                              expected="an embedding of the empty prompt, or guidance 1",
                              fix="pass empty_LD, or ForcingConfig(guidance=1)")
        sizes = {(d.cfg.in_dim, d.cfg.out_dim) for d in (student, teacher, critic)}
        if len(sizes) > 1:
            raise ConfigError("networks are of different latents", given=sorted(sizes),
                              expected="the same channels", fix="fit both over one codec")
        self.student, self.critic = student.requires_grad_(True), critic.requires_grad_(True)
        self.cfg = cfg
        self.teacher = teacher.eval().requires_grad_(False)
        self.sampler, self.plain, self.empty_LD = Euler.at(cfg.steps), plain, empty_LD

    def rollout(self, clip: Frames, window: Window, draw: Draw, passes: int,
                gradient: bool = False) -> Tensor:
        """What the student makes (B, N, C, h, w), chunk by chunk.

        The past before ``window.start`` is the clip's own; what the clip shows later is not read.
        Contexts are encoded without gradient, as Self-Forcing fills its cache.

        Args:
            passes: denoising passes, 1 to all; the last one's prediction of the clean latents is
                the result.
            gradient: through that pass alone, and not into what it sees.
        """
        n, made = window.chunk, []
        latents = clip.latents_BFChw.detach().clone()
        for i, index_BK in enumerate(window.contexts):
            start = window.start + i * n
            new = clip.span(start, start + n)
            with torch.no_grad():
                seen = with_latents(clip, latents).take(index_BK)
                context = encode(self.student, seen, new.here, plain=self.plain)
            x = draw(torch.randn, *new.latents_BFChw.shape[1:])
            for step in range(passes):
                t = self.sampler.timesteps_S[step].to(x).expand(len(x), n)
                last = step == passes - 1
                with torch.set_grad_enabled(gradient and last):
                    flow = flow_of(self.student, x, t, new, index_BK.shape[1], context, self.plain)
                    x = x0_from_flow(x, flow, float(self.sampler.sigmas_S[step])) if last else (
                        self.sampler.step(x, flow, step))
            made.append(x)
            latents[:, start:start + n] = x.detach()
        return torch.cat(made, 1)

    def times(self, draw: Draw) -> Tensor:
        """Timesteps (B,) at which the scores are compared: uniform, shifted, kept off the ends."""
        u, shift = draw(torch.rand, 1)[:, 0], self.cfg.shift
        return (1000 * shift * u / (1 + (shift - 1) * u)).clamp(self.cfg.least, self.cfg.most)

    @torch.no_grad()
    def direction(self, made_BNChw: Tensor, clip: Frames, window: Window, draw: Draw) -> Tensor:
        """Where the frames should not go (B, N, C, h, w): critic's less teacher's prediction of the
        clean frames, over the mean distance from the teacher's, per clip."""
        t_B = self.times(draw)
        noisy, _ = noised(made_BNChw, t_B, draw)
        place = (noisy, t_B, clip, window.start, window.teacher, self.plain)
        real = joint_flow(self.teacher, *place)
        if self.cfg.guidance > 1:
            assert self.empty_LD is not None
            free = replace(clip, text_BLD=self.empty_LD.expand(len(clip), -1, -1))
            empty = joint_flow(self.teacher, noisy, t_B, free, *place[3:])
            real = empty + self.cfg.guidance * (real - empty)
        fake = joint_flow(self.critic, *place)
        level = (t_B / 1000).to(noisy)
        clean = x0_from_flow(noisy, real, level)
        away = (made_BNChw - clean).abs().mean((1, 2, 3, 4), keepdim=True)
        return (x0_from_flow(noisy, fake, level) - clean) / away.clamp_min(1e-8)

    def student_loss(self, clip: Frames, window: Window, generator: torch.Generator
                     ) -> tuple[Tensor, dict[str, float]]:
        """Half the mean square of the distance to where the student's frames should be."""
        draw = self._draw(clip, generator)
        made = self.rollout(clip, window, draw, self._passes(generator), gradient=True)
        away = self.direction(made.detach(), clip, window, draw)
        loss = 0.5 * ((made - (made.detach() - away)) ** 2).mean()
        return loss, {"score_gap": float(away.abs().mean())}

    def critic_loss(self, clip: Frames, window: Window, generator: torch.Generator
                    ) -> tuple[Tensor, dict[str, float]]:
        """Flow-matching loss of the critic on what the student makes now."""
        draw = self._draw(clip, generator)
        with torch.no_grad():
            made = self.rollout(clip, window, draw, self._passes(generator))
        return joint_loss(self.critic, clip, window.start, made, window.teacher, self.times(draw),
                          draw, self.plain), {}

    def _draw(self, clip: Frames, generator: torch.Generator) -> Draw:
        return drawer(len(clip), generator, (0, 1), clip.latents_BFChw.device)

    def _passes(self, generator: torch.Generator) -> int:
        """How many of the passes are made: of all chunks of a rollout as many, as in Self-Forcing.
        """
        return int(torch.randint(1, len(self.sampler) + 1, (1,), generator=generator))

    def train(self, sample: Callable[[int, int], tuple[Frames, Window]], folder: str | Path, *,
              name: str = "dynamics", module: nn.Module | None = None, seed: int = 0,
              about: Mapping[str, Any] | None = None, save_every: int = 50, log_every: int = 20,
              tensorboard: bool = True) -> Loop:
        """Train student and critic; resumes from ``folder/name.ckpt``, where both are.

        Args:
            sample: sample(n, i): clips and window number n, for the student's iteration i.
            module: what is trained and averaged, if the student is a part of it.
            about: what else the checkpoint depends on.

        Returns:
            The student's loop; its average is ``loop.ema``.
        """
        cfg, each = self.cfg, self.cfg.critic_updates
        same: dict[str, Any] = {"warmup": 0, "decay": 0.0, "betas": cfg.betas, "clip": cfg.clip,
                                "weight_decay": cfg.weight_decay}
        critic = Loop(f"{name}-critic", self.critic, LoopConfig(
            iterations=each * cfg.iterations, lr=cfg.critic_lr, seed=seed + 1, **same),
            Path(folder))
        student = Loop(name, module or self.student, LoopConfig(
            iterations=cfg.iterations, lr=cfg.lr, seed=seed, ema=cfg.ema, ema_from=cfg.ema_from,
            save_every=save_every, log_every=log_every, **same), Path(folder), about={
                "forcing": json.loads(json.dumps(asdict(cfg))), "plain": self.plain,
                **dict(about or {})}, partner=critic)

        def learn(model: Any, data: dict, generator: torch.Generator) -> Any:
            return self.critic_loss(data["clip"], data["window"], generator)

        def criticised(i: int) -> dict:
            return dict(zip(("clip", "window"), sample(
                i // each * (each + 1) + i % each, i // each), strict=True))

        def loss(model: Any, data: dict, generator: torch.Generator) -> Any:
            losses = [critic.step(criticised, learn)["loss"] for _ in range(each)]
            clip, window = sample(data["i"] * (each + 1) + each, data["i"])
            value, logs = self.student_loss(clip, window, generator)
            return value, logs | {"critic_loss": sum(losses) / each}

        student.run(lambda i: {"i": i}, loss, tensorboard)
        return student


def history(rng: np.random.Generator, cfg: ForcingConfig, chunk: int, iteration: int,
            longest: int) -> int:
    """Chunks of true past j ~ U{least..m} of a rollout; ``longest``: chunks of the longest clip."""
    most = min(length_at(cfg.lengths, iteration) // chunk, longest) - cfg.chunks
    if longest - cfg.chunks < cfg.least_history:
        raise DatasetError("clips are too short for a rollout", given=f"{longest} chunks",
                           expected=f"at least {cfg.chunks + cfg.least_history}",
                           fix="record longer episodes")
    return int(rng.integers(cfg.least_history, max(cfg.least_history, most) + 1))
