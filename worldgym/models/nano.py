"""``nano``: a small world of our own, trained on two CPU cores, and its files.

A world folder holds ``world.safetensors`` (codec, dynamics and outcome heads), ``world.json``
(configuration, provenance, metrics) and, for a task, ``starts.safetensors``.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from worldgym import checkpoint
from worldgym.actions import ActionSpec
from worldgym.engine import World
from worldgym.errors import CheckpointError, ConfigError
from worldgym.heads import LearnedOutcome
from worldgym.memory import SinkWindow
from worldgym.models.codec import Codec, CodecConfig
from worldgym.models.dynamics import Dynamics, DynamicsConfig
from worldgym.models.outcome import Outcome, OutcomeConfig
from worldgym.models.wan import WanConfig
from worldgym.schedule import FewStep
from worldgym.spec import WorldSpec

WEIGHTS, CARD = "world.safetensors", "world.json"


def patch_for(latent_chw: tuple[int, int, int]) -> tuple[int, int]:
    """Latent cells of a token, as square as can be, so that a frame has 8 to 20 tokens.

    A step costs about as much as it has tokens; a game of small frames shows what matters in ten
    to twenty of them (NANO.md).

    >>> patch_for((8, 4, 10)), patch_for((8, 6, 6)), patch_for((8, 5, 7)), patch_for((8, 4, 4))
    ((2, 2), (2, 2), (5, 1), (1, 1))
    """
    _, h, w = latent_chw
    fits = [(p, q) for p in range(1, h + 1) for q in range(1, w + 1)
            if h % p == 0 and w % q == 0 and h * w <= 20 * p * q]
    return min(fits, key=lambda patch: (-min(8, h * w // (patch[0] * patch[1])),
                                        abs(patch[0] - patch[1]), patch[0] * patch[1]))


def dit_config(channels: int, recent: int, width: int = 128, layers: int = 6,
               head: int = 32, patch: tuple[int, int] = (2, 2)) -> WanConfig:
    """A small text-free DiT for ``channels`` latent channels and ``recent`` frames beside each."""
    return WanConfig(dim=width, ffn_dim=4 * width, num_heads=max(1, width // head),
                     num_layers=layers,
                     in_dim=channels * (1 + recent), out_dim=channels, freq_dim=width // 2,
                     text_len=0, patch_size=(1, *patch))


@dataclass(frozen=True, kw_only=True, slots=True)
class NanoConfig:
    """Everything that fixes a nano world but its weights.

    ``steps``: denoising timesteps of one step (1000 = pure noise); ``temperature``: factor on the
    sampler's noise; ``context_noise``: noise level told to the network for frames in memory;
    ``end_scale``: factor on the end chance; ``outcome_ahead``, ``reward_range``: see
    ``OutcomeConfig``.
    """

    name: str
    action: ActionSpec
    fps: float = 8.75
    codec: CodecConfig = field(default_factory=CodecConfig)
    wan: WanConfig = field(default_factory=lambda: dit_config(8, 3))
    recent: int = 3
    window: int = 6
    sink: int = 0
    steps: tuple[float, ...] = (1000.0, 850.0, 600.0)
    temperature: float = 1.0
    context_noise: float = 0.0
    end_scale: float = 1.0
    outcome_frames: int = 4
    outcome_width: int = 48
    outcome_members: int = 2
    outcome_ahead: int = 0
    reward_range: tuple[tuple[float, float], tuple[float, float]] | None = None

    def to_json(self) -> dict:
        """Plain dict that ``from_json`` reads back."""
        data = asdict(self)
        for name in ("reward_range", "outcome_ahead"):  # older worlds keep their fingerprint
            if not data[name]:
                del data[name]
        for name, usual in (("stem", 4), ("local", False)):
            if data["codec"][name] == usual:
                del data["codec"][name]
        return data

    @classmethod
    def from_json(cls, data: dict) -> "NanoConfig":
        """Inverse of ``to_json``."""
        try:
            data = dict(data)
            data["action"] = ActionSpec.from_json(data["action"])
            codec = dict(data["codec"])
            codec["frame_hw"] = tuple(codec["frame_hw"])
            data["codec"] = CodecConfig(**codec)
            data["wan"] = WanConfig.from_dict(data["wan"])
            data["steps"] = tuple(data["steps"])
            if data.get("reward_range") is not None:
                go, end = data["reward_range"]
                data["reward_range"] = (tuple(go), tuple(end))
            return cls(**data)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError("nano configuration cannot be read", given=str(error),
                              expected="the dict that NanoConfig.to_json writes",
                              fix="take world.json from the folder of the weights") from error

    @property
    def spec(self) -> WorldSpec:
        """The world's public sizes."""
        return WorldSpec(name=self.name, frame_hw=self.codec.frame_hw,
                         latent_chw=self.codec.latent_chw, action=self.action, fps=self.fps,
                         context_frames=self.window - 1)



