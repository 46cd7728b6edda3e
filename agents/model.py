"""Trained agents on disk: a Stable-Baselines3 zip that also says how to use it, loaded safely.

An agent file is an ordinary SB3 zip plus one member, ``worldgym.json``: algorithm, observation,
stack, spaces and network. From it the policy is built anew and the weights are read with
``weights_only=True``: nothing in the file is ever run.
"""

from __future__ import annotations

import importlib
import io
import json
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldgym.actions import ActionSpec
from worldgym.agents.encode import FrameObservation, LatentObservation
from worldgym.agents.policy import acting
from worldgym.agents.results import atomic_bytes
from worldgym.errors import CheckpointError, ConfigError, MissingDependencyError, UnsafeFileError

MEMBER = "worldgym.json"
NEEDED = ("algorithm", "policy", "network", "observation", "frame_stack", "observation_shape",
          "frame_hw", "action")


def algorithm_class(name: str) -> type:
    """The class of an SB3 or sb3-contrib algorithm by its name, such as ``PPO``."""
    found = []
    for library in ("stable_baselines3", "sb3_contrib"):
        try:
            module = importlib.import_module(library)
        except ImportError:
            continue
        known = {k: v for k, v in vars(module).items() if isinstance(v, type) and k.isupper()}
        known |= {k: v for k, v in vars(module).items() if k in ("MaskablePPO", "RecurrentPPO",
                                                                  "CrossQ")}
        found += sorted(known)
        if name in known:
            return known[name]
    if not found:
        raise MissingDependencyError("training needs Stable-Baselines3", given="not installed",
                                     expected="stable-baselines3",
                                     fix="pip install 'worldgym[rl]'")
    raise ConfigError("unknown algorithm", given=repr(name),
                      expected=f"one of {sorted(set(found))}",
                      fix="check the spelling; sb3-contrib's need pip install sb3-contrib")


def policy_kwargs(network: dict[str, Any]) -> dict[str, Any]:
    """SB3's ``policy_kwargs`` of a network written as plain data."""
    import torch

    kwargs: dict[str, Any] = {"net_arch": network.get("net_arch", [64, 64])}
    if "activation" in network:
        kwargs["activation_fn"] = getattr(torch.nn, network["activation"])
    if network.get("extractor") in ("latent", "tokens"):
        from worldgym.agents.extractor import LatentExtractor, TokenExtractor

        kwargs["features_extractor_class"] = (
            LatentExtractor if network["extractor"] == "latent" else TokenExtractor)
        kwargs["features_extractor_kwargs"] = dict(network.get("extractor_kwargs", {}))
    if network.get("extractor") == "crop":
        from worldgym.agents.party_learner import CropExtractor

        kwargs["features_extractor_class"] = CropExtractor
        kwargs["features_extractor_kwargs"] = dict(network.get("extractor_kwargs", {}))
    return kwargs


def save_agent(model: Any, path: str | Path, facts: dict[str, Any]) -> Path:
    """Write ``model`` and its ``facts`` to one zip, atomically."""
    path = Path(path)
    missing = [key for key in NEEDED if key not in facts]
    if missing:
        raise ConfigError("agent facts are incomplete", given=sorted(facts),
                          expected=f"also {missing}", fix="save through worldgym.agents.train")
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    model.save(buffer)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(MEMBER, json.dumps({"format": 1, **facts}, indent=1))
    atomic_bytes(path, buffer.getvalue())
    return path


def read_facts(path: str | Path) -> dict[str, Any]:
    """The facts of an agent file, checked."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError("agent file is missing", given=path, expected="an existing agent.zip",
                              fix="train one with `worldgym train`")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            text = archive.read(MEMBER) if MEMBER in names else None
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise CheckpointError("agent file is broken", given=f"{path} ({error})",
                              expected="a zip written by worldgym train",
                              fix="copy the file again or train anew") from error
    if text is None:
        raise UnsafeFileError(
            "not a worldgym agent; a plain Stable-Baselines3 zip could run code when opened",
            given=f"{path} with {names}", expected=f"a zip with {MEMBER}",
            fix="open it yourself with PPO.load if you trust it, and write it with save_agent")
    facts = json.loads(text)
    missing = [key for key in NEEDED if key not in facts]
    if facts.get("format") != 1 or missing:
        raise CheckpointError("agent file of another format", given=f"format {facts.get('format')},"
                              f" without {missing}", expected="format 1, complete",
                              fix="train again with this version")
    return facts


def load_agent(path: str | Path, world: Any = None, deterministic: bool = True) -> TrainedPolicy:
    """The policy in an agent file.

    Args:
        path: the zip.
        world: the world (or a function that returns it) whose codec a latent policy reads through.
        deterministic: take the most probable action, or draw one with the slot's own noise.
    """
    facts = read_facts(path)
    policy = build_policy(facts)
    load_weights(policy, path)
    policy.set_training_mode(False)
    for parameter in policy.parameters():
        parameter.requires_grad_(False)
    return TrainedPolicy(policy, facts, world, deterministic, name=Path(path).stem)


def load_weights(policy: Any, path: str | Path) -> None:
    """Load the weights of an agent file into an SB3 policy of the same network."""
    import torch

    try:
        with zipfile.ZipFile(path) as archive:
            data = io.BytesIO(archive.read("policy.pth"))
        state = torch.load(data, map_location="cpu", weights_only=True)
        policy.load_state_dict(state, strict=True)
    except pickle.UnpicklingError as error:
        raise UnsafeFileError("agent weights are a pickle that wants to run code", given=str(path),
                              expected="plain tensors", fix="do not use this file") from error
    except (KeyError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError("agent weights do not fit", given=f"{path}: {error}",
                              expected="the weights of the network described in the file",
                              fix="copy the file again or train anew") from error


def build_policy(facts: dict[str, Any]) -> Any:
    """An SB3 policy with the network that an agent's facts describe, untrained."""
    from gymnasium import spaces

    from worldgym.envs.spaces import action_space

    shape = tuple(facts["observation_shape"])
    box: spaces.Space = spaces.Box(0, 255, shape, np.uint8)
    if facts["observation"] == "latent":
        limit = np.finfo(np.float32).max
        box = spaces.Box(-limit, limit, shape, np.float32)
    cls = algorithm_class(facts["algorithm"])
    return cls.policy_aliases[facts["policy"]](  # type: ignore[attr-defined]
        box, action_space(ActionSpec.from_json(facts["action"])), lambda _: 0.0,
        **policy_kwargs(facts["network"]))


