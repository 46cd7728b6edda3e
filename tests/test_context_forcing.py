"""WorldPlay's training stages: who sees what with how much noise, where gradients may go, and that
context forcing moves a student to its teacher, which a teacher of another context cannot."""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import forcing_toy as toy  # noqa: E402
from forcing_toy import generator, lively, scene  # noqa: E402

from worldgym import camera  # noqa: E402
from worldgym.errors import (  # noqa: E402
    CheckpointError,
    ConfigError,
    DatasetError,
    ShapeError,
)
from worldgym.models.dynamics import drawer  # noqa: E402
from worldgym.models.worldplay_loss import (  # noqa: E402
    Frames,
    causal_loss,
    causal_sequence,
    encode,
    flow_of,
    joint_flow,
    joint_loss,
    with_latents,
)
from worldgym.models.worldplay_rollout import ChunkStepper, Moves  # noqa: E402
from worldgym.reconstituted import HUNYUAN_MEMORY, History, Reconstituted, Scoring  # noqa: E402
from worldgym.schedule import Euler, add_noise, chunk_times, x0_from_flow  # noqa: E402
from worldgym.train.context_forcing import (  # noqa: E402
    ContextForcing,
    ForcingConfig,
    Window,
    history,
    teacher_set,
)
from worldgym.train.loop import Loop, LoopConfig  # noqa: E402

CPU = torch.device("cpu")
SMALL = {"chunks": toy.CHUNKS, "guidance": 1.0, "steps": (1000.0, 750.0), "batch": 2}


def forcing(student=None, teacher=None, **changes):
    teacher = teacher or lively(1)
    return ContextForcing(student or lively(2), teacher, copy.deepcopy(teacher),
                          ForcingConfig(**{**SMALL, **changes}))


# -- who sees what --------------------------------------------------------------------------------


def walk(rng, frames):
    motions = np.zeros((frames - 1, 5))
    motions[:, camera.FORWARD] = rng.uniform(0, 0.2, frames - 1)
    motions[:, camera.YAW] = np.deg2rad(15) * rng.integers(-1, 2, frames - 1)
    return camera.inverse(camera.walk(motions))


@pytest.mark.parametrize("policy", [
    Reconstituted(scoring=Scoring(points=500)),
    replace(HUNYUAN_MEMORY, scoring=Scoring(points=500)),
    Reconstituted(total=12, temporal=4, scoring=Scoring(points=500))])
