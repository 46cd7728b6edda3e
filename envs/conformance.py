"""What the conformance suites share: rule names, the error, exact comparison, rollouts."""

import copy
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium import spaces

from worldgym.errors import WorldGymError

# name of a rule -> number of the promise (design, section 3; 0: Gymnasium's own) and the sentence
RULES: dict[str, tuple[int, str]] = {
    "types": (0, "spaces, Python types and dtypes are as declared"),
    "aliasing": (0, "what was returned is never touched again, nor read back"),
    "metadata": (1, "chunk, rates, observation frame and action mapping are in env.metadata"),
    "start-frame": (1, "reset returns the given start frame and generates nothing"),
    "end-frame": (2, "frames after the end are dropped and info says where the end was"),
    "truncation": (3, "truncation is never termination, and has a reason"),
    "seeds": (4, "the same seed repeats every byte, info included; 0 is a seed"),
    "global-rng": (4, "no global random generator is read or set"),
    "batch-invariance": (5, "a slot's stream does not depend on its batch"),
    "state": (6, "set_state(get_state()) and the same actions repeat everything"),
    "fork": (6, "forks repeat their parent and never touch it"),
    "other-process": (6, "a saved state repeats everything in another process"),
    "slot-reset": (8, "resetting one slot touches no other"),
    "autoreset": (8, "finished slots are reset as metadata['autoreset_mode'] declares"),
    "refusal": (9, "bad input raises a named error and leaves the env as it was"),
    "reset-needed": (9, "step before reset, or after the end, raises ResetNeeded"),
    "closed": (9, "calls after close raise ClosedError; closing twice is fine"),
    "uncertainty": (10, "uncertainty is a finite number of at least 0"),
    "safe-loading": (11, "a saved state is no pickle"),
    "render": (0, "rendering returns fresh frames and changes nothing"),
    "gymnasium": (0, "gymnasium's check_env passes without a warning"),
    "sb3": (0, "Stable-Baselines3's check_env passes without a warning"),
}
INVISIBLE = {
    "promise 7": "constant cost is a measurement: worldgym bench",
    "promise 12": "honest numbers are a matter of the repository, not of an env",
}


class ConformanceError(WorldGymError, AssertionError):
    """An environment breaks a rule; ``rule`` is its name in ``RULES``."""

    def __init__(self, rule: str, what: str, *, given: object, expected: object = None,
                 fix: str = "make the env keep this promise") -> None:
        number, sentence = RULES[rule]
        self.rule = rule
        label = f"rule {rule!r}" + (f" (promise {number})" if number else "")
        super().__init__(f"{label}: {what}", given=given, expected=expected or sentence, fix=fix)

    def __reduce__(self) -> Any:
        return (_rebuild, (self.rule, self.what, self.given, self.expected, self.fix))


def _rebuild(rule: str, what: str, given: object, expected: object, fix: str) -> ConformanceError:
    error = ConformanceError(rule, "", given=given, expected=expected, fix=fix)
    error.what = what
    error.args = (what, given, expected, fix)
    return error


@dataclass(slots=True)
class Report:
    """What was checked: rules that held, and those that could not be seen, with the reason."""

    passed: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=lambda: dict(INVISIBLE))

    def __str__(self) -> str:
        lines = [f"ok       {rule}: {RULES[rule][1]}" for rule in self.passed]
        return "\n".join(lines + [f"not seen {k}: {v}" for k, v in self.skipped.items()])


class NotSeen(Exception):
    """Raised inside a check that cannot be made here; its text is the reason."""


def demand(rule: str, held: object, what: str, given: object, expected: object = None) -> None:
    """Raise ConformanceError unless ``held``."""
    if not held:
        raise ConformanceError(rule, what, given=given, expected=expected)


@contextmanager
def guarding(rule: str) -> Iterator[None]:
    """Turn any exception inside into a ConformanceError of ``rule``."""
    try:
        yield
    except (ConformanceError, NotSeen):
        raise
    except Exception as error:
        text = str(error) or type(error).__name__
        raise ConformanceError(rule, f"{type(error).__name__} was raised", given=text) from error


def run_checks(table: dict[str, Callable[[], None]], report: Report) -> Report:
    """Run named checks in order and note what held and what could not be seen."""
    for rule, check in table.items():
        try:
            with guarding(rule):
                check()
        except NotSeen as reason:
            report.skipped[rule] = str(reason)
        else:
            report.passed.append(rule)
    return report


def difference(a: Any, b: Any, atol: float = 0.0, where: str = "") -> str:
    """Where two nested values differ in type, shape or bytes ('' if nowhere).

    With ``atol`` float arrays may differ by that much and uint8 arrays by 1.
    """
    if type(a) is not type(b):
        return f"{where or 'value'}: {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{where} keys: {sorted(a)} and {sorted(b)}"
        parts = [difference(a[k], b[k], atol, f"{where}[{k!r}]") for k in a]
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            return f"{where} length: {len(a)} and {len(b)}"
        parts = [difference(x, y, atol, f"{where}[{i}]") for i, (x, y) in
                 enumerate(zip(a, b, strict=True))]
    elif isinstance(a, np.ndarray):
        return _array_difference(a, b, atol, where)
    else:
        equal = a == b or (isinstance(a, float) and (a != a and b != b or abs(a - b) <= atol))
        return "" if equal else f"{where or 'value'}: {a!r} and {b!r}"
    return next((p for p in parts if p), "")


