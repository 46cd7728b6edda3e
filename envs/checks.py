"""Our conformance suite for a single dream env: every promise that can be seen from outside."""

import multiprocessing
import pickle
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from worldgym.envs.conformance import (
    ConformanceError,
    Evil,
    NotSeen,
    Report,
    bad_actions,
    demand,
    difference,
    frozen,
    looks_safe,
    other_generators,
    refuses,
    rollout,
    run_checks,
    sample_actions,
    watched_generators,
)
from worldgym.errors import ClosedError, ResetNeeded, WorldGymError

Factory = Callable[..., Any]


def check_dream_env(
    env_or_factory: gymnasium.Env | Factory, *, steps: int = 40, other_process: bool = True
) -> Report:
    """Check a dream env against every promise that can be seen from outside.

    Args:
        env_or_factory: an env (it is closed at the end), or better a callable that makes one: then
            "step before reset" and "another process" can be seen too (the latter needs a callable
            that pickles, such as a module's function).
        steps: length of the rollouts; take an env with a short horizon, so that episodes end.
        other_process: start a second Python process for the saved state.

    Returns:
        Which rules held, and which could not be seen and why.

    Raises:
        ConformanceError: naming the broken rule.
    """
    return Suite(env_or_factory, steps, other_process).run()


def _in_another_process(factory: Factory, path: str, actions: list[Any], pipe: Any) -> None:
    try:
        env = factory()
        env.load_state(path)
        pipe.send(rollout(env, actions))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


