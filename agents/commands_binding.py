"""The subcommands that judge action binding: ``worldgym binding`` and ``worldgym tiles``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldgym.errors import ConfigError


@dataclass(kw_only=True)
class LearnTiles:
    """Learn the judges of ``worldgym binding``: classifiers of map cells, from recorded frames.

    Args:
        data: folder that ``worldgym collect-party`` wrote.
        out: safetensors file to write.
        cell_px: pixels of a map cell, 4 (frames of 32 x 40) or 8.
        iterations: training steps per game.
        seed: of everything.
    """

    data: Path
    out: Path
    cell_px: int = 4
    iterations: int = 1200
    seed: int = 0

    def run(self) -> None:
        """Learn."""
        from worldgym.agents.tiles import TilesConfig
        from worldgym.data.party import open_party

        cfg = TilesConfig(cell_px=self.cell_px, iterations=self.iterations, seed=self.seed)
        _learn(open_party(self.data), cfg, self.out)


@dataclass(kw_only=True)
class Binding:
    """Measure whether a multi-player dream moves the right player.

    Held-out recordings are dreamt on with the recorded actions and judged by classifiers that saw
    real frames only, and by the model's own states. Beside it: the recording itself ("real"), the
    last frame copied ("copy"), and the model with its states snapped to cells, or not.

    Args:
        world: id, or folder that ``worldgym fit-party`` wrote.
        data: folder that ``worldgym collect-party`` wrote.
        baseline: NAME=FOLDER of further worlds, for instance no-msa=runs/no_msa.
        out: results file.
        tiles: file of the judges; default: the shipped ones. Learned first if it is not there.
        games: names of games; default: all that the world knows and that are recorded.
        clips: starting points per held-out episode.
        steps: lengths of the rollouts.
        video: film of four games; default: beside ``out``.
        seed: of the dream's noise.
    """

    world: str
    data: Path
    baseline: tuple[str, ...] = ()
    out: Path = Path("results/party_binding.json")
    tiles: Path | None = None
    games: tuple[str, ...] = ()
    clips: int = 6
    steps: tuple[int, ...] = (4, 20)
    video: Path | None = None
    seed: int = 0

    def _rollers(self) -> dict[str, Any]:
        """What is measured, by name."""
        from worldgym.agents import binding
        from worldgym.envs.party_tasks import place

        rollers: dict[str, Any] = {"real": binding.recorded, "copy": binding.copied}
        rollers |= binding.dreams(place(self.world), self.seed)
        for name, folder in _named(self.baseline, rollers):
            rollers[name] = binding.dreams(folder, self.seed)["model"]
        return rollers

    def run(self) -> None:
        """Measure."""
        from worldgym.agents import binding
        from worldgym.agents.binding_film import film
        from worldgym.agents.binding_rows import rows, table
        from worldgym.agents.results import write
        from worldgym.agents.tiles import TilesConfig
        from worldgym.data.party import open_party, split_party

        if min(self.steps) < 1 or self.clips < 1:
            raise ConfigError("impossible measurement", given=f"steps {self.steps}, "
                              f"{self.clips} clips", expected="1 or more", fix="leave them out")
        rollers = self._rollers()
        model = rollers["model"]
        stores = open_party(self.data)
        names = self.games or tuple(g for g in stores if g in model.games)
        if not names or set(names) - set(stores):
            raise ConfigError("no such recordings", given=self.games or model.games,
                              expected=[*stores], fix="record the games: worldgym collect-party")
        stores = {g: stores[g] for g in names}
        cell_px = model.world.spec.frame_hw[0] // 8
        tiles = _judges(self.tiles, cell_px, stores, self.out, TilesConfig)
        _, held_out = split_party(stores)
        clips = {g: binding.choose_clips(store, g, held_out[g], steps=max(self.steps),
                                         clips=self.clips, cell_px=cell_px,
                                         context=model.world.spec.context_frames)
                 for g, store in stores.items()}
        kept: dict[str, Any] = {}

        def keep(name: str, some: Any, rolled: Any) -> None:
            print(f"{some.game}: {name}", flush=True)
            if name == "model":
                kept[some.game] = (some, rolled)

        found = binding.measure(tiles, clips, rollers, self.steps, keep)
        real = tiles.card.get("real_frames", {})
        good = [g for g in names if real.get(g, {}).get("usable", 1.0)]
        made = rows(found, good, str(self.seed))
        longest = [f"{m}_{s}" for s in self.steps for m in ("ma", "sp")]
        print(table(made, [*longest, "detection", "interact"]))
        print("by the model's own states:")
        print(table([r for r in made if r.metric.endswith("_states")],
                    [f"{m}_states" for m in [*longest, "detection"]]))
        write(self.out, made, merge=False, extra={
            "games": [*names], "pooled": good,
            "clips": {g: len(c) for g, c in clips.items()},
            "held_out_episodes": {g: len(set(c.episode_B.tolist())) for g, c in clips.items()},
            "judges_on_real_frames": real})
        where = film(kept, self.video or self.out.with_suffix(".mp4"))
        print("written:", self.out, *where)


def _named(texts: Iterable[str], taken: dict[str, Any]) -> list[tuple[str, str]]:
    made: list[tuple[str, str]] = []
    for text in texts:
        name, equals, folder = text.partition("=")
        if not equals or not folder or name in taken or name in dict(made) or "/" in name:
            raise ConfigError("a baseline cannot be read", given=text,
                              expected=f"NAME=FOLDER, not one of {[*taken]}",
                              fix="write for instance no-msa=runs/no_msa")
        made.append((name, folder))
    return made


def _judges(path: Path | None, cell_px: int, stores: Any, out: Path, config: Any) -> Any:
    """The judges of a file, of the shipped one, or learned now."""
    from worldgym.agents.tiles import Tiles, shipped

    file = path or shipped(cell_px)
    if file.exists():
        tiles = Tiles.load(file)
        if set(stores) <= set(tiles.games):
            return tiles
    if path is None:
        file = out.with_name(f"party_tiles_{cell_px}px.safetensors")
    return _learn(stores, config(cell_px=cell_px), file)


def _learn(stores: Any, cfg: Any, out: Path) -> Any:
    from worldgym.agents.compare import aligned
    from worldgym.agents.tiles_learn import learn_tiles
    from worldgym.data.party import split_party

    tiles = learn_tiles(stores, *split_party(stores), cfg, progress=True)
    columns = ["presence", "missed", "strays", "facing", "interact_seen", "interact_false"]
    print(aligned([["held-out real frames", *columns]] + [
        [game, *(f"{found[c]:.4f}" if c in found else "-" for c in columns)]
        for game, found in tiles.card["real_frames"].items()]))
    print("written:", tiles.save(out))
    return tiles
