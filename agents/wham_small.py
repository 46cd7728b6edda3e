"""``python -m worldgym.agents.wham_small``: a small WHAM beside ``nano``, on one held-out play.

As a world: both replay recorded actions from the same moments of held-out episodes. As players:
the model's own actions in its own dream beside the recorded ones (the published measure of
diversity, a Wasserstein distance of actions; specs/wham.md section 12), and what the behaviour
policy is worth in the real game, beside the agent that was trained in ``nano``.
Shapes: B clip, S step, R run of actions, L its length, A choices.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from worldgym.agents import results
from worldgym.agents.demo import PRETRAINED
from worldgym.agents.games import game_maker, unit
from worldgym.agents.model import load_agent
from worldgym.agents.policy import Policy
from worldgym.agents.results import Row
from worldgym.agents.score import REAL_SEEDS, better, play_real
from worldgym.agents.stats import METHOD, difference, summary
from worldgym.agents.wham_policy import wham_policy
from worldgym.agents.wham_rollout import open_task, play_block
from worldgym.data.store import Episodes
from worldgym.envs.tasks import load_task
from worldgym.errors import ConfigError, DatasetError
from worldgym.train.metrics import psnr, real_context, replay

STEPS, RUN, RESAMPLES = 50, 8, 300
BOOTSTRAP = ("95% interval: bootstrap over clips, percentiles moved so that their median is the "
             f"value, {RESAMPLES} resamples, fixed seed")


def held_out(episodes: Episodes, holdout: float, context: int, steps: int, clips: int,
             seed: int) -> np.ndarray:
    """Rows (B,) of the first dreamt frame of one clip of each of so many held-out episodes.

    ``context`` real frames lie before it, and ``steps`` rows from it on never show an ending.

    Raises:
        DatasetError: no held-out episode is long enough.
    """
    ids = episodes.split(holdout, seed=0)[1]
    long = ids[episodes.lengths[ids] >= context + steps]
    if not len(long):
        raise DatasetError("no held-out episode is long enough", given=f"{len(ids)} episodes",
                           expected=f"one of {context + steps} steps", fix="record more episodes")
    rng = np.random.default_rng((seed, 7))
    pick = np.sort(rng.permutation(long)[:clips])
    room = episodes.lengths[pick] - context - steps + 1
    return episodes.starts[pick] + context + rng.integers(0, room)


def drawing(what: str, world: Any, episodes: Episodes, rows_B: np.ndarray, steps: int,
            seed: int) -> tuple[list[Row], np.ndarray]:
    """PSNR of the first and the last of ``steps`` replayed frames, and the last one's per clip."""
    context = world.spec.context_frames
    dream, real = replay(world, episodes, rows_B - context, context, steps, seed)
    again = np.concatenate([world.decode(world.encode(part)).cpu().numpy()
                            for part in np.array_split(real[-1], len(rows_B))])
    values = {"psnr_1": psnr(dream[0], real[0]), f"psnr_{steps}": psnr(dream[-1], real[-1]),
              "psnr_codec": psnr(again, real[-1])}
    note = (f"one clip of each held-out episode, {context} real frames before it, recorded "
            f"actions; temperature {world.temperature:g}; {METHOD}")
    return [Row(what=what, metric=name, value=s.mean, ci95=s.ci95, n=s.n, sd=s.sd, unit="dB",
                seeds=str(seed), note=note)
            for name, s in ((k, summary(v)) for k, v in values.items())], values[f"psnr_{steps}"]


# -- what is pressed ------------------------------------------------------------------------------


def names(world: Any, actions: np.ndarray) -> np.ndarray:
    """Local ids (..., A) of actions: two of them are as far apart as the share of parts in which
    they differ."""
    from worldgym.models.action_tokens import ActionTokens

    return ActionTokens(world.spec.action).ids(actions)


