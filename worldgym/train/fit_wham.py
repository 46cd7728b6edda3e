"""Fit a small WHAM to recorded episodes: image tokeniser, then transformer, then outcome heads.

The transformer learns observations and actions in one sequence (specs/wham.md sections 0 and 6), so
that the same weights are the world and its players. Everything else is as in ``fit``.
Shapes: B clip, F frame, R row of the data, K past frame, A action tokens.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from worldgym.data.chunks import ChunkSampler
from worldgym.errors import ConfigError
from worldgym.models import nano, wham_nano
from worldgym.models.codec import emphasis, to_pixels
from worldgym.models.wham_nano import WhamNano, WhamNanoConfig
from worldgym.train.fit import Fit, FitConfig
from worldgym.train.stages import CODEC_BATCH

UNUSED = ("init", "clip", "alone_share", "steps")
USAGE, STRAIGHT = 0.1, 0.5  # weights of the codes' even use and of the code and commitment loss


@dataclass(frozen=True, kw_only=True, slots=True)
class FitWhamConfig(FitConfig):
    """What to fit to what, for how long; fields of ``FitConfig`` mean what they mean there.

    The defaults take about eighty minutes on one core. ``window``: steps (frame and action) of a
    clip and of the longest window; ``patch``: pixels of a token (height, width; equal); ``codes``,
    ``code_width``: the codebook; ``tokenizer``: "vit", or "conv" for square frames;
    ``tokenizer_width``, ``tokenizer_layers``: of each of its halves; ``slide``: frames that the
    world drops at once from a full window. Not here: ``init``, ``clip``, ``steps``.
    """

    codec_iterations: int = 4000
    dynamics_iterations: int = 3800
    outcome_iterations: int = 2500
    batch: int = 16
    width: int | None = 160
    layers: int | None = 4
    window: int | None = 8
    patch: tuple[int, int] | None = (8, 8)
    temperature: float | None = 1.0
    ahead: int | None = 8
    dynamics_lr: float = 3e-3
    codes: int = 512
    code_width: int = 16
    tokenizer: str = "vit"
    tokenizer_width: int = 128
    tokenizer_layers: int = 3
    slide: int = 1

    def __post_init__(self) -> None:
        FitConfig.__post_init__(self)
        numbers = (self.width, self.layers, self.window, self.codes, self.code_width,
                   self.tokenizer_width, self.tokenizer_layers, self.slide)
        patch = self.patch or (0, 0)
        if (any(n is None or n < 1 for n in numbers) or patch[0] != patch[1] or patch[0] < 1
                or self.codes > 2**15 or not 1 <= self.slide < (self.window or 0)):
            raise ConfigError("impossible sizes of a small WHAM", given=f"width, layers, window, "
                              f"codes, code width, tokeniser width and layers, slide {numbers}, "
                              f"patch {patch}", expected="numbers >= 1, a square patch, at most "
                              "32768 codes, a slide below the window", fix="leave them out")
        other = {f.name: getattr(self, f.name) for f in fields(FitConfig)
                 if f.name in UNUSED and getattr(self, f.name) != f.default}
        if other:
            raise ConfigError("settings of nano that a small WHAM has not", given=other,
                              expected="none of them", fix="leave them out")


class FitWham(Fit):
    """One fitting run."""

    nano: WhamNano
    cfg: FitWhamConfig
    files = wham_nano
    command = "worldgym fit --dynamics wham"

    def _network(self) -> WhamNano:  # type: ignore[override]
        cfg, data = self.cfg, self.episodes
        assert cfg.window and cfg.width and cfg.layers and cfg.patch and cfg.temperature is not None
        wham = wham_nano.small(
            data.action, (data.frame_hw[0], data.frame_hw[1]), seq_len=cfg.window, width=cfg.width,
            layers=cfg.layers, codes=cfg.codes, patch=cfg.patch[0], tokenizer=cfg.tokenizer,
            tokenizer_width=cfg.tokenizer_width, tokenizer_layers=cfg.tokenizer_layers,
            code_width=cfg.code_width)
        return wham_nano.fresh(WhamNanoConfig(
            name=cfg.name or Path(cfg.out).resolve().name, wham=wham, code_width=cfg.code_width,
            fps=data.fps, temperature=cfg.temperature, slide=cfg.slide,
            outcome_frames=min(4, cfg.window), outcome_ahead=cfg.ahead or 0,
            reward_range=self._reward_range()), cfg.seed)

    def _codec(self, iterations: int) -> None:
        rows, group, median_CHW = self._image_rows(self.train_ids), self.group, self._median()
        codec, average = self.nano.codec, self.group.average

        def sample(i: int) -> dict:
            rng = np.random.default_rng((self.cfg.seed, 2, i))
            mine = rng.choice(rows, CODEC_BATCH)[group.rows(CODEC_BATCH)]
            return {"frames": torch.from_numpy(self._read(mine))}

        def loss(model, data, generator):
            pixels = to_pixels(data["frames"], codec.frame_hw, group.device)
            target = codec.preprocess(data["frames"].to(group.device).permute(0, 3, 1, 2))
            drawn, straight, usage, perplexity = model(target)
            error = (drawn - target) ** 2
            weight = 1 + 8 * emphasis(pixels, median_CHW)
            picture = (weight * error).mean() / average(weight.mean())
            return picture + STRAIGHT * straight + USAGE * usage, {
                "mse": float(error.detach().mean()), "codes_in_use": float(perplexity.detach())}

        about = {"codes": [self.cfg.codes, self.cfg.code_width], "weights": [USAGE, STRAIGHT]}
        loop = self.loop("codec", iterations, about, lr=1e-3, decay=0.4, weight_decay=0.0)
        loop.run(sample, loss, self.cfg.tensorboard)
        self.finish(loop)

    def _encode(self) -> tuple[np.ndarray, np.ndarray]:
        """Row-aligned ids (R, 1, h, w); nothing is weighted."""
        codec = self.nano.codec
        tag = f"{nano.value_fingerprint(self.nano, 'wham.tokenizer')}-{self.about['data']}"
        ids, = self.stored(self.work, tag, self.episodes.rows, self._read, lambda: None,
                           lambda frames, _: {"latents": codec.encode(frames)},
                           {"latents": ((1, *codec.grid_hw), np.int16)})
        return ids, ids

    def _dynamics(self, iterations: int) -> None:
        cfg, group, wham = self.cfg, self.group, self.nano.wham
        assert cfg.window is not None
        # one row more than steps: the action on a frame is stored beside the frame it led to
        sampler = ChunkSampler(
            self.episodes, self.train_ids, cfg.window + 1, cfg.batch, cfg.seed, shortest=2,
            drop_terminal_frame=False, rank=group.rank, world_size=group.size,
            extra={"latents": self.latents})

        def loss(model, data, generator):
            ids = torch.from_numpy(data["latents"][:, :-1].astype(np.int64)).flatten(2)
            acted = torch.from_numpy(wham.actions.ids(data["actions"][:, 1:]))
            there = torch.from_numpy(data["valid"][:, 1:])
            image, action, mean = wham.loss(ids.to(group.device), acted.to(group.device),
                                            there.to(group.device), model)
            known = float(there.sum())
            return mean, {"image": float(image.detach().sum()) / known / wham.image_tokens,
                          "action": float(action.detach().sum()) / known / wham.actions.count}

        loop = self.loop("dynamics", iterations, {"batch": cfg.batch, "window": cfg.window},
                         lr=cfg.dynamics_lr, decay=0.4, warmup=200, weight_decay=0.02, muon=True,
                         ema=0.995)
        loop.run(sampler, loss, cfg.tensorboard)
        self.finish(loop)

    def _seen(self, latents: np.ndarray) -> torch.Tensor:
        ids = torch.from_numpy(latents.astype(np.int64)).to(self.group.device)
        with torch.no_grad():
            return self.nano.codec.vectors(ids.flatten(0, 1)).unflatten(0, ids.shape[:2])
