"""Fit a nano world to recorded episodes: codec, then dynamics, then outcome heads.

Every part resumes from its checkpoint in ``out/training``; run the same command again after a
kill, in the same way. Under torchrun each part trains on all processes.
Shapes: B clip, F frame, R row of the data.
"""

import hashlib
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldgym.data.chunks import ChunkSampler, OutcomeSampler
from worldgym.data.starts import StartBank
from worldgym.data.store import Episodes
from worldgym.errors import ConfigError, DatasetError
from worldgym.models import nano
from worldgym.models.codec import CodecConfig
from worldgym.models.dynamics import dynamics_loss
from worldgym.models.nano import Nano, NanoConfig
from worldgym.models.outcome import outcome_loss
from worldgym.train.distributed import Group
from worldgym.train.metrics import measure
from worldgym.train.provenance import command, machine, started_from
from worldgym.train.stages import CODEC_BATCH, Stages

OUTCOME_BATCH = 128  # transitions
SIZES: dict[str, Any] = {"patch": None, "width": 128, "layers": 6, "window": 6,
                         "steps": (1000.0, 850.0, 600.0), "temperature": 1.0, "ahead": 8}


@dataclass(frozen=True, kw_only=True, slots=True)
class FitConfig:
    """What to fit to what, for how long.

    ``data``: folder of recorded episodes; ``out``: world folder to make; ``init``: world folder to
    start from (its codec is kept as it is, so that latents stay comparable).
    Iterations are per part; the defaults take about two hours on two cores, ``quick`` a minute.
    ``width``, ``layers``, ``patch`` (latent cells of a token: height, width), ``window`` (frames
    seen), ``steps`` (denoising timesteps), ``temperature`` (of the sampler's noise), ``ahead``
    (steps that the danger looks ahead): default ``SIZES``, or those of ``init``, of which only the
    last four may change. No ``dynamics_iterations``: those of ``init`` stay, only heads are fitted.
    ``outcome_noise``: most noise on latents that the heads read; ``starts``: start states to keep.
    ``keep_terminal_frames``: learn to draw the frame after an ending (off: games often show black).
    ``compile``: fuse the dynamics' operations: faster, but the first iterations take minutes (needs
    a C++ compiler). ``shard``: fully sharded over the processes instead of copies; AdamW then
    replaces Muon.
    """

    data: str
    out: str
    init: str | None = None
    name: str | None = None
    codec_iterations: int = 2000
    dynamics_iterations: int = 11000
    alone_share: float = 0.78  # of the dynamics iterations: recent frames only, three times faster
    outcome_iterations: int = 3000
    batch: int = 32
    clip: int = 8
    width: int | None = None
    layers: int | None = None
    patch: tuple[int, int] | None = None
    window: int | None = None
    steps: tuple[float, ...] | None = None
    temperature: float | None = None
    ahead: int | None = None
    dynamics_lr: float = 5e-3
    outcome_noise: float = 0.2
    starts: int = 800
    holdout: float = 0.03
    keep_terminal_frames: bool = False
    quick: bool = False
    seed: int = 0
    device: str = "cpu"
    compile: bool = False
    shard: bool = False
    measure: bool = True
    tensorboard: bool = True

    def __post_init__(self) -> None:
        counts = (self.codec_iterations, self.dynamics_iterations, self.outcome_iterations)
        needed = counts[::2] if self.init else counts
        least = min(*needed, counts[1] + 1, self.batch, self.clip - 1, self.starts, self.seed + 1)
        if least < 1:
            raise ConfigError("impossible length of training",
                              given=f"iterations {counts}, batch {self.batch}, clip {self.clip}, "
                                    f"starts {self.starts}, seed {self.seed}",
                              expected="iterations, batch, starts >= 1, clip >= 2, seed >= 0 "
                                       "(0 iterations of the dynamics only with init)",
                              fix="raise the numbers")
        if not 0 <= self.holdout < 1:
            raise ConfigError("impossible share of held-out episodes", given=self.holdout,
                              expected="0 <= holdout < 1", fix="use 0.03, or 0 to train on all")


