"""The conformance suites: good envs pass, every broken one fails by the right rule's name."""

import pickle
from functools import partial

import numpy as np
import pytest

from tests import broken_envs
from tests.broken_envs import BROKEN, BROKEN_VECTOR
from tests.fakes import fake_env, fake_task, fake_vector, nano_env, nano_vector
from worldgym.envs.conformance import RULES, difference, other_generators, watched_generators
from worldgym.testing import ConformanceError, check_dream_env, check_dream_vector_env

STEPS = 24


@pytest.mark.parametrize("settings", [
    {"render_mode": "rgb_array", "frame_stack": 2},
    {"observation": "latent", "frames": 3, "kind": "multi_discrete"},
    {"kind": "box", "frames": 2, "actions": "per_frame"},
    {"kind": "multi_binary", "distrust": 0.3, "penalty": 0.5},
], ids=str)
def test_good_envs_pass(settings):
    report = check_dream_env(partial(fake_env, horizon=10, **settings), steps=STEPS,
                             other_process=False)
    assert {"seeds", "state", "fork", "truncation", "gymnasium", "sb3"} <= set(report.passed)
    assert "other-process" in report.skipped and "other_process=True" in str(report)


def test_good_env_passes_in_another_process_too():
    report = check_dream_env(partial(fake_env, "rgb_array", horizon=10, frames=3), steps=STEPS)
    assert set(report.passed) == {*RULES} - {"batch-invariance", "slot-reset", "autoreset",
                                             "uncertainty"}


def test_instance_instead_of_factory():
    report = check_dream_env(fake_env(horizon=10), steps=STEPS)
    assert "needs a factory" in report.skipped["reset-needed"]


def test_nano_passes():
    report = check_dream_env(partial(nano_env, observation="latent"), steps=16,
                             other_process=False)
    assert "state" in report.passed


@pytest.mark.parametrize("settings", [{}, {"observation": "latent", "frames": 3}], ids=str)
def test_good_vector_envs_pass_in_all_modes(settings):
    report = check_dream_vector_env(partial(fake_vector, horizon=8, **settings), steps=16)
    assert {"autoreset", "batch-invariance", "slot-reset", "state"} <= set(report.passed)


def test_nano_vector_passes():
    report = check_dream_vector_env(
        partial(nano_vector, observation="latent", horizon=6), steps=10, num_envs=2, atol=1e-5)
    assert "batch-invariance" in report.passed


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_broken_env_is_caught(name):
    rule, *_ = BROKEN[name]
    make = partial(broken_envs.make_broken, name)
    with pytest.raises(ConformanceError) as caught:
        check_dream_env(make, steps=STEPS, other_process=rule == "other-process")
    assert caught.value.rule == rule, str(caught.value)
    assert f"rule '{rule}'" in str(caught.value) and "expected" in str(caught.value)


@pytest.mark.parametrize("name", sorted(BROKEN_VECTOR))
def test_broken_vector_env_is_caught(name):
    rule, cls, settings = BROKEN_VECTOR[name]

    def make(num_envs=3):
        return cls(fake_task(horizon=8), num_envs, **settings)

    with pytest.raises(ConformanceError) as caught:
        if rule == "batch-invariance":
            check_dream_vector_env(lambda num_envs, autoreset_mode: cls(
                fake_task(horizon=8), num_envs, autoreset_mode=autoreset_mode), steps=16)
        else:
            check_dream_vector_env(make(), steps=16)
    assert caught.value.rule == rule, str(caught.value)


def test_there_are_enough_broken_envs():
    assert len(BROKEN) >= 12
    seen = {rule for rule, *_ in [*BROKEN.values(), *BROKEN_VECTOR.values()]}
    assert seen == set(RULES)


def test_error_is_assertion_and_pickles():
    error = ConformanceError("seeds", "it differed", given="a and b")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(error, AssertionError) and again.rule == "seeds" and str(again) == str(error)


def test_difference_is_exact_about_types_and_bytes():
    assert difference(np.float32(1), 1.0) and difference([1], (1,)) and difference({1: 2}, {2: 2})
    assert difference(np.zeros(2), np.array([0.0, -0.0]))
    assert not difference({"a": np.zeros(2)}, {"a": np.zeros(2)})
    assert not difference(np.ones(2, np.float32), np.ones(2, np.float32) + 1e-6, 1e-5)
    assert not difference(np.array([3], np.uint8), np.array([4], np.uint8), 1e-5)
    assert difference(np.array([3], np.uint8), np.array([5], np.uint8), 1e-5)


def test_generators_are_watched_and_put_back():
    with pytest.raises(ConformanceError, match="global generator"), watched_generators():
        np.random.rand()
    with watched_generators(), other_generators():
        np.random.rand()


def test_testing_module_is_lazy():
    import worldgym.testing

    assert "check_dream_env" in dir(worldgym.testing)
    with pytest.raises(AttributeError):
        _ = worldgym.testing.check_everything
