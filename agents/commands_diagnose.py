"""``worldgym diagnose`` as a dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(kw_only=True)
class Diagnose:
    """Show where a dream is wrong: dream recorded play again, step by step.

    Args:
        data: folder that ``worldgym collect`` wrote.
        out: folder for diagnosis.json and the plots.
        world: world id or folder.
        steps: length of the replay.
        clips: places in the recordings to start from.
        forks: forks per step; their spread is the uncertainty.
        window: steps within which an end or a mistake must be foreseen.
        held_out: only the episodes that ``worldgym fit`` held out of training.
        seed: of clips and noise.
    """

    data: Path
    out: Path
    world: str = "worldgym/TakeCover-v0"
    steps: int = 50
    clips: int = 64
    forks: int = 8
    window: int = 8
    held_out: bool = False
    seed: int = 0

    def run(self) -> None:
        """Diagnose."""
        from worldgym.agents.diagnose import diagnose
        from worldgym.agents.diagnose_plots import plot
        from worldgym.data.store import Episodes
        from worldgym.envs.tasks import load_task

        episodes = Episodes.open(self.data)
        found = diagnose(
            load_task(self.world), episodes,
            episodes.split(seed=0)[1] if self.held_out else None, steps=self.steps,
            clips=self.clips, forks=self.forks, window=self.window, seed=self.seed, progress=True)
        print(found.table())
        print("written:", found.write(self.out / "diagnosis.json"), *plot(found, self.out))
