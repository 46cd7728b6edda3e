"""ActionParty as a world of the one engine: what it adds to a step, and nothing else.

Shapes: B slot, K past frame, C channel, h w latent grid, N subject, S state channel, G game,
L text token, V = C * h * w + N * S numbers of a frame.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldgym.actions import ActionSpec
from worldgym.engine import Chunk, World
from worldgym.errors import ConfigError, NotFiniteError, ShapeError
from worldgym.memory import SinkWindow
from worldgym.models.cellbook import CellBook, standing
from worldgym.models.codec import Codec
from worldgym.models.dynamics import before
from worldgym.models.party import PartyDynamics
from worldgym.noise import PASSES, normal, uniform
from worldgym.rollout import Block, CausalStepper, Guided
from worldgym.schedule import FewStep, UniPC
from worldgym.spec import WorldSpec
from worldgym.state import Starts, Tables, WorldState


@dataclass(frozen=True, slots=True)
class SubjectsChunk:
    """The subjects' part of a chunk, one row per stepped slot.

    ``states_BFNS``: states as the model drew them (zeros where nobody is); ``valid_BN``: which
    places are taken; ``rewards_BN`` float32; ``ended_BN`` bool: ended in this step or before;
    ``end_probability_BN``: chance that the player's part ended in this step.
    """

    states_BFNS: Tensor
    valid_BN: np.ndarray
    rewards_BN: np.ndarray
    ended_BN: np.ndarray
    end_probability_BN: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Guidance:
    """``v = v_neg + scale (v - v_neg)`` with a second cache; ``text_LD``: the negative prompt
    (None: zeros, as dropped texts are in training); ``drop_actions``: nobody acts there."""

    scale: float
    text_LD: Tensor | None = None
    drop_actions: bool = True


class PartyWorld(World):
    """A world of several players: ``step`` takes actions (n, N), -1 where a player does nothing.

    What is given for an empty place, or for a player that has ended, is not read. Starts carry
    ``subjects_BKNS``, ``valid_BN`` and (with several games) ``game_B``; ``Chunk.subjects`` is a
    ``SubjectsChunk``. ``Chunk.reward_B`` is the players' sum; ``terminated_B``: everyone has ended.

    Args:
        texts_GLD: text embeddings of the games, e.g. ``party_loss.game_text(torch.arange(G), G)``.
        guidance: None = none.
        cells_G4: per game (offset x, offset y, width, height) of its first cell, over the frame's
            two units from its top left corner: positions snap to cell centres before they are
            kept (facing and alive to what they mean). None = they are kept as drawn.
        book: drawn cells are replaced by its tiles, and nobody goes where it knows a wall. None =
            they are kept as drawn.
        outcome: a ``LearnedPartyOutcome``, or None.

    All further arguments: see ``World``.
    """

    def __init__(self, spec: WorldSpec, codec: Codec, dynamics: PartyDynamics, outcome: Any,
                 policy: SinkWindow, schedule: FewStep | UniPC, *, texts_GLD: Tensor,
                 guidance: Guidance | None = None, cells_G4: Tensor | None = None,
                 book: CellBook | None = None, **rest: Any) -> None:
        super().__init__(spec, codec, dynamics, outcome, policy, schedule, **rest)  # type: ignore
        if spec.latents_per_chunk != 1:
            raise ConfigError("chunk is too long for subjects", given=spec.latents_per_chunk,
                              expected="1 latent frame per step", fix="set latents_per_chunk=1")
        sub = dynamics.cfg.subjects
        if spec.subjects != sub.slots or spec.action.shape != (sub.slots,) or any(
                n != sub.actions for n in spec.action.sizes):
            raise ConfigError("actions do not fit the subjects",
                              given=f"{spec.subjects} subjects, actions {spec.action.sizes}",
                              expected=f"{sub.slots} subjects with {sub.actions} actions each",
                              fix="build the spec with party_spec")
        window, recent = dynamics.cfg.window, dynamics.cfg.recent
        if 1 < window <= recent:
            raise ConfigError("frames beside a frame lie outside its window",
                              given=f"window {window}, recent {recent}",
                              expected="window 1, or above recent", fix="change one of them")
        self.party, self.sub, self.guidance = dynamics, sub, guidance
        # anchors need the frame before; without an action mask, tokens see the window's actions
        least = 2 if sub.mca != "none" else dynamics.cfg.window + 1
        self.history = max(self.history, least)
        self.games = len(texts_GLD)
        self.extra = {
            "subjects": ((self.history, sub.slots, sub.channels), torch.float32),
            "controls": ((self.history, sub.slots), torch.int64),
            "valid": ((sub.slots,), torch.bool), "ended": ((sub.slots,), torch.bool),
            "game": ((), torch.int64)}
        if book is not None:  # whose looks every player has, -1: not known yet
            self.extra["look"] = (sub.slots,), torch.int64
        with torch.no_grad():
            texts = texts_GLD.to(self.device, torch.float32)
            self.text_kv = dynamics.dit.text(texts) if dynamics.cfg.wan.text_len else None
            if guidance is not None:
                no = torch.zeros_like(texts[0]) if guidance.text_LD is None else guidance.text_LD
                self.no_text_kv = dynamics.dit.text(no[None].to(texts)) if self.text_kv else None
                self.stepper: CausalStepper | Guided = Guided(
                    CausalStepper(dynamics.network, self.pool, policy), guidance.scale, self._split)
                self.table_rows = 2
        if cells_G4 is not None and tuple(cells_G4.shape) != (self.games, 4):
            raise ConfigError("cells do not fit the games", given=tuple(cells_G4.shape),
                              expected=(self.games, 4), fix="give one row for every game")
        self.book = book
        self.cells_G4 = None if cells_G4 is None else cells_G4.to(self.device, torch.float32)

    @property
    def pending_shape(self) -> tuple[int, ...]:
        return (self.sub.slots,)

    # -- actions -----------------------------------------------------------------------------

    def _numbers(self, actions: np.ndarray, skip: np.ndarray, n: int) -> Tensor:
        """Checked action numbers (n, N) as features; the null action where ``skip`` or -1."""
        array = np.asarray(actions)
        if array.shape == skip.shape and array.dtype.kind in "iuf":
            skip = skip | (array == -1)
            array = np.where(skip, self.spec.action.start, array)
        checked = self.spec.action.check(array, n) - self.spec.action.start
        return torch.from_numpy(np.where(skip, self.sub.null, checked)).to(self.device).float()

    def _controls(self, raw: np.ndarray, state: WorldState, index: np.ndarray) -> Tensor:
        plays = (state.extra["valid"] & ~state.extra["ended"]).cpu().numpy()[index]
        return self._numbers(raw, ~plays, len(index))

    def _start_controls(self, actions: np.ndarray, unused: np.ndarray) -> Tensor:
        skip = np.broadcast_to(unused[:, None], actions.shape)
        return self._numbers(actions, skip, len(actions))

    # -- begin -------------------------------------------------------------------------------

    def _check_starts(self, starts: Starts) -> tuple[Tensor, Tensor, np.ndarray]:
        _, valid, _ = self._subjects(starts)
        actions = np.asarray(starts.actions)
        if actions.ndim == 3 and actions.shape[2] == valid.shape[1]:
            actions = np.where(valid[:, None].numpy(), actions, -1)
        return super()._check_starts(Starts(starts.latents_BKChw, actions, starts.null_BK,
                                            starts.length_B))

    def _subjects(self, starts: Starts) -> tuple[Tensor, Tensor, Tensor]:
        """States (B, K, N, S) with zeros where nobody is, valid (B, N), game (B,), checked."""
        b, k = np.shape(starts.latents_BKChw)[:2]
        wants = {"subjects_BKNS": (b, k, self.sub.slots, self.sub.channels),
                 "valid_BN": (b, self.sub.slots), "game_B": (b,)}
        found = {}
        for name, shape in wants.items():
            value = getattr(starts, name)
            if value is None and name == "game_B" and self.games == 1:
                value = np.zeros(b, np.int64)
            if value is None or np.shape(value) != shape:
                raise ShapeError(f"start {name} does not fit", expected=shape,
                                 given="nothing" if value is None else np.shape(value),
                                 fix="give every start its players' states, which places are "
                                     "taken, and its game")
            found[name] = np.asarray(value)
        game, valid = found["game_B"], found["valid_BN"].astype(bool)
        if game.dtype.kind not in "iu" or game.min() < 0 or game.max() >= self.games:
            raise ConfigError("no such game", given=game.tolist()[:8],
                              expected=f"integers in [0, {self.games - 1}]",
                              fix="number the games as the world was trained")
        length = np.asarray(starts.length_B)
        there = np.broadcast_to(valid[:, None, :, None], wants["subjects_BKNS"]).copy()
        if length.shape == (b,):
            there &= (np.arange(k)[None] >= k - length[:, None])[:, :, None, None]
        states = np.where(there, found["subjects_BKNS"], 0).astype(np.float32)
        if not np.isfinite(states).all():
            raise NotFiniteError("start states are not finite", given="NaN or infinity",
                                 expected="finite positions where valid_BN is true",
                                 fix="mark places without a player as not valid")
        return tuple(torch.from_numpy(x).to(self.device)  # type: ignore[return-value]
                     for x in (states, valid, game.astype(np.int64)))

    def _start_extra(self, starts: Starts, features_BKA: Tensor, rows_B1: np.ndarray,
                     reach_BK: np.ndarray) -> dict[str, Tensor]:
        states, valid, game = self._subjects(starts)
        where = tuple(torch.from_numpy(i).to(self.device) for i in (rows_B1, reach_BK))
        extra = {"subjects": states[where], "controls": features_BKA[where].long(),
                 "valid": valid, "ended": torch.zeros_like(valid), "game": game}
        if self.book is not None:
            extra["look"] = torch.full_like(valid, -1, dtype=torch.int64)
            frames = starts.latents_BKChw.to(self.device)
            there = torch.from_numpy(np.asarray(starts.length_B)).to(self.device)[:, None]
            for i in range(k := frames.shape[1]):  # who is off the map now was on it before
                at = standing(states[:, i], valid & (there >= k - i), self.spec.latent_chw[1:])
                look = self.book.looks(frames[:, i], game, at)
                extra["look"] = torch.where(look >= 0, look, extra["look"])
        return extra

    def _remember(self, latents_BKChw: Tensor, features_BKA: Tensor, length_B: np.ndarray,
                  starts: Starts, extra: dict[str, Tensor]) -> Tables:
        if self.party.cfg.window == 1:  # older frames are seen beside the newest only
            return self.stepper.empty(len(latents_BKChw))
        return super()._remember(latents_BKChw, features_BKA, length_B, starts, extra)

    def _past(self, past_BCKhw: Tensor, features_BKA: Tensor, index_BK: np.ndarray,
              starts: Starts, extra: dict[str, Tensor]) -> tuple[Tensor, Block]:
        states = self._subjects(starts)[0][:, :-1]
        index = torch.from_numpy(index_BK).to(self.device)
        before_it = torch.cat([states[:, :1], states[:, :-1]], 1)
        first = (index <= 0)[:, :, None, None]  # nothing before it: anchored at itself
        earlier = torch.where(first, states, before_it)
        recent = self.dynamics.cfg.recent
        given = self._given(extra, features_BKA.long(), earlier) | {
            "action_frame_BG": index, "action_before_BGNS": earlier,
            "recent_BRFhw": before(past_BCKhw, recent) if recent else None}
        x = self.party.pack(past_BCKhw.transpose(1, 2), states)
        return x, Block(index_BK, given, self.party.within(extra["valid"]))

    # -- step --------------------------------------------------------------------------------

    def _given(self, extra: dict[str, Tensor], actions_BGN: Tensor, before_BFNS: Tensor) -> dict:
        """Network arguments of every call."""
        text = self.text_kv and [(k[extra["game"]], v[extra["game"]]) for k, v in self.text_kv]
        return {"actions_BGN": actions_BGN, "before_BFNS": before_BFNS, "valid_BN": extra["valid"],
                "text_kv": text}

    def _blocks(self, state: WorldState, action_BA: Tensor) -> tuple[Tensor, Block, Block, dict]:
        states, valid = state.extra["subjects"], state.extra["valid"]
        earlier = states[:, -2:]  # before the current frame, and before the next
        actions = torch.cat([state.extra["controls"], action_BA.long()[:, None]], 1)
        index = state.index_B[:, None] + 1
        frames = index + np.arange(-self.history, 1)[None]
        frames = np.where(np.arange(self.history, -1, -1)[None] <= state.lengths_B[:, None],
                          frames, -1)
        every = torch.cat([states[:, :1], states], 1)
        # a token sees the actions of its own frame, or of all its window (mca "none")
        count = 2 if self.sub.mca != "none" else self.history + 1
        keys = {"action_frame_BG": torch.from_numpy(frames).to(self.device)[:, -count:],
                "action_before_BGNS": every[:, -count:]}
        recent = self._recent(state) if self.dynamics.cfg.recent else None
        joint = self._given(state.extra, actions[:, -count:], earlier) | keys | {
            "recent_BRFhw": recent}
        alone = joint | {"before_BFNS": earlier[:, -1:],
                         "recent_BRFhw": None if recent is None else recent[:, :, 1:]}
        within = self.party.within(valid)
        current = self.party.pack(state.history_BKChw[:, -1:], states[:, -1:])
        return (current, Block(state.index_B[:, None], {}, within),
                Block(index, alone, within), joint)

    def _split(self, given: dict) -> dict:
        """Network arguments of two rows per slot: as they are, and negative."""
        assert self.guidance is not None
        out = {k: v.repeat_interleave(2, 0) if isinstance(v, Tensor) else v
               for k, v in given.items()}
        if self.guidance.drop_actions:
            out["actions_BGN"][1::2] = self.sub.null
        if given["text_kv"] is not None:
            out["text_kv"] = [
                tuple(torch.stack([x, no.expand_as(x)], 1).flatten(0, 1)
                      for x, no in zip(kv, no_kv, strict=True))
                for kv, no_kv in zip(given["text_kv"], self.no_text_kv or [], strict=True)]
        return out

    def noise(self, keys_B4: np.ndarray, number: int) -> Tensor:
        """Noise (B, V, 1) of latents, then of states."""
        c, h, w = self.spec.latent_chw
        count = c * h * w + self.sub.slots * self.sub.channels
        return self.temperature * normal(keys_B4, number, (count, 1), self.device)

    def _made(self, state: WorldState, action_BA: Tensor,
              x0: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        video, states = self.party.unpack(x0)
        states = states[:, 0].clamp(-1, 1)
        if self.cells_G4 is not None:
            states = snap(states, self.cells_G4[state.extra["game"]])
        states = torch.where(state.extra["valid"][..., None], states, 0)
        drawn, extra = video[:, :1].contiguous(), dict(state.extra)
        if self.book is not None:
            game, look, was = extra["game"], extra["look"], state.history_BKChw[:, -1]
            grid, earlier = self.spec.latent_chw[1:], extra["subjects"][:, -1]
            from_BN, to_BN = (standing(x, extra["valid"], grid) for x in (earlier, states))
            stays = (from_BN >= 0) & self.book.blocked(was, game, to_BN)
            states[..., :2] = torch.where(stays[..., None], earlier[..., :2], states[..., :2])
            to_BN = torch.where(stays, from_BN, to_BN)
            draw = uniform(state.keys_B4, PASSES["growth"], grid[0] * grid[1], self.device)
            drawn = self.book(drawn[:, 0], was, game, from_BN, to_BN, look, draw)[:, None]
            extra["look"] = torch.where(look >= 0, look,
                                        self.book.looks(drawn[:, 0], game, to_BN))
        return drawn, extra | {
            "subjects": torch.cat([state.extra["subjects"][:, 1:], states[:, None]], 1),
            "controls": torch.cat([state.extra["controls"][:, 1:], action_BA.long()[:, None]], 1)}

    def _judge(self, state: WorldState, action_BA: Tensor, latents_BFChw: Tensor,
               extra: dict[str, Tensor]) -> tuple[Chunk, dict[str, Tensor]]:
        valid, was = extra["valid"], extra["ended"]
        b, n = valid.shape
        chance, reward = torch.zeros(2, b, n, device=self.device)
        if self.outcome is not None:
            states = extra["subjects"]
            chance, reward = self.outcome(state.history_BKChw, states[:, -2], latents_BFChw[:, -1],
                                          states[:, -1], action_BA.long(), valid,
                                          state.extra["game"])
        plays = valid & ~was
        chance_BN = torch.where(plays, chance, 0).double().cpu().numpy()
        reward_BN = torch.where(plays, reward, 0).cpu().numpy()
        draw = uniform(state.keys_B4, PASSES["end"], n).numpy()
        ended = was.cpu().numpy() | (draw < chance_BN)
        there, open_BN = valid.cpu().numpy(), plays.cpu().numpy()
        subjects = SubjectsChunk(extra["subjects"][:, -1:], there, reward_BN, ended, chance_BN)
        every = np.where(open_BN, chance_BN, 1).prod(1) * open_BN.any(1)
        total = np.zeros(b, np.float32)
        for player in range(n):  # in this order for every batch
            total = total + reward_BN[:, player]
        chunk = Chunk(np.arange(b), latents_BFChw, total,
                      (ended | ~there).all(1) & there.any(1), every, np.zeros(b, np.int64),
                      danger_B=every, subjects=subjects, decode=self.decode)
        return chunk, extra | {"ended": torch.from_numpy(ended).to(self.device)}


def snap(states_BNS: Tensor, cells_B4: Tensor) -> Tensor:
    """States with positions at the nearest cell centre; facing and alive as 1 and -1."""
    offset, size = cells_B4[:, None, :2], cells_B4[:, None, 2:]
    cell = ((states_BNS[..., :2] + 1 - offset) / size - 0.5).round()
    out = [((cell + 0.5) * size + offset - 1).clamp(-1, 1)]
    if states_BNS.shape[-1] > 2:
        facing = torch.nn.functional.one_hot(states_BNS[..., 2:6].argmax(-1), 4)
        out += [2 * facing.to(states_BNS) - 1, torch.where(states_BNS[..., 6:] < 0, -1.0, 1.0)]
    return torch.cat(out, -1)


def party_spec(name: str, frame_hw: tuple[int, int], latent_chw: tuple[int, int, int], slots: int,
               actions: int, window: int, fps: float = 8.0, recent: int = 0) -> WorldSpec:
    """Public sizes of a party world: ``slots`` players with ``actions`` actions each.

    ``window``, ``recent``: see ``PartyConfig``; a start may have as many frames as either sees.
    """
    action = ActionSpec(kind="multi_discrete", shape=(slots,), sizes=(actions,) * slots)
    return WorldSpec(name=name, frame_hw=frame_hw, latent_chw=latent_chw, action=action, fps=fps,
                     context_frames=max(window - 1, recent), subjects=slots)