def _array_difference(a: np.ndarray, b: np.ndarray, atol: float, where: str) -> str:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{where}: {a.dtype}{a.shape} and {b.dtype}{b.shape}"
    if a.dtype == object:
        return difference(a.tolist(), b.tolist(), atol, where)
    if a.tobytes() == b.tobytes():
        return ""
    if a.dtype.kind in "fu" and atol:
        gap = np.abs(a.astype(np.float64) - b.astype(np.float64)).max()
        if gap <= (1 if a.dtype == np.uint8 else atol):
            return ""
    worst = np.flatnonzero(np.asarray(a != b).ravel())
    return f"{where}: {len(worst)} of {a.size} elements differ"


def frozen(value: Any) -> Any:
    """A deep copy that later calls cannot change."""
    return copy.deepcopy(value)


def sample_actions(space: Any, count: int, seed: int = 7) -> list[Any]:
    """``count`` actions from a copy of ``space``, which is left alone."""
    space = copy.deepcopy(space)
    space.seed(seed)
    return [space.sample() for _ in range(count)]


@contextmanager
def watched_generators() -> Iterator[None]:
    """Demand that nothing inside reads or sets a global random generator."""
    torch = sys.modules.get("torch")

    def look() -> dict[str, bytes]:
        legacy: Any = np.random.get_state()
        name, keys, *rest = legacy
        seen = {"random": repr(random.getstate()).encode(),
                "numpy.random": keys.tobytes() + repr((name, rest)).encode()}
        if torch is not None:
            seen["torch"] = torch.get_rng_state().numpy().tobytes()
        return seen

    before = look()
    yield
    after = look()
    moved = [name for name in before if before[name] != after[name]]
    demand("global-rng", not moved, "a global generator moved", moved)


@contextmanager
def other_generators() -> Iterator[None]:
    """Give the global generators other states inside, and restore them afterwards."""
    kept = random.getstate(), np.random.get_state()
    random.setstate(random.Random(4711).getstate())
    np.random.set_state(np.random.RandomState(4711).get_state())
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])


def refuses(rule: str, call: Callable[[], Any], kind: type[Exception], what: str) -> None:
    """Demand that ``call`` raises ``kind`` with given, expected and fix in its message."""
    try:
        call()
    except kind as error:
        parts = [getattr(error, n, None) for n in ("given", "expected", "fix")]
        demand(rule, all(p is not None and str(p) for p in parts),
               f"the error for {what} lacks given, expected or fix", str(error))
    except Exception as error:
        raise ConformanceError(
            rule, f"{what} raised another error", given=f"{type(error).__name__}: {error}",
            expected=f"{kind.__name__} of worldgym.errors") from error
    else:
        raise ConformanceError(rule, f"{what} was accepted", given="no error",
                               expected=f"{kind.__name__} of worldgym.errors")


def rollout(env: Any, actions: list[Any]) -> list[Any]:
    """Transitions (deep copies); a finished episode is followed by a reset() without seed."""
    out = []
    for action in actions:
        result = env.step(action)
        out.append(frozen(result))
        if result[2] or result[3]:
            out.append(frozen(env.reset()))
    return out


def looks_safe(head: bytes) -> bool:
    """Whether the first 9 bytes are those of safetensors: header length, then a brace."""
    return head[8:9] == b"{"


class Evil:
    """Pickles to code that makes a folder when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.path,))


def bad_actions(space: spaces.Space) -> list[Any]:
    """Actions that ``space`` does not hold: types, shapes, ranges, NaN."""
    if isinstance(space, spaces.Dict):
        good = {k: np.zeros(part.shape or (), part.dtype) for k, part in space.items()}
        wrong = [{k: value, **{n: v for n, v in good.items() if n != k}}
                 for k, part in space.items() for value in bad_actions(part)]
        return [None, "up", {}, {**good, "a": 1}, np.zeros(3), *wrong]
    bad: list[Any] = [None, "up", {"a": 1}, np.zeros((*space.shape, 2, 5))]  # type: ignore[misc]
    if isinstance(space, spaces.Box):
        full = np.full(space.shape, np.nan, np.float32)
        return [*bad, full, np.full(space.shape, np.inf), space.high + 1, space.low - 1]
    if isinstance(space, spaces.Discrete):
        return [*bad, int(space.start - 1), int(space.start + space.n), 0.5, float("nan")]
    assert space.shape is not None
    top = np.asarray(space.nvec if isinstance(space, spaces.MultiDiscrete) else 2)
    return [*bad, np.broadcast_to(top, space.shape), np.full(space.shape, -1),
            np.full(space.shape, 0.5)]
