"""WHAM's models and world: layouts, sampler, exact stepping, batching, options, state."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from worldgym.errors import (
    ActionError,
    ConfigError,
    DTypeError,
    ShapeError,
    SlotError,
    StateError,
    WorldGymError,
)
from worldgym.models import wham_actions
from worldgym.models.sampling import Sampling, distribution, draw
from worldgym.models.vqgan import ViTConfig
from worldgym.models.wham import SIZES, WhamConfig, tiny
from worldgym.models.wham_decode import surprise, waves
from worldgym.models.wham_world import WhamWorld
from worldgym.state import Starts, WorldState

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import golden  # noqa: E402

WHAM = HERE.parents[1] / "shared" / "golden" / "wham"
GREEDY = Sampling(top_k=1)


@pytest.fixture(scope="module")
def model():
    return tiny(torch.Generator().manual_seed(0), hw=(8, 12))


def some_starts(world, slots=3, frames=2, seed=0, lengths=None):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, world.model.codes, (slots, frames, *world.spec.latent_chw))
    lengths = np.full(slots, frames) if lengths is None else np.array(lengths)
    null = np.arange(frames)[None] == (frames - lengths)[:, None]
    return Starts(torch.from_numpy(ids), some_actions(slots * frames, seed).reshape(
        slots, frames, 16), null, lengths)


def some_actions(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, np.array(wham_actions.SIZES), (count, 16))


def play(world, state, steps, rows=slice(None), slots=8):
    """Ids of every step (steps, B, I); actions depend on the step number alone."""
    out = []
    for t in range(steps):
        state, chunk = world.step(state, some_actions(slots, t)[rows])
        out.append(chunk.latents_BFChw.flatten(1))
    return state, torch.stack(out)


# ------------------------------------------------------------------------------- golden tensors


@pytest.mark.skipif(not WHAM.is_dir(), reason=f"{WHAM} is absent")
def test_golden_tensors_within_1e_4():
    for result in golden.run([WHAM]):
        assert not result.reason, result
        assert result.error <= 1e-4


# ------------------------------------------------------------------------------------- sampler


def test_the_token_that_crosses_p_is_dropped():
    chances = torch.tensor([[0.5, 0.3, 0.2]])
    how = Sampling(temperature=1.0, top_p=0.7)
    assert distribution(chances.log(), how).tolist() == [[1.0, 0.0, 0.0]]
    how = Sampling(temperature=1.0, top_p=0.0, min_tokens_to_keep=2)
    torch.testing.assert_close(distribution(chances.log(), how)[0, :2], torch.tensor([.625, .375]))


def test_draws_follow_the_distribution():
    chances = torch.tensor([[0.0, 0.1, 0.6, 0.0, 0.3]]).expand(20_000, -1)
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    share = torch.bincount(draw(chances, u), minlength=5) / 20_000
    torch.testing.assert_close(share, chances[0], atol=2e-4, rtol=0)
    ends = draw(chances[:2], torch.tensor([2.0**-33, 1 - 2.0**-33], dtype=torch.float64))
    assert ends.tolist() == [1, 4]  # an impossible id is never drawn


@pytest.mark.parametrize("bad", [
    {"top_k": 3, "top_p": 0.5}, {"top_p": 1.1}, {"top_p": -0.1}, {"top_k": 0}, {"top_k": 2.0},
    {"temperature": -1.0}, {"temperature": float("nan")}, {"min_tokens_to_keep": 0}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ConfigError, match="impossible"):
        Sampling(**bad)


# ------------------------------------------------------------------------------------- actions


def test_every_bin_survives_the_way_to_stick_values_and_back():
    bins = np.concatenate([np.zeros((11, 12), int), np.arange(11)[:, None].repeat(4, 1)], 1)
    assert (wham_actions.bins(wham_actions.world_values(bins)) == bins).all()
    world = np.zeros(16)
    world[12:] = [5.0, -5.0, 0.0, 1.0]
    assert wham_actions.bins(world).tolist()[12:] == [10, 0, 5, 10]
    assert wham_actions.bins(world, derive_flag=True)[0] == 1
    world[3] = 1
    assert wham_actions.bins(world, derive_flag=True)[0] == 0


@pytest.mark.parametrize(("spoil", "error"), [
    (lambda a: a[..., :15], ShapeError), (lambda a: a.astype(str), ShapeError),
    (lambda a: np.where(np.arange(16) == 12, 11, a), ActionError),
    (lambda a: np.where(np.arange(16) == 3, -1, a), ActionError),
    (lambda a: np.where(np.arange(16) == 3, np.nan, a), ActionError)])
def test_bad_actions_are_refused(spoil, error):
    with pytest.raises(error):
        wham_actions.ids(spoil(wham_actions.NEUTRAL))


# -------------------------------------------------------------------------------------- models


def test_the_published_sizes_have_the_published_parameter_counts():
    from worldgym.models.gpt import GPT, GPTConfig
    from worldgym.models.vqgan import ViTVQGAN

    for name, version, count in (("chinchilla-251M", 2, 224_016_384),
                                 ("wham-4kvocab-1.6b", 1, 1_580_262_912)):
        layers, heads, width = SIZES[name]
        with torch.device("meta"):
            net = GPT(GPTConfig(block_size=5560, vocab_size=16_452, n_layer=layers, n_head=heads,
                                n_embd=width, version=version))
        assert sum(p.numel() for p in net.parameters()) == count
    with torch.device("meta"):
        vit = ViTVQGAN(ViTConfig(
            image_size_per_x_axis=300, image_size_per_y_axis=180, patch_size=10, transf_dim=1024,
            embedding_dim=32, num_layers=12, head_size=64, vocab_size=16_384))
    assert sum(p.numel() for p in vit.parameters()) == 304_355_660 and vit.tokens == 540


def test_frames_are_checked(model):
    for frames, error in ((torch.zeros(1, 8, 12, 3), DTypeError),
                          (torch.zeros(1, 9, 12, 3, dtype=torch.uint8), ShapeError),
                          (torch.zeros(8, 12, 3, dtype=torch.uint8), ShapeError)):
        with pytest.raises(error):
            WhamWorld(model).encode(frames)
    with pytest.raises(ShapeError, match="vocabulary"):
        model.gpt(torch.full((1, 3), 10_000))


def test_config_survives_json(model):
    import json

    assert WhamConfig.from_json(json.loads(json.dumps(model.cfg.to_json()))) == model.cfg


def test_the_loss_is_that_of_the_sequence(model):
    world = WhamWorld(model)
    starts = some_starts(world, 2, 3)
    images, acted = starts.latents_BKChw.flatten(2), torch.from_numpy(
        wham_actions.ids(starts.actions))
    image, action, mean = model.loss(images, acted)
    ids = model.sequence(images, acted)
    told = torch.nn.functional.cross_entropy(
        model.gpt(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(image.sum() + action.sum(), told)
    torch.testing.assert_close(mean, told / ids.numel())
    assert float(image[0, 0, 0]) == 0


# ------------------------------------------------------------------------------------ stepping


def plain_frame(model, ids, u):
    """The next image by whole forwards, nothing cached: what a reader of the spec would write."""
    for i in range(model.image_tokens):
        low, high = model.image_range(i)
        chances = distribution(model.gpt(ids)[:, -1], Sampling(), (low, high))
        ids = torch.cat([ids, draw(chances, u[:, i])[:, None]], 1)
    return ids[:, -model.image_tokens:]


@torch.no_grad()
def test_frames_are_those_of_whole_forwards_before_and_after_the_slide(model):
    from worldgym.noise import PASSES, uniform

    world = WhamWorld(model)
    state = world.begin(some_starts(world, 2, 2), [5, 6])
    for t in range(4):  # windows of 2, 3, 3, 3 pairs; from the third step on one pair is dropped
        taken = state.extra["taken_BFA"].clone()
        taken[:, -1] = torch.from_numpy(wham_actions.ids(some_actions(2, t)))
        pairs = min(2 + t, world.window)
        ids = model.sequence(state.history_BKChw[:, -pairs:].flatten(2), taken[:, -pairs:])
        want = plain_frame(model, ids, uniform(state.keys_B4, PASSES["image"], model.image_tokens))
        state, chunk = world.step(state, some_actions(2, t))
        assert torch.equal(chunk.latents_BFChw.flatten(1), want)
    assert len(want.unique()) > 3  # the model says something


@pytest.mark.parametrize("options", [{}, {"slide": 2}, {"diagonal": 1}, {"propose": True},
                                     {"sampling": GREEDY}, {"context_length": 2}])
def test_a_slot_gets_the_bits_it_gets_alone(model, options):
    world = WhamWorld(model, **options)
    starts = some_starts(world, 4, 3, lengths=[1, 3, 2, 3])
    state, together = play(world, world.begin(starts, [1, 2, 3, 4]), 5, slice(0, 4))
    for slot in (0, 2, 3):
        rows = np.array([slot])
        one, alone = play(world, world.begin(starts.rows(rows), [slot + 1]), 5, rows)
        assert torch.equal(together[:, slot], alone[:, 0])
        assert (world.proposal(one) == world.proposal(state)[slot]).all()


def test_final_states_do_not_depend_on_the_batch(model):
    """Not only the drawn tokens: every float they are drawn from."""
    world = WhamWorld(model)
    starts = some_starts(world, 3, 3, lengths=[2, 3, 2])

    def states(rows):
        said = []
        world.watch = said.append
        world.step(world.begin(starts.rows(rows), rows + 1), some_actions(3)[rows])
        world.watch = None
        return torch.stack(said, 1)

    both = states(np.arange(3))  # sorted by window: slots 0, 2, 1
    for place, slot in enumerate((0, 2, 1)):
        assert torch.equal(both[place], states(np.array([slot]))[0])


def test_seeds_and_actions_matter_and_repeat(model):
    world = WhamWorld(model)
    starts = some_starts(world, 1)
    same = [play(world, world.begin(starts, [seed], [episode]), 2, [0])[1]
            for seed, episode in ((0, 0), (0, 0), (1, 0), (0, 1))]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2]) and not torch.equal(same[0], same[3])
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    world.step(world.begin(starts, [0]), some_actions(1))
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_first_image_token_is_never_zero():
    model = tiny(torch.Generator().manual_seed(1), hw=(4, 8), codes=2)
    world = WhamWorld(model)
    _, ids = play(world, world.begin(some_starts(world, 8), range(8)), 5)
    assert (ids[..., 0] == 1).all() and (ids[..., 1:] == 0).any()


def test_frames_are_decoded_ids(model):
    world = WhamWorld(model)
    _, chunk = world.step(world.begin(some_starts(world), [0, 1, 2]), some_actions(3))
    frames = chunk.frames()
    assert frames.shape == (3, 1, 8, 12, 3) and frames.dtype == torch.uint8
    assert torch.equal(frames[:, 0], world.decode(chunk.latents_BFChw[:, 0]))


# ------------------------------------------------------------------------------------- options


def test_the_chunked_slide_is_exact_on_the_window_it_has(model):
    """Cached steps between slides give what a fresh start with the same frames gives."""
    chunked, exact = WhamWorld(model, slide=2), WhamWorld(model)
    state, seen = chunked.begin(some_starts(chunked, 2, 3), [1, 2]), []
    for t in range(6):
        pairs = int(chunked._pairs(state)[0])
        seen.append(pairs)
        led = state.extra["taken_BFA"][:, -pairs:-1]
        bins = wham_actions.from_ids(led.numpy())
        led = np.concatenate([np.zeros((2, 1, 16), int), bins], 1)
        starts = Starts(state.history_BKChw[:, -pairs:], led,
                        np.arange(pairs)[None].repeat(2, 0) == 0, np.full(2, pairs))
        fresh = exact.begin(starts, [1, 2])
        fresh._counters["step_B"] = state.step_B
        action = some_actions(2, t)
        state, chunk = chunked.step(state, action)
        assert torch.equal(chunk.latents_BFChw, exact.step(fresh, action)[1].latents_BFChw)
    assert seen == [3, 2, 3, 2, 3, 2]


def test_diagonal_decoding_in_raster_order_is_exact(model):
    width = model.tokenizer.grid_hw[1]
    exact, wide = WhamWorld(model), WhamWorld(model, diagonal=width)
    starts = some_starts(exact, 4, 3, lengths=[1, 3, 2, 3])
    assert torch.equal(play(exact, exact.begin(starts, range(4)), 3, slice(0, 4))[1],
                       play(wide, wide.begin(starts, range(4)), 3, slice(0, 4))[1])


@torch.no_grad()
def test_diagonal_decoding_deviates_little_and_takes_fewer_passes(model):
    (height, width), exact = model.tokenizer.grid_hw, WhamWorld(model)
    for lead in range(1, width + 1):
        order = waves(height, width, lead)
        assert len(order) == width + lead * (height - 1)
        assert sorted(sum(order, [])) == [(r, c) for r in range(height) for c in range(width)]
    starts = some_starts(exact, 64, 2)

    def nats(world):
        state = world.begin(starts, range(64))
        action = some_actions(64)
        new, _ = world.step(state, action)
        taken = state.extra["taken_BFA"].clone()
        taken[:, -1] = world.features(action)
        ids = torch.cat([model.sequence(state.history_BKChw[:, -2:].flatten(2), taken[:, -2:]),
                         new.latents_BCHW.flatten(1)], 1)
        return float(surprise(model, ids, model.image_tokens).mean())

    raster, one = nats(exact), nats(WhamWorld(model, diagonal=1))
    assert raster < np.log(model.codes) and abs(one - raster) < 0.5
    with pytest.raises(ConfigError, match="lead"):
        WhamWorld(model, diagonal=width + 1)


def test_a_proposal_is_the_same_however_it_is_asked_for(model):
    """From the step's own cache, from pages, or from nothing but ids."""
    plain, eager = WhamWorld(model), WhamWorld(model, propose=True)
    a, b = (w.begin(some_starts(w, 2, 1), [1, 2]) for w in (plain, eager))
    for t in range(5):
        assert (plain.proposal(a) == eager.proposal(b)).all()
        wham_actions.check(plain.proposal(a))
        (a, one), (b, two) = plain.step(a, some_actions(2, t)), eager.step(b, some_actions(2, t))
        assert torch.equal(one.latents_BFChw, two.latents_BFChw)
    assert (b.extra["taken_BFA"][:, -1] >= 0).all() and (a.extra["taken_BFA"][:, -1] < 0).all()


