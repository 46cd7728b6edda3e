"""README tables, generated from ``results/*.json`` between ``<!-- table:NAME -->`` markers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worldgym.agents import results, tables_party, tables_worlds
from worldgym.agents.results import told
from worldgym.errors import ConfigError

MARKER = re.compile(r"<!-- table:(\w+) -->\n(.*?)<!-- /table -->", re.DOTALL)
WAITING = "*Not measured yet in this checkout: `{command}` writes `results/{file}`.*\n"

POLICIES = {
    "dream-ppo": "PPO, trained **only in the dream** (shipped)",
    "scripted-best": "best scripted policy",
    "real-ppo-same-steps": "PPO in the real game, as many real steps",
    "random": "random",
    "noop": "standing still",
}
BENCH = {
    "dream_steps_per_s": "dream, 64 slots, latent observations (steps/s)",
    "real_steps_per_s": "real game, one process, 160x120, skip 4 (steps/s)",
    "dream_over_real_steps": "dream ÷ real",
    "step2000_over_step50": "time of step 2,000 ÷ step 50",
    "memory_growth": "memory growth after warm-up",
    "wrapper_share": "share of a step spent in the environment face",
    "cached_over_recomputed": "cached stepping ÷ recomputing the window in every pass (speed)",
    "cached_over_refilled": "cached stepping ÷ refilling the cache at every step (speed)",
}


def transfer(data: dict[str, Any]) -> str:
    """Dream and real return of every policy, side by side."""
    rows = results.by_metric(data)
    names = [n for n in POLICIES if (n, "real_return") in rows]
    names += sorted({w for w, m in rows if m == "real_return"} - set(names))
    lines = ["| agent | in the real game (tics) | in the dream (tics) | optimism |",
             "|---|---|---|---|"]
    for name in names:
        real, dream = rows[name, "real_return"], rows.get((name, "dream_return"))
        gap = "–" if dream is None else f"{dream['value'] - real['value']:+,.0f}"
        lines.append(f"| {POLICIES.get(name, name)} | {told(real)} | {told(dream)} | {gap} |")
    return "\n".join([*lines, "", _world_facts(rows), ""])


def _world_facts(rows: dict[tuple[str, str], dict[str, Any]]) -> str:
    names = {"real_steps_used": "real steps used", "psnr_1": "PSNR after 1 step (dB)",
             "psnr_50": "after 50 steps", "psnr_50_copy": "copying the last frame, after 50 steps",
             "end_auc": "AUC of the end head"}
    facts = [f"{label} {rows['world', key]['value']:,.6g}" for key, label in names.items()
             if ("world", key) in rows]
    return "Mean ± standard deviation (95 % interval)." + (
        " The world: " + ", ".join(facts) + "." if facts else "")


def bench(data: dict[str, Any]) -> str:
    """Speed, constancy and overhead of the shipped world."""
    rows = results.by_metric(data)
    lines = ["| what | value |", "|---|---|"]
    for metric, label in BENCH.items():
        row = rows.get(("nano", metric))
        if row is not None:
            lines.append(f"| {label} | {_bench_value(metric, row)} |")
    return "\n".join([*lines, "", f"Machine: {data['about'].get('machine', 'unknown')}.", ""])


def _bench_value(metric: str, row: dict[str, Any]) -> str:
    if metric in ("memory_growth", "wrapper_share"):
        return f"{100 * row['value']:.2f} %"
    if metric.startswith("cached_over"):
        return f"{row['value']:.1f}×"
    return f"{row['value']:,.0f}" if row["value"] >= 10 else f"{row['value']:.3f}"


def fuzz(data: dict[str, Any]) -> str:
    """Random sequences of state operations."""
    rows = results.by_metric(data)
    order = ["sequences", "failures", "pages_leaked"]
    lines = ["| " + " | ".join(x.replace("_", " ") for x in order) + " |", "|---|---|---|"]
    lines.append("| " + " | ".join(f"{rows['nano', x]['value']:,.0f}" if ("nano", x) in rows
                                   else "–" for x in order) + " |")
    return "\n".join([*lines, ""])


LADDERS = {
    "ladder": "anchored, ends by danger: all policies",
    "ladder-outside": "the same: policies that did not learn in a dream",
    "ladder-free": "left to itself: all policies",
    "ladder-free-outside": "the same: policies that did not learn in a dream"}
PAIRED = {
    "ladder": "from recorded moments, 60 steps, ends counted by their chance",
    "ladder-pairing": "there pairing alone", "ladder-lives": "pairing alone, whole lives"}
AGREEMENT = {"pearson_r": "Pearson's r", "kendall_tau": "Kendall's tau", "mmrv": "MMRV (tics)",
             "optimism": "optimism (tics)"}


def evaluation(data: dict[str, Any]) -> str:
    """Agreement of dream and real values, what pairing and uncertainty are worth, every policy."""
    rows = results.by_metric(data)
    lines = ["| dream | " + " | ".join(AGREEMENT.values()) + " |", "|---" * 5 + "|"]
    for what, label in LADDERS.items():
        if (what, "policies") in rows:
            cells = [_figure(rows.get((what, metric))) for metric in AGREEMENT]
            lines.append(f"| {label} ({rows[what, 'policies']['value']:.0f}) | "
                         + " | ".join(cells) + " |")
    said = [f"{label} {_figure(rows[what, 'paired_episode_ratio'])}"
            for what, label in PAIRED.items() if (what, "paired_episode_ratio") in rows]
    lines += ["", "Episodes that a paired comparison of neighbours needs, as a share of what an "
              f"unpaired one needs: {'; '.join(said)}." if said else ""]
    doubt = rows.get(("ladder", "uncertainty_auroc"))
    if doubt is not None:
        lines[-1] += (" Spread of reward and end over forks foretells a wrong reward or end within "
                      f"8 steps with an AUROC of {_figure(doubt)}.")
    known = sorted(((w, r["value"]) for (w, m), r in rows.items() if m == "real_return"),
                   key=lambda pair: -pair[1])
    lines += ["", "<details><summary>Every policy</summary>", "",
              "| policy | in the real game (tics) | in the dream (tics) | optimism |",
              "|---|---|---|---|"]
    for what, real in known:
        dream = rows[what, "dream_return"]
        lines.append(f"| {what} | {told(rows[what, 'real_return'])} | {told(dream)} | "
                     f"{dream['value'] - real:+,.0f} |")
    return "\n".join([*lines, "", "</details>", ""])


def _figure(row: dict[str, Any] | None) -> str:
    return results.figure(row, 2 if row is not None and abs(row["value"]) < 10 else 0)


TABLES: dict[str, tuple[str, str, Callable[[dict[str, Any]], str]]] = {
    "transfer": ("take_cover_transfer.json", "worldgym score", transfer),
    "bench": ("take_cover_bench.json", "make bench", bench),
    "evaluation": ("take_cover_evaluation.json", "worldgym evaluate --ladder --real", evaluation),
    "fuzz": ("state_fuzz.json", "make fuzz", fuzz),
    "binding": ("party_binding.json", "worldgym binding", tables_party.binding),
    "party_transfer": ("party_transfer.json", "worldgym score-party", tables_party.transfer),
    "party_bench": ("party_bench.json", "worldgym bench party", tables_party.bench),
    "revisit": ("rooms_revisit.json", "worldgym revisit", tables_worlds.revisit),
    "walk": ("worldplay_bench.json", "worldgym bench worldplay", tables_worlds.walk),
    "wham": ("wham_small.json", "python -m worldgym.agents.wham_small", tables_worlds.wham),
}


def render(name: str, folder: Path) -> str:
    """The Markdown of table ``name`` from the results in ``folder``."""
    if name not in TABLES:
        raise ConfigError("unknown table", given=name, expected=f"one of {sorted(TABLES)}",
                          fix="correct the marker in the README or add the table to tables.py")
    file, command, make = TABLES[name]
    path = folder / file
    if not path.exists():
        return WAITING.format(command=command, file=file)
    return make(results.read(path))


def filled(text: str, folder: Path) -> str:
    """``text`` with every marked table generated anew."""
    return MARKER.sub(
        lambda m: f"<!-- table:{m[1]} -->\n{render(m[1], folder)}<!-- /table -->", text)


def update(readme: Path, folder: Path) -> bool:
    """Rewrite the tables of ``readme``; true if anything changed."""
    old = readme.read_text()
    new = filled(old, folder)
    if new != old:
        results.atomic_text(readme, new)
    return new != old


def main() -> None:
    """``make tables``."""
    root = Path(__file__).resolve().parent.parent
    print("README.md", "updated" if update(root / "README.md", root / "results") else "unchanged")


if __name__ == "__main__":
    main()
