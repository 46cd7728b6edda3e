"""The subcommand that measures speed: of a world, of SCOPE's network, of a multi-player world."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from worldgym.errors import ConfigError

TAKE_COVER = "worldgym/TakeCover-v0"


@dataclass(kw_only=True)
class Bench:
    """Measure speed, constancy of cost, memory and overhead of a world.

    Args:
        world: world id or folder; "scope": SCOPE's work at its real size, and a tiny pass; "party":
            the shipped world of several players, beside real Melting Pot; "worldplay": what a long
            episode costs a tiny one.
        out: results file to write; nothing is written without it (but for scope, party and
            worldplay: results/scope_bench.json and so on).
        slots: dreams in parallel.
        seconds: time per speed measurement; for scope 0 only counts and keeps the measured times.
        gpu: scope: seconds at its real size on a GPU, random weights (results/scope_gpu.json).
        long: steps of the constancy measurement.
    """

    world: str = TAKE_COVER
    out: Path | None = None
    slots: int = 64
    seconds: float = 10.0
    long: int = 2000
    gpu: bool = False

    def run(self) -> None:
        """Measure."""
        from worldgym.agents.bench import bench

        if self.gpu and self.world != "scope":
            raise ConfigError("nothing to measure on a GPU", given=self.world, expected="scope",
                              fix="worldgym bench scope --gpu")
        if self.gpu:
            from worldgym.agents import bench_scope_gpu

            bench_scope_gpu.bench(self.out)
            return
        if self.world == "scope":
            from worldgym.agents import bench_scope

            bench_scope.bench(self.out, self.seconds)
            return
        if self.world == "party":
            from worldgym.agents import bench_party

            bench_party.bench("worldgym/MeltingPotMini-v0", self.out, self.seconds)
            return
        if self.world == "worldplay":
            from worldgym.agents import bench_worldplay

            bench_worldplay.bench(self.out)
            return
        if "/" not in self.world and not Path(self.world).exists():
            raise ConfigError("nothing to measure", given=repr(self.world),
                              expected=f"a world id like {TAKE_COVER}, a folder, scope, party or "
                              "worldplay",
                              fix="check the name")
        bench(self.world, self.out, slots=self.slots, seconds=self.seconds, long=self.long)
