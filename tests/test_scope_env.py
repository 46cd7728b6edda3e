"""``worldgym/SCOPE-v0`` on a tiny published folder: conformance, options, refusals."""

import sys
import warnings
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
for package in ("diffusers", "transformers", "sentencepiece", "ftfy", "PIL"):
    pytest.importorskip(package)

import scope_folder as layout  # noqa: E402

import worldgym  # noqa: E402, F401
from worldgym.envs.make import make_dream, make_dream_vector  # noqa: E402
from worldgym.errors import (  # noqa: E402
    ActionError,
    CheckpointError,
    ConfigError,
    DatasetError,
    DTypeError,
    ShapeError,
    WorldGymError,
)
from worldgym.testing import check_dream_env, check_dream_vector_env  # noqa: E402

ID = "worldgym/SCOPE-v0"
SMALL = dict(height=32, width=64, latents=1, steps=1, horizon=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return layout.write_folder(tmp_path_factory.mktemp("scope"))


def make(folder, **settings):
    return make_dream(ID, model=str(folder), **{**SMALL, **settings})


def held(y=-1.0, fire=1):
    return {"buttons": np.array([fire, 0, 0, 0, 0, 0]), "move": np.array([0.0, y]),
            "camera": np.array([0.25, 0.0])}


@pytest.mark.parametrize("settings", [
    {"render_mode": "rgb_array"},
    {"flat_actions": True, "observation": "latent", "carry": "latent", "guidance": 1.0}], ids=str)
def test_conformance(folder, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = check_dream_env(
            partial(make_dream, ID, model=str(folder), **{**SMALL, **settings}), steps=4,
            other_process="render_mode" in settings)
    for rule in ("types", "start-frame", "end-frame", "truncation", "seeds", "global-rng", "state",
                 "fork", "refusal", "gymnasium", "closed"):
        assert rule in report.passed or (rule, settings.get("observation")) == (
            "start-frame", "latent") or rule == "end-frame", report
    if "flat_actions" in settings:  # SB3 has no use for Dict actions
        pytest.importorskip("stable_baselines3")
        assert "sb3" in report.passed, report


def test_vector_conformance(folder):
    check_dream_vector_env(
        lambda **given: make_dream_vector(ID, model=str(folder), **SMALL, **given,
                                         reward=lambda c: np.ones(len(c.slots))), num_envs=2,
        steps=4)


def test_made_by_its_id(folder):
    env = gymnasium.make(ID, model=folder, **SMALL)
    assert isinstance(env.action_space, gymnasium.spaces.Dict)
    assert env.action_space["buttons"] == gymnasium.spaces.MultiBinary(6)
    assert env.action_space["move"].shape == env.action_space["camera"].shape == (2,)
    picture = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    obs, info = env.reset(seed=1, options={"image": picture, "prompt": "a soldier"})
    assert obs.shape == (32, 64, 3) and info["start"] == -1
    from worldgym.clip import ClipSize, fit_image

    assert (obs == fit_image(picture, ClipSize(32, 64, 5))).all()
    obs, reward, ended, cut, info = env.step(held())
    assert info["frames"].shape == (4, 32, 64, 3) and (info["frames"][-1] == obs).all()
    assert (reward, ended, cut) == (0.0, False, False)
    many = gymnasium.make_vec(ID, num_envs=2, model=folder, **SMALL)
    both, _ = many.reset(seed=1, options={"image": picture, "prompt": ["a soldier", "the fox"]})
    both, *_ = many.step({k: np.stack([v, v]) for k, v in held().items()})
    assert (both[0] == obs).all()


def test_what_the_dream_hears(folder):
    """Texts, every part of an action and actions per frame matter; a flat action is the same."""
    env = make(folder, observation="latent")

    def after(action=None, on=env, **options):
        on.reset(seed=0, options=options)
        return on.step(held() if action is None else action)[0]

    want = after(prompt="a soldier")
    assert (after(prompt="a soldier") == want).all()
    other = [after(prompt="the fox"), after(prompt="a soldier", negative_prompt="rain"),
             after(held(y=1.0), prompt="a soldier"), after(held(fire=0), prompt="a soldier"),
             after({**held(), "camera": np.zeros(2)}, prompt="a soldier")]
    assert all((o != want).any() for o in other)
    flat = make(folder, observation="latent", flat_actions=True)
    assert flat.action_space.shape == (10,)
    row = np.array([1, 0, 0, 0, 0, 0, 0, -1, 0.25, 0], np.float32)
    assert (after(row, flat, prompt="a soldier") == want).all()
    dense = make(folder, observation="latent", actions="per_frame")
    rows = {k: np.stack([v] * 4) for k, v in held().items()}
    assert (after(rows, dense, prompt="a soldier") == want).all()
    rows["move"][1:] = 0
    assert (after(rows, dense, prompt="a soldier") != want).any()


def test_reward_end_and_drift_are_pluggable(folder):
    env = make(folder, reward=lambda c: c.frames().float().mean((2, 3, 4)),
               end=lambda c: np.array([[False, True, False, False]] * len(c.slots)))
    env.reset(seed=0)
    _, reward, ended, _, info = env.step(held())
    assert ended and info["end_frame"] == 1 and len(info["frames"]) == 2
    assert reward == pytest.approx(info["frames"].mean((1, 2, 3)).sum(), rel=1e-5)
    env = make(folder, drift=0.0)
    env.reset(seed=0)
    _, _, ended, cut, info = env.step(held())
    assert cut and not ended and info["truncation_reason"] == "drift" and info["drift"] > 0
    env = make(folder, drift=1e9, distrust=0.0, forks=2)
    env.reset(seed=0)
    assert env.step(held())[4]["truncation_reason"] == "distrust"


def test_the_text_encoder_is_let_go(folder, monkeypatch):
    import gc
    import weakref

    from worldgym.models import umt5

    made, load = [], umt5.TextEncoder.load.__func__

    def watched(cls, *args, **kwargs):
        encoder = load(cls, *args, **kwargs)
        made.append(weakref.ref(encoder.net))
        return encoder

    monkeypatch.setattr(umt5.TextEncoder, "load", classmethod(watched))
    env = make(folder, prompt=["a soldier", "the fox"], image=[np.zeros((32, 64, 3), np.uint8)] * 2)
    assert len(made) == 1
    for _ in range(2):
        env.reset(options={"prompt": "rain"})
        env.step(held())
        env.reset(options={"start": 1})
    gc.collect()
    assert len(made) == 2 and all(ref() is None for ref in made)


def test_named_errors(folder, tmp_path):
    with pytest.raises(ConfigError, match="no model folder"):
        gymnasium.make(ID)
    with pytest.raises(CheckpointError, match="not a SCOPE folder"):
        gymnasium.make(ID, model=tmp_path / "nowhere")
    with pytest.raises(ShapeError, match="multiples of 32"):
        make(folder, height=33)
    for wrong in (dict(latents=0), dict(carry="nothing"), dict(solver="none"), dict(drift=-1),
                  dict(prompt=["a", "b"]), dict(image=[]), dict(dtype="int8"), dict(stepz=1)):
        with pytest.raises(ConfigError):
            make(folder, **wrong)
    env = make(folder)
    with pytest.raises(DatasetError, match="picture"):
        env.reset(options={"image": str(tmp_path / "none.png")})
    with pytest.raises(DTypeError, match="prompt is not a text"):
        env.reset(options={"prompt": 3})
    with pytest.raises(ConfigError, match="contradictory"):
        env.reset(options={"image": np.zeros((9, 9, 3), np.uint8), "start": 0})
    env.reset(seed=0)
    with pytest.raises(ActionError, match="parts"):
        env.step(np.zeros(10))
    with pytest.raises(ActionError, match="neither 0 nor 1"):
        env.step({**held(), "buttons": np.full(6, 0.5)})


def test_wrong_inputs_leave_the_episode_as_it_was(folder, tmp_path):
    env = make(folder, observation="latent", carry="latent")
    env.reset(seed=0, options={"prompt": "a soldier"})
    state, want = env.get_state(), env.step(held())[0]
    env.set_state(state)
    square = np.zeros((9, 9, 3), np.uint8)
    for options in ({"image": str(tmp_path / "none.png")}, {"image": square[..., :2]},
                    {"image": square.astype(np.float32)}, {"prompt": 3}, {"negative_prompt": 3},
                    {"image": square, "prompt": 3}, {"image": square, "start": 0}, {"pictures": 1}):
        with pytest.raises(WorldGymError):
            env.reset(seed=9, options=options)
    for action in (np.zeros(10), {**held(), "move": np.array([0.0, 2.0])},
                   {**held(), "camera": np.full(2, np.nan)}, {"buttons": np.zeros(6)},
                   {**held(), "buttons": np.full(6, 2)}):
        with pytest.raises(WorldGymError):
            env.step(action)
    assert (env.step(held())[0] == want).all()
