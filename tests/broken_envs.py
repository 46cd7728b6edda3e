"""Envs that break one promise each, and the name of the rule that must catch them."""

import os
import pickle
import random
import time

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode

from tests.fakes import fake_task
from worldgym.envs.dream import DreamEnv
from worldgym.envs.vector import DreamVectorEnv

BROKEN = {}  # name -> (rule, class, keywords of the fake task)
BROKEN_VECTOR = {}  # name -> (rule, class, keywords of the env)


def breaks(rule, **task):
    def note(cls):
        BROKEN[cls.__name__] = (rule, cls, task)
        return cls
    return note


def breaks_vector(rule, **settings):
    def note(cls):
        BROKEN_VECTOR[cls.__name__] = (rule, cls, settings)
        return cls
    return note


def make_broken(name, render_mode="rgb_array"):
    """Factory (use with functools.partial) of a broken env that another process can import."""
    _, cls, task = BROKEN[name]
    task = dict(task)
    view = {k: task.pop(k) for k in ("frame_stack", "observation") if k in task}
    return cls(fake_task(**{"horizon": 10, **task}), render_mode=render_mode, **view)


@breaks("global-rng")
class ReadsGlobalNoise(DreamEnv):
    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, reward + float(np.random.rand()), *rest


@breaks("global-rng")
class SetsGlobalSeed(DreamEnv):
    def reset(self, *, seed=None, options=None):
        random.seed(seed)
        return super().reset(seed=seed, options=options)


@breaks("global-rng")
class PeeksAtGlobalState(DreamEnv):
    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, reward + float(np.random.get_state()[1][3]), *rest


@breaks("seeds")
class ZeroIsNoSeed(DreamEnv):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed or None, options=options)


@breaks("seeds")
class IgnoresSeeds(DreamEnv):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=3, options={"start": 2} | (options or {}))


@breaks("seeds")
class TellsTheTime(DreamEnv):
    def step(self, action):
        *rest, info = super().step(action)
        return *rest, {**info, "took": time.perf_counter()}


@breaks("aliasing")
class ReusesItsBuffer(DreamEnv):
    buffer = None

    def step(self, action):
        obs, *rest = super().step(action)
        if self.buffer is None:
            self.buffer = obs.copy()
        self.buffer[...] = obs
        return self.buffer, *rest


@breaks("aliasing", frame_stack=2)
class ShowsItsState(DreamEnv):
    def step(self, action):
        _, *rest = super().step(action)
        return self.core._state.stack_B[0], *rest


@breaks("types")
class NumpyFlag(DreamEnv):
    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, terminated, np.bool_(truncated), info


@breaks("types")
class NumpyReward(DreamEnv):
    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, np.float32(reward), *rest


@breaks("types")
class FloatObservation(DreamEnv):
    def step(self, action):
        obs, *rest = super().step(action)
        return obs / 255.0, *rest


@breaks("metadata")
class HidesItsChunk(DreamEnv):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        del self.metadata["frames_per_chunk"]


@breaks("start-frame")
class StepsInReset(DreamEnv):
    def reset(self, *, seed=None, options=None):
        _, info = super().reset(seed=seed, options=options)
        return super().step(0)[0], info


@breaks("end-frame", frames=3)
class KeepsFramesAfterTheEnd(DreamEnv):
    def step(self, action):
        *rest, info = super().step(action)
        info["frames"] = np.resize(info["frames"], (3, 40, 40, 3))
        return *rest, info


@breaks("end-frame", frames=3)
class HidesTheEndFrame(DreamEnv):
    def step(self, action):
        *rest, info = super().step(action)
        info.pop("end_frame", None)
        return *rest, info


@breaks("end-frame", frames=3)
class ShowsTheFirstFrame(DreamEnv):
    def step(self, action):
        obs, *rest, info = super().step(action)
        return info["frames"][0].copy(), *rest, info


@breaks("truncation")
class TruncatesWithoutReason(DreamEnv):
    def step(self, action):
        *rest, info = super().step(action)
        info.pop("truncation_reason", None)
        return *rest, info


@breaks("truncation")
class EndsTwice(DreamEnv):
    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        if truncated:
            info["end_frame"] = 0
        return obs, reward, terminated or truncated, truncated, info


@breaks("truncation")
class OutlivesItsHorizon(DreamEnv):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.metadata["horizon"] = 4


@breaks("uncertainty", distrust=100.0)
class UncertainAboutUncertainty(DreamEnv):
    def step(self, action):
        *rest, info = super().step(action)
        return *rest, {**info, "uncertainty": -1.0}


@breaks("state")
class ForgetsAVariable(DreamEnv):
    count = 0

    def reset(self, *, seed=None, options=None):
        self.count = 0
        return super().reset(seed=seed, options=options)

    def step(self, action):
        self.count += 1
        obs, reward, *rest = super().step(action)
        return obs, reward + self.count, *rest


@breaks("state")
class StateIsALiveObject(DreamEnv):
    def get_state(self):
        self.kept = [super().get_state()]
        return self.kept

    def step(self, action):
        result = super().step(action)
        if hasattr(self, "kept"):
            self.kept[0] = super().get_state()
        return result

    def set_state(self, state):
        super().set_state(state[0])


