"""``make demo``: an agent learns inside a learned world; the real game says what it is worth."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from worldgym.agents import results
from worldgym.agents.compare import Scores, score_all, text_table
from worldgym.agents.games import game_maker, unit
from worldgym.agents.model import load_agent
from worldgym.agents.score import better
from worldgym.agents.train import TrainConfig, Trained, train_in_dream
from worldgym.agents.video import side_by_side
from worldgym.envs.tasks import load_task

PRETRAINED = Path(__file__).resolve().parent / "pretrained"
SHIPPED = {"worldgym/TakeCover-v0": PRETRAINED / "take_cover.zip"}
HAZARD, HORIZON = 20.0, 100  # as in the shipped agent's last training; scores leave both out
STEPS = 600_000  # more than six minutes allow; the learning rate does not depend on it


def demo(world: str, out: Path | None = None, *, minutes: float = 6.0, episodes: int = 20,
         quick: bool = False, seed: int = 0) -> Scores:
    """Train, score, draw and film; everything is written to ``out``."""
    out = Path(out) if out else Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    task = load_task(world)
    spec = task.world.spec
    print(f"1/4  An agent trains inside the dream of {world} ({spec.frame_hw[1]}x"
          f"{spec.frame_hw[0]} pixels, {spec.action.kind}{spec.action.sizes}), for about "
          f"{'a few seconds' if quick else f'{minutes:g} minutes'}. It never sees the real game.")
    careful = replace(task, hazard=HAZARD, horizon=min(HORIZON, task.horizon or HORIZON))
    trained = train_in_dream(careful, _config(minutes, quick, seed), out / "training")
    curve = plot_curve(trained, out / "learning_curve.png")
    episodes = 3 if quick else episodes
    policies = contestants(world, task, trained)
    print(f"2/4  Everyone plays {episodes} episodes, in the real game and in the dream.")
    scores = score_all(task, policies, episodes)
    print("\n" + text_table(scores) + "\n")
    file = write_results(out / "results.json", task, scores, trained)
    print("3/4  Filming: the same first frames and the same actions, real and dreamt.")
    best = load_agent(trained.agent, world=task.world)
    film = side_by_side(task, game_maker(task), best, out / "side_by_side.mp4", seed=seed + 7,
                        steps=40 if quick else 200)
    gain = better(scores["demo agent"]["real"], scores["random"]["real"])
    verdict = "beats random" if gain.low > 0 else "does not clearly beat random"
    print(f"4/4  The agent trained in the dream {verdict} in the real game: {gain.mean:+.0f} "
          f"(95% {gain.low:+.0f} to {gain.high:+.0f}).\n"
          f"     {file}\n     {curve}\n     {film}\n     {trained.agent}")
    return scores


def _config(minutes: float, quick: bool, seed: int) -> TrainConfig:
    config = TrainConfig(steps=STEPS, minutes=minutes, seed=seed, save_every=25_000,
                         tensorboard=False, hyperparameters={"learning_rate": 5e-4})
    if not quick:
        return config
    return replace(config, steps=512, envs=16, minutes=None, save_every=256,
                   hyperparameters={"n_steps": 16, "batch_size": 64})


def contestants(world: str, task: Any, trained: Trained) -> dict[str, Any]:
    """Who plays: the new agent, the shipped one, random, and a scripted policy."""
    policies: dict[str, Any] = {"demo agent": load_agent(trained.agent, world=task.world)}
    shipped = SHIPPED.get(world)
    if shipped is not None and shipped.is_file():
        policies["shipped agent"] = load_agent(shipped, world=task.world)
    else:
        print(f"     (no fully trained agent in this checkout: {shipped or world} is missing)")
    take_cover = task.twin == "VizdoomTakeCover-v1"
    policies |= {"random": "random", "scripted": "sweep:20" if take_cover else "sticky:0.2"}
    return policies


def write_results(path: Path, task: Any, scores: Scores, trained: Trained) -> Path:
    """The demo's figures in the format of every results file."""
    rows = [played.row(name.replace(" ", "-"), unit(task))
            for name, at in scores.items() for played in at.values()]
    rows.append(results.Row(what="demo-agent", metric="dream_steps", value=trained.steps,
                            unit="steps"))
    rows.append(results.Row(what="demo-agent", metric="training_seconds", value=trained.seconds,
                            unit="s"))
    return results.write(path, rows, merge=False)


def plot_curve(trained: Trained, path: Path) -> Path:
    """Dream return over dream steps as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    axes.plot([p["steps"] for p in trained.curve], [p["return"] for p in trained.curve])
    axes.set_xlabel("dream steps")
    axes.set_ylabel(f"reward in training (dreams cut at {HORIZON} steps,\ndanger taken off; "
                    "mean of recent ones)")
    axes.set_title("Learning inside the learned world (the real game tells the truth)")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path
