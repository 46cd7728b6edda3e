"""Fit a nano world to recorded episodes: codec, then dynamics, then outcome heads.

Every part resumes from its checkpoint in ``out/training``; run the same command again after a
kill. Under torchrun each part trains on all processes. Shapes: B clip, F frame, R row of the data.
"""

import json
import math
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from worldgym.data.chunks import ChunkSampler, OutcomeSampler
from worldgym.data.starts import StartBank
from worldgym.data.store import Episodes
from worldgym.errors import ConfigError
from worldgym.models import nano
from worldgym.models.codec import CodecConfig, cell_weight, codec_loss, to_pixels
from worldgym.models.dynamics import dynamics_loss
from worldgym.models.nano import Nano, NanoConfig
from worldgym.models.outcome import outcome_loss
from worldgym.train.distributed import Group
from worldgym.train.loop import Loop, LoopConfig
from worldgym.train.metrics import measure


@dataclass(frozen=True, kw_only=True, slots=True)
class FitConfig:
    """What to fit to what, for how long.

    ``data``: folder of recorded episodes; ``out``: world folder to make; ``init``: world folder to
    start from (its codec is kept as it is, so that latents stay comparable).
    Iterations are per part; the defaults take about two hours on two cores, ``quick`` a minute.
    ``keep_terminal_frames``: learn to draw the frame after an ending (off: games often show black).
    """

    data: str
    out: str
    init: str | None = None
    name: str | None = None
    codec_iterations: int = 3200
    dynamics_iterations: int = 6000
    alone_share: float = 0.4  # of the dynamics iterations: recent frames only, three times faster
    outcome_iterations: int = 3000
    batch: int = 24
    clip: int = 8
    width: int = 128
    layers: int = 6
    window: int = 6
    steps: tuple[float, ...] = (1000.0, 500.0)
    dynamics_lr: float = 1e-3
    outcome_noise: float = 0.15
    starts: int = 1500
    holdout: float = 0.03
    keep_terminal_frames: bool = False
    quick: bool = False
    seed: int = 0
    device: str = "cpu"
    shard: bool = False
    measure: bool = True
    tensorboard: bool = True


