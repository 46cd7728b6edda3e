"""Random sequences of state operations: replay and batch invariance exact, no page leaked.

``python tests/state_fuzz.py --sequences 1000 --world FOLDER --out results/state_fuzz.json``.
Every slot carries the story of its life (start, seed, episode, actions). At the end of a sequence
each slot's story is told again, alone, in a batch of one: latents, rewards and ends must be the
same bytes. Then everything is dropped and the pool must be empty.
"""

import argparse
import gc
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from worldgym.engine import World  # noqa: E402
from worldgym.state import Starts, WorldState  # noqa: E402


@dataclass(frozen=True)
class Story:
    """How a slot came to be what it is."""

    start: int
    seed: int
    episode: int
    actions: tuple = ()
    results: tuple = ()


def random_starts(world: World, count: int, seed: int) -> Starts:
    """Starts of random latents with contexts of all lengths."""
    rng, k = np.random.default_rng(seed), world.spec.context_frames
    latents = torch.from_numpy(rng.standard_normal((count, k, *world.spec.latent_chw))).float()
    actions = np.stack([[random_action(world, rng) for _ in range(k)] for _ in range(count)])
    lengths = rng.integers(1, k + 1, count)
    null = np.arange(k)[None] == (k - lengths)[:, None]
    return Starts(latents, actions, null, lengths)


def random_action(world: World, rng: np.random.Generator) -> np.ndarray:
    """Any legal action."""
    action = world.spec.action
    if action.kind == "box":
        return rng.uniform(action.low, action.high).reshape(action.shape).astype(np.float32)
    top = 2 if action.kind == "multi_binary" else np.asarray(action.sizes).reshape(action.shape)
    return action.start + rng.integers(0, top, action.shape)


class Sequence:
    """One random sequence on one world."""

    def __init__(self, world: World, starts: Starts, seed: int, slots: int, folder: Path) -> None:
        self.world, self.starts, self.folder = world, starts, folder
        self.rng = np.random.default_rng(seed)
        self.stories = [self._fresh(0) for _ in range(slots)]
        self.state = self._begin(self.stories)
        self.saved: list[tuple[WorldState, list[Story]]] = []

    def _fresh(self, episode: int) -> Story:
        return Story(int(self.rng.integers(len(self.starts))), int(self.rng.integers(2**40)),
                     episode)

    def _begin(self, stories: list[Story]) -> WorldState:
        return self.world.begin(self.starts.rows(np.array([s.start for s in stories])),
                                [s.seed for s in stories], [s.episode for s in stories])

    def _some(self) -> np.ndarray:
        n = len(self.stories)
        return self.rng.permutation(n)[: self.rng.integers(1, n + 1)]

    def step(self) -> None:
        """Step all slots, or some in any order."""
        slots = None if self.rng.random() < 0.6 else self._some()
        index = np.arange(len(self.stories)) if slots is None else slots
        actions = np.stack([random_action(self.world, self.rng) for _ in index])
        self.state, chunk = self.world.step(self.state, actions, slots)
        for row, slot in enumerate(index):
            story = self.stories[slot]
            self.stories[slot] = replace(story, actions=(*story.actions, actions[row]),
                                         results=(*story.results, outcome(chunk, row)))

    def reset(self) -> None:
        """Begin some slots anew."""
        slots = self._some()
        for slot in slots:
            self.stories[slot] = self._fresh(self.stories[slot].episode + 1)
        chosen = [self.stories[slot] for slot in slots]
        rows = self.starts.rows(np.array([s.start for s in chosen]))
        self.state = self.world.restart(self.state, slots, rows, [s.seed for s in chosen],
                                        [s.episode for s in chosen])

    def fork(self) -> None:
        """Fork some slots, then keep at most eight slots."""
        slots, n = self._some(), int(self.rng.integers(1, 4))
        forked = self.state.fork(n, slots)
        stories = [self.stories[slot] for slot in np.repeat(slots, n)]
        keep = np.sort(self.rng.permutation(len(stories))[:8])
        self.state, self.stories = forked.select(keep), [stories[i] for i in keep]

    def snapshot(self) -> None:
        """Remember this moment."""
        self.saved.append((self.state.snapshot(), list(self.stories)))

    def restore(self) -> None:
        """Go back to a remembered moment; the snapshot stays good."""
        if self.saved:
            state, stories = self.saved[self.rng.integers(len(self.saved))]
            self.state, self.stories = state.snapshot(), list(stories)

    def disk(self) -> None:
        """Save, forget, load."""
        path = self.folder / "state.safetensors"
        self.state.save(path)
        self.state = WorldState.load(path, self.world)

    def run(self, length: int) -> int:
        """Run ``length`` random operations, then retell every story; returns the failures."""
        steps = [self.step] * 5 + [self.reset, self.fork, self.snapshot, self.restore, self.disk]
        for _ in range(length):
            steps[self.rng.integers(len(steps))]()
        every = self.stories + [s for _, stories in self.saved for s in stories]
        return sum(not self._retold(story) for story in every)

    def _retold(self, story: Story) -> bool:
        state = self._begin([story])
        for action, result in zip(story.actions, story.results, strict=True):
            state, chunk = self.world.step(state, action[None])
            if outcome(chunk, 0) != result:
                return False
        return True


def outcome(chunk, row: int) -> tuple:
    """What a step brought to one slot, as bytes."""
    return (chunk.latents_BFChw[row].numpy().tobytes(), float(chunk.reward_B[row]),
            bool(chunk.terminated_B[row]), float(chunk.end_probability_B[row]))


def fuzz(world: World, sequences: int, length: int = 12, seed: int = 0, bar=iter) -> dict:
    """Counts of failed slots and leaked pages over random sequences."""
    failures = leaked = 0
    starts = random_starts(world, 16, seed)
    with tempfile.TemporaryDirectory() as folder:
        for number in bar(range(sequences)):
            sequence = Sequence(world, starts, seed * 1_000_003 + number, 4, Path(folder))
            failures += sequence.run(length)
            del sequence
            gc.collect()
            leaked += world.pool.stats()["pages_used"]
    return {"sequences": sequences, "failures": failures, "pages_leaked": leaked}


def main() -> None:
    """Fuzz a shipped world and write the results file."""
    from tqdm import tqdm

    from worldgym.agents.results import Row, write
    from worldgym.models import nano

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=1000)
    parser.add_argument("--length", type=int, default=12)
    parser.add_argument("--world", default="envs/worlds/take_cover")
    parser.add_argument("--out", default="results/state_fuzz.json")
    args = parser.parse_args()
    torch.set_num_threads(1)  # more threads split matrix products by their size: no exact bits
    counts = fuzz(nano.load(args.world), args.sequences, args.length, bar=tqdm)
    print(counts)
    units = {"sequences": "sequences", "failures": "slots", "pages_leaked": "pages"}
    write(args.out, [Row(what="nano", metric=k, value=v, n=args.sequences, unit=units[k], seeds="0")
                     for k, v in counts.items()])
    sys.exit(bool(counts["failures"] or counts["pages_leaked"]))


if __name__ == "__main__":
    main()
