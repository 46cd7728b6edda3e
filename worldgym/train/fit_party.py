"""Fit a world of several players and games to recordings: codec, rewards and ends, dynamics.

The dynamics train in two stages: the video alone, then subjects and video together; first on
single frames with the one before beside them (cheap), at last on whole clips. Every part resumes
from its checkpoint in ``out/training``; run the same command again after a kill.
Shapes: B clip, F frame, R row of a game's data, N player slot, S state channel.
"""

import hashlib
import json
import time
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldgym.data.party import PartySampler, halved, open_party, split_party
from worldgym.data.starts import StartBank
from worldgym.data.store import Episodes
from worldgym.errors import ConfigError
from worldgym.models import party_nano
from worldgym.models.cellbook import CellBook, standing
from worldgym.models.codec import CodecConfig
from worldgym.models.party import nano_config
from worldgym.models.party_loss import PartyLossConfig, batch_of, party_loss
from worldgym.models.party_nano import PartyNano, PartyNanoConfig
from worldgym.models.party_outcome import amounts_of, party_outcome_loss
from worldgym.train.distributed import Group
from worldgym.train.fit_party_config import ABLATIONS, FitPartyConfig
from worldgym.train.metrics_party import measure_party, recorded_states
from worldgym.train.provenance import command, machine, started_from
from worldgym.train.stages import CODEC_BATCH, Stages

OUTCOME_BATCH = 64  # clips of as many transitions as the heads look back
EVENTFUL = 0.5  # of these: share that pays or ends a player
OUTCOME_FRAMES = 3  # that the heads look back: two who mine gold may do so three steps apart
SHORT = 8  # one in so many iterations on single frames sees only one frame before them
SOON = 3  # rows before what happens that are drawn with it where the dynamics train
# root mean square step of latents, of positions, and of facing and alive, over thirteen games
SKIP = (0.6, 0.11, 0.7)


