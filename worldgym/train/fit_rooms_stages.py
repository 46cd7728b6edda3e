"""WorldPlay's published training stages for rooms: causal student, joint teacher, context forcing.

Source: specs/worldplay.md section 12; the losses are in models/worldplay_loss.py and
context_forcing.py. Here recordings become their clips. Shapes as in fit_rooms.py; F frame of a
clip.
"""

import copy
from typing import Any

import numpy as np
import torch

from worldgym.errors import ConfigError, DatasetError
from worldgym.models import nano, rooms
from worldgym.models.dynamics import drawer
from worldgym.models.worldplay_loss import (
    CausalConfig,
    Frames,
    causal_loss,
    causal_sequence,
    joint_loss,
    length_at,
)
from worldgym.schedule import chunk_times
from worldgym.train.context_forcing import ContextForcing, ForcingConfig, Window, history
from worldgym.train.fit_rooms import FORGETFUL, Clips, FitRooms
from worldgym.train.provenance import started_from


class FitRoomsStage(FitRooms):
    """One run of a stage; a world to start from keeps its codec and its heads."""

    def _network(self) -> Any:
        if self.group.size > 1:
            raise ConfigError("stages of rooms are trained by one process",
                              given=f"{self.group.size} processes, stage {self.cfg.stage}",
                              expected="1 process", fix="start it without torchrun")
        return super()._network()

    def _dynamics(self, iterations: int) -> None:
        {"causal": self._causal, "teacher": self._joint,
         "forcing": self._forcing}[self.cfg.stage](iterations)

    def _causal(self, iterations: int) -> None:
        """Stages one and two of the student: every chunk with a noise level of its own."""
        cfg, clips, causal = self.cfg, self.clips, CausalConfig()
        wide = clips.policy.total + clips.n
        usable = self.train_ids[[clips.chunks(e) * clips.n >= wide for e in self.train_ids]]
        if not len(usable):
            raise DatasetError("no clip is long enough", given=f"{len(self.train_ids)} clips",
                               expected=f"one of {wide} frames", fix="a smaller --total")

        def sample(i: int) -> dict:
            rng = np.random.default_rng((cfg.seed, 7, i))
            most = max(wide, length_at(causal.lengths, i))
            episodes, made = rng.choice(usable, cfg.batch), []
            for e in episodes:
                frames = np.arange(min(most, clips.chunks(e) * clips.n))
                made.append(causal_sequence(clips.policy, clips.w2c[clips.rows(e, frames)],
                                            clips.K, rng, causal.memory))
            return {"clip": self._clip(episodes, np.stack([m[0] for m in made])),
                    "memory": torch.tensor([m[1] for m in made], device=self.group.device)}

        def loss(model: Any, data: dict, generator: torch.Generator) -> Any:
            draw = drawer(cfg.batch, generator, (0, 1), self.group.device)
            return causal_loss(model.dit, data["clip"], data["memory"], draw, clips.n, causal,
                               clips.cfg.positions == "plain")

        about = {"stage": "causal", "batch": cfg.batch, "config": clips.cfg.to_json()}
        self._learn(iterations, about, sample, loss, skip=causal.skip)

    def _joint(self, iterations: int) -> None:
        """The teacher: four chunks at once, which see all that their memories retrieve."""
        cfg, clips = self.cfg, self.clips
        sizes = self._sizes(iterations)

        def sample(i: int) -> dict:
            return dict(zip(("clip", "window"), self._window(sizes, i, i, FORGETFUL), strict=True))

        def loss(model: Any, data: dict, generator: torch.Generator) -> Any:
            draw, clip = drawer(cfg.batch, generator, (0, 1), self.group.device), data["clip"]
            window = data["window"]
            t_B = chunk_times(torch.sigmoid(draw(torch.randn, 1))[:, 0]).to(clip.latents_BFChw)
            return joint_loss(model.dit, clip, window.start, clip.latents_BFChw[:, window.start:],
                              window.teacher, t_B, draw, clips.cfg.positions == "plain"), {}

        about = {"stage": "teacher", "batch": cfg.batch, "config": clips.cfg.to_json()}
        self._learn(iterations, about, sample, loss)

    def _forcing(self, iterations: int) -> None:
        """Stage three: the student learns the teacher's distribution."""
        cfg, clips = self.cfg, self.clips
        assert cfg.teacher is not None
        teacher = rooms.load_net(cfg.teacher)
        codec, mine = teacher.codec.state_dict(), self.nano.codec.state_dict()
        if codec.keys() != mine.keys() or not all(
                torch.equal(codec[k], mine[k].cpu()) for k in mine) or (
                teacher.cfg.positions != clips.cfg.positions):
            raise ConfigError("student and teacher do not speak of the same latents",
                              given=f"teacher {cfg.teacher}, student {cfg.init}",
                              expected="one codec and the same positions",
                              fix="fit the one with --init of the other, then --stage forcing")
        dit = teacher.dynamics.dit.to(self.group.device)
        sizes = self._sizes(iterations)
        forcing = ContextForcing(self.nano.dynamics.dit, dit, copy.deepcopy(dit), sizes,
                                 plain=clips.cfg.positions == "plain")
        loop = forcing.train(
            lambda number, i: self._window(sizes, number, i), self.work,
            module=self.nano.dynamics, seed=cfg.seed, tensorboard=cfg.tensorboard,
            save_every=max(1, min(50, iterations // 4)),
            about=self.about | {"teacher": nano.value_fingerprint(teacher)})
        self.finish(loop)

    def _sizes(self, iterations: int) -> ForcingConfig:
        """A clip's first chunk is its start picture, and is never made."""
        cfg = self.cfg
        return ForcingConfig(
            iterations=iterations, batch=cfg.batch, lr=cfg.student_lr, critic_lr=cfg.critic_lr,
            critic_updates=cfg.critic_updates, steps=self.clips.cfg.steps, guidance=1.0,
            least_history=1)

    def _window(self, sizes: ForcingConfig, number: int, i: int, forgetful: float = 0.0
                ) -> tuple[Frames, Window]:
        """Clips and window ``number``, as long as iteration ``i`` allows."""
        clips, rng = self.clips, np.random.default_rng((self.cfg.seed, 8, number))
        longest = max(clips.chunks(e) for e in self.train_ids)
        past = history(rng, sizes, clips.n, i, longest)
        episodes, window = windows(clips, self.train_ids, sizes.batch, rng, past, sizes.chunks,
                                   forgetful)
        end = clips.n * (past + sizes.chunks)
        return self._clip(episodes, np.arange(end)[None].repeat(len(episodes), 0)), window

    def _clip(self, episodes: np.ndarray, number_BF: np.ndarray) -> Frames:
        clips = self.clips
        rows = np.stack([clips.rows(e, n) for e, n in zip(episodes, number_BF, strict=True)])
        return Frames.of(self._latents(rows), clips.w2c[rows], clips.labels[rows], clips.K,
                         number_BF)

    def _provenance(self) -> dict:
        taught = started_from(self.cfg.teacher).get("started_from")
        return super()._provenance() | ({"teacher": taught} if self.cfg.teacher else {})


def windows(clips: Clips, ids: np.ndarray, count: int, rng: np.random.Generator, past: int,
            chunks: int, forgetful: float = 0.0) -> tuple[np.ndarray, Window]:
    """Episodes, and what is seen in the ``chunks`` chunks after ``past``.

    ``forgetful``: share of clips that see the newest frames alone.
    """
    episodes = rng.choice(ids[[clips.chunks(e) >= past + chunks for e in ids]], count)
    starts = clips.n * (past + np.arange(chunks))
    seen = [[clips.recent.choose(clips.w2c[:clips.n], int(s), None, ()) for s in starts]
            if rng.random() < forgetful else [clips.context(int(e), int(s)) for s in starts]
            for e in episodes]
    return episodes, Window.of(seen, clips.n * past, clips.n)