class Fit:
    """One fitting run."""

    def __init__(self, cfg: FitConfig) -> None:
        self.cfg = cfg
        counts = (cfg.codec_iterations, cfg.dynamics_iterations, cfg.outcome_iterations)
        if min(counts) < 1 or cfg.batch < 1 or cfg.clip < 2:
            raise ConfigError("impossible length of training",
                              given=f"iterations {counts}, batch {cfg.batch}, clip {cfg.clip}",
                              expected="iterations >= 1, batch >= 1, clip >= 2",
                              fix="raise the numbers")
        self.group = Group.from_env(cfg.device, cfg.shard)
        if cfg.batch % self.group.size:
            raise ConfigError("batch does not split", given=f"{cfg.batch} clips",
                              expected=f"a multiple of {self.group.size} processes",
                              fix="change --batch")
        self.episodes = Episodes.open(cfg.data)
        self.train_ids, self.held_ids = self.episodes.split(cfg.holdout, seed=0)
        self.out, self.work = Path(cfg.out), Path(cfg.out) / "training"
        self.nano = self._network().to(self.group.device)
        self.drop = not cfg.keep_terminal_frames
        self.seconds: dict[str, float] = {}

    def _network(self) -> Nano:
        cfg, data = self.cfg, self.episodes
        if cfg.init:
            return nano.load_nano(cfg.init)
        codec = CodecConfig(frame_hw=tuple(data.frame_hw))
        wan = nano.dit_config(codec.channels, 3, cfg.width, cfg.layers)
        config = NanoConfig(
            name=cfg.name or Path(cfg.out).name, action=data.action, fps=data.fps, wan=wan,
            codec=codec, window=cfg.window, steps=cfg.steps)
        return nano.fresh(config, cfg.seed)

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

    def _loop(self, name: str, iterations: int, **changes: float) -> Loop:
        cfg = LoopConfig(iterations=iterations, seed=self.cfg.seed,
                         save_every=max(1, min(200, iterations // 4)), **changes)
        return Loop(name, getattr(self.nano, name), cfg, self.work, self.group)

    def _finish(self, loop: Loop) -> None:
        loop.load_ema()
        loop.module.eval()
        self.seconds[loop.name] = round(loop.seconds, 1)

    def _image_rows(self, ids: np.ndarray) -> np.ndarray:
        """Rows of these episodes whose frame is a picture of the game."""
        starts, steps = self.episodes.starts[ids], self.episodes.lengths[ids]
        rows = np.concatenate([np.arange(s, s + n + 1) for s, n in zip(starts, steps, strict=True)])
        return rows[~self.episodes.take("terminated", rows)] if self.drop else rows

    def _median(self) -> torch.Tensor:
        """Median frame of the recording, as pixels (3, H, W)."""
        rows = self._image_rows(self.train_ids)
        pick = np.random.default_rng((self.cfg.seed, 1)).choice(rows, min(400, len(rows)), False)
        median = np.median(self.episodes.take("frames", np.sort(pick)), axis=0).astype(np.uint8)
        return to_pixels(torch.from_numpy(median)[None], self.nano.codec.cfg.frame_hw,
                         self.group.device)[0]

    def _codec(self, iterations: int) -> None:
        rows, batch, group = self._image_rows(self.train_ids), 32, self.group
        hw, device = self.nano.codec.cfg.frame_hw, group.device
        median_CHW = self._median()
        shape = self.nano.codec.cfg.latent_chw

        def sample(i: int) -> dict:
            rng = np.random.default_rng((self.cfg.seed, 2, i))
            mine = rng.choice(rows, batch)[group.rows(batch)]
            return {"frames": torch.from_numpy(self.episodes.take("frames", mine))}

        def loss(model, data, generator):
            noise = torch.randn(batch, *shape, generator=generator)[group.rows(batch)]
            pixels = to_pixels(data["frames"], hw, device)
            value, plain = codec_loss(model, pixels, median_CHW, noise.to(device))
            return value, {"mse": float(plain)}

        self.nano.codec.to(memory_format=torch.channels_last)
        loop = self._loop("codec", iterations, lr=1e-3, decay=0.4)
        loop.run(sample, loss, self.cfg.tensorboard)
        self._finish(loop)
        self._normalise(rows)

    @torch.no_grad()
    def _normalise(self, rows: np.ndarray) -> None:
        codec = self.nano.codec
        pick = np.sort(np.random.default_rng((self.cfg.seed, 3)).choice(rows, min(2000, len(rows))))
        raw = torch.cat([
            codec.raw(to_pixels(torch.from_numpy(self.episodes.take("frames", part)),
                                codec.cfg.frame_hw, codec.mean.device))
            for part in np.array_split(pick, max(1, len(pick) // 100))])
        codec.mean.copy_(raw.mean((0, 2, 3)))
        codec.std.copy_(raw.std((0, 2, 3)).clamp_min(1e-3))

    @torch.no_grad()
    def _encode(self) -> tuple[np.ndarray, np.ndarray]:
        """Row-aligned latents (R, C, h, w) and cell weights (R, h, w), float16, cached on disk."""
        codec, work = self.nano.codec, self.work
        tag = nano.value_fingerprint(self.nano, "codec") + f"-{self.episodes.rows}"
        mark = work / "latents.json"
        known = json.loads(mark.read_text()) if mark.exists() else None
        if known != tag and self.group.first:
            work.mkdir(parents=True, exist_ok=True)
            median_CHW, total = self._median(), self.episodes.rows
            shapes = {"latents": codec.cfg.latent_chw, "weights": codec.cfg.latent_chw[1:]}
            stores = {name: np.lib.format.open_memmap(work / f"{name}.npy", "w+", np.float16,
                                                      (total, *shape))
                      for name, shape in shapes.items()}
            for first in tqdm(range(0, total, 256), desc="encode", mininterval=5.0):
                rows = np.arange(first, min(first + 256, total))
                frames = torch.from_numpy(self.episodes.take("frames", rows))
                pixels = to_pixels(frames, codec.cfg.frame_hw, self.group.device)
                stores["latents"][rows] = codec.encode(frames).cpu().numpy()
                stores["weights"][rows] = cell_weight(pixels, median_CHW).cpu().numpy()
            for store in stores.values():
                store.flush()
            mark.write_text(json.dumps(tag))  # last: a kill before this encodes again
        self.group.barrier()
        return tuple(np.load(work / f"{name}.npy", mmap_mode="r") for name in ("latents", "weights"))

    def _dynamics(self, iterations: int) -> None:
        cfg, group, device = self.cfg, self.group, self.group.device
        sampler = ChunkSampler(
            self.episodes, self.train_ids, cfg.clip, cfg.batch, cfg.seed,
            drop_terminal_frame=self.drop, rank=group.rank, world_size=group.size,
            extra={"latents": self.latents, "weights": self.weights})
        alone = int(cfg.alone_share * iterations)

        def loss(model, data, generator):
            latents = torch.from_numpy(data["latents"].astype(np.float32)).to(device)
            actions = self._features(data["actions"], data["null"]).to(device)
            weight = torch.from_numpy(data["weights"].astype(np.float32)).to(device)
            return dynamics_loss(model, latents, actions, weight, generator,
                                 (group.rank, group.size), alone=loop.iteration < alone)

        loop = self._loop("dynamics", iterations, lr=cfg.dynamics_lr, decay=0.3,
                          warmup=200, weight_decay=0.02, muon=True, ema=0.995)
        loop.run(sampler, loss, cfg.tensorboard)
        self._finish(loop)

    def _features(self, actions: np.ndarray, null: np.ndarray) -> torch.Tensor:
        shape = null.shape
        flat = actions.reshape(-1, *self.episodes.action.shape)
        return torch.from_numpy(self.episodes.action.encode(flat, null.ravel())).unflatten(0, shape)

    def _outcome(self, iterations: int) -> None:
        cfg, group, device, batch = self.cfg, self.group, self.group.device, 128
        head = self.nano.outcome
        sampler = OutcomeSampler(
            self.episodes, self.train_ids, head.cfg.frames, batch, cfg.seed,
            rank=group.rank, world_size=group.size, extra={"latents": self.latents})
        rows = np.random.default_rng((cfg.seed, 5)).choice(self.episodes.rows, 20_000)
        scale = float(np.abs(self.episodes.take("rewards", np.sort(rows))).max())
        head.reward_scale.fill_(max(scale, 1e-6))

        def loss(model, data, generator):
            past = torch.from_numpy(data["latents"].astype(np.float32)).to(device)
            level = cfg.outcome_noise * torch.rand(batch, 1, 1, 1, 1, generator=generator)
            noise = torch.randn(batch, *past.shape[1:], generator=generator)
            past = past + (level * noise)[group.rows(batch)].to(device)
            null = np.zeros(len(past), bool)
            action = self._features(data["actions"], null).to(device)
            return outcome_loss(model, past, action, torch.from_numpy(data["rewards"]).to(device),
                                torch.from_numpy(data["terminated"]).to(device), head.reward_scale)

        loop = self._loop("outcome", iterations, lr=1e-3, decay=0.5, weight_decay=0.1)
        loop.run(sampler, loss, cfg.tensorboard)
        self._finish(loop)

    def _write(self) -> None:
        cfg = self.cfg
        bank = StartBank.build(self.episodes, self.nano.codec.encode, self.train_ids, cfg.starts,
                               context=self.nano.cfg.window - 1, seed=cfg.seed)
        self.out.mkdir(parents=True, exist_ok=True)
        bank.save(self.out / "starts.safetensors")
        returns = [float(self.episodes.episode(int(i))["rewards"].sum()) for i in self.train_ids]
        card = {"provenance": {
            "command": cfg_command(cfg), "config": asdict(cfg), "seed": cfg.seed,
            "real_steps_used": int(self.episodes.steps), "episodes": len(self.episodes),
            "mean_recorded_return": float(np.mean(returns)), "policies": dict(Counter(self.episodes.policies)),
            "training_seconds": self.seconds, "machine": machine(), "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d")}}
        nano.save(self.nano, self.out, card)
        if cfg.measure and len(self.held_ids):
            world = nano.load(self.out)
            card["metrics"] = measure(world, self.episodes, self.held_ids, seed=cfg.seed)
            nano.save(self.nano, self.out, card)


def machine() -> str:
    """One line on where this runs."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} CPU cores, {math.ceil(memory)} GiB"


def cfg_command(cfg: FitConfig) -> str:
    """The command line that repeats this run."""
    words = [f"--{k.replace('_', '-')} {v}" for k, v in asdict(cfg).items()
             if v not in (None, False, True) and not isinstance(v, tuple)]
    return "worldgym fit " + " ".join(words)


def fit(cfg: FitConfig) -> Path:
    """Fit a world; see ``FitConfig``. Returns the world folder."""
    return Fit(cfg).run()