def test_the_teacher_sees_the_union_of_the_contexts_less_the_chunks_made(policy):
    rng = np.random.default_rng(0)
    sizes = set()
    for past in (0, 1, 3, 7, 12):
        w2c = np.stack([walk(rng, 4 * past + 16) for _ in range(3)])
        window = Window.choose(policy, w2c, 4 * past)
        for b in range(3):
            seen = set()  # by brute force, frame by frame
            for i in range(4):
                frames = policy.select(w2c[b], 4 * (past + i))
                assert window.contexts[i][b].tolist() == frames.tolist()
                seen |= set(frames.tolist())
            want = sorted(f for f in seen if f // 4 not in range(past, past + 4))
            assert window.teacher[b].tolist() == want
            assert max(want, default=-1) < 4 * past
            sizes.add(len(want))
    assert len(sizes) > 3
    # part of a chunk counts for all of it
    assert teacher_set([np.array([1, 9]), np.array([17, 30])], 16, 2).tolist() == [
        0, 1, 2, 3, 8, 9, 10, 11, 28, 29, 30, 31]


def test_a_misaligned_teacher_sees_something_else():
    clip, window = scene()
    other = Window.choose(toy.MEMORY, clip.cameras.w2c_BF44.numpy(), 16, toy.CHUNKS,
                          teacher_policy=toy.RECENT)
    assert window.teacher[0].tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert other.teacher[0].tolist() == [8, 9, 10, 11, 12, 13, 14, 15]
    assert all((a == b).all() for a, b in zip(window.contexts, other.contexts, strict=True))


def test_clips_of_unlike_contexts_are_judged_each_by_its_own():
    """One batch, contexts of 0, 4 and 8 frames: the same as clip by clip."""
    clip, dit = scene(count=4)[0], lively()
    chosen = [np.arange(8), np.arange(0), np.arange(4, 12), np.arange(4)]
    x, t = torch.randn(4, 8, 4, 1, 1, generator=generator()), torch.tensor([20., 500., 700., 980.])
    with torch.no_grad():
        together = joint_flow(dit, x, t, clip, 16, chosen)
        for i in range(4):
            alone = joint_flow(dit, x[i:i + 1], t[i:i + 1], clip.rows([i]), 16, chosen[i:i + 1])
            assert torch.allclose(together[i:i + 1], alone, atol=1e-5)


# -- rollouts and gradients -----------------------------------------------------------------------


@torch.no_grad()
def test_a_rollout_is_what_the_student_does_while_it_steps():
    clip, window = scene()
    force = forcing(steps=toy.STEPS)
    made = force.rollout(clip, window, drawer(2, generator(1), (0, 1), CPU), 4)
    stepper = ChunkStepper(force.student, toy.MEMORY, Euler.at(toy.STEPS))
    w2c, labels = clip.cameras.w2c_BF44.numpy(), clip.labels_BF.numpy()
    K = np.eye(3)[None].repeat(24, 0)
    past = [History.empty().append(clip.latents_BFChw[b, :16], w2c[b, :16], K[:16], labels[b, :16])
            for b in range(2)]
    draw = drawer(2, generator(1), (0, 1), CPU)
    for i in range(2):
        part = slice(16 + 4 * i, 20 + 4 * i)
        moves = Moves(replace(clip.span(part.start, part.stop).cameras), labels[:, part])
        x, past, chosen = stepper.step(past, draw(torch.randn, 4, 4, 1, 1).transpose(1, 2), moves,
                                       None)
        assert [c.tolist() for c in chosen] == window.contexts[i].tolist()
        assert torch.allclose(x.transpose(1, 2), made[:, 4 * i:4 * i + 4], atol=1e-4)


def test_what_the_clip_shows_later_is_never_read():
    clip, window = scene()
    latents = clip.latents_BFChw.clone()
    latents[:, 16:] = float("nan")
    hidden, force = with_latents(clip, latents), forcing()
    for loss in (force.student_loss, force.critic_loss):
        value, _ = loss(hidden, window, generator(3))
        assert torch.equal(value, loss(clip, window, generator(3))[0]) and value.isfinite()


def test_no_gradient_reaches_history_or_teacher_and_each_loss_trains_its_own():
    clip, window = scene()
    latents = clip.latents_BFChw.clone().requires_grad_()
    clip, force = with_latents(clip, latents), forcing()

    def moved(dit):
        return any(p.grad is not None and bool(p.grad.any()) for p in dit.parameters())

    for loss, trained, still in ((force.student_loss, force.student, force.critic),
                                 (force.critic_loss, force.critic, force.student)):
        # critic and teacher must differ, or there is nothing to learn
        for p in force.critic.parameters():
            p.data = p.data * 1.1
        loss(clip, window, generator(2))[0].backward()
        assert moved(trained) and not moved(still) and not moved(force.teacher)
        assert latents.grad is None
        trained.zero_grad()
    assert not any(p.requires_grad for p in force.teacher.parameters())


def test_the_gradient_comes_from_the_last_pass_alone():
    """Of one chunk after three: by hand, with everything before the last pass held fixed."""
    clip, window = scene()
    one = Window(window.start, 4, window.contexts[:1], window.teacher)
    force = forcing(steps=toy.STEPS)
    weight = torch.randn(2, 4, 4, 1, 1, generator=generator(9))
    for passes in (1, 3):
        made = force.rollout(clip, one, drawer(2, generator(1), (0, 1), CPU), passes, gradient=True)
        force.student.zero_grad()
        (made * weight).sum().backward()
        got = {n: p.grad.clone() for n, p in force.student.named_parameters()}
        x = drawer(2, generator(1), (0, 1), CPU)(torch.randn, 4, 4, 1, 1)
        new = clip.span(16, 20)
        with torch.no_grad():
            context = encode(force.student, clip.take(one.contexts[0]), new.here)
            for i in range(passes - 1):
                t = torch.full((2, 4), float(force.sampler.timesteps_S[i]))
                x = force.sampler.step(x, flow_of(force.student, x, t, new, 8, context), i)
        sigma = float(force.sampler.sigmas_S[passes - 1])
        force.student.zero_grad()
        flow = flow_of(force.student, x, torch.full((2, 4), 1000 * sigma), new, 8, context)
        (x0_from_flow(x, flow, sigma) * weight).sum().backward()
        for name, p in force.student.named_parameters():
            assert torch.allclose(got[name], p.grad, atol=1e-5), name
        assert max(float(g.abs().max()) for g in got.values()) > 0.1


def test_the_direction_is_the_difference_of_two_predictions_with_guidance():
    cfg = replace(toy.CFG, text_dim=8, text_len=4)
    text = torch.randn(2, 4, 8, generator=generator(7))
    clip, window = scene()
    clip = replace(clip, text_BLD=text)
    teacher = lively(1, cfg)
    force = ContextForcing(lively(2, cfg), teacher, lively(3, cfg), ForcingConfig(
        **{**SMALL, "guidance": 3.0}), empty_LD=torch.zeros(4, 8))
    made = torch.randn(2, 8, 4, 1, 1, generator=generator(8))
    got = force.direction(made, clip, window, drawer(2, generator(4), (0, 1), CPU))
    draw = drawer(2, generator(4), (0, 1), CPU)
    t = force.times(draw)
    noisy = add_noise(made, draw(torch.randn, *made.shape[1:]), t / 1000)
    flow = {}
    with torch.no_grad():
        for name, dit, words in (("real", teacher, text), ("empty", teacher, 0 * text),
                                 ("fake", force.critic, text)):
            flow[name] = joint_flow(dit, noisy, t, replace(clip, text_BLD=words), 16,
                                    window.teacher)
    sigma = (t / 1000)[:, None, None, None, None]
    real = noisy - sigma * (flow["empty"] + 3 * (flow["real"] - flow["empty"]))
    away = torch.stack([(made[b] - real[b]).abs().mean() for b in range(2)])
    want = (noisy - sigma * flow["fake"] - real) / away[:, None, None, None, None]
    assert torch.allclose(got, want, atol=1e-5)
    same = forcing()  # whose critic is still a copy of the teacher
    assert not same.direction(made, scene()[0], window, drawer(2, generator(), (0, 1), CPU)).any()
    times = same.times(drawer(4000, generator(), (0, 1), CPU))
    assert times.min() == 20 and times.max() == 980
    assert float(times.median()) == pytest.approx(1000 * 2.5 / 3, abs=15)  # shift 5


# -- tiny trainings -------------------------------------------------------------------------------


def train_teacher():
    """Bidirectional, two chunks at once; a quarter of its clips see the newest frames alone."""
    dit = toy.fresh(1)

    def sample(i):
        rng = np.random.default_rng((7, i))
        past = int(rng.integers(3, 5))
        clip, _, ahead = toy.clips(rng, 32, past)
        return {"clip": clip, "window": toy.window(
            32, ahead, past, toy.RECENT if rng.random() < 0.25 else None)}

    def loss(model, data, g):
        clip, start = data["clip"], data["window"].start
        draw = drawer(32, g, (0, 1), CPU)
        t = chunk_times(torch.sigmoid(draw(torch.randn, 1))[:, 0]).float()
        return joint_loss(model, clip, start, clip.latents_BFChw[:, start:],
                          data["window"].teacher, t, draw), {}

    return dit, sample, loss


def train_student():
    """Chunk-causal, in a world that forgets: it shows another thing whenever one looks ahead."""
    dit = toy.fresh(2)

    def sample(i):
        rng = np.random.default_rng((8, i))
        clip, _, _ = toy.clips(rng, 32, int(rng.integers(3, 5)), forgets=True)
        frames, memory = causal_sequence(toy.MEMORY, clip.cameras.w2c_BF44[0].numpy(), None, rng)
        return {"clip": clip.take(frames[None].repeat(32, 0)), "memory": torch.full((32,), memory)}

    def loss(model, data, g):
        return causal_loss(model, data["clip"], data["memory"], drawer(32, g, (0, 1), CPU))

    return dit, sample, loss


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Teacher and student before context forcing, and the losses on the way."""
    folder, out = tmp_path_factory.mktemp("trained"), {}
    for name, make, iterations in (("teacher", train_teacher, 250),
                                   ("student", train_student, 120)):
        dit, sample, loss = make()
        loop = Loop(name, dit, LoopConfig(iterations=iterations, lr=3e-3, ema=0.98, log_every=20,
                                          save_every=1000), folder)
        loop.run(sample, loss, False)
        loop.load_ema()
        out[name] = dit, [row["loss"] for row in loop.history]
    return out


def force_student(trained, folder, teacher=None, iterations=40, **changes):
    """Context forcing of the student; ``teacher``: chooses the teacher's context instead."""
    student, judge = (copy.deepcopy(trained[n][0]) for n in ("student", "teacher"))
    force = ContextForcing(student, judge, copy.deepcopy(judge), ForcingConfig(**{
        **SMALL, "iterations": iterations, "batch": 32, "lr": 1e-3, "critic_lr": 1e-3,
        "critic_updates": 3, "ema": 0.8, "ema_from": 10, **changes}))

    def sample(number, i):
        rng = np.random.default_rng((9, number))
        past = int(rng.integers(3, 5))
        clip, _, ahead = toy.clips(rng, 32, past)
        return clip, toy.window(32, ahead, past, teacher)

    return force, force.train(sample, folder, tensorboard=False, save_every=2, log_every=10)


def held_out(draws=16):
    """Eight clips that no training saw, each ``draws`` times, and their things."""
    clip, thing, ahead = toy.clips(np.random.default_rng(99), 8, 4, always=True)
    return clip.rows(np.repeat(np.arange(8), draws)), toy.window(8 * draws, ahead, 4), thing


@torch.no_grad()
def ask(teacher, clip, window, seed):
    """The teacher's own samples (8, draws, 8 frames, 4): twenty steps, both chunks at once."""
    x, solver = torch.randn(len(clip), 8, 4, 1, 1, generator=generator(seed)), Euler(20, shift=3.0)
    for i, t in enumerate(solver.timesteps_S.tolist()):
        x = solver.step(x, joint_flow(teacher, x, torch.full((len(clip),), t), clip, window.start,
                                      window.teacher), i)
    return x.unflatten(0, (8, -1))[..., 0, 0]


@torch.no_grad()
def play(student, clip, window, seed=5):
    """The student's samples on other noise than it was trained on."""
    force = forcing(student)
    made = force.rollout(clip, window, drawer(len(clip), generator(seed), (0, 1), CPU), 2)
    return made.unflatten(0, (8, -1))[..., 0, 0]


def energy(x_BDFC, y_BDFC):
    """Energy distance of two samples, mean over clips: 0 for one distribution, else above."""
    x, y = x_BDFC.flatten(2), y_BDFC.flatten(2)
    pairs = x.shape[1] * (x.shape[1] - 1)
    own = (torch.cdist(x, x).sum((1, 2)) + torch.cdist(y, y).sum((1, 2))) / pairs
    return float((2 * torch.cdist(x, y).mean((1, 2)) - own).mean())


def test_the_losses_of_the_first_stages_fall(trained):
    for name in ("teacher", "student"):
        losses = trained[name][1]
        assert losses[-1] < 0.7 * losses[0], (name, losses)


def test_context_forcing_moves_a_student_to_its_teacher_and_misaligned_context_does_not(
        trained, tmp_path):
    clip, window, thing = held_out()
    teacher = trained["teacher"][0]
    real = ask(teacher, clip, window, 0)
    floor = energy(real, ask(teacher, clip, window, 1))
    before = energy(play(trained["student"][0], clip, window), real)
    after, error, loss = {}, {}, {}
    for name, other in (("aligned", None), ("misaligned", toy.RECENT)):
        force, loop = force_student(trained, tmp_path / name, other)
        force.student.load_state_dict(loop.ema)
        loss[name] = [round(row["loss"], 3) for row in loop.history]
        made = play(force.student, clip, window)
        after[name] = energy(made, real)
        error[name] = float((made[:, :, :4, :3].mean((1, 2)) - torch.from_numpy(thing)
                             ).abs().mean())
    figures = f"floor {floor:.3f} before {before:.3f} after {after} error {error} loss {loss}"
    print(figures)
    assert abs(floor) < 0.1 and before > 3, figures
    assert loss["aligned"][-1] < 0.75 * loss["aligned"][0], figures
    assert after["aligned"] < 0.35 * before, figures
    assert after["misaligned"] > 2 * after["aligned"], figures
    # whoever is judged without the memory never learns to look there
    assert error["aligned"] < 0.5 * error["misaligned"], figures


def test_a_killed_run_goes_on_to_the_same_bits(trained, tmp_path, monkeypatch):
    """Student, critic, both optimisers and the average; killed within the critic's updates."""
    settings = dict(iterations=5, critic_updates=2, batch=4)
    whole_force, whole = force_student(trained, tmp_path / "whole", **settings)
    step, count = Loop._step, [0]

    def dying(self, *args):
        count[0] += 1
        if count[0] == 11:  # third critic update after the checkpoint of iteration 2
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(Loop, "_step", dying)
    with pytest.raises(KeyboardInterrupt):
        force_student(trained, tmp_path / "killed", **settings)
    monkeypatch.undo()
    force, loop = force_student(trained, tmp_path / "killed", **settings)
    for a, b in ((force.student, whole_force.student), (force.critic, whole_force.critic)):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(),
                                                     b.state_dict().values(), strict=True))
    assert all(torch.equal(loop.ema[k], whole.ema[k]) for k in whole.ema)
    assert loop.partner.iteration == 10
    with pytest.raises(CheckpointError, match="other settings"):
        force_student(trained, tmp_path / "killed", **{**settings, "critic_lr": 1e-2})