# --------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("options", [{}, {"slide": 2}])
def test_snapshot_fork_select_restart_and_pages(model, tmp_path, options):
    world = WhamWorld(model, **options)
    state, _ = play(world, world.begin(some_starts(world, 3, 1), [1, 2, 3]), 1, slice(0, 3))
    kept, path = state.snapshot(), tmp_path / "state.safetensors"
    state.save(path)
    state, want = play(world, state, 4, slice(0, 3))
    for again in (kept, WorldState.load(path, world)):
        assert torch.equal(play(world, again, 4, slice(0, 3))[1], want)
    other = WhamWorld(model, **options)
    assert torch.equal(play(other, WorldState.load(path, other), 4, slice(0, 3))[1], want)
    assert torch.equal(play(world, kept.select([2, 0]), 4, [2, 0])[1], want[:, [2, 0]])
    two = kept.fork(2)
    assert torch.equal(play(world, two, 4, [0, 0, 1, 1, 2, 2])[1], want.repeat_interleave(2, 1))
    fresh = play(world, kept.fork(2, fresh=True), 2, [0, 0, 1, 1, 2, 2])[1]
    assert not torch.equal(fresh[:, ::2], fresh[:, 1::2])
    mixed = world.restart(kept, [1], some_starts(world, 1, 1, seed=9))
    got = play(world, mixed, 4, slice(0, 3))[1]
    assert torch.equal(got[:, [0, 2]], want[:, [0, 2]]) and not torch.equal(got[:, 1], want[:, 1])
    part, chunk = world.step(kept, some_actions(3)[:2], slots=[2, 0])
    assert chunk.slots.tolist() == [2, 0] and part.step_B.tolist() == [2, 1, 2]
    import gc

    del state, kept, again, two, mixed, part, chunk
    gc.collect()
    assert world.pool.stats()["pages_used"] == 0