class TrainedPolicy:
    """A trained SB3 policy that acts on frames or on latents; satisfies ``Policy``."""

    def __init__(self, policy: Any, facts: dict[str, Any], world: Any = None,
                 deterministic: bool = True, name: str = "trained") -> None:
        self.policy, self.facts, self.name = policy, facts, name
        self.deterministic = deterministic
        self.observes: str = facts["observation"]
        self._memory: Any = None
        self._starts: np.ndarray = np.zeros(0, bool)
        self._keys: np.ndarray = np.zeros((0, 2), np.int64)
        self._seed = 0
        if self.observes == "frame":
            self.view: Any = FrameObservation(tuple(facts["frame_hw"]), facts["frame_stack"])
            return
        world = world() if callable(world) and not hasattr(world, "encode") else world
        if world is None:
            raise ConfigError("a latent policy needs its world", given="no world",
                              expected="the world it was trained in",
                              fix="pass world=load_task(id).world")
        self.view = LatentObservation(world, facts["frame_stack"])

    def reset(self, n: int, seed: int) -> None:
        """Prepare ``n`` slots."""
        self._seed, self._memory = int(seed), None
        self._keys = np.zeros((n, 2), np.int64)
        self._keys[:, 0] = -1
        self.view.reset(n)

    def act(self, frames_NHWC: np.ndarray, t: int | np.ndarray,
            slots: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Actions from frames."""
        return self._decide(self.view.frames(frames_NHWC, t, slots), t, slots)

    def act_latents(self, latents_NCHW: np.ndarray, t: int | np.ndarray,
                    slots: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Actions from the dream's own latents; nothing is decoded or encoded."""
        return self._decide(self.view.latents(latents_NCHW, t, slots), t, slots)

    def _decide(self, obs: np.ndarray, t: int | np.ndarray,
                slots: Sequence[int] | np.ndarray | None) -> np.ndarray:
        index, times = acting(len(obs), t, slots, len(self._keys))
        self._keys[index, 0] += times == 0
        self._keys[index, 1] = times
        if self.observes == "frame" and obs.shape[1:] != tuple(self.facts["observation_shape"]):
            obs = obs.transpose(0, 3, 1, 2)  # SB3 trained on channels first
        if hasattr(self.policy, "lstm_actor"):
            return self._recurrent(obs, index, times)
        if not self.deterministic and hasattr(self.policy, "get_distribution"):
            return self._drawn(obs, index)
        return self.policy.predict(obs, deterministic=True)[0]

    def _drawn(self, obs: np.ndarray, index: np.ndarray) -> np.ndarray:
        import torch

        with torch.no_grad():
            tensor, _ = self.policy.obs_to_tensor(obs)
            logits = getattr(self.policy.get_distribution(tensor).distribution, "logits", None)
        if logits is None or logits.ndim != 2:
            raise ConfigError("only Discrete actions can be drawn", given=self.facts["action"],
                              expected="a Discrete action space", fix="use deterministic=True")
        noise = np.stack([np.random.default_rng([self._seed, slot, *self._keys[slot]])
                          .gumbel(size=logits.shape[1]) for slot in index])
        return (logits.cpu().numpy() + noise).argmax(1)

    def _recurrent(self, obs: np.ndarray, index: np.ndarray, times: np.ndarray) -> np.ndarray:
        shape = self.policy.lstm_hidden_state_shape
        if self._memory is None:
            full = (shape[0], len(self._keys), shape[2])
            self._memory = (np.zeros(full, np.float32), np.zeros(full, np.float32))
        part = tuple(m[:, index] for m in self._memory)
        actions, new = self.policy.predict(obs, state=part, episode_start=times == 0,
                                           deterministic=self.deterministic)
        for whole, fresh in zip(self._memory, new, strict=True):
            whole[:, index] = fresh
        return actions
