"""Our conformance suite for native vector envs: what a single env cannot show.

Shapes: B slots.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from worldgym.envs.conformance import (
    NotSeen,
    Report,
    demand,
    difference,
    frozen,
    other_generators,
    refuses,
    run_checks,
    sample_actions,
    watched_generators,
)
from worldgym.errors import ClosedError, ResetNeeded, WorldGymError


def check_dream_vector_env(
    env_or_factory: VectorEnv | Callable[..., VectorEnv], *, num_envs: int = 3, steps: int = 40,
    atol: float = 0.0,
) -> Report:
    """Check a vector env against the promises that concern batches.

    Args:
        env_or_factory: an env (closed at the end), or better a callable
            ``(num_envs=..., autoreset_mode=...)``: then all three modes and batch invariance are
            checked too.
        num_envs: B of the envs that the callable makes, at least 2.
        steps: length of the rollouts; take a short horizon, so that episodes end.
        atol: allowed difference of floats between batch sizes (uint8 then by 1); 0: exact.

    Raises:
        ConformanceError: naming the broken rule.
    """
    report = Report()
    if isinstance(env_or_factory, VectorEnv):
        return VectorSuite(env_or_factory, None, steps, atol, report).run()
    for mode in AutoresetMode:
        def make(n: int, mode: AutoresetMode = mode) -> VectorEnv:
            return env_or_factory(num_envs=n, autoreset_mode=mode)

        VectorSuite(make(num_envs), make, steps, atol, report, mode).run()
    report.passed = list(dict.fromkeys(report.passed))
    return report


def each(change: Callable[..., Any], *actions: Any) -> Any:
    """``change`` applied to batches of actions, or to every part of Dict actions."""
    if isinstance(actions[0], dict):
        return {k: change(*(np.asarray(a[k]) for a in actions)) for k in actions[0]}
    return change(*(np.asarray(a) for a in actions))


class VectorSuite:
    """One run over one env in its declared mode."""

    def __init__(self, env: VectorEnv, make: Any, steps: int, atol: float, report: Report,
                 wanted: AutoresetMode | None = None) -> None:
        self.env: Any = env  # with state and forks, which VectorEnv does not declare
        self.make, self.steps, self.atol, self.report = make, steps, atol, report
        self.mode: Any = env.metadata.get("autoreset_mode")
        self.wanted = wanted
        self.actions = sample_actions(env.action_space, steps)

    def run(self) -> Report:
        """All checks."""
        return run_checks({
            "types": self.types, "autoreset": self.autoreset, "reset-needed": self.reset_needed,
            "global-rng": self.global_rng, "seeds": self.seeds, "aliasing": self.aliasing,
            "truncation": self.truncation, "batch-invariance": self.batch_invariance,
            "slot-reset": self.slot_reset, "state": self.state, "fork": self.fork,
            "refusal": self.refusal, "closed": self.closed,
        }, self.report)

    def roll(self, env: Any, actions: list[Any]) -> list[Any]:
        """Transitions; with autoreset off, finished slots are reset by mask after each step."""
        out = []
        for action in actions:
            result = frozen(env.step(action))
            out.append(result)
            done_B = result[2] | result[3]
            if self.mode is AutoresetMode.DISABLED and done_B.any():
                out.append(frozen(env.reset(options={"reset_mask": done_B})))
        return out

    def play(self, seed: Any = 0, env: Any = None) -> list[Any]:
        """Reset and the suite's actions."""
        env = self.env if env is None else env
        return [frozen(env.reset(seed=seed)), *self.roll(env, self.actions)]

    def steps_of(self, seed: Any = 0) -> list[Any]:
        """The steps of ``play``."""
        return [r for r in self.play(seed) if len(r) == 5]

    # ------------------------------------------------------------------ promises

    def autoreset(self) -> None:
        """The declared mode is an enum, is the one asked for, and is what happens."""
        demand("autoreset", isinstance(self.mode, AutoresetMode),
               "metadata['autoreset_mode'] is no AutoresetMode", self.mode)
        if self.wanted is not None:
            demand("autoreset", self.mode is self.wanted, "another mode was asked for", self.mode,
                   self.wanted)
        env = self.env
        env.reset(seed=0)
        for action in self.actions:
            before = env.get_state()
            result = frozen(env.step(action))
            done_B = result[2] | result[3]
            if done_B.any():
                break
        else:
            raise NotSeen("no episode ended within the rollout")
        {AutoresetMode.NEXT_STEP: self._next_step, AutoresetMode.SAME_STEP: self._same_step,
         AutoresetMode.DISABLED: self._disabled}[self.mode](result, done_B, before, action)

    def _next_step(self, result: Any, done_B: np.ndarray, *_: Any) -> None:
        state = self.env.get_state()
        other = sample_actions(self.env.action_space, 1, seed=99)[0]
        pair = []
        for action in (self.actions[0], other):
            mixed = each(lambda a, b: np.where(done_B.reshape(-1, *[1] * (np.ndim(a) - 1)), b, a),
                         self.actions[0], action)
            self.env.set_state(state)
            pair.append(frozen(self.env.step(mixed)))
        gap = difference(pair[0], pair[1])
        demand("autoreset", not gap, "the action of a slot to be reset was not ignored", gap)
        reward, flags = pair[0][1][done_B], (pair[0][2] | pair[0][3])[done_B]
        demand("autoreset", not reward.any() and not flags.any(),
               "the step that resets must give reward 0 and no flag", (reward, flags))
        self.env.set_state(state)
        fresh, _ = self.env.reset(options={"reset_mask": done_B})
        gap = difference(np.ascontiguousarray(fresh[done_B]), pair[0][0][done_B])
        demand("autoreset", not gap, "the step after an end did not return the reset frame", gap)

    def _same_step(self, result: Any, done_B: np.ndarray, *_: Any) -> None:
        infos = result[4]
        for name in ("final_obs", "final_info"):
            mask = infos.get(f"_{name}")
            demand("autoreset", name in infos and isinstance(mask, np.ndarray)
                   and (mask == done_B).all(), f"infos[{name!r}] and its mask are missing or wrong",
                   sorted(infos))
        for slot in np.flatnonzero(done_B):
            last = infos["final_obs"][slot]
            demand("autoreset", last is not None and last in self.env.single_observation_space,
                   "final_obs holds no observation for a finished slot", type(last))
        follow = self.env.step(self.actions[0])
        demand("autoreset", not (follow[1][done_B] == 0).all(),
               "the step after a same-step reset generated nothing", follow[1][done_B])

    def _disabled(self, result: Any, done_B: np.ndarray, *_: Any) -> None:
        refuses("autoreset", lambda: self.env.step(self.actions[0]), ResetNeeded,
                "stepping a finished slot without autoreset")
        self.env.reset(options={"reset_mask": done_B})
        self.env.step(self.actions[0])

    def reset_needed(self) -> None:
        """Step before reset."""
        if self.make is None:
            raise NotSeen("step before reset needs a factory")
        env = self.make(2)
        action = sample_actions(env.action_space, 1)[0]
        refuses("reset-needed", lambda: env.step(action), ResetNeeded, "step before reset")
        refuses("reset-needed",
                lambda: env.reset(options={"reset_mask": np.array([True, False])}), ResetNeeded,
                "reset_mask before a full reset")
        env.close()

    def types(self) -> None:
        """Dtypes, shapes, and that every info has its mask."""
        n = self.env.num_envs
        for obs, reward, terminated, truncated, infos in self.steps_of():
            demand("types", obs in self.env.observation_space, "observation outside its space",
                   (obs.dtype, obs.shape), self.env.observation_space)
            demand("types", reward.dtype.kind == "f" and reward.shape == (n,),
                   "rewards are not floats of shape (B,)", (reward.dtype, reward.shape))
            for flags in (terminated, truncated):
                demand("types", flags.dtype == bool and flags.shape == (n,),
                       "flags are not bools of shape (B,)", (flags.dtype, flags.shape))
            for name in infos:
                mask = infos.get(f"_{name}", infos[name] if name.startswith("_") else None)
                demand("types", isinstance(mask, np.ndarray) and mask.shape == (n,)
                       and mask.dtype == bool, f"infos[{name!r}] has no bool mask of shape (B,)",
                       type(mask))

    def seeds(self) -> None:
        """Replay; an int seed is seed + slot; 0 is a seed."""
        n = self.env.num_envs
        for seed in (0, 77, list(range(5, 5 + n))):
            gap = difference(self.play(seed), self.play(seed))
            demand("seeds", not gap, f"seed {seed} did not repeat itself", gap)
        gap = difference(self.play(5), self.play(list(range(5, 5 + n))))
        demand("seeds", not gap, "seed s is not the list s, s + 1, ...", gap)

    def global_rng(self) -> None:
        """Global generators neither move nor matter."""
        with watched_generators():
            before = self.play()
            repeats = not difference(before, self.play())
        with other_generators():
            gap = difference(before, self.play()) if repeats else ""  # else: a matter of seeds
        demand("global-rng", not gap, "global generators changed the stream", gap)

    def aliasing(self) -> None:
        """Writing into what was returned changes nothing."""
        clean = self.steps_of()
        self.env.reset(seed=0)
        scribbled, kept, copies = [], [], []
        for action in self.actions:
            result = self.env.step(action)
            scribbled.append(frozen(result))
            done_B = (result[2] | result[3]).copy()
            if self.mode is AutoresetMode.DISABLED and done_B.any():
                self.env.reset(options={"reset_mask": done_B})
            for array in (*result[:4], result[4].get("frames")):
                if isinstance(array, np.ndarray) and array.dtype != object:
                    array[...] = 1
            kept.append(result[0])
            copies.append(frozen(result[0]))
        gap = difference(clean, scribbled) or difference(copies, kept)
        demand("aliasing", not gap, "writing into a returned array changed another", gap)

    def truncation(self) -> None:
        """Never both; a reason exactly for truncated slots."""
        seen = False
        for _, _, terminated_B, truncated_B, infos in self.steps_of():
            demand("truncation", not (terminated_B & truncated_B).any(),
                   "a slot was terminated and truncated", np.flatnonzero(terminated_B))
            if self.mode is AutoresetMode.SAME_STEP:
                infos = infos.get("final_info", {})
            mask_B = infos.get("_truncation_reason", np.zeros(self.env.num_envs, bool))
            demand("truncation", (mask_B == truncated_B).all(),
                   "truncation_reason must be given exactly for truncated slots",
                   (mask_B, truncated_B))
            seen |= truncated_B.any()
            if mask_B.any():
                demand("truncation", all(infos["truncation_reason"][truncated_B]),
                       "a truncation has no reason", infos["truncation_reason"])
        if not seen:
            raise NotSeen("no episode was truncated within the rollout")

    def batch_invariance(self) -> None:
        """Slot i of B equals a batch of one with the same seed."""
        if self.make is None:
            raise NotSeen("needs a factory")
        seeds = list(range(20, 20 + self.env.num_envs))
        whole = self.steps_of(seeds)
        for slot, seed in enumerate(seeds):
            env = self.make(1)
            alone = [env.reset(seed=[seed])]
            alone += self.roll(env, [
                each(lambda x, s=slot: x[s:s + 1], a) for a in self.actions])
            env.close()
            ours = [[np.array(x[slot]) for x in step[:4]] for step in whole]
            theirs = [[np.array(x[0]) for x in step[:4]] for step in alone if len(step) == 5]
            gap = difference(theirs, ours, self.atol)
            demand("batch-invariance", not gap,
                   f"slot {slot} of {len(seeds)} differs from a batch of one", gap)

    def slot_reset(self) -> None:
        """A reset of slot 0 leaves the other slots' streams as they were."""
        env = self.env
        if env.num_envs < 2:
            raise NotSeen("needs at least two slots")
        mask = np.zeros(env.num_envs, bool)
        mask[0] = True
        streams = []
        for reset in (False, True):
            env.reset(seed=0)
            stream = self.roll(env, self.actions[:2])
            if reset:
                shown, _ = env.reset(options={"reset_mask": mask})
                gap = difference(stream[-1][0][1:], shown[1:])
                demand("slot-reset", not gap, "reset by mask changed other observations", gap)
            rest = [r for r in self.roll(env, self.actions[2:]) if len(r) == 5]
            streams.append([[x[1:] for x in r[:4]] for r in rest])
        gap = difference(streams[0], streams[1])
        demand("slot-reset", not gap, "other slots went another way after the reset", gap)

    def state(self) -> None:
        """Restoring repeats everything, also when slots wait for their reset."""
        for warm in (0, 2, self.steps // 2):
            self.env.reset(seed=3)
            self.roll(self.env, self.actions[:warm])
            state = self.env.get_state()
            first = self.roll(self.env, self.actions)
            for _ in range(2):
                self.env.set_state(state)
                gap = difference(first, self.roll(self.env, self.actions))
                demand("state", not gap, f"restoring after {warm} steps did not repeat", gap)

    def fork(self) -> None:
        """Forks repeat their parent and leave it alone."""
        self.env.reset(seed=3)
        state = self.env.get_state()
        alone = self.roll(self.env, self.actions)
        self.env.set_state(state)
        forks = self.env.fork(2)
        self.roll(forks[1], self.actions[::-1])
        forks[1].close()
        for name, env in (("the parent after its fork was used", self.env), ("a fork", forks[0])):
            gap = difference(alone, self.roll(env, self.actions))
            demand("fork", not gap, f"{name} went another way", gap)
        forks[0].close()

    def refusal(self) -> None:
        """Bad batches, masks, seeds and options change nothing."""
        env, n = self.env, self.env.num_envs
        env.reset(seed=4)
        state = env.get_state()
        after = self.actions[:6]
        expected = self.roll(env, after)
        good = self.actions[0]
        calls: dict[str, Callable[[], Any]] = {
            "actions None": lambda: env.step(None),
            "too few actions": lambda: env.step(each(lambda a: a[: n - 1], good)),
            "too many actions": lambda: env.step(
                each(lambda a: np.concatenate([a, a]), good)),
            "actions as words": lambda: env.step(["up"] * n),
            "actions out of range": lambda: env.step(each(lambda a: a + 100, good)),
            "an integer mask": lambda: env.reset(options={"reset_mask": np.ones(n, int)}),
            "a short mask": lambda: env.reset(options={"reset_mask": np.ones(n + 1, bool)}),
            "an empty mask": lambda: env.reset(options={"reset_mask": np.zeros(n, bool)}),
            "too many seeds": lambda: env.reset(seed=list(range(n + 1))),
            "a negative seed": lambda: env.reset(seed=-1),
            "an unknown option": lambda: env.reset(options={"speed": 1}),
            "state None": lambda: env.set_state(None),
        }
        for what, call in calls.items():
            env.set_state(state)
            refuses("refusal", call, WorldGymError, what)
            gap = difference(expected, self.roll(env, after))
            demand("refusal", not gap, f"after {what} the env went another way", gap)

    def closed(self) -> None:
        """After close every call is refused."""
        self.env.close()
        self.env.close()
        refuses("closed", lambda: self.env.step(self.actions[0]), ClosedError, "step after close")
        refuses("closed", lambda: self.env.reset(), ClosedError, "reset after close")
