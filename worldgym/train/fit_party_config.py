"""What to fit a world of several players to, and for how long."""

from dataclasses import dataclass
from typing import Any

from worldgym.errors import ConfigError

HORIZON = 100
# networks to compare with: what binds actions to players is taken out
ABLATIONS: dict[str, dict[str, Any]] = {
    "none": {}, "no-msa": {"msa": False}, "no-mca": {"mca": "none"}, "pooled": {"pooled": True}}


@dataclass(frozen=True, kw_only=True, slots=True)
class FitPartyConfig:
    """What to fit to what, for how long.

    ``data``: folder of ``worldgym collect-party``; ``out``: world folder to make; ``games``: names,
    empty: all that are there. Iterations are per part; ``quick``: a minute in all.
    ``halve``: frames at half the recorded size. ``channels``: of the latents, a cell of the map
    each; ``width``, ``layers``: of the dynamics; ``patch``: cells of a side that share a token;
    ``recent``: frames before it that a frame always sees, beside it as channels (what a beam hides
    is behind them); ``window``: frames that a step can see while training, ``play_window``: in the
    world that is written: what fewer cost in quality, they give back in speed.
    ``init``: world folder to start from, whose codec stays and is not trained; with 0 iterations
    of another part, that part stays, too; ``fresh``: its dynamics do not, they begin anew and may
    have other sizes (to compare networks that share a codec and heads).
    ``balance``: "games": each is drawn equally often, or "players": a game of seven players, which
    has more to learn, more often than one of two. ``compile``: fuse the dynamics' operations: an
    iteration takes less time, the first ones minutes (needs a C++ compiler).
    ``eventful``: share of the dynamics' batches in which a player is paid, ends, leaves the map or
    comes back within three steps: what seldom happens is otherwise seldom learned. They are not
    weighed back, as the heads' are: what follows from what is seen is learned more often, at the
    price that what is left to chance happens somewhat more often than it should: end with some
    iterations at 0 (``init``).
    ``steps``, ``temperature``: of the sampler; ``book_frames``: of each game, whose tiles drawn
    cells are replaced by (0: none; see ``CellBook``).
    ``video_share``: of the dynamics' iterations, the video alone; ``alone_share``: those on single
    frames. ``batch``: clips of ``clip`` frames. ``ablation``: one of ``ABLATIONS``.
    ``state_weight``, ``position_weight``: see ``PartyLossConfig``. ``starts``: start states to keep
    of each game; ``horizon``: steps of a dreamt episode.
    ``snapshot``: write the world as the checkpoints in ``out`` have it into this folder, train
    nothing; before the last stage such a world has no memory, before its heads are
    trained no ends.
    """

    data: str
    out: str
    name: str | None = None
    init: str | None = None
    fresh: bool = False
    games: tuple[str, ...] = ()
    codec_iterations: int = 4000
    dynamics_iterations: int = 6000
    outcome_iterations: int = 3000
    video_share: float = 0.04
    alone_share: float = 0.8
    balance: str = "games"
    eventful: float = 0.4
    compile: bool = False
    batch: int = 8
    clip: int = 7
    channels: int = 10
    width: int = 96
    layers: int = 5
    patch: int = 1
    recent: int = 3
    window: int = 6
    play_window: int = 1
    steps: tuple[float, ...] = (1000.0, 900.0, 800.0, 700.0, 600.0, 500.0, 400.0)
    temperature: float = 0.85
    book_frames: int = 4000
    state_weight: float = 2.0
    position_weight: float = 5.0
    dynamics_lr: float = 4e-3
    ablation: str = "none"
    starts: int = 100
    horizon: int = HORIZON
    holdout: float = 0.05
    halve: bool = True
    quick: bool = False
    seed: int = 0
    device: str = "cpu"
    measure: bool = True
    tensorboard: bool = True
    snapshot: str | None = None

    def __post_init__(self) -> None:
        counts = (self.codec_iterations, self.dynamics_iterations, self.outcome_iterations)
        needed = [n + bool(self.init) for n in counts]
        if min(*needed, self.batch, self.clip - 1, self.starts, self.seed + 1, self.window,
               self.play_window, self.recent, self.horizon, self.channels, self.layers) < 1:
            raise ConfigError("impossible length of training",
                              given=f"iterations {counts}, batch {self.batch}, clip {self.clip}, "
                                    f"starts {self.starts}, seed {self.seed}, window {self.window},"
                                    f" recent {self.recent}, horizon {self.horizon}",
                              expected="iterations, batch, starts, window, recent, horizon >= 1 "
                                       "(iterations 0 only with init), clip >= 2, seed >= 0",
                              fix="raise the numbers")
        if self.fresh and not (self.init and self.dynamics_iterations):
            raise ConfigError("nothing to begin anew beside", expected="fresh with init, and "
                              "dynamics iterations >= 1", fix="give --init, or leave --fresh out",
                              given=f"init {self.init}, dynamics {self.dynamics_iterations}")
        for window in (self.window, self.play_window):
            if 1 < window <= self.recent:
                raise ConfigError("frames beside a frame lie outside its window",
                                  given=f"window {window}, recent {self.recent}",
                                  expected="a window of 1, or above recent",
                                  fix="change one of them")
        if self.ablation not in ABLATIONS:
            raise ConfigError("no such ablation", given=self.ablation, expected=[*ABLATIONS],
                              fix="choose one of them")
        if not 0 <= self.eventful < 1:
            raise ConfigError("impossible share of events", given=self.eventful,
                              expected="0 <= eventful < 1", fix="use 0.4")
        if self.balance not in ("games", "players"):
            raise ConfigError("no such balance", given=self.balance, expected=["games", "players"],
                              fix="choose one of them")
        if not (0 < self.holdout < 1 and 0 <= self.video_share <= self.alone_share <= 1):
            raise ConfigError("impossible shares",
                              given=f"holdout {self.holdout}, video {self.video_share}, alone "
                                    f"{self.alone_share}",
                              expected="0 < holdout < 1, 0 <= video_share <= alone_share <= 1",
                              fix="use 0.05, 0.04 and 0.8")
