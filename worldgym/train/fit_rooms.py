"""Fit a small WorldPlay to recordings with poses: codec, dynamics with memory, heads.

A clip is what the dream will do: its first picture stands still for a chunk, then come the recorded
frames, chunk by chunk; the context of a chunk is chosen among all frames before it, by the world's
own policy, so that old views are there to be used.
Every part resumes from its checkpoint in ``out/training``; run the same command again after a kill.
The published stages of WorldPlay's training are in fit_rooms_stages.py.
Shapes: B clip, R noisy version, K context frame, n frame of a chunk, C channel, h w latent grid.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from worldgym import camera
from worldgym.errors import ConfigError, DatasetError
from worldgym.models import nano, rooms
from worldgym.models.codec import CodecConfig
from worldgym.models.dynamics import drawer
from worldgym.models.rooms import CLEAN, RoomsConfig
from worldgym.reconstituted import Recent
from worldgym.schedule import add_noise
from worldgym.train.distributed import Group
from worldgym.train.fit import OUTCOME_BATCH, Fit, FitConfig
from worldgym.train.provenance import command

FULL = 0.75  # share of batches with a whole context; the others have a young clip's
FORGETFUL = 0.15  # share of clips that see the newest frames alone, whatever the policy
NOISED, MOST_NOISE = 0.5, 300.0  # share of clips with a noised context; up to this timestep
PURE, SHIFT = 0.25, 3.0  # share of pure noise; time shift of the rest
PAST, SOON = 12, 8  # chunks that a start remembers at most; before the goal
STAGES = ("whole", "causal", "teacher", "forcing")


@dataclass(frozen=True, kw_only=True, slots=True)
class FitRoomsConfig(FitConfig):
    """What to fit to what, for how long; see ``FitConfig`` for what both share.

    ``draws``: noisy versions of a chunk that share one context pass; ``channels``: of the latents;
    ``stem``: 2 for latent cells of 4 pixels, 4 for 8; ``total``, ``temporal``: frames of a context,
    and the newest of them; ``positions``, ``memory``: see ``RoomsConfig``, where the defaults are.
    ``stage``: how the dynamics are trained; "whole": with clean or slightly noised contexts;
    "causal": every chunk with a noise level of its own, contexts included; "teacher": four chunks
    at once; "forcing": the student ``init`` by the teacher of the folder ``teacher``, with
    ``student_lr``, ``critic_lr`` and ``critic_updates`` (the published rates are for billions of
    weights, these for small ones). ``init``: codec, heads and sizes are its, and what is not given
    of positions and memory.
    """

    codec_iterations: int = 4000
    dynamics_iterations: int = 12_000
    outcome_iterations: int = 500  # longer learns the few recorded ends by heart
    outcome_noise: float = 0.4
    batch: int = 16
    starts: int = 256
    keep_terminal_frames: bool = True
    draws: int = 3
    channels: int = 16
    stem: int = 4
    total: int = 16
    temporal: int = 8
    positions: str | None = None
    memory: str | None = None
    stage: str = "whole"
    teacher: str | None = None
    student_lr: float = 2e-5
    critic_lr: float = 1e-5
    critic_updates: int = 5

    def __post_init__(self) -> None:
        FitConfig.__post_init__(self)
        forcing = self.stage == "forcing"
        if self.stage not in STAGES or (self.teacher is not None) != forcing or (
                forcing and self.init is None):
            raise ConfigError("stage and folders do not fit",
                              given=f"stage {self.stage}, init {self.init}, teacher {self.teacher}",
                              expected=f"one of {STAGES}; forcing needs init (the student) and "
                              "teacher, the others take no teacher",
                              fix="see worldgym fit-rooms --help")


class Clips:
    """Clips of recorded episodes, as a dream will see them.

    Args:
        episodes: with ``info_pose`` and ``info_free``. cfg: of the world.
    """

    def __init__(self, episodes: Any, cfg: RoomsConfig) -> None:
        missing = [n for n in ("info_pose", "info_free") if n not in episodes.fields]
        if missing:
            raise DatasetError("recording without poses", given=sorted(episodes.fields),
                               expected=f"{missing}, as rooms are recorded",
                               fix="worldgym collect --env worldgym/RoomsGame-v0 --out FOLDER")
        self.episodes, self.cfg, self.n = episodes, cfg, cfg.chunk
        self.labels = np.asarray(cfg.labels)[episodes.take("actions", np.arange(episodes.rows))]
        self.labels[episodes.starts] = 0
        self.w2c = camera.inverse(episodes.take("info_pose", np.arange(episodes.rows)
                                                ).astype(np.float64))
        self.free = episodes.take("info_free", np.arange(episodes.rows)) > 0.5
        self.K = camera.normalised(cfg.K_33)
        self.policy = cfg.policy
        self.recent = Recent(total=cfg.total, temporal=cfg.temporal, chunk=cfg.chunk)
        self._known: dict[tuple[int, int], np.ndarray] = {}

    def chunks(self, episode: int) -> int:
        """Chunks of an episode's clip, the standing one included."""
        return 1 + int(self.episodes.lengths[episode]) // self.n

    def rows(self, episode: int, frames: np.ndarray) -> np.ndarray:
        """Rows of the data of some frames of a clip."""
        return self.episodes.starts[episode] + np.maximum(frames - self.n + 1, 0)

    def context(self, episode: int, start: int) -> np.ndarray:
        """Frames that the chunk at frame ``start`` sees, by the world's policy."""
        key = episode, start
        if key not in self._known:
            w2c = self.w2c[self.rows(episode, np.arange(start + self.n))]
            self._known[key] = self.policy.select(w2c, start, self.K)
        return self._known[key]

    def batch(self, ids: np.ndarray, count: int, seed: int, i: int) -> dict[str, np.ndarray]:
        """Batch ``i``: rows and frame numbers of contexts (B, K) and chunks (B, n).

        All contexts of a batch are of one length: whole, or a young clip's.
        """
        rng = np.random.default_rng((seed, 4, i))
        total, n = self.cfg.total, self.n
        long = ids[[self.chunks(e) * n > total + n for e in ids]]
        whole = len(long) > 0 and rng.random() < FULL
        young = n * int(rng.integers(1, total // n + 1))
        usable = long if whole else ids[[self.chunks(e) * n > young for e in ids]]
        if not len(usable):
            usable, young = ids[[self.chunks(e) > 1 for e in ids]], n
        out: dict[str, list] = {"old": [], "old_rows": [], "new": [], "new_rows": []}
        for episode in rng.choice(usable, count):
            start = young if not whole else n * int(
                rng.integers(total // n + 1, self.chunks(episode)))
            forget = rng.random() < FORGETFUL
            old = self.recent.choose(self.w2c[:n], start, None, ()) if forget else self.context(
                int(episode), start)
            new = np.arange(start, start + n)
            for name, frames in (("old", old), ("new", new)):
                out[name].append(frames)
                out[name + "_rows"].append(self.rows(episode, frames))
        return {k: np.stack(v) for k, v in out.items()}


def dynamics_loss(model: Any, clean_BKchw: Tensor, target_Bnchw: Tensor, given: dict[str, Tensor],
                  draw: Callable[..., Tensor], draws: int, chunk: int
                  ) -> tuple[Tensor, dict[str, float]]:
    """Flow-matching loss of chunks that see clean or slightly noised contexts.

    Args:
        clean_BKchw: context latents. target_Bnchw: chunks.
        given: labels, w2c and index of both ("old_", "new_"), and K.
        draw: draw(kind, *shape): (B, *shape) of noise. draws: R. chunk: frames of a chunk.
    """
    b, k = clean_BKchw.shape[:2]
    noised = draw(torch.rand, 1) < NOISED
    time = CLEAN + (MOST_NOISE - CLEAN) * draw(torch.rand, k // chunk)  # of whole chunks
    time = torch.where(noised, time, torch.full_like(time, CLEAN)).repeat_interleave(chunk, 1)
    level = torch.where(noised, time / 1000, torch.zeros_like(time))
    context = add_noise(clean_BKchw, draw(torch.randn, *clean_BKchw.shape[1:]), level)
    sigma = draw(torch.rand, draws)
    sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
    sigma = torch.where(draw(torch.rand, draws) < PURE, torch.ones_like(sigma), sigma)
    target = target_Bnchw.transpose(1, 2)[:, None].expand(-1, draws, -1, -1, -1, -1)
    noise = draw(torch.randn, *target.shape[1:])
    noisy = add_noise(target.contiguous(), noise, sigma)
    times = (1000 * sigma)[..., None].expand(-1, -1, target_Bnchw.shape[1])
    flow = model(context.transpose(1, 2), time, given["old_labels"], given["old_w2c"],
                 given["old_index"], noisy, times, given["new_labels"], given["new_w2c"],
                 given["new_index"], given["K"])
    error = ((flow - (noise - target)) ** 2).mean((2, 3, 4, 5))
    pure = sigma == 1
    first = error[pure].mean() if bool(pure.any()) else error.mean()
    return error.mean(), {"full_noise_mse": float(first.detach())}


class FitRooms(Fit):
    """One fitting run."""

    cfg: FitRoomsConfig

    def _network(self) -> Any:
        cfg, recipe = self.cfg, self.episodes.env.get("recipe", {})
        missing = [k for k in ("labels", "move", "turn", "K") if k not in recipe]
        if missing:
            raise DatasetError("recording does not tell its camera", given=sorted(recipe),
                               expected=f"{missing} in the recipe", fix="record rooms with "
                               "worldgym collect --env worldgym/RoomsGame-v0")
        if cfg.draws < 1:
            raise ConfigError("no noisy version of a chunk", given=f"draws {cfg.draws}",
                              expected="draws >= 1", fix="leave it out")
        if cfg.init:
            return self._started(cfg.name or Path(cfg.out).resolve().name, self._own())
        codec = CodecConfig(frame_hw=tuple(self.episodes.frame_hw),  # type: ignore[arg-type]
                            channels=cfg.channels, stem=cfg.stem)
        _, h, w = codec.latent_chw
        patch = cfg.patch or (2 if h % 2 == 0 else 1, 2 if w % 2 == 0 else 1)
        wan = nano.dit_config(cfg.channels, 0, cfg.width or 128, cfg.layers or 6,
                              patch=(patch[0], patch[1]))
        config = RoomsConfig(
            name=cfg.name or Path(cfg.out).resolve().name, labels=tuple(recipe["labels"]),
            move=recipe["move"], turn=recipe["turn"], K=tuple(np.ravel(recipe["K"]).tolist()),
            fps=self.episodes.fps, codec=codec, wan=wan, chunk=int(recipe.get("frames", 4)),
            total=cfg.total, temporal=cfg.temporal, **self._own())  # type: ignore[arg-type]
        self.clips = Clips(self.episodes, config)
        return rooms.fresh(config, cfg.seed)

    def _own(self) -> dict[str, Any]:
        """Settings of the world that were given, and may differ from those of ``init``."""
        cfg = self.cfg
        given = {"steps": cfg.steps and tuple(cfg.steps), "temperature": cfg.temperature,
                 "positions": cfg.positions, "memory": cfg.memory}
        return {k: v for k, v in given.items() if v is not None}

    def _started(self, name: str, given: dict) -> Any:
        """The world of ``init``, checked against data and settings."""
        cfg, recipe = self.cfg, self.episodes.env["recipe"]
        assert cfg.init is not None
        net = rooms.load_net(cfg.init, name=name, fps=self.episodes.fps, **given)
        old = net.cfg
        mine = {"frames": tuple(old.codec.frame_hw), "labels": list(old.labels), "chunk": old.chunk,
                "K": list(old.K), "width": old.wan.dim, "layers": old.wan.num_layers}
        want = {"frames": tuple(self.episodes.frame_hw), "labels": list(recipe["labels"]),
                "chunk": int(recipe.get("frames", 4)), "K": np.ravel(recipe["K"]).tolist(),
                "width": cfg.width or old.wan.dim, "layers": cfg.layers or old.wan.num_layers}
        self.agree(mine, want, "use a world fitted to such recordings, and leave sizes out")
        self.clips = Clips(self.episodes, old)
        return net

    def _dynamics(self, iterations: int) -> None:
        cfg, group, clips = self.cfg, self.group, self.clips
        K = torch.from_numpy(clips.K).to(group.device)
        share = group.rank, group.size

        def sample(i: int) -> dict:
            batch = clips.batch(self.train_ids, cfg.batch, cfg.seed, i)
            return {k: v[group.rows(cfg.batch)] for k, v in batch.items()}

        def loss(model: Any, data: dict, generator: torch.Generator) -> Any:
            given = {"K": K}
            for name in ("old", "new"):
                rows = data[name + "_rows"]
                given |= {f"{name}_{k}": torch.from_numpy(v).to(group.device) for k, v in (
                    ("labels", clips.labels[rows]), ("w2c", clips.w2c[rows]),
                    ("index", data[name] if clips.cfg.positions == "plain" else
                     np.arange(rows.shape[1])[None].repeat(len(rows), 0) + (
                         data["old"].shape[1] if name == "new" else 0)))}
            old, new = (self._latents(data[k + "_rows"]) for k in ("old", "new"))
            draw = drawer(len(old), generator, share, group.device)
            return dynamics_loss(model, old, new, given, draw, cfg.draws, clips.n)

        about = {"batch": cfg.batch, "draws": cfg.draws, "config": clips.cfg.to_json()}
        self._learn(iterations, about, sample, loss)

    def _learn(self, iterations: int, about: dict, sample: Callable[[int], dict], loss: Any,
               **changes: Any) -> None:
        """Train the dynamics by one loss."""
        loop = self.loop("dynamics", iterations, about, lr=self.cfg.dynamics_lr, decay=0.3,
                         warmup=200, weight_decay=0.02, muon=True, ema=0.995, **changes)
        loop.run(sample, loss, self.cfg.tensorboard)
        self.finish(loop)

    def _latents(self, rows: np.ndarray) -> Tensor:
        flat = self.latents[rows.ravel()].astype(np.float32)
        return torch.from_numpy(flat).unflatten(0, rows.shape).to(self.group.device)

    def _outcome(self, iterations: int) -> None:
        """Heads: is the way free, is this the goal; those of ``init`` are kept."""
        if self.cfg.init:
            self.nano.outcome.eval()
            return
        cfg, group, clips, data = self.cfg, self.group, self.clips, self.episodes
        n, batch = clips.n, OUTCOME_BATCH
        before = np.concatenate([s + np.arange(0, length - n + 1) for s, length in zip(
            data.starts[self.train_ids], data.lengths[self.train_ids], strict=True)])
        rows = self._all_rows(self.train_ids)
        over = data.take("terminated", rows)
        ends, others = rows[over], rows[~over]

        def sample(i: int) -> dict:
            rng = np.random.default_rng((cfg.seed, 5, i))
            start = rng.choice(before, batch)
            which = rng.integers(n, size=batch)
            shown = rng.choice(others, batch)
            if len(ends):
                shown[:batch // 4] = rng.choice(ends, batch // 4)
            mine = group.rows(batch)
            return {"start": start[mine], "which": which[mine], "shown": shown[mine]}

        def loss(model: Any, data_: dict, generator: torch.Generator) -> Any:
            start, which, shown = data_["start"], data_["which"], data_["shown"]
            labels = clips.labels[start[:, None] + np.arange(1, n + 1)]
            wish = self.nano.outcome.wishes(labels)[np.arange(len(start)), which]
            latents = torch.cat([self._latents(start), self._latents(shown)])
            draw = drawer(len(start), generator, (group.rank, group.size), group.device)
            level = cfg.outcome_noise * torch.cat([draw(torch.rand, 1, 1, 1) for _ in range(2)])
            noise = torch.cat([draw(torch.randn, *latents.shape[1:]) for _ in range(2)])
            wishes = torch.from_numpy(np.concatenate([wish, np.zeros_like(wish)])).to(latents)
            out = model(latents + level * noise, wishes)
            there = (labels[np.arange(len(start)), which] >= 9).astype(np.float32)
            target = clips.free[start + 1 + which].astype(np.float32)
            move = F.binary_cross_entropy_with_logits(
                out[:len(start), 0], torch.from_numpy(target).to(out),
                weight=torch.from_numpy(there).to(out))
            end = F.binary_cross_entropy_with_logits(
                out[len(start):, 1],
                torch.from_numpy(data.take("terminated", shown).astype(np.float32)).to(out))
            return move + end, {"move_bce": float(move.detach()), "end_bce": float(end.detach())}

        loop = self.loop("outcome", iterations, {"noise": cfg.outcome_noise}, lr=1e-3, decay=0.5,
                         weight_decay=0.05)
        loop.run(sample, loss, cfg.tensorboard)
        self.finish(loop)

    def _all_rows(self, ids: np.ndarray) -> np.ndarray:
        data = self.episodes
        return np.concatenate([s + np.arange(length + 1) for s, length in zip(
            data.starts[ids], data.lengths[ids], strict=True)])

    def _write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self._starts().save(self.out)
        nano.save(self.nano, self.out, {"task": self._task(), "provenance": self._provenance()},
                  rooms.KIND)

    def _starts(self) -> rooms.RoomsStarts:
        """Half of the starts are pictures, half moments of recorded walks, which they remember;
        every other one of these is soon followed by the goal, so that there is something to find.
        """
        cfg, clips, data = self.cfg, self.clips, self.episodes
        rng, n = np.random.default_rng((cfg.seed, 6)), clips.n
        rows = self._all_rows(self.train_ids)
        rows = rows[~data.take("terminated", rows)]
        alone = np.sort(rng.choice(rows, min(cfg.starts - cfg.starts // 2, len(rows)), False))
        ends = data.starts[self.train_ids] + data.lengths[self.train_ids]
        won = self.train_ids[data.take("terminated", ends)]
        frames, latents, poses, lengths = [self._read(alone)], [], [], []
        for i in range(cfg.starts // 2):
            soon = i % 2 == 0 and len(won) > 0
            episode = int(rng.choice(won if soon else self.train_ids))
            most = clips.chunks(episode) - 1  # the last chunk may show the end
            number = int(rng.integers(max(1, most - SOON) if soon else 1, max(1, most) + 1))
            seen = np.arange(max(0, number - PAST) * n, number * n)
            walk = clips.rows(episode, seen)
            room = np.pad(walk, (PAST * n - len(walk), 0), "edge")
            frames.append(self._read(walk[-1:]))
            latents.append(self._latents(room).cpu())
            poses.append(clips.w2c[walk[-1]] @ camera.inverse(clips.w2c[room]))  # seen from here
            lengths.append(len(walk))
        shape = 0, PAST * n, *self.nano.cfg.codec.latent_chw
        return rooms.RoomsStarts(
            np.concatenate(frames), torch.stack(latents) if latents else torch.zeros(shape),
            np.stack(poses) if poses else np.zeros((*shape[:2], 4, 4)),
            np.array(lengths, np.int64))

    def _task(self) -> dict:
        recipe = self.episodes.env["recipe"]
        return {"twin": recipe.get("id"), "horizon": recipe.get("horizon")}

    def _provenance(self) -> dict:
        return {**super()._provenance(), "command": command(self.cfg, "worldgym fit-rooms")}


def fit_rooms(cfg: FitRoomsConfig) -> Path:
    """Fit a world; see ``FitRoomsConfig``. Returns the world folder."""
    from worldgym.train.fit_rooms_stages import FitRoomsStage

    group = Group.from_env(cfg.device, cfg.shard)
    try:
        return (FitRooms if cfg.stage == "whole" else FitRoomsStage)(cfg, group).run()
    finally:
        group.close()
