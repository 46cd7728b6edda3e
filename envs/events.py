"""Events: a dream's prompt changes at random steps (weather, objects), for domain randomisation."""

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np

from worldgym.errors import ConfigError, DTypeError

WEATHER = ("Heavy rain falls.", "Thick fog hangs over everything.", "Snow falls.",
           "It is night and dark.", "A storm bends the trees.")
OBJECTS = ("A dog runs by.", "A red car stands in the way.", "A balloon rises.",
           "A person with an umbrella walks past.")
STREAM = 1 << 20  # number of the events' random stream, apart from those of a step


class Events(gymnasium.Wrapper):
    """Wrapper of an env with ``set_prompt``: at random steps the prompt is joined by an event.

    Which events there are at a step depends on (seed, episode, step) of the dream alone, so saved
    states, forks and replays repeat them. ``info["events"]``: what the step's chunk was told.

    >>> env = Events(gymnasium.make("worldgym/WorldPlay-v0", model=FOLDER))     # doctest: +SKIP

    Args:
        env: the dream.
        kinds: name of a kind -> its texts; at most one of each kind at a time, the newer one wins.
        chance: that an event of a kind begins at a step. lasts: steps it goes on for.
    """

    def __init__(self, env: gymnasium.Env, kinds: Mapping[str, Sequence[str]] | None = None, *,
                 chance: float = 0.02, lasts: int = 20) -> None:
        super().__init__(env)
        self.kinds = {"weather": WEATHER, "objects": OBJECTS} if kinds is None else {
            str(k): tuple(v) for k, v in kinds.items()}
        texts = [t for some in self.kinds.values() for t in some]
        if not texts or not all(isinstance(t, str) for t in texts) or not all(self.kinds.values()):
            raise ConfigError("no events", given=self.kinds, expected="texts of at least one kind",
                              fix='pass {"weather": ["It rains."]}')
        if not 0 <= chance <= 1 or isinstance(lasts, bool) or not isinstance(lasts, int) or (
                lasts < 1):
            raise ConfigError("impossible events", given=f"chance {chance}, lasts {lasts}",
                              expected="0 <= chance <= 1, whole steps", fix="use 0.02 and 20")
        if not hasattr(env.unwrapped, "set_prompt"):
            raise DTypeError("env has no prompt to change", given=type(env.unwrapped).__name__,
                             expected="set_prompt(text, event)", fix="wrap a WorldPlay dream")
        self.chance, self.lasts = float(chance), lasts

    def events(self) -> tuple[str, ...]:
        """What the next chunk is told, beside the prompt."""
        from worldgym.noise import uniform

        state = self.unwrapped.core.ready().world  # type: ignore[attr-defined]
        seed, episode, step, branch = state.keys_B4[0].tolist()
        keys = np.array([[seed, episode, s, branch]
                         for s in range(max(0, step - self.lasts + 1), step + 1)], np.int64)
        draws = uniform(keys, STREAM, 2 * len(self.kinds)).numpy()
        out = []
        for i, texts in enumerate(self.kinds.values()):
            begun = np.flatnonzero(draws[:, 2 * i] < self.chance)
            if len(begun):
                out.append(texts[int(draws[begun[-1], 2 * i + 1] * len(texts))])
        return tuple(out)

    def step(self, action: Any) -> Any:
        """A step of the dream, told what happens in it."""
        dream: Any = self.unwrapped
        events = self.events()
        dream.set_prompt(dream.prompt, " ".join(events))
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, {**info, "events": events}

    def set_prompt(self, text: str) -> None:
        """From the next chunk on, dream of ``text`` (and of the events)."""
        self.unwrapped.set_prompt(text)  # type: ignore[attr-defined]

    def get_state(self) -> Any:
        """The dream's state, which is all there is."""
        return self.unwrapped.get_state()  # type: ignore[attr-defined]

    def set_state(self, state: Any) -> None:
        """Go on from a state."""
        self.unwrapped.set_state(state)  # type: ignore[attr-defined]

    def fork(self, n: int = 1, fresh: bool = False) -> list["Events"]:
        """``n`` independent wrapped envs that continue from here."""
        return [Events(e, self.kinds, chance=self.chance, lasts=self.lasts)
                for e in self.unwrapped.fork(n, fresh)]  # type: ignore[attr-defined]