# -- settings -------------------------------------------------------------------------------------


def test_published_settings_and_how_long_a_past_may_be():
    cfg = ForcingConfig()
    assert (cfg.lr, cfg.critic_lr, cfg.betas, cfg.critic_updates, cfg.chunks) == (
        1e-6, 2e-7, (0.0, 0.999), 5, 4)
    assert (cfg.guidance, cfg.shift, cfg.least, cfg.most, cfg.ema, cfg.ema_from) == (
        3.0, 5.0, 20.0, 980.0, 0.99, 200)
    rng = np.random.default_rng(0)
    for iteration, most in ((0, 4), (500, 12), (1000, 20), (3000, 36)):
        drawn = {history(rng, cfg, 4, iteration, 60) for _ in range(600)}
        assert drawn == set(range(most + 1))
    assert {history(rng, replace(cfg, least_history=1), 4, 3000, 6) for _ in range(50)} == {1, 2}
    with pytest.raises(DatasetError, match="too short"):
        history(rng, cfg, 4, 0, 3)


@pytest.mark.parametrize("changes", [
    {"chunks": 0}, {"critic_updates": 0}, {"lr": 0.0}, {"least": 0.0}, {"most": 1000.0},
    {"least": 990.0}, {"guidance": 0.5}, {"steps": (500.0, 600.0)}, {"steps": ()},
    {"lengths": ((5, 32),)}, {"ema": 1.0}, {"least_history": -1}], ids=str)
def test_wrong_settings_have_named_errors(changes):
    with pytest.raises(ConfigError):
        ForcingConfig(**changes)


def test_wrong_networks_and_clips_have_named_errors():
    dit = lively()
    with pytest.raises(ConfigError, match="share weights"):
        ContextForcing(dit, dit, lively(1), ForcingConfig(**SMALL))
    with pytest.raises(ConfigError, match="guidance"):
        forcing(guidance=3.0)
    wide = lively(1, replace(toy.CFG, in_dim=8, out_dim=8))
    with pytest.raises(ConfigError, match="different latents"):
        forcing(teacher=wide)
    clip, _ = scene()
    with pytest.raises(ShapeError, match="end of the rollout"):
        Window.choose(toy.MEMORY, clip.cameras.w2c_BF44.numpy(), 20, 2)
    with pytest.raises(ShapeError, match="do not fit"):
        Frames.of(clip.latents_BFChw, clip.cameras.w2c_BF44.numpy()[:, :4], clip.labels_BF.numpy())
