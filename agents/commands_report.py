"""``worldgym report`` as a dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(kw_only=True)
class Report:
    """Write one HTML file with an evaluation's verdict, tables, plots and films.

    Args:
        evaluation: folder that ``worldgym evaluate`` wrote.
        diagnosis: folder that ``worldgym diagnose`` wrote, of the same world.
        out: HTML file; default: report.html in the evaluation's folder.
        videos: film where dream and real game differ most and least.
    """

    evaluation: Path
    diagnosis: Path | None = None
    out: Path | None = None
    videos: bool = True

    def run(self) -> None:
        """Report."""
        from worldgym.agents.report import write_report

        out = self.out or self.evaluation / "report.html"
        print("written:", write_report(out, evaluation=self.evaluation, diagnosis=self.diagnosis,
                                       films=self.videos))
