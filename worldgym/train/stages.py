"""What all fitting runs share: stages that resume, the codec's training, latents kept on disk.

Shapes: B frame, R row of the data, C channel, H W pixels, h w latent grid.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from worldgym.errors import CheckpointError, ConfigError
from worldgym.models.codec import cell_weight, codec_loss, to_pixels
from worldgym.train.distributed import Group
from worldgym.train.loop import Loop, LoopConfig

CODEC_BATCH = 32  # frames
Read = Callable[[np.ndarray], np.ndarray]  # rows to frames uint8 (R, H, W, 3)


class Stages:
    """Parts ``codec``, ``dynamics``, ``outcome`` of ``nano``, trained one after another.

    ``cfg``: settings with ``out``, ``seed`` and ``tensorboard``; ``about``: what every stage's
    checkpoint depends on; ``seconds``: training time of every part.
    """

    nano: Any

    def __init__(self, cfg: Any, group: Group) -> None:
        self.cfg, self.group = cfg, group
        self.out, self.work = Path(cfg.out), Path(cfg.out) / "training"
        self.seconds: dict[str, float] = {}
        self.about: dict[str, Any] = {}

    def agree(self, mine: dict[str, Any], want: dict[str, Any], fix: str) -> None:
        """ConfigError where the world to start from is not as data and settings want it."""
        wrong = [k for k in mine if mine[k] != want[k]]
        if wrong:
            raise ConfigError("the world to start from does not fit",
                              given=f"{self.cfg.init} with " + ", ".join(
                                  f"{k} {mine[k]}" for k in wrong),
                              expected=", ".join(f"{k} {want[k]}" for k in wrong), fix=fix)

    def loop(self, name: str, iterations: int, about: dict, **changes: Any) -> Loop:
        """The training loop of one part."""
        cfg = LoopConfig(iterations=iterations, seed=self.cfg.seed,
                         compile=name == "dynamics" and getattr(self.cfg, "compile", False),
                         **{"save_every": max(1, min(200, iterations // 4)), **changes})
        return Loop(name, getattr(self.nano, name), cfg, self.work, self.group, self.about | about)

    def finish(self, loop: Loop) -> None:
        """Keep the averaged weights."""
        loop.load_ema()
        getattr(self.nano, loop.name).eval()
        self.seconds[loop.name] = round(loop.seconds, 1)

    def averaged(self, name: str) -> int:
        """Take the averaged weights of a part from its checkpoint; returns its iteration, or 0."""
        path = self.work / f"{name}.ckpt"
        part = getattr(self.nano, name).eval()
        if not path.exists():
            return 0
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            part.load_state_dict(state["ema"])
        except (OSError, KeyError, RuntimeError, EOFError, ValueError) as error:
            raise CheckpointError("cannot read a checkpoint", given=f"{path} ({error})",
                                  expected="that of a run with these settings",
                                  fix="repeat the command that trains, with nothing changed") \
                from error
        self.seconds[name] = round(state["seconds"], 1)
        return int(state["iteration"])

    def median(self, frames_RHWC: np.ndarray) -> Tensor:
        """Median of these frames, as pixels (3, H, W)."""
        median = np.median(frames_RHWC, axis=0).astype(np.uint8)
        return to_pixels(torch.from_numpy(median)[None], self.nano.codec.frame_hw,
                         self.group.device)[0]

    def fit_codec(self, iterations: int, sample: Callable[[int], dict],
                  median: Callable[[dict], Tensor], read: Read, rows: np.ndarray,
                  about: dict | None = None) -> None:
        """Train the codec, then measure the latents' mean and spread.

        ``sample``: this process's share of batch i, ``frames`` (B, H, W, 3); ``median``: the usual
        picture (3, H, W) of its game, or one for every frame; ``rows``: frames to measure on.
        """
        group, batch = self.group, CODEC_BATCH
        hw, device = self.nano.codec.cfg.frame_hw, group.device
        shape = self.nano.codec.cfg.latent_chw

        def loss(model, data, generator):
            noise = torch.randn(batch, *shape, generator=generator)[group.rows(batch)]
            pixels = to_pixels(data["frames"], hw, device)
            value, plain = codec_loss(model, pixels, median(data), noise.to(device),
                                      average=group.average)
            return value, {"mse": float(plain)}

        if not group.shard:  # faster convolutions, but fully_shard wants contiguous weights
            self.nano.codec.to(memory_format=torch.channels_last)
        loop = self.loop("codec", iterations, about or {}, lr=1e-3, decay=0.4)
        loop.run(sample, loss, self.cfg.tensorboard)
        self.finish(loop)
        self.normalise(read, rows)

    @torch.no_grad()
    def normalise(self, read: Read, rows: np.ndarray) -> None:
        """Measure mean and spread of the latents of these frames."""
        codec = self.nano.codec
        pick = np.sort(np.random.default_rng((self.cfg.seed, 3)).choice(rows, min(2000, len(rows))))
        raw = torch.cat([
            codec.raw(to_pixels(torch.from_numpy(read(part)), codec.cfg.frame_hw,
                                codec.mean.device))
            for part in np.array_split(pick, max(1, len(pick) // 100))])
        codec.mean.copy_(raw.mean((0, 2, 3)))
        codec.std.copy_(raw.std((0, 2, 3)).clamp_min(1e-3))

    def encode(self, folder: Path, tag: str, total: int, read: Read,
               median: Callable[[], Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Latents (R, C, h, w) and cell weights (R, h, w) of ``total`` rows, float16, on disk.

        Made once for a ``tag`` and kept in ``folder``.
        """
        codec = self.nano.codec
        chw, device = codec.cfg.latent_chw, self.group.device

        def store(frames: Tensor, median_CHW: Tensor) -> dict[str, Tensor]:
            pixels = to_pixels(frames, codec.cfg.frame_hw, device)
            return {"latents": codec.encode(frames),
                    "weights": cell_weight(pixels, median_CHW, codec.cfg.cell)}

        latents, weights = self.stored(folder, tag, total, read, median, store, {
            "latents": (chw, np.float16), "weights": (chw[1:], np.float16)})
        return latents, weights

    @torch.no_grad()
    def stored(self, folder: Path, tag: str, total: int, read: Read, prepare: Callable[[], Any],
               make: Callable[[Tensor, Any], dict[str, Tensor]],
               shapes: dict[str, tuple[tuple[int, ...], Any]]) -> list[np.ndarray]:
        """Arrays (R, *shape) of dtype, one for each entry of ``shapes``, on disk: what
        ``make(frames, prepare())`` says of all rows.

        Made once for a ``tag`` and kept in ``folder``.
        """
        start = time.perf_counter()
        mark = folder / "latents.json"
        known = json.loads(mark.read_text()) if mark.exists() else {}
        if known.get("tag") != tag and self.group.first:
            folder.mkdir(parents=True, exist_ok=True)
            mark.unlink(missing_ok=True)
            given = prepare()
            stores = {name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype,
                                                      (total, *shape))
                      for name, (shape, dtype) in shapes.items()}
            for first in tqdm(range(0, total, 256), desc="encode", mininterval=5.0):
                rows = np.arange(first, min(first + 256, total))
                for name, made in make(torch.from_numpy(read(rows)), given).items():
                    stores[name][rows] = made.cpu().numpy()
            known = {"tag": tag, "seconds": round(time.perf_counter() - start, 1)}
            for store in stores.values():
                store.flush()
            mark.write_text(json.dumps(known))  # last: a kill before this encodes again
        self.group.barrier()
        self.seconds["encode"] = round(self.seconds.get("encode", 0.0) + known.get("seconds", 0), 1)
        return [np.load(folder / f"{name}.npy", mmap_mode="r") for name in shapes]
