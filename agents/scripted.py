"""Policies that nobody trained, and the parser that turns a name into a policy."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from worldgym.actions import ActionSpec
from worldgym.agents.policy import Policy, SlotPolicy, acting, idle_action, sample_action
from worldgym.errors import ConfigError, WorldGymError


class Random(SlotPolicy):
    """A new uniformly random action at every step."""

    name = "random"

    def choose(self, slot: int, t: int, frame_HWC: np.ndarray) -> np.ndarray:
        return sample_action(self.action, self.rngs[slot])


class Constant(SlotPolicy):
    """The same action for ever; without a value, the idle one."""

    def __init__(self, action: ActionSpec, value: float | None = None) -> None:
        super().__init__(action)
        self.name = "noop" if value is None else f"constant:{value:g}"
        self.value = idle_action(action)
        if value is not None:
            self.value = action.check(np.full((1, *action.shape), value))[0]

    def choose(self, slot: int, t: int, frame_HWC: np.ndarray) -> np.ndarray:
        return self.value


class Sticky(SlotPolicy):
    """Keeps its action, and draws a new one with probability ``p`` at every step."""

    def __init__(self, action: ActionSpec, p: float = 0.2) -> None:
        super().__init__(action)
        if not 0 < p <= 1:
            raise ConfigError("sticky needs a probability", given=p, expected="0 < p <= 1",
                              fix="write sticky:0.2")
        self.name, self.p = f"sticky:{p:g}", p
        self._held: dict[int, np.ndarray] = {}

    def start(self, slot: int) -> None:
        self._held[slot] = sample_action(self.action, self.rngs[slot])

    def choose(self, slot: int, t: int, frame_HWC: np.ndarray) -> np.ndarray:
        if self.rngs[slot].random() < self.p:
            self._held[slot] = sample_action(self.action, self.rngs[slot])
        return self._held[slot]


class Sweep(SlotPolicy):
    """Left and right (actions 2 and 1) in turn, ``period`` steps each; for Discrete(3) games.

    >>> sweep = Sweep(ActionSpec.discrete(3), 2)
    >>> sweep.reset(1, seed=0)
    >>> frame = np.zeros((1, 4, 4, 3), np.uint8)
    >>> len({int(sweep.act(frame, t)[0]) for t in range(4)})
    2
    """

    def __init__(self, action: ActionSpec, period: int = 20) -> None:
        super().__init__(action)
        if period < 1:
            raise ConfigError("sweep needs a period", given=period, expected="period >= 1",
                              fix="write sweep:20")
        _needs_three(action, "sweep")
        self.name, self.period = f"sweep:{period}", period
        self._first: dict[int, int] = {}

    def start(self, slot: int) -> None:
        self._first[slot] = int(self.rngs[slot].integers(2))

    def choose(self, slot: int, t: int, frame_HWC: np.ndarray) -> int:
        return self.action.start + 1 + (t // self.period + self._first[slot]) % 2


class Noisy(SlotPolicy):
    """Another policy that slips: by chance ``p`` a step it holds a random action, 1 to 8 steps.

    Recordings of a good player alone never show what a mistake leads to.
    """

    def __init__(self, action: ActionSpec, p: float, player: Policy) -> None:
        super().__init__(action)
        if not 0 <= p <= 1:
            raise ConfigError("noisy needs a probability", given=p, expected="0 <= p <= 1",
                              fix="write noisy:0.1:dodger")
        self.name, self.p, self.player = f"noisy:{p:g}:{player.name}", p, player
        self._slip: dict[int, tuple[int, np.ndarray]] = {}
        self._wish: dict[int, np.ndarray] = {}

    def reset(self, n: int, seed: int) -> None:
        super().reset(n, seed)
        self.player.reset(n, seed)

    def act(self, frames_NHWC: np.ndarray, t: int | np.ndarray,
            slots: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        wishes = self.player.act(frames_NHWC, t, slots)
        index, _ = acting(len(frames_NHWC), t, slots, len(self.rngs))
        self._wish = dict(zip(index.tolist(), wishes, strict=True))
        return super().act(frames_NHWC, t, slots)

    def start(self, slot: int) -> None:
        self._slip[slot] = (0, idle_action(self.action))

    def choose(self, slot: int, t: int, frame_HWC: np.ndarray) -> np.ndarray:
        left, held = self._slip[slot]
        if not left and self.rngs[slot].random() < self.p:
            left = int(self.rngs[slot].integers(1, 9))
            held = sample_action(self.action, self.rngs[slot])
        self._slip[slot] = (max(0, left - 1), held)
        return held if left else self._wish[slot]


def _needs_three(action: ActionSpec, who: str) -> None:
    if action.kind != "discrete" or action.sizes != (3,):
        raise ConfigError(f"{who} moves left and right only", given=f"{action.kind}{action.sizes}",
                          expected="Discrete(3): none, right, left", fix="use random or sticky:0.2")


def _dodge(action: ActionSpec, text: str | None) -> Policy:
    from worldgym.agents.dodger import Dodger

    _needs_three(action, "dodger")
    return Dodger(action, **({} if text is None else {"safe": _number(text, "dodger")}))


def _number(text: str, name: str, kind: type = float) -> float:
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"policy {name} has a bad argument", given=text,
                          expected=f"{name}:NUMBER", fix=f"write for instance {EXAMPLES[name]}"
                          ) from None


EXAMPLES = {"random": "random", "noop": "noop", "constant": "constant:1", "sticky": "sticky:0.2",
            "sweep": "sweep:20", "dodger": "dodger",
            "noisy": "noisy:0.1:dodger", "cem": "cem:horizon=12,n=64",
            "shooting": "shooting:horizon=12,n=64", "wham": "wham:FILE"}

_TABLE: dict[str, Callable[[ActionSpec, str | None], Policy]] = {
    "random": lambda a, _: Random(a),
    "noop": lambda a, _: Constant(a),
    "constant": lambda a, x: Constant(a, None if x is None else _number(x, "constant")),
    "sticky": lambda a, x: Sticky(a, 0.2 if x is None else _number(x, "sticky")),
    "sweep": lambda a, x: Sweep(a, 20 if x is None else int(_number(x, "sweep", int))),
    "dodger": _dodge,
}


def parse_policy(name: str, action: ActionSpec, world: object | None = None,
                 task: object | None = None) -> Policy:
    """Make the policy that ``name`` says.

    Args:
        name: ``random``, ``noop``, ``constant:1``, ``sticky:0.2``, ``sweep:20``, ``dodger``,
            ``noisy:0.1:POLICY``, ``cem:horizon=12,n=64`` and ``shooting:horizon=12,n=64``
            (settings: ``worldgym.agents.planner.PlanConfig``), ``wham:FILE`` (WHAM's behaviour
            mode, ``worldgym.agents.wham_policy``), a trained ``model.zip``, or
            ``module:function`` or ``path/to/file.py:function`` (called with the action spec).
        action: the game's actions.
        world: a world (or a function that makes one), needed to encode frames for a policy that
            was trained on latent observations, and to plan in.
        task: the task whose reward and end a planner plans for; default: the world's heads.
    """
    head, _, tail = name.partition(":")
    if head in _TABLE:
        if head in ("random", "noop") and tail:
            raise ConfigError(f"policy {head} takes no argument", given=name, expected=head,
                              fix=f"write {head}")
        return _TABLE[head](action, tail or None)
    if head == "noisy" and ":" in tail:
        chance, _, player = tail.partition(":")
        return Noisy(action, _number(chance, "noisy"), parse_policy(player, action, world, task))
    if head in ("cem", "shooting"):
        from worldgym.agents.planner import parse_planner

        return parse_planner(name, action, world, task)
    if head == "wham" and tail:
        from worldgym.agents.wham_policy import parse_wham

        return parse_wham(name, action, world)
    if name.endswith(".zip"):
        from worldgym.agents.model import load_agent

        return load_agent(Path(name), world=world)
    if head.endswith(".py") and tail:
        return _call(_module_of_file(Path(head)), tail, action, f"{head}:{tail}")
    if tail and head.replace(".", "").replace("_", "").isalnum():
        return _import_policy(head, tail, action)
    raise ConfigError(
        "unknown policy", given=repr(name),
        expected=f"one of {', '.join(EXAMPLES.values())}, a model.zip, module:function or "
        "path/to/file.py:function",
        fix="check the spelling, or give a trained agent as agent.zip",
    )


def _import_policy(module: str, function: str, action: ActionSpec) -> Policy:
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise _no_import(f"{module}:{function}", error) from error
    return _call(found, function, action, f"{module}:{function}")


def _module_of_file(path: Path) -> ModuleType:
    """The module in a Python file, under a name that no other module has."""
    spec = importlib.util.spec_from_file_location(f"policy_in_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError("policy file is missing", given=path, expected="an existing Python file",
                          fix="check the path; it is relative to the current folder")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's file raises is named as its fault
        raise _no_import(str(path), error) from error
    return module


def _no_import(name: str, error: BaseException) -> ConfigError:
    return ConfigError("policy cannot be imported", given=f"{name} ({error!r})",
                       expected="module:function on the Python path, or path/to/file.py:function",
                       fix="run from the folder of that module, install it, or repair it")


def _call(module: ModuleType, function: str, action: ActionSpec, name: str) -> Policy:
    try:
        factory = getattr(module, function)
    except AttributeError as error:
        raise _no_import(name, error) from error
    try:
        policy = factory(action)
    except WorldGymError:
        raise
    except Exception as error:  # a user's function may raise anything
        raise ConfigError("policy cannot be made", given=f"{name} ({error!r})",
                          expected="a function of the action spec that returns a policy",
                          fix="def make(action): return MyPolicy(action)") from error
    if not isinstance(policy, Policy):
        raise ConfigError("not a policy", given=f"{type(policy).__name__} from {name}",
                          expected="an object with name, reset(n, seed) and act(frames, t, slots)",
                          fix="see worldgym.agents.policy.Policy")
    return policy