@breaks("fork")
class ForksAreTheParent(DreamEnv):
    def fork(self, n=1, fresh=False):
        return [super().fork(1)[0], self][:n]

    def close(self):
        pass


@breaks("safe-loading")
class SavesPickles(DreamEnv):
    def save_state(self, path):
        with open(path, "wb") as file:
            pickle.dump(self.get_state(), file)

    def load_state(self, path):
        with open(path, "rb") as file:
            self.set_state(pickle.load(file))


@breaks("other-process")
class DependsOnItsProcess(DreamEnv):
    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, reward + os.getpid(), *rest


@breaks("refusal")
class ClipsBadActions(DreamEnv):
    def step(self, action):
        if isinstance(action, int | float) and action == action:
            action = int(np.clip(action, 0, 2))
        return super().step(action)


@breaks("refusal")
class StepsBeforeRefusing(DreamEnv):
    def step(self, action):
        if not self.action_space.contains(action):
            super().step(0)
        return super().step(action)


@breaks("refusal")
class UnnamedErrors(DreamEnv):
    def step(self, action):
        if self.core._state is not None and not self.action_space.contains(action):
            raise ValueError("bad action")
        return super().step(action)


@breaks("refusal")
class IgnoresUnknownOptions(DreamEnv):
    def reset(self, *, seed=None, options=None):
        if isinstance(options, dict):
            options = {k: v for k, v in options.items() if k in ("start", "frame")}
        return super().reset(seed=seed, options=options)


@breaks("reset-needed")
class ResetsItself(DreamEnv):
    def step(self, action):
        if self.core._state is None:
            self.reset()
        return super().step(action)


@breaks("reset-needed")
class StepsPastTheEnd(DreamEnv):
    def step(self, action):
        if self.core._state is not None and self.core.done_B[0]:
            self.reset()
        return super().step(action)


@breaks("render")
class RenderingDreamsOn(DreamEnv):
    def render(self):
        frame = super().render()
        if not self.core.done_B[0]:
            self.step(0)
        return frame


@breaks("closed")
class NeverCloses(DreamEnv):
    def close(self):
        pass


@breaks("gymnasium")
class OldSeedMethod(DreamEnv):
    def seed(self, seed=None):
        return [seed]


@breaks("sb3")
class OddActionBox(DreamEnv):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.action_space = gymnasium.spaces.Discrete(2, start=1)


# ---------------------------------------------------------------------- vector


@breaks_vector("slot-reset")
class ResetsTheNeighbour(DreamVectorEnv):
    def reset(self, *, seed=None, options=None):
        if options and "reset_mask" in options and options["reset_mask"][0]:
            options = {"reset_mask": options["reset_mask"] | (np.arange(self.num_envs) == 1)}
        return super().reset(seed=seed, options=options)


@breaks_vector("batch-invariance")
class PaysForCompany(DreamVectorEnv):
    def step(self, actions):
        obs, reward, *rest = super().step(actions)
        return obs, reward * self.num_envs, *rest


@breaks_vector("autoreset")
class DeclaresAnotherMode(DreamVectorEnv):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.metadata["autoreset_mode"] = AutoresetMode.SAME_STEP


@breaks_vector("autoreset")
class ModeIsAWord(DreamVectorEnv):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.metadata["autoreset_mode"] = "NextStep"


@breaks_vector("autoreset")
class UsesIgnoredActions(DreamVectorEnv):
    def step(self, actions):
        obs, reward, *rest = super().step(actions)
        return obs, reward + np.asarray(actions), *rest


@breaks_vector("autoreset", autoreset_mode="SameStep")
class LosesTheFinalObservation(DreamVectorEnv):
    def step(self, actions):
        *rest, infos = super().step(actions)
        infos.pop("final_obs", None)
        return *rest, infos


@breaks_vector("autoreset", autoreset_mode="Disabled")
class ResetsAnyway(DreamVectorEnv):
    def step(self, actions):
        if self.core.done_B.any():
            self.reset(options={"reset_mask": self.core.done_B})
        return super().step(actions)


@breaks_vector("types")
class InfoWithoutMask(DreamVectorEnv):
    def step(self, actions):
        *rest, infos = super().step(actions)
        infos.pop("_frames")
        return *rest, infos


@breaks_vector("types")
class ListsForFlags(DreamVectorEnv):
    def step(self, actions):
        obs, reward, terminated, truncated, infos = super().step(actions)
        return obs, reward, terminated, truncated.astype(np.int64), infos


@breaks_vector("seeds")
class OneSeedForAll(DreamVectorEnv):
    def reset(self, *, seed=None, options=None):
        if isinstance(seed, int) and seed >= 0:
            seed = [seed] * self.num_envs
        return super().reset(seed=seed, options=options)


@breaks_vector("truncation")
class VectorWithoutReason(DreamVectorEnv):
    def step(self, actions):
        *rest, infos = super().step(actions)
        infos.pop("truncation_reason", None)
        infos.pop("_truncation_reason", None)
        return *rest, infos


@breaks_vector("refusal")
class PadsShortBatches(DreamVectorEnv):
    def step(self, actions):
        if actions is not None and len(actions) == self.num_envs - 1:
            actions = [*actions, 0]
        return super().step(actions)
