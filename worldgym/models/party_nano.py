"""A small party world, its trainable parts (codec, dynamics, outcome), its tiles and its files.

A folder holds ``world.safetensors`` and ``world.json``, as nano's does.
Shapes: B slot, N subject, G game.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from worldgym import checkpoint
from worldgym.errors import ConfigError
from worldgym.memory import SinkWindow
from worldgym.models import nano
from worldgym.models.cellbook import CellBook
from worldgym.models.codec import Codec, CodecConfig
from worldgym.models.party import PartyConfig, PartyDynamics, nano_config
from worldgym.models.party_loss import game_text
from worldgym.models.party_outcome import LearnedPartyOutcome, PartyOutcome, PartyOutcomeConfig
from worldgym.models.party_world import Guidance, PartyWorld, party_spec
from worldgym.schedule import FewStep, UniPC

KIND = "worldgym.party"


@dataclass(frozen=True, kw_only=True, slots=True)
class PartyNanoConfig:
    """Everything that fixes a small party world but its weights.

    ``games``: their names, in the order of their numbers; ``cells``: per game the offset and size
    of its cells (see ``PartyWorld``), used with ``snap``; ``steps``: denoising timesteps of a step;
    ``solver_steps``: a UniPC solver with this many steps instead (0: none); ``guidance``: its scale
    (1: off); ``tiles``: how many tiles, pairs of them in a place and of a player, and changes by
    chance are in the book that drawn cells are replaced from (None: there is none),
    ``tile_prior``: how much what followed in recordings is preferred (see ``CellBook``);
    ``end_scale``: factor on end chances; ``outcome_frames``: past frames that the heads see;
    ``outcome_amounts``: see ``PartyOutcomeConfig``; ``outcome_games``: they know the games by their
    numbers.
    """

    name: str
    dynamics: PartyConfig
    codec: CodecConfig = field(default_factory=CodecConfig)
    games: tuple[str, ...] = ("game",)
    cells: tuple[tuple[float, float, float, float], ...] = ()
    snap: bool = False
    fps: float = 8.0
    sink: int = 0
    steps: tuple[float, ...] = (1000.0, 850.0, 600.0)
    solver_steps: int = 0
    shift: float = 5.0
    guidance: float = 1.0
    temperature: float = 1.0
    context_noise: float = 0.0
    tiles: tuple[int, int, int, int] | None = None
    tile_prior: float = 0.3
    end_scale: float = 1.0
    outcome_frames: int = 1
    outcome_width: int = 48
    outcome_members: int = 2
    outcome_amounts: int = 8
    outcome_games: bool = False

    def __post_init__(self) -> None:
        if self.dynamics.wan.text_dim != len(self.games) or self.dynamics.wan.text_len != 1:
            raise ConfigError("games do not fit the network",
                              given=f"{len(self.games)} games, text {self.dynamics.wan.text_len} x "
                                    f"{self.dynamics.wan.text_dim}",
                              expected="one text row as wide as there are games",
                              fix="build the network with party.nano_config(games=...)")
        if self.codec.latent_chw != self.dynamics.latent_chw:
            raise ConfigError("codec and dynamics do not fit", given=self.codec.latent_chw,
                              expected=self.dynamics.latent_chw, fix="use one latent shape")
        if self.snap and len(self.cells) != len(self.games):
            raise ConfigError("nothing to snap to", given=f"{len(self.cells)} rows of cells",
                              expected=f"one for each of {len(self.games)} games",
                              fix="give cells, or set snap=False")

    def to_json(self) -> dict:
        """Plain dict that ``from_json`` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> "PartyNanoConfig":
        """Inverse of ``to_json``."""
        try:
            known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v
                                     for k, v in data.items()}
            known["dynamics"] = PartyConfig.from_json(data["dynamics"])
            codec = data["codec"] | {"frame_hw": tuple(data["codec"]["frame_hw"])}
            known["codec"] = CodecConfig(**codec)
            known["cells"] = tuple(tuple(row) for row in data["cells"])
            return cls(**known)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError("party configuration cannot be read", given=str(error),
                              expected="the dict that PartyNanoConfig.to_json writes",
                              fix="take world.json from the folder of the weights; a world of an "
                              "older release is to be fitted anew") from error