def wasserstein(a_RX: np.ndarray, b_RX: np.ndarray) -> float:
    """Wasserstein-1 distance of two equally large samples of rows of names, in [0, 1].

    Rows are as far apart as the share of entries in which they differ.
    """
    from scipy.optimize import linear_sum_assignment

    if len(a_RX) != len(b_RX):
        raise ConfigError("samples of different sizes", given=(len(a_RX), len(b_RX)),
                          expected="equally many", fix="draw as many of each")
    kinds, inverse = np.unique(np.concatenate([a_RX, b_RX]), axis=0, return_inverse=True)
    inverse = inverse.ravel()
    counts = [np.bincount(part, minlength=len(kinds)) for part in np.split(inverse, 2)]
    # what both have stays where it is: moving it would never pay, for the distance is a metric
    left = [np.repeat(np.arange(len(kinds)), np.maximum(counts[i] - counts[1 - i], 0))
            for i in (0, 1)]
    if not len(left[0]):
        return 0.0
    cost = np.zeros((len(left[0]), len(left[1])))
    for column in range(kinds.shape[1]):
        cost += kinds[left[0], column][:, None] != kinds[left[1], column][None]
    return float(cost[linear_sum_assignment(cost)].sum()) / kinds.shape[1] / len(a_RX)


def runs(names_BSA: np.ndarray, length: int) -> np.ndarray:
    """All stretches (B, R, length * A) of so many steps that follow each other in a clip."""
    b, s, a = names_BSA.shape
    at = np.arange(0, s - length + 1, length)[:, None] + np.arange(length)
    return names_BSA[:, at].reshape(b, len(at), length * a)


def distance(what: str, mine_BSA: np.ndarray, theirs_BSA: np.ndarray, note: str,
             seed: int = 0) -> list[Row]:
    """Rows of the distance of single actions, and of runs of ``RUN`` actions."""
    rows, b = [], len(mine_BSA)
    rng = np.random.default_rng((seed, 11))
    for length, name in ((1, "action_wasserstein"), (RUN, f"action_wasserstein_{RUN}")):
        if mine_BSA.shape[1] < length:
            continue
        a, c = runs(mine_BSA, length), runs(theirs_BSA, length)

        def of(i: np.ndarray, j: np.ndarray, a: np.ndarray = a, c: np.ndarray = c) -> float:
            return wasserstein(a[i].reshape(-1, a.shape[-1]), c[j].reshape(-1, c.shape[-1]))

        value = of(np.arange(b), np.arange(b))
        again = np.array([of(i, i) for i in rng.integers(0, b, (RESAMPLES, b))])
        again += value - np.median(again)  # resampled distances are too large: chance adds to them
        low, high = np.quantile(again, (0.025, 0.975)).clip(0, 1)
        rows.append(Row(what=what, metric=name, value=value, n=b, unit="share",
                        ci95=(float(low), float(high)), seeds=str(seed),
                        note=f"{note}; {a.shape[1]} samples of each clip; {BOOTSTRAP}"))
    return rows


def acted(task: Any, episodes: Episodes, rows_B: np.ndarray, steps: int, seed: int,
          policy: Any = None) -> np.ndarray:
    """Names (B, S, A) of what is done in dreams that begin where the clips begin."""
    world, context = task.world, task.world.spec.context_frames
    free = replace(task, horizon=steps, end="never")
    seeds = [seed + i for i in range(len(rows_B))]
    if policy is not None:
        policy.reset(len(rows_B), seed)
    made = play_block(free, seeds, policy,
                      starts=real_context(world, episodes, rows_B - context, context))
    return names(world, np.stack([e["actions"][1:] for e in made]))