class FitParty(Stages):
    """One fitting run."""

    nano: PartyNano

    def __init__(self, cfg: FitPartyConfig, group: Group | None = None) -> None:
        super().__init__(cfg, group or Group(device=torch.device(cfg.device)))
        size = self.group.size
        if cfg.batch % size or CODEC_BATCH % size or OUTCOME_BATCH % size:
            raise ConfigError("batches do not split over the processes", given=f"{size} processes",
                              expected=f"divisors of {cfg.batch}, {CODEC_BATCH}, {OUTCOME_BATCH}",
                              fix="change --batch or --nproc_per_node")
        stores = open_party(cfg.data)
        unknown = sorted(set(cfg.games) - set(stores))
        if unknown:
            raise ConfigError("no recordings of this game", given=unknown,
                              expected=f"some of {list(stores)}", fix="record it, or leave it out")
        self.stores = {k: v for k, v in stores.items() if not cfg.games or k in cfg.games}
        self.train_ids, self.held_ids = split_party(self.stores, cfg.holdout)
        self.view = halved if cfg.halve else np.asarray
        self.nano = self._network().to(self.group.device)
        self.rows = {game: self._rows(game) for game in self.stores}
        self.ends = np.cumsum([len(rows) for rows in self.rows.values()])
        self.about = {"data": self._tag()}
        if cfg.init:
            self.about["from"] = self._value_tag("")
        players = [s.take("info_valid", s.starts).sum(1).mean() for s in self.stores.values()]
        self.chances = None if cfg.balance == "games" else np.array(players) / sum(players)

    def _network(self) -> PartyNano:
        """A fresh one, or that of ``init``, checked against data and settings."""
        cfg, config = self.cfg, self._config()
        if not cfg.init:
            return party_nano.fresh(config, cfg.seed)
        made = party_nano.load_party(cfg.init)
        c, recent = made.cfg.codec.channels, max(cfg.recent, made.cfg.dynamics.recent)
        old = replace(made.cfg.dynamics, window=config.dynamics.window, recent=recent, wan=replace(
            made.cfg.dynamics.wan, in_dim=c * (1 + recent)))
        mine = {"games": made.cfg.games, "codec": made.cfg.codec} | (
            {} if cfg.fresh else {"dynamics": old})
        self.agree(mine, {k: getattr(config, k) for k in mine},
                   "fit without --init, or with its games and sizes")
        others = ("book.", "dynamics.") if cfg.fresh else ("book.",)
        weights = {k: v for k, v in made.state_dict().items() if not k.startswith(others)}
        if not cfg.fresh:
            name = "dynamics.dit.patch_embedding.weight"  # newest frames first: older ones from 0
            weights[name] = torch.nn.functional.pad(
                weights[name], (0, 0) * 3 + (0, old.wan.in_dim - weights[name].shape[1]))
        started = party_nano.fresh(config, cfg.seed)
        own = started.state_dict()
        # heads that knew no games: what is added for each of them begins at nothing; that saw
        # fewer frames: so does what older ones, which come first, say
        own |= {k: torch.zeros_like(v) for k, v in own.items() if k.endswith(".games.weight")}
        weights |= {k: torch.nn.functional.pad(v, (own[k].shape[1] - v.shape[1], 0))
                    for k, v in weights.items() if k.endswith(".inputs.weight")}
        paid = "outcome.amounts_GV"
        weights[paid] = weights[paid].expand_as(own[paid])
        started.load_state_dict(own | weights)
        return started.eval()

    def _config(self) -> PartyNanoConfig:
        cfg, first = self.cfg, next(iter(self.stores.values()))
        down = 2 if cfg.halve else 1
        codec = CodecConfig(frame_hw=(first.frame_hw[0] // down, first.frame_hw[1] // down),
                            channels=cfg.channels, width=32, deep_width=128, noise=0.25,
                            stem=4 // down, local=True)
        cells = [self._cells(store) for store in self.stores.values()]
        actions = int(first.action.sizes[0])
        return PartyNanoConfig(
            name=cfg.name or Path(cfg.out).resolve().name, codec=codec, games=tuple(self.stores),
            cells=tuple(cells), snap=True, fps=first.fps, steps=cfg.steps,
            temperature=cfg.temperature, outcome_frames=OUTCOME_FRAMES, outcome_games=True,
            dynamics=nano_config(codec.latent_chw, len(self.stores), cfg.width, cfg.layers,
                                 recent=cfg.recent,
                                 window=cfg.window, patch=(cfg.patch,) * 2, skip=SKIP,
                                 slots=first.agents, actions=actions, facing=True,
                                 **ABLATIONS[cfg.ablation]))

    @staticmethod
    def _cells(store: Episodes) -> tuple[float, float, float, float]:
        """Offset and size of the cells of a game's frames, over the frame's two units."""
        height, width = store.env.get("recipe", store.env).get("frame_cells_hw", (8, 10))
        return 0.0, 0.0, 2 / width, 2 / height

    def _tag(self) -> str:
        """Which recordings these are."""
        text = json.dumps([[k, v.lengths.tolist(), v.seeds, v.policies, v.env]
                           for k, v in self.stores.items()], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def run(self) -> Path:
        """Fit all parts and write the world folder; returns it."""
        cfg, short = self.cfg, 50 if self.cfg.quick else 10**9
        if cfg.snapshot:
            return self._snapshot(Path(cfg.snapshot))
        if not cfg.init:
            self._codec(min(cfg.codec_iterations, short))
        self._encode()
        # the heads first, which read recordings only: every snapshot then knows what pays
        self._outcome(min(cfg.outcome_iterations, short))
        self._dynamics(min(cfg.dynamics_iterations, short))
        if self.group.first:
            self._write(self.out, self._seeing(min(cfg.play_window, cfg.window)))
        return self.out

    def _seeing(self, window: int, **changes: Any) -> PartyNano:
        """The world with these weights, and a book of tiles, whose steps see so many frames."""
        now, book = self.nano.cfg, self._book()
        tiles = None if book is None else (len(book), len(book.pairs_M3), len(book.moves_M3),
                                           len(book.growth))
        made = PartyNano(replace(now, dynamics=replace(now.dynamics, window=window), tiles=tiles,
                                 **changes))
        weights = self.nano.state_dict()
        if book is not None:
            weights |= {f"book.{k}": v for k, v in book.state_dict().items()}
        made.load_state_dict(weights)
        return made.eval()

    def _book(self) -> CellBook | None:
        """The tiles of some training frames of every game, and of the frames after them."""
        count = self.cfg.book_frames
        if not count:
            return None
        rng = np.random.default_rng((self.cfg.seed, 4))
        pairs, places = [], []
        for game, rows in self.rows.items():
            rows = rows[:-1][np.diff(rows) == 1]
            rows = rows[~np.isin(rows + 1, self.stores[game].starts)]  # another episode's first
            rows = np.sort(rng.choice(rows, min(count, len(rows)), False))
            pairs.append(np.stack([self._read(game, rows + i) for i in range(2)], 1))
            places.append(np.stack([self._places(game, rows + i) for i in range(2)], 1))
        return CellBook.of(self.nano.codec, pairs, places)

    def _places(self, game: str, rows: np.ndarray) -> np.ndarray:
        """Cell of every player in the latents (R, N), -1: not on the map."""
        store = self.stores[game]
        there = torch.from_numpy(store.take("info_valid", rows) & store.take("info_alive", rows))
        at = torch.from_numpy(np.nan_to_num(store.take("info_position", rows)))
        return standing(at, there, self.nano.codec.cfg.latent_chw[1:]).numpy()

    def _read(self, game: str, rows: np.ndarray) -> np.ndarray:
        return self.view(self.stores[game].take("frames", rows))

    def _rows(self, game: str) -> np.ndarray:
        """Rows of the training episodes of a game."""
        store, ids = self.stores[game], self.train_ids[game]
        return np.concatenate([np.arange(s, s + n + 1) for s, n in zip(
            store.starts[ids], store.lengths[ids], strict=True)])

    def _median(self, game: str) -> torch.Tensor:
        rows = self.rows[game]
        pick = np.random.default_rng((self.cfg.seed, 1)).choice(rows, min(400, len(rows)), False)
        return self.median(self._read(game, np.sort(pick)))

    def _any(self, numbers: np.ndarray) -> np.ndarray:
        """Training frames by their number, counted through all games."""
        of = np.searchsorted(self.ends, numbers, side="right")
        out = np.empty((len(numbers), *self.nano.codec.cfg.frame_hw, 3), np.uint8)
        for g in np.unique(of):
            name = self.nano.cfg.games[g]
            first = self.ends[g] - len(self.rows[name])
            out[of == g] = self._read(name, self.rows[name][numbers[of == g] - first])
        return out

    def _codec(self, iterations: int) -> None:
        games, group = self.nano.cfg.games, self.group
        medians = torch.stack([self._median(game) for game in games])
        counts = np.array([len(self.rows[game]) for game in games])

        def sample(i: int) -> dict:
            rng = np.random.default_rng((self.cfg.seed, 2, i))
            game = rng.integers(len(games), size=CODEC_BATCH)
            number = (self.ends - counts + rng.integers(counts, size=(CODEC_BATCH, len(games))))[
                np.arange(CODEC_BATCH), game]
            mine = group.rows(CODEC_BATCH)
            return {"frames": torch.from_numpy(self._any(number[mine])),
                    "game": torch.from_numpy(game[mine])}

        self.fit_codec(iterations, sample, lambda data: medians[data["game"]], self._any,
                       np.arange(self.ends[-1]), {"codec": self.nano.cfg.to_json()["codec"]})

    def _value_tag(self, part: str = "codec") -> str:
        """Which codec this is, or which world; and which recordings."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.nano.get_submodule(part).state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return f"{digest.hexdigest()[:16]}-{self.about['data']}"

    def _encode(self) -> None:
        self.latent_tag, self.extra = self._value_tag(), {}
        for game, store in self.stores.items():
            latents, weights = self.encode(
                self.work / "latents" / game, self.latent_tag, store.rows,
                partial(self._read, game), partial(self._median, game))
            self.extra[game] = {"latents": latents, "weights": weights}

    def _sampler(self, frames: int, batch: int, eventful: float = 0.0,
                 soon: int | None = None) -> PartySampler:
        return PartySampler(self.stores, self.train_ids, frames, batch, self.cfg.seed,
                            with_frames=False, extra=self.extra, eventful=eventful, soon=soon,
                            chances=self.chances,
                            rank=self.group.rank, world_size=self.group.size)

    def _batch(self, data: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        sub = self.nano.cfg.dynamics.subjects
        batch = batch_of(data, sub.facing)
        batch["weight_BFhw"] = torch.from_numpy(data["weights"].astype(np.float32))
        batch["cell_B2"] = torch.tensor(self.nano.cfg.cells)[batch["game_B"], 2:]
        if "likely" in data:
            batch["likely_B"] = torch.from_numpy(data["likely"])
        return {k: v.to(self.group.device) for k, v in batch.items()}

    def _dynamics(self, iterations: int) -> None:
        if not iterations:
            return
        cfg, group = self.cfg, self.group
        video, alone = int(cfg.video_share * iterations), int(cfg.alone_share * iterations)
        # single frames: as many as clips have, each with those before it, or (as when an episode
        # begins) with one of them
        half = max(group.size, cfg.batch // 2 // group.size * group.size)
        singles = cfg.batch * (cfg.clip - 1)
        samplers = [self._sampler(frames, count, cfg.eventful, SOON) for frames, count in (
            (cfg.recent + 1, singles), (2, singles), (cfg.clip, half))]

        def which(i: int) -> int:
            return 2 if i >= alone else int(i % SHORT == SHORT - 1)
        how = PartyLossConfig(shift=3.0, state_weight=cfg.state_weight, forcing="alone",
                              position_weight=cfg.position_weight)

        def loss(model, data, generator):
            here = replace(how, stage="video" if loop.iteration < video else "joint",
                           forcing="alone" if loop.iteration < alone else "teacher",
                           lead=(cfg.recent - 1, 0, 0)[which(loop.iteration)])
            return party_loss(model, self.nano.cfg.dynamics, self._batch(data), generator, here,
                              (group.rank, group.size), group.average)

        about = {"batch": cfg.batch, "clip": cfg.clip, "video": video, "alone": alone,
                 "balance": cfg.balance, "eventful": cfg.eventful,
                 "loss": asdict(how), "latents": self.latent_tag,
                 "dynamics": json.dumps(self.nano.cfg.dynamics.to_json(), sort_keys=True)}
        loop = self.loop("dynamics", iterations, about, lr=cfg.dynamics_lr, decay=0.3, warmup=200,
                         weight_decay=0.02, muon=True, ema=0.995,
                         save_every=max(1, min(100, iterations // 4)))
        loop.run(lambda i: samplers[which(i)](i), loss, cfg.tensorboard)
        self.finish(loop)

    def _outcome(self, iterations: int) -> None:
        if not iterations:
            return
        cfg, group, head = self.cfg, self.group, self.nano.outcome
        sampler = self._sampler(head.cfg.frames + 1, OUTCOME_BATCH, EVENTFUL)
        head.amounts_GV.copy_(torch.from_numpy(np.stack([
            amounts_of(store.take("rewards", self.rows[game]), head.cfg.amounts)
            for game, store in self.stores.items()])))

        def loss(model, data, generator):
            batch = self._batch(data)
            noise = torch.randn(OUTCOME_BATCH, *batch["latents_BFChw"].shape[1:],
                                generator=generator)
            level = 0.2 * torch.rand(OUTCOME_BATCH, 1, 1, 1, 1, generator=generator)
            batch["latents_BFChw"] += (level * noise)[group.rows(OUTCOME_BATCH)].to(group.device)
            return party_outcome_loss(model, head.cfg, batch, head.amounts_GV)

        loop = self.loop("outcome", iterations,
                         {"latents": self.latent_tag, "head": json.dumps(asdict(head.cfg)),
                          "amounts": head.amounts_GV.tolist(),
                          "eventful": EVENTFUL, "balance": cfg.balance},
                         lr=1e-3, decay=0.5, weight_decay=0.1)
        loop.run(sampler, loss, cfg.tensorboard)
        self.finish(loop)

    def _snapshot(self, folder: Path) -> Path:
        """Write the world that the checkpoints make now."""
        cfg = self.cfg
        done = {name: self.averaged(name) for name in ("codec", "dynamics", "outcome")}
        if not done["dynamics"]:
            raise ConfigError("nothing to take a snapshot of", given=str(self.work),
                              expected="the folder of a run whose dynamics train",
                              fix="train first: the same command without --snapshot")
        if not cfg.init:
            self.normalise(self._any, np.arange(self.ends[-1]))
        early = done["dynamics"] <= int(cfg.alone_share * cfg.dynamics_iterations)
        window = 1 if early else min(cfg.play_window, cfg.window)
        # untrained heads end half of the players in every step; those of ``init`` are trained
        heads = done["outcome"] or cfg.init
        made = self._seeing(window, **({} if heads else {"end_scale": 0.0}))
        self._write(folder, made, done)
        return folder

    def _write(self, folder: Path, made: PartyNano, iterations: dict | None = None) -> None:
        cfg = self.cfg
        count = min(cfg.starts, 8) if cfg.quick else cfg.starts
        folder.mkdir(parents=True, exist_ok=True)
        StartBank.joined([StartBank.build(
            store, made.codec.encode, self.train_ids[game], count, seed=cfg.seed + number,
            context=max(made.cfg.dynamics.window - 1, made.cfg.dynamics.recent + 1),
            view=self.view, game=number,
            states=partial(recorded_states, store, facing=made.cfg.dynamics.subjects.facing))
            for number, (game, store) in enumerate(self.stores.items())]).save(
                folder / "starts.safetensors")
        card: dict[str, Any] = {"task": {"horizon": cfg.horizon},
                                "provenance": self._provenance(iterations)}
        party_nano.save(made, folder, card)
        if cfg.measure:
            world = party_nano.load(folder, self.group.device)
            card["metrics"] = measure_party(
                world, self.stores, self.held_ids, view=self.view, seed=cfg.seed,
                cells=made.cfg.cells, clips=8 if cfg.quick else 64)
            party_nano.save(made, folder, card)

    def _provenance(self, iterations: dict | None) -> dict:
        cfg = self.cfg
        return {
            "command": command(cfg, "worldgym fit-party"), "config": asdict(cfg), "seed": cfg.seed,
            "real_steps_used": {k: int(v.steps) for k, v in self.stores.items()},
            "episodes": {k: len(v) for k, v in self.stores.items()},
            "policies": {k: dict(Counter(v.policies)) for k, v in self.stores.items()},
            "env": {k: v.env for k, v in self.stores.items()},
            "training_seconds": self.seconds, "processes": self.group.size,
            "machine": machine(self.group.device), "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
            **started_from(cfg.init), **({"iterations": iterations} if iterations else {})}


def fit_party(cfg: FitPartyConfig) -> Path:
    """Fit a party world; see ``FitPartyConfig``. Returns the world folder."""
    group = Group.from_env(cfg.device)
    try:
        return FitParty(cfg, group).run()
    finally:
        group.close()