class Fit(Stages):
    """One fitting run."""

    files: Any = nano  # how a world is written and read
    command = "worldgym fit"

    def __init__(self, cfg: FitConfig, group: Group | None = None) -> None:
        super().__init__(cfg, group or Group(device=torch.device(cfg.device)))
        size = self.group.size
        if cfg.batch % size or CODEC_BATCH % size or OUTCOME_BATCH % size:
            raise ConfigError("batches do not split over the processes",
                              given=f"batches {cfg.batch}, {CODEC_BATCH}, {OUTCOME_BATCH} over "
                                    f"{size} processes",
                              expected=f"a --batch that is a multiple of {size}, and 1, 2, 4, 8, "
                                       "16 or 32 processes",
                              fix="change --batch or --nproc_per_node")
        self.episodes = Episodes.open(cfg.data).one_player()
        if not len(self.episodes):
            raise DatasetError("no episodes to learn from", given=str(cfg.data),
                               expected="at least one recorded episode",
                               fix="record some: worldgym collect --env GAME --out FOLDER")
        everything = np.arange(len(self.episodes)), np.arange(0)
        split = len(self.episodes) > 1 and cfg.holdout > 0
        self.train_ids: np.ndarray
        self.held_ids: np.ndarray
        self.train_ids, self.held_ids = (
            self.episodes.split(cfg.holdout, seed=0) if split else everything)
        self.nano = self._network().to(self.group.device)
        self.drop = not cfg.keep_terminal_frames
        self.about = {"data": self._tag(), "from": nano.value_fingerprint(self.nano),
                      "keep_terminal_frames": cfg.keep_terminal_frames}

    def _network(self) -> Nano:
        cfg, data = self.cfg, self.episodes
        name = cfg.name or Path(cfg.out).resolve().name
        given = {k: getattr(cfg, k) for k in SIZES if getattr(cfg, k) is not None}
        if cfg.init:
            return self._started(name, given)
        size = SIZES | given
        codec = CodecConfig(frame_hw=(data.frame_hw[0], data.frame_hw[1]))
        wan = nano.dit_config(codec.channels, 3, size["width"], size["layers"],
                              patch=tuple(size["patch"] or nano.patch_for(codec.latent_chw)))
        config = NanoConfig(
            name=name, action=data.action, fps=data.fps, wan=wan, codec=codec,
            window=size["window"], steps=tuple(size["steps"]), temperature=size["temperature"],
            outcome_ahead=size["ahead"],
            reward_range=self._reward_range())
        return nano.fresh(config, cfg.seed)

    def _started(self, name: str, given: dict) -> Nano:
        """The network of ``init``, checked against data and settings."""
        assert self.cfg.init is not None
        free = {k: given[k] for k in ("window", "steps", "temperature") if k in given}
        network = nano.load_nano(self.cfg.init, name=name, fps=self.episodes.fps,
                                 reward_range=self._reward_range(), **free)
        if given.get("ahead", network.cfg.outcome_ahead) != network.cfg.outcome_ahead:
            network = nano.with_ahead(network, given["ahead"], self.cfg.seed)
        old, data = network.cfg, self.episodes
        mine = {"frames": tuple(old.codec.frame_hw), "actions": old.action, "width": old.wan.dim,
                "layers": old.wan.num_layers, "patch": tuple(old.wan.patch_size[1:])}
        want = {"frames": tuple(data.frame_hw), "actions": data.action,
                "width": given.get("width", old.wan.dim),
                "layers": given.get("layers", old.wan.num_layers),
                "patch": tuple(given.get("patch", old.wan.patch_size[1:]))}
        self.agree(mine, want, "fit without --init, or record the same frame size and actions")
        return network

    def _reward_range(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Lowest and highest reward of a step that went on, and of one that ended."""
        data = self.episodes
        rows = np.ones(data.rows, bool)
        rows[data.starts] = False  # nothing was paid yet
        rewards, ended = (data.take(k, np.flatnonzero(rows)) for k in ("rewards", "terminated"))
        parts = [r if len(r) else rewards for r in (rewards[~ended], rewards[ended])]
        go, end = ((float(r.min()), float(r.max())) for r in parts)
        return go, end

    def _tag(self) -> str:
        """Which recordings these are."""
        data = self.episodes
        text = json.dumps([data.lengths.tolist(), data.seeds, data.policies, data.env],
                          sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def run(self) -> Path:
        """Fit all parts and write the world folder; returns it."""
        cfg, short = self.cfg, 50 if self.cfg.quick else 10**9
        if not cfg.init:
            self._codec(min(cfg.codec_iterations, short))
        self.latents, self.weights = self._encode()
        self._dynamics(min(cfg.dynamics_iterations, short))
        self._outcome(min(cfg.outcome_iterations, short))
        if self.group.first:
            self._write()
        return self.out

    def _image_rows(self, ids: np.ndarray) -> np.ndarray:
        """Rows of these episodes whose frame is a picture of the game."""
        starts, steps = self.episodes.starts[ids], self.episodes.lengths[ids]
        rows = np.concatenate([np.arange(s, s + n + 1) for s, n in zip(starts, steps, strict=True)])
        return rows[~self.episodes.take("terminated", rows)] if self.drop else rows

    def _median(self) -> torch.Tensor:
        """Median frame of the recording, as pixels (3, H, W)."""
        rows = self._image_rows(self.train_ids)
        pick = np.random.default_rng((self.cfg.seed, 1)).choice(rows, min(400, len(rows)), False)
        return self.median(self._read(np.sort(pick)))

    def _read(self, rows: np.ndarray) -> np.ndarray:
        return self.episodes.take("frames", rows)

    def _codec(self, iterations: int) -> None:
        rows, group, median_CHW = self._image_rows(self.train_ids), self.group, self._median()

        def sample(i: int) -> dict:
            rng = np.random.default_rng((self.cfg.seed, 2, i))
            mine = rng.choice(rows, CODEC_BATCH)[group.rows(CODEC_BATCH)]
            return {"frames": torch.from_numpy(self._read(mine))}

        self.fit_codec(iterations, sample, lambda data: median_CHW, self._read, rows)

    def _encode(self) -> tuple[np.ndarray, np.ndarray]:
        """Row-aligned latents (R, C, h, w) and cell weights (R, h, w)."""
        tag = f"{nano.value_fingerprint(self.nano, 'codec')}-{self.about['data']}"
        return self.encode(self.work, tag, self.episodes.rows, self._read, self._median)

    def _dynamics(self, iterations: int) -> None:
        cfg, group, device = self.cfg, self.group, self.group.device
        if not iterations:
            self.nano.dynamics.eval()
            return
        usable = self.episodes.lengths[self.train_ids].max() + 1
        clip = int(min(cfg.clip, max(usable, 2)))  # a longer one would only be filled up
        alone = int(cfg.alone_share * iterations)
        # clips with their memory cost three times as much: half as many of them
        samplers = [ChunkSampler(
            self.episodes, self.train_ids, clip, batch, cfg.seed, shortest=2,
            drop_terminal_frame=self.drop, rank=group.rank, world_size=group.size,
            extra={"latents": self.latents, "weights": self.weights})
            for batch in (cfg.batch, max(group.size, cfg.batch // 2 // group.size * group.size))]

        def loss(model, data, generator):
            latents = torch.from_numpy(data["latents"].astype(np.float32)).to(device)
            actions = self._features(data["actions"], data["null"]).to(device)
            weight = torch.from_numpy(data["weights"].astype(np.float32)).to(device)
            weight = weight * torch.from_numpy(data["valid"].astype(np.float32)).to(device)[
                ..., None, None]
            return dynamics_loss(model, latents, actions, weight, generator,
                                 (group.rank, group.size), alone=loop.iteration < alone,
                                 average=group.average)

        about = {"batch": cfg.batch, "clip": clip, "alone": alone, "window": self.nano.cfg.window}
        loop = self.loop("dynamics", iterations, about, lr=cfg.dynamics_lr, decay=0.3,
                          warmup=200, weight_decay=0.02, muon=True, ema=0.995)
        loop.run(lambda i: samplers[i >= alone](i), loss, cfg.tensorboard)
        self.finish(loop)

    def _features(self, actions: np.ndarray, null: np.ndarray) -> torch.Tensor:
        shape = null.shape
        flat = actions.reshape(-1, *self.episodes.action.shape)
        return torch.from_numpy(self.episodes.action.encode(flat, null.ravel())).unflatten(0, shape)

    def _seen(self, latents: np.ndarray) -> torch.Tensor:
        """What the heads read of latents (B, K, C, h, w) as they are stored."""
        return torch.from_numpy(latents.astype(np.float32)).to(self.group.device)

    def _outcome(self, iterations: int) -> None:
        cfg, group, device, batch = self.cfg, self.group, self.group.device, OUTCOME_BATCH
        head = self.nano.outcome
        sampler = OutcomeSampler(
            self.episodes, self.train_ids, head.cfg.frames, batch, cfg.seed,
            rank=group.rank, world_size=group.size, extra={"latents": self.latents},
            ahead=head.cfg.ahead)
        bounds = np.abs(np.asarray(self.nano.cfg.reward_range, np.float64))
        head.reward_scale.fill_(float(bounds.max()) or 1.0)

        def loss(model, data, generator):
            past = self._seen(data["latents"])
            level = cfg.outcome_noise * torch.rand(batch, 1, 1, 1, 1, generator=generator)
            noise = torch.randn(batch, *past.shape[1:], generator=generator)
            past = past + (level * noise)[group.rows(batch)].to(device)
            null = np.zeros(len(past), bool)
            action = self._features(data["actions"], null).to(device)
            reward, end, soon = (torch.from_numpy(data[k]).to(device) if k in data else None
                                 for k in ("rewards", "terminated", "soon"))
            return outcome_loss(model, past, action, reward, end, head.reward_scale, soon)

        loop = self.loop("outcome", iterations, {"noise": cfg.outcome_noise}, lr=1e-3, decay=0.5,
                          weight_decay=0.1)
        loop.run(sampler, loss, cfg.tensorboard)
        self.finish(loop)

    def _write(self) -> None:
        cfg = self.cfg
        count = min(cfg.starts, 64) if cfg.quick else cfg.starts
        bank = StartBank.build(self.episodes, self.nano.codec.encode, self.train_ids, count,
                               context=self.nano.cfg.window - 1, seed=cfg.seed)
        self.out.mkdir(parents=True, exist_ok=True)
        bank.save(self.out / "starts.safetensors")
        card = {"task": self._task(), "provenance": self._provenance()}
        self.files.save(self.nano, self.out, card)
        if cfg.measure and len(self.held_ids):
            world = self.files.load(self.out, self.group.device)
            card["metrics"] = measure(world, self.episodes, self.held_ids, seed=cfg.seed,
                                      clips=8 if cfg.quick else 64)
            self.files.save(self.nano, self.out, card)

    def _context(self) -> int:
        """Most frames of a start."""
        return self.nano.cfg.window - 1

    def _task(self) -> dict:
        """What ``worldgym.envs.tasks.load_task`` reads: the real game and a horizon.

        No dream is longer than the longest recorded episode: there is nothing to know beyond.
        """
        env = self.episodes.env
        game = env.get("recipe", env)
        return {"twin": game.get("id") if isinstance(game, dict) else None,
                "horizon": int(self.episodes.lengths.max())}

    def _provenance(self) -> dict:
        cfg, data = self.cfg, self.episodes
        returns = [float(data.episode(i)["rewards"].sum()) for i in range(len(data))]
        return {
            "command": command(cfg, self.command), "config": asdict(cfg), "seed": cfg.seed,
            "real_steps_used": int(data.steps), "episodes": len(data), "env": data.env,
            "mean_recorded_return": float(np.mean(returns)),
            "policies": dict(Counter(data.policies)), "training_seconds": self.seconds,
            "processes": self.group.size, "machine": machine(self.group.device),
            "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
            **started_from(cfg.init)}


def fit(cfg: FitConfig) -> Path:
    """Fit a world; see ``FitConfig`` and ``fit_wham.FitWhamConfig``. Returns the world folder."""
    from worldgym.train.fit_wham import FitWham, FitWhamConfig

    group = Group.from_env(cfg.device, cfg.shard)
    try:
        return (FitWham if isinstance(cfg, FitWhamConfig) else Fit)(cfg, group).run()
    finally:
        group.close()