class Suite:
    """One run of the suite over one env; ``run`` does it all."""

    def __init__(self, source: Any, steps: int, other_process: bool) -> None:
        self.factory = None if isinstance(source, gymnasium.Env) else source
        self.env = source if self.factory is None else source()
        self.steps, self.spawn = steps, other_process
        self._seen: list[Any] | None = None
        self.actions = sample_actions(self.env.action_space, steps)

    def run(self) -> Report:
        """All checks, the ones with precise names first."""
        return run_checks({
            "reset-needed": self.reset_needed, "types": self.types, "metadata": self.metadata,
            "global-rng": self.global_rng, "seeds": self.seeds, "aliasing": self.aliasing,
            "start-frame": self.start_frame, "end-frame": self.end_frame, "state": self.state,
            "truncation": self.truncation, "uncertainty": self.uncertainty, "fork": self.fork,
            "safe-loading": self.safe_loading,
            "other-process": self.another_process, "refusal": self.refusal, "render": self.render,
            "gymnasium": self.gymnasium, "sb3": self.sb3, "closed": self.closed,
        }, Report())

    def play(self, seed: int | None = 0) -> list[Any]:
        """The stream of a seed: reset, then the suite's actions."""
        return [frozen(self.env.reset(seed=seed)), *rollout(self.env, self.actions)]

    def transitions(self, seed: int = 0) -> list[Any]:
        """The steps of ``play`` without its resets."""
        return [r for r in self.play(seed) if len(r) == 5]

    def reset_needed(self) -> None:
        """Step before the first reset, and after an end."""
        if self.factory is not None:
            refuses("reset-needed", lambda: self.env.step(self.actions[0]), ResetNeeded,
                    "step before reset")
        self.env.reset(seed=0)
        for action in self.actions:
            *_, terminated, truncated, _ = self.env.step(action)
            if terminated or truncated:
                refuses("reset-needed", lambda: self.env.step(self.actions[0]), ResetNeeded,
                        "step after the end of an episode")
                break
        if self.factory is None:
            raise NotSeen("step before reset needs a factory")

    def types(self) -> None:
        """Declared spaces and exact Python types."""
        env = self.env
        result = env.reset(seed=0)
        demand("types", isinstance(result, tuple) and len(result) == 2 and type(result[1]) is dict,
               "reset must return (observation, info dict)", type(result).__name__)
        for obs, *_ in [result, *self.transitions()]:
            demand("types", isinstance(obs, np.ndarray) and obs in env.observation_space,
                   "the observation is outside its space",
                   f"{getattr(obs, 'dtype', type(obs))} {getattr(obs, 'shape', '')}",
                   env.observation_space)
        for _, reward, terminated, truncated, info in self.transitions():
            for name, value, kind in (("reward", reward, float), ("terminated", terminated, bool),
                                      ("truncated", truncated, bool), ("info", info, dict)):
                demand("types", type(value) is kind, f"{name} is no {kind.__name__}", type(value))

    def metadata(self) -> None:
        """What a caller must know is data."""
        known = self.env.metadata
        for name, kind in (("frames_per_chunk", int), ("control_rate_hz", float),
                           ("observation_frame", str), ("action_mapping", str),
                           ("render_modes", list)):
            demand("metadata", isinstance(known.get(name), kind),
                   f"metadata[{name!r}] is missing or of the wrong type", known.get(name), kind)
        demand("metadata", known.get("render_fps", 0) > 0, "metadata['render_fps'] is missing",
               known.get("render_fps"))

    def seeds(self) -> None:
        """Exact replay, seed 0, and the following episode."""
        for seed in (0, 12345):
            gap = difference(self.play(seed), self.play(seed))
            demand("seeds", not gap, f"seed {seed} did not repeat itself", gap)
        streams = [self.play(seed)[: self.steps // 2] for seed in range(4)]
        demand("seeds", any(difference(streams[0], s) for s in streams[1:]),
               "four seeds gave the same stream", "seeds 0 to 3", "seeds that matter")
        self.env.reset(seed=0)
        first = frozen(self.env.reset())
        self.env.reset(seed=0)
        gap = difference(first, frozen(self.env.reset()))
        demand("seeds", not gap, "reset() after reset(seed=0) did not repeat itself", gap)

    def global_rng(self) -> None:
        """Global generators neither move nor matter."""
        with watched_generators():
            before = self.play()
            repeats = not difference(before, self.play())
        with other_generators():
            gap = difference(before, self.play()) if repeats else ""  # else: a matter of seeds
        demand("global-rng", not gap, "global generators changed the stream", gap)

    def aliasing(self) -> None:
        """Scribbling over returned arrays changes nothing; old ones stay as they were."""
        clean = self.transitions()
        kept, copies, scribbled = [], [], []
        self._scribble(self.env.reset(seed=0)[0])
        for action in self.actions:
            result = self.env.step(action)
            kept.append(result[0])
            copies.append(frozen(result[0]))
            scribbled.append(frozen(result))
            if result[2] or result[3]:
                self._scribble(self.env.reset()[0])
            elif len(kept) % 2:
                self._scribble(result[0])
                self._scribble(result[4].get("frames"))
                copies[-1] = frozen(result[0])
        gap = difference(clean, scribbled)
        demand("aliasing", not gap, "writing into a returned array changed later ones", gap)
        gap = difference(copies, kept)
        demand("aliasing", not gap, "an array returned earlier was changed", gap)

    @staticmethod
    def _scribble(array: Any) -> None:
        if isinstance(array, np.ndarray) and array.dtype != object and array.flags.writeable:
            array[...] = 77

    def start_frame(self) -> None:
        """Start by index does not depend on the seed; the user's image comes back."""
        pair = [frozen(self.env.reset(seed=s, options={"start": 0})[0]) for s in (1, 2)]
        gap = difference(*pair)
        demand("start-frame", not gap, "start 0 looked different under two seeds", gap)
        space = self.env.observation_space
        if space.dtype != np.uint8:
            raise NotSeen("latent observations: the given image cannot come back")
        image = np.random.default_rng(5).integers(0, 256, (*space.shape[:2], 3), np.uint8)
        given = image.copy()
        shown = self.env.reset(seed=0, options={"frame": image})[0][..., -3:]
        gap = difference(given, np.ascontiguousarray(shown))
        demand("start-frame", not gap, "reset did not return the given image", gap)

    def end_frame(self) -> None:
        """Number of frames, end frame, and that the observation is the last that counts."""
        chunk, seen_end = self.env.metadata["frames_per_chunk"], False
        for obs, _, terminated, _, info in self._many_transitions():
            demand("end-frame", terminated == ("end_frame" in info),
                   "end_frame must be in info exactly when the episode terminated",
                   f"terminated={terminated}, info has {sorted(info)}")
            last = info.get("end_frame", chunk - 1)
            demand("end-frame", type(last) is int and 0 <= last < chunk,
                   "end_frame is no frame of the chunk", last, f"an int in 0..{chunk - 1}")
            seen_end |= terminated
            if obs.dtype != np.uint8:
                continue
            frames, count = info.get("frames"), last + 1 - info.get("first_frame", 0)
            demand("end-frame", isinstance(frames, np.ndarray) and len(frames) == count,
                   "info['frames'] must hold the frames up to the end and no more",
                   None if frames is None else len(frames), f"{count} frames")
            gap = difference(np.ascontiguousarray(frames[-1]),
                             np.ascontiguousarray(obs[..., -3:]))
            demand("end-frame", not gap, "the observation is not the last frame that counts", gap)
        if not seen_end:
            raise NotSeen("no episode terminated within the rollouts")

    def _many_transitions(self) -> list[Any]:
        if self._seen is None:
            self._seen = [t for seed in range(4) for t in self.transitions(seed)]
        return self._seen

    def truncation(self) -> None:
        """Never both flags; a reason exactly when truncated; the horizon is kept."""
        horizon, length, seen = self.env.metadata.get("horizon"), 0, False
        for number, (_, _, terminated, truncated, info) in enumerate(self._many_transitions()):
            length = 1 if number % self.steps == 0 else length + 1
            demand("truncation", not (terminated and truncated),
                   "a step was terminated and truncated", info)
            reason = info.get("truncation_reason")
            demand("truncation", truncated == bool(reason),
                   "truncation_reason must be given exactly when truncated",
                   f"truncated={truncated}, reason={reason!r}")
            demand("truncation", horizon is None or length <= horizon,
                   "an episode outlived the horizon", length, horizon)
            seen |= truncated
            length = 0 if terminated or truncated else length
        if not seen:
            raise NotSeen("no episode was truncated within the rollouts")

    def uncertainty(self) -> None:
        """Where a step has an uncertainty, it is a sane number."""
        values = [i["uncertainty"] for *_, i in self.transitions() if "uncertainty" in i]
        for value in values:
            demand("uncertainty", type(value) is float and np.isfinite(value) and value >= 0,
                   "uncertainty is no finite float of at least 0", value)
        if not values:
            raise NotSeen("the env reports no uncertainty")

    def state(self) -> None:
        """Restoring at several points, twice, repeats everything."""
        for warm in (0, 1, self.steps // 2):
            self.env.reset(seed=3)
            rollout(self.env, self.actions[:warm])
            state = self.env.get_state()
            first = rollout(self.env, self.actions)
            for _ in range(2):
                self.env.set_state(state)
                gap = difference(first, rollout(self.env, self.actions))
                demand("state", not gap, f"restoring after {warm} steps did not repeat", gap)

    def fork(self) -> None:
        """Forks repeat; stepping and closing them leaves the parent alone."""
        self.env.reset(seed=3)
        rollout(self.env, self.actions[:2])
        state = self.env.get_state()
        alone = rollout(self.env, self.actions)
        self.env.set_state(state)
        forks = self.env.fork(2)
        demand("fork", len(forks) == 2, "fork(2) did not make two envs", len(forks))
        rollout(forks[1], self.actions[::-1])
        forks[1].close()
        for name, env in (("the parent after its fork was used", self.env), ("a fork", forks[0])):
            gap = difference(alone, rollout(env, self.actions))
            demand("fork", not gap, f"{name} went another way", gap)
        forks[0].close()

    def _saved(self, folder: str) -> Any:
        self.env.reset(seed=3)
        rollout(self.env, self.actions[:3])
        path = Path(folder) / "state.bin"
        self.env.save_state(path)
        return path, rollout(self.env, self.actions)

    def safe_loading(self) -> None:
        """The file is no pickle, loads here, and a pickle is refused."""
        with tempfile.TemporaryDirectory() as folder:
            path, expected = self._saved(folder)
            demand("safe-loading", looks_safe(path.read_bytes()[:9]),
                   "the saved state is a pickle or an archive", path.read_bytes()[:9],
                   "safetensors")
            self.env.load_state(path)
            gap = difference(expected, rollout(self.env, self.actions))
            demand("state", not gap, "a saved state did not repeat", gap)
            evil = Path(folder) / "evil.pkl"
            evil.write_bytes(pickle.dumps(Evil(str(Path(folder) / "ran"))))
            refuses("safe-loading", lambda: self.env.load_state(evil), WorldGymError,
                    "loading a pickle")
            demand("safe-loading", not (Path(folder) / "ran").exists(),
                   "loading a pickle ran its code", "the code ran")

    def another_process(self) -> None:
        """The saved state in a fresh Python process."""
        if self.factory is None or not self.spawn:
            raise NotSeen("needs a factory and other_process=True")
        try:
            pickle.dumps(self.factory)
        except Exception as error:
            raise NotSeen(f"the factory does not pickle: {error}") from error
        context = multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory() as folder:
            path, expected = self._saved(folder)
            ours, theirs = context.Pipe()
            child = context.Process(target=_in_another_process,
                                    args=(self.factory, str(path), self.actions, theirs))
            child.start()
            answer = ours.recv() if ours.poll(120) else "no answer within 120 s"
            child.join(10)
            if isinstance(answer, str):
                raise ConformanceError("other-process", "the other process failed", given=answer)
            gap = difference(expected, answer)
            demand("other-process", not gap, "the other process went another way", gap)

    def refusal(self) -> None:
        """Bad actions, seeds, options and states: a named error, and nothing changes."""
        env = self.env
        env.reset(seed=4)
        rollout(env, self.actions[:1])
        state = env.get_state()
        after = self.actions[:6]
        expected = rollout(env, after)
        calls: dict[str, Callable[[], Any]] = {
            f"action {action!r}"[:60]: partial(env.step, action)
            for action in bad_actions(env.action_space)}
        calls |= {f"seed {s!r}": partial(env.reset, seed=s) for s in (-1, "one", 0.5)}
        calls |= {f"options {o!r}"[:60]: partial(env.reset, options=o) for o in (
            {"no such option": 1}, {"start": -1}, {"start": 10**9}, {"frame": np.zeros(3)}, [1])}
        calls["state None"] = lambda: env.set_state(None)
        for what, call in calls.items():
            env.set_state(state)
            refuses("refusal", call, WorldGymError, what)
            gap = difference(expected, rollout(env, after))
            demand("refusal", not gap, f"after {what} the env went another way", gap)

    def render(self) -> None:
        """A frame that is fresh, and a stream that does not care."""
        if self.env.render_mode != "rgb_array":
            raise NotSeen("the env was not made with render_mode='rgb_array'")
        clean = self.play()
        obs = [frozen(self.env.reset(seed=0))]
        for action in self.actions:
            frame = self.env.render()
            demand("render", isinstance(frame, np.ndarray) and frame.dtype == np.uint8
                   and frame.ndim == 3 and frame.shape[2] == 3,
                   "not a uint8 frame (H, W, 3)", getattr(frame, "shape", type(frame)))
            self._scribble(frame)
            obs += rollout(self.env, [action])
        gap = difference(clean, obs)
        demand("render", not gap, "rendering changed the stream", gap)

    def gymnasium(self) -> None:
        """Gymnasium's checker, warnings as errors."""
        from gymnasium.utils.env_checker import check_env

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_env(self.env.unwrapped, skip_render_check=True)

    def sb3(self) -> None:
        """Stable-Baselines3's checker, warnings as errors but for its advice on images."""
        try:
            from stable_baselines3.common.env_checker import check_env
        except ImportError:
            raise NotSeen("stable-baselines3 is not installed") from None
        kind = self.env.action_space
        if isinstance(kind, spaces.Dict) or getattr(kind, "nvec", np.ones(1)).ndim != 1:
            raise NotSeen("SB3 has no use for Dict actions or matrices of discrete ones")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # latents are (C, h, w) floats, which SB3 takes for badly scaled pictures
            if self.env.observation_space.dtype != np.uint8:
                warnings.filterwarnings("ignore", message=".*(image|CNN|normalize).*")
            warnings.filterwarnings("ignore", message=".*symmetric and normalized Box action.*")
            check_env(self.env.unwrapped)

    def closed(self) -> None:
        """After close every call is refused."""
        self.env.reset(seed=0)
        self.env.close()
        self.env.close()
        refuses("closed", lambda: self.env.step(self.actions[0]), ClosedError, "step after close")
        refuses("closed", lambda: self.env.reset(), ClosedError, "reset after close")