class PartyNano(nn.Module):
    """The three trainable parts of a small party world."""

    def __init__(self, cfg: PartyNanoConfig) -> None:
        super().__init__()
        self.cfg, sub = cfg, cfg.dynamics.subjects
        self.codec = Codec(cfg.codec)
        self.dynamics = PartyDynamics(cfg.dynamics)
        self.outcome = PartyOutcome(PartyOutcomeConfig(
            latent_chw=cfg.dynamics.latent_chw, channels=sub.channels, actions=sub.actions,
            frames=cfg.outcome_frames, width=cfg.outcome_width, members=cfg.outcome_members,
            amounts=cfg.outcome_amounts,
            games=len(cfg.games) if cfg.outcome_games else 1))
        self.book = None if cfg.tiles is None else CellBook(
            cfg.codec.channels, cfg.tiles[0], cfg.tiles[1:3], len(cfg.games), cfg.tile_prior,
            (cfg.tiles[3], cfg.codec.latent_chw[1] * cfg.codec.latent_chw[2]))

    def world(self, device: torch.device | str = "cpu",
              max_pages: int | None = None) -> PartyWorld:
        """A world that steps with these weights."""
        self.eval().requires_grad_(False).to(device)
        cfg, sub, games = self.cfg, self.cfg.dynamics.subjects, len(self.cfg.games)
        schedule = UniPC(cfg.solver_steps, shift=cfg.shift) if cfg.solver_steps else FewStep(
            tuple(cfg.steps), tuple(t / 1000 for t in cfg.steps))
        spec = party_spec(cfg.name, cfg.codec.frame_hw, cfg.dynamics.latent_chw, sub.slots,
                          sub.actions, cfg.dynamics.window, cfg.fps, cfg.dynamics.recent)
        return PartyWorld(
            spec, self.codec, self.dynamics, LearnedPartyOutcome(self.outcome, cfg.end_scale),
            SinkWindow(cfg.dynamics.window, cfg.sink), schedule,
            texts_GLD=game_text(torch.arange(games), games),
            guidance=None if cfg.guidance == 1 else Guidance(scale=cfg.guidance),
            cells_G4=torch.tensor(cfg.cells) if cfg.snap else None, book=self.book,
            temperature=cfg.temperature, context_noise=cfg.context_noise,
            fingerprint=nano.value_fingerprint(self), device=device, max_pages=max_pages)


def fresh(cfg: PartyNanoConfig, seed: int = 0) -> PartyNano:
    """Untrained weights that depend on ``seed`` alone."""
    return nano.seeded(PartyNano(cfg), seed)


def tiny(seed: int = 0, lively: bool = True, games: int = 2, slots: int = 4,
         subjects: dict | None = None, **changes: Any) -> PartyWorld:
    """A random-weight world of 32x32 frames and up to four players, for tests and docs.

    ``lively``: random output weights, so that actions and noise change what happens.

    >>> world = tiny()
    >>> world.spec.subjects, world.spec.action.shape
    (4, (4,))
    """
    codec = CodecConfig(frame_hw=(32, 32), channels=4, width=8, deep_width=16)
    cfg = PartyNanoConfig(
        name="tiny", codec=codec, games=tuple(f"game {i}" for i in range(games)),
        dynamics=nano_config(codec.latent_chw, games, 32, 2, 16, slots=slots, actions=5,
                             **(subjects or {})), outcome_width=8)
    made = fresh(replace(cfg, **changes), seed)
    if lively:
        generator = torch.Generator().manual_seed(seed + 1)
        for head in (made.dynamics.dit.head.head, made.dynamics.subjects.head):
            nn.init.normal_(head.weight, std=0.2, generator=generator)
        for reader in made.outcome.ends:
            reader.last.bias.data.fill_(-3.0)  # type: ignore[union-attr, operator]
        if made.book is not None:
            nn.init.normal_(made.book.cells_TC, generator=generator)
            made.book.looks_T.copy_(torch.arange(len(made.book)) % (slots + 1) - 1)
            pairs = made.book.pairs_M3, made.book.moves_M3
            sizes = torch.tensor([len(made.book), *map(len, pairs)]) // games
            made.book.ends_G3.copy_(torch.arange(1, games + 1)[:, None] * sizes)
            for some in pairs:
                some.copy_(torch.randint(1, int(sizes[0]), some.shape, generator=generator))
            kinds = made.book.growth.tiles_K2
            kinds.copy_(torch.randint(int(sizes[0]), kinds.shape, generator=generator))
            made.book.growth.chance_KP.fill_(0.05)
            made.book.growth.ends_G.copy_(torch.arange(1, games + 1) * len(kinds) // games)
    return made.world()


def save(party: PartyNano, folder: str | Path, card: dict) -> None:
    """Write weights and card (provenance and metrics as plain JSON values)."""
    nano.save(party, folder, card, KIND)


def load_party(folder: str | Path, **changes: Any) -> PartyNano:
    """Weights and configuration of a folder; ``changes`` override configuration fields."""
    cfg = replace(PartyNanoConfig.from_json(nano.read_config(folder)), **changes)
    return checkpoint.load_into(PartyNano(cfg), Path(folder) / nano.WEIGHTS)


def load(folder: str | Path, device: torch.device | str = "cpu", **changes: Any) -> PartyWorld:
    """A world from a folder, ready to step."""
    return load_party(folder, **changes).world(device)


