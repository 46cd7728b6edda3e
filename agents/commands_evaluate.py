"""The ``evaluate`` subcommand of ``worldgym``; heavy imports happen inside ``run``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(kw_only=True)
class Evaluate:
    """Evaluate policies in the dream on the same starts and noise; run it again to go on.

    Args:
        policy: name=policy or policy, one or more; ladder stands for scripted ones, bad to good.
        ladder: add the ladder of scripted policies.
        world: world id or folder.
        real: play the same policies in the real game too, and compare.
        episodes: episodes each; with --until-separated the most there may be.
        until_separated: stop once all pairs are told apart; keeps the error rate.
        alpha: error rate of --until-separated over all pairs.
        out: folder for episodes, tables and plots; default: runs/evaluate-SETTINGS.
        seed: first seed of the episodes; recordings use those from 2,000,000.
        slots: dreams in one batch.
        games: real games in lockstep.
        horizon: steps after which a dream is cut; default: the world's.
        draw: draw actions from the policy instead of taking the most probable one.
        anywhere: begin at recorded moments anywhere in episodes; with a short --horizon policies
            share most of their luck.
        anchor: steps after which a dream goes on from a recorded moment of the same age, so that
            its faults do not add up.
        expected: count ends by their chance instead of drawing them; for short horizons.
        end: how dreams end; danger ends them as often as recorded play in such situations ended.
        report: write report.html into the folder when done, with films if --real.
    """

    policy: tuple[str, ...] = ()
    ladder: bool = False
    world: Annotated[str, tyro.conf.arg(aliases=("--env",))] = "worldgym/TakeCover-v0"
    real: bool = False
    episodes: int = 50
    until_separated: bool = False
    alpha: float = 0.05
    out: Path | None = None
    seed: int = 1_000_000
    slots: int = 96
    games: int = 8
    horizon: int | None = None
    draw: bool = False
    anywhere: bool = False
    anchor: int | None = None
    expected: bool = False
    end: Literal["head", "danger", "never"] | None = None
    report: bool = True

    def run(self) -> None:
        """Evaluate."""
        from worldgym.agents.evaluate import evaluate
        from worldgym.agents.evaluation_text import text

        wanted = (*(("ladder",) if self.ladder and "ladder" not in self.policy else ()),
                  *self.policy)
        found = evaluate(
            self.world, wanted, episodes=self.episodes, real=self.real, out=self.out,
            until_separated=self.until_separated, seed=self.seed, slots=self.slots,
            games=self.games, horizon=self.horizon, alpha=self.alpha, draw=self.draw,
            anywhere=self.anywhere, anchor=self.anchor, expected=self.expected,
            end=self.end)
        print(text(found))
        if self.report and found.folder is not None:
            from worldgym.agents.report import write_report

            print("written:", write_report(found.folder / "report.html", evaluation=found.folder))
