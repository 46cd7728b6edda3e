"""Fitting runs in processes of their own, for tests that kill them or run several together.

``python -m torch.distributed.run ... tests/fit_run.py SETTINGS.json``: a list of FitConfig fields;
the loss of every iteration of every run goes to ``SETTINGS.losses.json``.
"""

import json
import os
import signal
import sys

import torch

from worldgym.train.fit import FitConfig, fit
from worldgym.train.fit_party import FitPartyConfig, fit_party
from worldgym.train.loop import Loop


def recorded(settings: dict, kill: tuple[str, int, str] | None = None) -> dict[str, list[float]]:
    """Fit; returns the loss of every iteration by part. ``kill``: (part, iteration, signal).

    Settings with ``party`` are those of a world of several players.
    """
    settings = dict(settings)
    party = settings.pop("party", False)
    losses: dict[str, list[float]] = {}
    step = Loop._step

    def watched(self, sample, loss):
        values = step(self, sample, loss)
        losses.setdefault(self.name, []).append(values["loss"])
        if kill and kill[:2] == (self.name, self.iteration):  # after the step, before any save
            os.kill(os.getpid(), getattr(signal, kill[2]))
        return values

    Loop._step = watched
    try:
        fit_party(FitPartyConfig(**settings)) if party else fit(FitConfig(**settings))
    finally:
        Loop._step = step
    return losses


def child(settings: dict, kill: tuple[str, int, str] | None = None) -> None:
    """``recorded`` as the target of a process."""
    torch.set_num_threads(1)
    recorded(settings, kill)


def main(path: str) -> None:
    """All runs of the file in one group of processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    with open(path) as file:
        losses = [recorded(settings) for settings in json.load(file)]
    if torch.distributed.get_rank() == 0:
        with open(path.replace(".json", ".losses.json"), "w") as file:
            json.dump(losses, file)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