def test_a_full_window_keeps_no_pages(model):
    world = WhamWorld(model)
    state, _ = play(world, world.begin(some_starts(world, 2, 4), [1, 2]), 3, slice(0, 2))
    assert world.pool.stats()["pages_used"] == 0 and state.num_slots == 2
    chunked = WhamWorld(model, slide=3)
    state = chunked.begin(some_starts(chunked, 2, 4), [1, 2])
    used = []
    for t in range(40):
        state, _ = chunked.step(state, some_actions(2, t))
        used.append(chunked.pool.stats()["capacity"])
    assert used[-1] == used[5]


# ------------------------------------------------------------------------------------- refusals


def spoiled(name, change):
    def make(world):
        starts = some_starts(world)
        fields = {f: getattr(starts, f) for f in starts.__dataclass_fields__}
        return Starts(**{**fields, name: change(fields[name])})

    return make


@pytest.mark.parametrize(("make", "error"), [
    (spoiled("latents_BKChw", lambda x: x.float()), DTypeError),
    (spoiled("latents_BKChw", lambda x: x + 1000), ShapeError),
    (spoiled("latents_BKChw", lambda x: x[:, :, 0]), ShapeError),
    (spoiled("actions", lambda x: x + 11), ActionError),
    (lambda world: some_starts(world, 1, 5), ShapeError)])
def test_bad_starts_are_refused(model, make, error):
    world = WhamWorld(model)
    starts = make(world)
    with pytest.raises(error):
        world.begin(starts, list(range(len(starts))))


def test_bad_calls_are_refused_and_the_state_lives(model):
    world = WhamWorld(model)
    state = world.begin(some_starts(world), [1, 2, 3])
    for call in (lambda: world.step(state, some_actions(2)),
                 lambda: world.step(state, some_actions(3) + 11),
                 lambda: world.step(state, some_actions(3).astype(float) + 0.5)):
        with pytest.raises(WorldGymError):
            call()
    with pytest.raises(SlotError):
        world.step(state, some_actions(1), slots=[7])
    with pytest.raises(StateError, match="another world"):
        WhamWorld(model, slide=2).step(state, some_actions(3))
    for bad in ({"slide": 9}, {"slide": 0}, {"context_length": 0}, {"context_length": 99},
                {"diagonal": 0}, {"diagonal": 1, "propose": True}):
        with pytest.raises(ConfigError):
            WhamWorld(model, **bad)
    world.step(state, some_actions(3))