class Nano(nn.Module):
    """The three trainable parts of a nano world."""

    def __init__(self, cfg: NanoConfig) -> None:
        super().__init__()
        self.cfg = cfg
        channels = cfg.codec.channels
        wide = channels * (1 + cfg.recent)
        if (cfg.wan.in_dim, cfg.wan.out_dim) != (wide, channels):
            raise ConfigError("codec and dynamics do not fit",
                              given=f"in_dim {cfg.wan.in_dim}, out_dim {cfg.wan.out_dim}",
                              expected=f"in_dim {wide} = {channels} channels * (1 + "
                              f"{cfg.recent} recent frames), out_dim {channels}",
                              fix="build the sizes with nano.dit_config")
        _, h, w = cfg.codec.latent_chw
        if h % cfg.wan.patch_size[1] or w % cfg.wan.patch_size[2]:
            raise ConfigError("frame size does not fit the dynamics", given=cfg.codec.frame_hw,
                              expected=f"height and width divisible by {8 * cfg.wan.patch_size[1]}"
                              f" and {8 * cfg.wan.patch_size[2]}",
                              fix="resize the game's frames, for example to (48, 80) or (64, 64)")
        self.codec = Codec(cfg.codec)
        self.dynamics = Dynamics(DynamicsConfig(
            action_features=cfg.action.features, window=cfg.window, recent=cfg.recent,
            wan=cfg.wan))
        self.outcome = Outcome(OutcomeConfig(
            latent_chw=cfg.codec.latent_chw, action_features=cfg.action.features,
            frames=cfg.outcome_frames, width=cfg.outcome_width, members=cfg.outcome_members,
            ahead=cfg.outcome_ahead, reward_range=cfg.reward_range))

    def world(self, device: torch.device | str = "cpu", max_pages: int | None = None) -> World:
        """A world that steps with these weights."""
        self.eval().requires_grad_(False).to(device)
        cfg = self.cfg
        schedule = FewStep(tuple(cfg.steps), tuple(t / 1000 for t in cfg.steps))
        return World(
            cfg.spec, self.codec, self.dynamics, LearnedOutcome(self.outcome, cfg.end_scale),
            SinkWindow(cfg.window, cfg.sink), schedule,
            temperature=cfg.temperature, context_noise=cfg.context_noise,
            fingerprint=value_fingerprint(self), device=device, max_pages=max_pages)


def value_fingerprint(nano: Any, part: str = "") -> str:
    """Hash of configuration and weight values (of one part): which world a state belongs to."""
    digest = hashlib.sha256(json.dumps(nano.cfg.to_json(), sort_keys=True).encode())
    for name, tensor in sorted((n, t) for n, t in nano.state_dict().items() if n.startswith(part)):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def fresh(cfg: NanoConfig, seed: int = 0) -> Nano:
    """Untrained weights that depend on ``seed`` alone."""
    return seeded(Nano(cfg), seed)


def seeded(nano: Any, seed: int) -> Any:
    """The same module (with ``dynamics``) with untrained weights that depend on ``seed`` alone."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in nano.named_parameters():
        if p.ndim > 1:
            nn.init.xavier_uniform_(p.flatten(1) if p.ndim == 5 else p, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
    nano.dynamics.initialize(generator)
    return nano


def with_ahead(nano: Nano, ahead: int, seed: int = 0) -> Nano:
    """The same codec and dynamics with untrained outcome heads that look ``ahead`` steps ahead."""
    new = fresh(replace(nano.cfg, outcome_ahead=ahead), seed)
    new.codec.load_state_dict(nano.codec.state_dict())
    new.dynamics.load_state_dict(nano.dynamics.state_dict())
    return new


def tiny(seed: int = 0, action: ActionSpec | None = None, lively: bool = True,
         **changes: Any) -> World:
    """A random-weight world of 32x32 frames for tests and docs.

    ``lively``: random output weights, so that actions and noise change what happens.
    """
    cfg = NanoConfig(
        name="tiny", action=action or ActionSpec.discrete(3),
        codec=CodecConfig(frame_hw=(32, 32), channels=4, width=8, deep_width=16),
        wan=dit_config(4, 3, 32, 2, 16), window=5, outcome_frames=2, outcome_width=8)
    nano = fresh(replace(cfg, **changes), seed)
    if lively:
        generator = torch.Generator().manual_seed(seed + 1)
        nn.init.normal_(nano.dynamics.dit.head.head.weight, std=0.2, generator=generator)
        for member in nano.outcome.members:
            cast(Any, member).last.bias.data[:3] = torch.tensor([-3.0, 1.0, 0.0])
    return nano.world()


def save(nano: Any, folder: str | Path, card: dict, kind: str = "worldgym.nano") -> None:
    """Write weights and card; ``card`` holds provenance and metrics as plain JSON values."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(folder / WEIGHTS, nano, {"kind": kind})
    part = folder / (CARD + ".part")
    part.write_text(json.dumps({"kind": kind, "config": nano.cfg.to_json()} | card,
                               indent=1) + "\n")
    os.replace(part, folder / CARD)


def read_config(folder: str | Path) -> dict:
    """The configuration on a world folder's card."""
    folder = Path(folder)
    try:
        return json.loads((folder / CARD).read_text())["config"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError("no world in this folder", given=f"{folder} ({error})",
                              expected=f"{CARD} with a config, and {WEIGHTS}",
                              fix="fit a world first: worldgym fit --data ... --out ...") from error


def load_nano(folder: str | Path, **changes: Any) -> Nano:
    """Weights and configuration of a world folder; ``changes`` override configuration fields."""
    nano = Nano(replace(NanoConfig.from_json(read_config(folder)), **changes))
    return checkpoint.load_into(nano, Path(folder) / WEIGHTS)


def load(folder: str | Path, device: torch.device | str = "cpu", **changes: Any) -> World:
    """A world from a folder, ready to step."""
    return load_nano(folder, **changes).world(device)


def parts(nano: Nano) -> dict[str, dict[str, Tensor]]:
    """State dicts of the three trainable parts, by name."""
    return {name: getattr(nano, name).state_dict() for name in ("codec", "dynamics", "outcome")}