def players(task: Any, nano: Any, agent: Any, episodes: Episodes, rows_B: np.ndarray, steps: int,
            seed: int) -> list[Row]:
    """Action distances of both worlds' players, with the least and the most to compare with."""
    rows_BS = rows_B[:, None] + np.arange(steps)
    recorded = names(task.world, episodes.take("actions", rows_BS))
    mine = acted(task, episodes, rows_B, steps, seed)
    other = acted(nano, episodes, rows_B, steps, seed, agent)
    rng = np.random.default_rng((seed, 13))
    sizes = np.array(task.world.model.actions.sizes)
    any_ = rng.integers(0, sizes, (*rows_BS.shape, len(sizes))) + task.world.model.actions.offsets
    half = rng.permutation(len(rows_B))
    half = half[:len(half) // 2 * 2].reshape(2, -1)
    where = f"{steps} steps each, beside those recorded from the same moments on"
    made = distance("wham", mine, recorded, f"frames and actions of the model, {where}", seed)
    made += distance("nano", other, recorded, f"{agent.name} in nano's dream, {where}", seed)
    made += distance("uniform", any_, recorded, f"uniformly random actions, {where}", seed)
    if half.shape[1]:
        made += distance("recorded", recorded[half[0]], recorded[half[1]],
                         "one half of the recorded clips beside the other: what chance makes", seed)
    return made


# -- the command ----------------------------------------------------------------------------------


def measure(world: str | Path, data: str | Path, *, nano: str | Path, nano_agent: str | Path,
            agent: str | Path | None = None, clips: int = 64, steps: int = STEPS,
            episodes: int = 100, games: int = 8, holdout: float = 0.03, seed: int = 0,
            say: Callable[[str], None] = print) -> list[Row]:
    """All rows of the results file; see ``main`` for the arguments."""
    task, beside = open_task(world), load_task(nano)
    plain = load_task(nano, temperature=1.0)
    store = Episodes.open(data).one_player()
    context = max(t.world.spec.context_frames for t in (task, beside))
    rows_B = held_out(store, holdout, context, steps, clips, seed)
    say(f"{len(rows_B)} clips of {steps} steps")
    rows: list[Row] = []
    last = {}
    for what, world_ in (("wham", task.world), ("nano", beside.world),
                         ("nano-temperature-1", plain.world)):
        made, last[what] = drawing(what, world_, store, rows_B, steps, seed)
        rows += made
    gap = difference(last["wham"], last["nano"], paired=True)
    rows.append(Row(what="wham-nano", metric=f"psnr_{steps}", value=gap.mean, ci95=gap.ci95,
                    n=gap.n, sd=gap.sd, unit="dB", note=f"difference, clip by clip; {METHOD}"))
    copy = summary(psnr(store.take("frames", rows_B - 1),
                        store.take("frames", rows_B + steps - 1)))
    rows.append(Row(what="copy", metric=f"psnr_{steps}", value=copy.mean, ci95=copy.ci95, n=copy.n,
                    sd=copy.sd, unit="dB", note=f"the last real frame, shown again; {METHOD}"))
    trained = load_agent(nano_agent, world=beside.world)
    trained.deterministic = False
    rows += players(task, beside, trained, store, rows_B, steps, seed)
    if episodes:
        trained.deterministic = True
        contestants: dict[str, Policy] = {
            "wham": wham_policy(world, task.world.spec.action), "nano": trained}
        if agent is not None:
            contestants["wham-agent"] = load_agent(agent, world=task.world)
        played = {}
        for what, policy in contestants.items():
            say(f"{what}: {episodes} real episodes")
            played[what] = play_real(game_maker(task), policy, episodes, REAL_SEEDS, games)
            rows.append(played[what].row(what, unit(task)))
        gain = better(played["wham"], played["nano"])
        rows.append(Row(what="wham-nano", metric="real_return", value=gain.mean, ci95=gain.ci95,
                        n=gain.n, sd=gain.sd, unit=unit(task),
                        note=f"difference on the same seeds; {METHOD}"))
    return rows


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--world", required=True, help="folder of the small WHAM")
    parser.add_argument("--data", required=True, help="recordings that it was fitted to")
    parser.add_argument("--nano", default="worldgym/TakeCover-v0", help="world to compare with")
    parser.add_argument("--nano-agent", default=PRETRAINED / "take_cover.zip",
                        help="agent that was trained in it")
    parser.add_argument("--agent", help="agent that was trained in the small WHAM, if there is one")
    parser.add_argument("--clips", type=int, default=64, help="held-out episodes at most")
    parser.add_argument("--steps", type=int, default=STEPS, help="dreamt steps of a clip")
    parser.add_argument("--episodes", type=int, default=100, help="real episodes each; 0: none")
    parser.add_argument("--holdout", type=float, default=0.03, help="as the world was fitted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/wham_small.json"))
    given = vars(parser.parse_args(argv))
    out = given.pop("out")
    rows = measure(given.pop("world"), given.pop("data"), **given)
    for row in rows:
        spread = f" ({row.ci95[0]:.4g} to {row.ci95[1]:.4g})" if row.ci95 else ""
        print(f"{row.what:20} {row.metric:24} {row.value:>9.4g} {row.unit}{spread} n={row.n}")
    print("written:", results.write(out, rows))


if __name__ == "__main__":
    main()
