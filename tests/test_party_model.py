"""ActionParty's network: the must-pass list of specs/actionparty.md 4.9, and its files."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import golden  # noqa: E402
import golden_wan  # noqa: E402
from party_tools import CHW, SLOTS, VIDEO, close, inputs, tiny_party  # noqa: E402

from worldgym import checkpoint  # noqa: E402
from worldgym.attention import attention  # noqa: E402
from worldgym.errors import CheckpointError, ConfigError  # noqa: E402
from worldgym.memory import Full, PagePool, PageSpec  # noqa: E402
from worldgym.models import party  # noqa: E402
from worldgym.models.party import PARTY_1_3B, PartyConfig, PartyDynamics  # noqa: E402
from worldgym.models.party_layers import SubjectConfig  # noqa: E402
from worldgym.models.wan import WanConfig, WanDiT, block_ids, causal_frame_mask, masked  # noqa: E402
from worldgym.rollout import Block, CausalStepper  # noqa: E402

FIXTURES = HERE.parents[1] / "shared" / "golden" / "wan_causal"
ABLATIONS = {"published": {}, "no MSA": dict(msa=False), "frame-wise MCA": dict(mca="frame"),
             "no MCA": dict(mca="none"), "no RoPE in SA": dict(rope_sa=False),
             "no RoPE in CA": dict(mca="frame", rope_ca=False),
             "state before beside": dict(beside=True), "pooled": dict(pooled=True)}
every_ablation = pytest.mark.parametrize("how", ABLATIONS.values(), ids=ABLATIONS.keys())


# ------------------------------------------------------------------------- spec 4.9, in its order


def test_base_parity_without_subjects():
    """N=0: the base, bit for bit, under training masks and with every token seeing every token."""
    model, clip = tiny_party(slots=0), inputs(slots=0, absent=0)
    x, t = clip.clean_BFChw.transpose(1, 2), 1000 * clip.sigma_BF
    base = WanDiT(model.cfg.wan)
    base.load_state_dict(model.dit.state_dict())
    for frames in (None, causal_frame_mask(block_ids(5, 1)), causal_frame_mask(block_ids(5, 1), 3)):
        attend = None if frames is None else masked(frames, VIDEO)
        got, _ = model.joint(x, clip.states_BFNS, t, actions_BGN=clip.actions_BFN,
                             before_BFNS=clip.states_BFNS, valid_BN=clip.valid_BN,
                             text_kv=model.dit.text(clip.text_BLD), attend=attend)
        assert torch.equal(got, base(x, t, clip.text_BLD, attend=attend))


class WithoutSubjects:
    """A party network of no subjects where the base is expected."""

    def __init__(self, dit):
        self.cfg, self.text, size = dit.cfg, dit.text, (dit.cfg.out_dim, 8, 8)
        self.party = PartyDynamics(PartyConfig(latent_chw=size, wan=dit.cfg,
                                               subjects=SubjectConfig(slots=0)))
        self.party.dit = dit

    def __call__(self, x, t, context=None, *, text_kv=None, **given):
        none = torch.zeros(len(x), x.shape[2], 0, 2)
        t = t[:, None].expand(-1, x.shape[2]) if t.ndim == 1 else t
        return self.party.joint(x, none, t, actions_BGN=none[..., 0].long(), before_BFNS=none,
                                valid_BN=none[:, 0, :, 0].bool(),
                                text_kv=text_kv or self.text(context), **given)[0]


@pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"{FIXTURES} is absent")
def test_base_fixtures_without_subjects(monkeypatch):
    """N=0 reproduces the published base: forwards, masks, cached rollouts, guided UniPC."""
    plain, made = golden_wan.model_of, []
    monkeypatch.setattr(golden_wan, "model_of",
                        lambda fixture: made.append(WithoutSubjects(plain(fixture))) or made[-1])
    results = list(golden.run([FIXTURES]))
    assert not [r.line() for r in results if r.reason] and len(made) >= 7


def test_base_parity_with_empty_slots():
    """Nobody there: the same numbers with subject tokens in the sequence."""
    clip = inputs(absent=SLOTS)
    without = replace(clip, **{k: getattr(clip, k)[:, :, :0] for k in
                               ("states_BFNS", "state_noise_BFNS", "context_states_BFNS",
                                "actions_BFN")}, valid_BN=clip.valid_BN[:, :0])
    with_slots = tiny_party()
    bare = PartyDynamics(replace(with_slots.cfg, subjects=SubjectConfig(slots=0)))
    bare.dit.load_state_dict(with_slots.dit.state_dict())
    close(clip(with_slots)[0], without(bare)[0])


@every_ablation
def test_slot_permutation_equivariance(how):
    """Permuting states, actions, valid and their noise permutes the states' flow; not the video."""
    model, clip = tiny_party(**how), inputs()
    order = torch.tensor([2, 0, 3, 1])
    moved = replace(clip, valid_BN=clip.valid_BN[:, order], **{
        k: getattr(clip, k)[:, :, order] for k in
        ("states_BFNS", "state_noise_BFNS", "context_states_BFNS", "actions_BFN")})
    video, states = clip(model)
    video_moved, states_moved = moved(model)
    close(video_moved, video)
    close(states_moved, states[:, :, order])
    assert states.std() > 0.05 and video.std() > 0.05


def test_a_slot_embedding_breaks_the_symmetry():
    model, clip = tiny_party(slot_embedding=True), inputs(absent=0)
    model.subjects.slot.normal_(generator=torch.Generator().manual_seed(1))
    order = torch.tensor([1, 0, 2, 3])
    moved = replace(clip, **{k: getattr(clip, k)[:, :, order] for k in
                             ("states_BFNS", "state_noise_BFNS", "context_states_BFNS",
                              "actions_BFN")})
    assert (moved(model)[0] - clip(model)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("msa", [True, False])
def test_mask_table_entry_by_entry(msa):
    """Table 4.4, read off what attention really lets through, frame by frame and token by token."""
    model, frames, valid = tiny_party(msa=msa), 3, torch.tensor([[True, True, True, False]])
    m, window = VIDEO + SLOTS, 2
    attend = masked(causal_frame_mask(block_ids(frames, 1), window), m, model.within(valid))
    q = torch.zeros(1, frames * m, 1, frames * m)
    eye = torch.eye(frames * m)[None, :, None]  # the value of token k is the k-th unit vector
    seen = attend(0, q, torch.zeros_like(eye), eye)[0, :, 0] > 0
    for a in range(frames * m):
        for b in range(frames * m):
            (fq, tq), (fk, tk) = divmod(a, m), divmod(b, m)
            i, j = tq - VIDEO, tk - VIDEO  # subject numbers; below 0: video
            temporal = fk <= fq and fk >= fq + 1 - window
            if j < 0:
                kind = True  # video is seen by video and by subjects
            elif i < 0:
                kind = bool(valid[0, j])  # video sees the subjects that are there
            else:
                kind = bool(valid[0, j]) and (i == j or not msa)
            assert bool(seen[a, b]) == (temporal and kind), (fq, tq, fk, tk)


def test_cross_attention_mask_entry_by_entry():
    """Section 4.5: which tokens see which action tokens."""
    valid, frames, window = torch.tensor([[True, True, False, True]]), 3, 2
    index = torch.arange(frames)[None]
    for mca in ("subject", "frame", "none"):
        sub = tiny_party(mca=mca).subjects
        sees = sub.sees_actions(index, index, valid, VIDEO, window)[0]
        tokens = range(VIDEO, VIDEO + SLOTS) if mca == "subject" else range(VIDEO + SLOTS)
        assert sees.shape == (frames * len(tokens), frames * SLOTS)
        for row, (fq, tq) in enumerate((f, t) for f in range(frames) for t in tokens):
            for column, (fk, j) in enumerate((f, j) for f in range(frames) for j in range(SLOTS)):
                want = {"subject": fk == fq and j == tq - VIDEO,
                        "frame": fk == fq and bool(valid[0, j]),
                        "none": fq - window < fk <= fq and bool(valid[0, j])}[mca]
                assert bool(sees[row, column]) == want


@every_ablation
@pytest.mark.parametrize("forcing", ["teacher", "diffusion"])
def test_causality_of_actions(how, forcing):
    """Other actions at frame f: the frames before are the same bits, frame f is not."""
    model, clip, frame = tiny_party(**how), inputs(), 3
    actions = clip.actions_BFN.clone()
    actions[:, frame, 0] = (actions[:, frame, 0] + 1) % 8
    (video, states), (video2, states2) = (
        c(model, forcing=forcing) for c in (clip, replace(clip, actions_BFN=actions)))
    assert torch.equal(video[:, :frame], video2[:, :frame])
    assert torch.equal(states[:, :frame], states2[:, :frame])
    assert (states[:, frame] - states2[:, frame]).abs().max() > 1e-4
    assert (video[:, frame] - video2[:, frame]).abs().max() > 1e-5


@every_ablation
def test_cached_rollout_is_the_teacher_forced_forward(how):
    """Frame by frame through paged memory, at equal inputs, with a window as long as the clip."""
    model, clip = tiny_party(**how), inputs()
    b, f = clip.sigma_BF.shape
    want_video, want_states = clip(model)
    mix = [(1 - s) * x + s * n for x, n, s in (
        (clip.clean_BFChw, clip.noise_BFChw, clip.sigma_BF[..., None, None, None]),
        (clip.states_BFNS, clip.state_noise_BFNS, clip.sigma_BF[..., None, None]))]
    noisy, clean = model.pack(*mix), model.pack(clip.clean_BFChw, clip.states_BFNS)
    place = clip.context_states_BFNS
    before = torch.cat([place[:, :1], place[:, :-1]], 1)
    cfg = model.cfg.wan
    pool = PagePool(PageSpec(layers=cfg.num_layers, heads=cfg.num_heads, head_dim=cfg.head_dim,
                             tokens=VIDEO + SLOTS))
    stepper = CausalStepper(model.network, pool, Full())
    tables, text = stepper.empty(b), model.dit.text(clip.text_BLD)
    for i in range(f):
        keys = slice(0, i + 1) if model.cfg.subjects.mca == "none" else slice(i, i + 1)
        given = {"actions_BGN": clip.actions_BFN[:, keys], "before_BFNS": before[:, i:i + 1],
                 "action_frame_BG": torch.arange(f)[None, keys].expand(b, -1),
                 "action_before_BGNS": before[:, keys], "valid_BN": clip.valid_BN, "text_kv": text}
        block = Block(np.full((b, 1), i), given, model.within(clip.valid_BN))
        x, t = noisy[:, :, i:i + 1], 1000 * clip.sigma_BF[:, i:i + 1]
        with torch.no_grad():
            flow = stepper._call(x, t, stepper.reader(tables, block), block.index_Bn, given)
            tables, _ = stepper.commit(tables, clean[:, :, i:i + 1], 0.0, block)
        video, states = model.unpack(flow)
        close(video[:, 0], want_video[:, i])
        close(states[:, 0], want_states[:, i])


@every_ablation
def test_invalid_slot_content_is_irrelevant(how):
    """Whatever is in an empty slot, NaN included: the same bits; its own flow is zero."""
    model, clip = tiny_party(**how), inputs()
    empty = {k: getattr(clip, k).clone() for k in
             ("states_BFNS", "state_noise_BFNS", "context_states_BFNS", "actions_BFN")}
    for name, value in empty.items():
        value[:, :, -1] = 3 if name == "actions_BFN" else float("nan")
    (video, states), (video2, states2) = clip(model), replace(clip, **empty)(model)
    assert torch.equal(video, video2) and torch.equal(states, states2)
    assert (states[:, :, -1] == 0).all() and (states[:, :, :-1] != 0).any()
    there = replace(clip, valid_BN=torch.ones_like(clip.valid_BN))(model)
    assert (there[0] - video).abs().max() > 1e-4  # a player more does change the picture


def test_action_of_j_cannot_change_token_i_in_one_layer_with_frozen_video():
    """One isolated block, video tokens replaced after it: only subject j hears its action."""
    def run(how, actions):
        model, clip = tiny_party(layers=1, **how), inputs(absent=0)
        seen = {}
        block = model.dit.blocks[0]
        block.register_forward_hook(lambda m, a, y: seen.update(y=y))
        replace(clip, actions_BFN=actions)(model, forcing="diffusion")
        return seen["y"].unflatten(1, (5, -1))

    actions = inputs(absent=0).actions_BFN
    other = actions.clone()
    other[:, :, 1] = (other[:, :, 1] + 1) % 8
    for how in ({}, dict(msa=False)):  # within one layer, MSA comes before the actions
        changed = (run(how, actions) - run(how, other)).abs().amax((0, 1, 3)) > 0
        assert changed.tolist() == [False] * (VIDEO + 1) + [True] + [False] * 2
    changed = (run(dict(mca="frame"), actions) - run(dict(mca="frame"), other)).abs()
    assert (changed.amax((0, 1, 3)) > 0).all()


def test_action_of_j_reaches_i_only_through_video_in_two_layers():
    """MSA over layers: with the video's keys hidden from subjects, j's action never gets to i."""
    def run(how, actions):
        model, clip = tiny_party(**how), inputs(absent=0)
        plain = model.within

        def blind(valid):
            see = plain(valid)
            see[:, VIDEO:, :VIDEO] = False
            return see

        model.within = blind
        return replace(clip, actions_BFN=actions)(model, forcing="diffusion")[1]

    actions = inputs(absent=0).actions_BFN
    other = actions.clone()
    other[:, :, 1] = (other[:, :, 1] + 1) % 8
    for how, isolated in (({}, True), (dict(msa=False), False), (dict(mca="frame"), False)):
        moved = (run(how, actions) - run(how, other)).abs().amax((0, 1, 3)) > 0
        assert moved.tolist() == ([False, True, False, False] if isolated else [True] * 4)
    # with video in between it does, by the third layer: j hears, video sees j, i sees video
    model, clip = tiny_party(layers=3), inputs(absent=0)
    a, b = clip(model)[1], replace(clip, actions_BFN=other)(model)[1]
    assert ((a - b).abs().amax((0, 1, 3)) > 0).all()


# ------------------------------------------------------------------------- the ablations differ


def test_every_ablation_is_a_different_network():
    clip, told = inputs(), []
    for how in ABLATIONS.values():
        told.append(torch.cat([x.flatten() for x in clip(tiny_party(**how))]))
    for i, a in enumerate(told):
        for b in told[:i]:
            assert (a - b).abs().max() > 1e-4


def test_pooled_actions_do_not_know_whose_they_are():
    model, clip = tiny_party(pooled=True), inputs(absent=0)
    swapped = replace(clip, actions_BFN=clip.actions_BFN[:, :, [1, 0, 2, 3]])
    for a, b in zip(clip(model), swapped(model), strict=True):
        close(a, b)
    bound = tiny_party()
    assert (clip(bound)[1] - swapped(bound)[1]).abs().max() > 1e-2


def test_anchor_biases_attention_to_where_the_subject_was():
    """The subject stands on its patch: same rotation as the video token there."""
    model = tiny_party()
    place = torch.tensor([[[[-0.75, -0.75], [0.25, -0.25], [0.75, 0.75], [0.0, 0.0]]]])
    spots = model.subjects.positions(torch.tensor([[7]]), (4, 4), place)[0, 0]
    for subject, patch in ((0, 0), (1, 6), (2, 15)):  # centre of row y, column x: 4 y + x
        assert torch.equal(spots[VIDEO + subject], spots[patch])
    assert spots[-1].tolist() == [7, 1.5, 1.5]


@pytest.mark.parametrize("forcing", ["teacher", "diffusion"])
def test_facing_and_alive_are_diffused_too(forcing):
    video, states = inputs(channels=7)(tiny_party(facing=True), forcing=forcing)
    assert states.shape == (2, 5, SLOTS, 7) and (states[..., 6] != 0).any()


# ------------------------------------------------------------------------- sizes and files


def test_the_published_size():
    with torch.device("meta"):
        model = PartyDynamics(PARTY_1_3B)
    base, new = model.dit.state_dict(), model.subjects.state_dict()
    assert sum(v.numel() for v in base.values()) == 1_418_996_800 and len(base) == 825
    assert PARTY_1_3B.grid_hw == (32, 32) and PARTY_1_3B.subjects.slots == 8
    assert {k: tuple(v.shape) for k, v in new.items()} == {
        "inputs.weight": (1536, 34), "inputs.bias": (1536,), "embedding.weight": (1536, 1536),
        "embedding.bias": (1536,), "kind": (1536,), "absent": (1536,), "actions": (9, 1536),
        "modulation": (1, 2, 1536), "head.weight": (2, 1536), "head.bias": (2,)}


def native_folder(folder):
    """A tiny base in the native layout."""
    model = tiny_party(slots=0)
    save_file({k: v.clone() for k, v in model.dit.state_dict().items()},
              folder / "diffusion_pytorch_model.safetensors")
    sizes = {k: getattr(model.cfg.wan, k) for k in ("dim", "ffn_dim", "num_heads", "num_layers",
                                                    "in_dim", "out_dim", "freq_dim", "text_len",
                                                    "text_dim")}
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", **sizes}))
    return model


def test_native_base_weights_load_strictly(tmp_path):
    base = native_folder(tmp_path)
    model = party.from_base(tmp_path)
    for name, value in base.dit.state_dict().items():
        assert torch.equal(model.dit.state_dict()[name], value)
    new = model.subjects
    assert (new.head.weight == 0).all() and (new.inputs.bias == 0).all()
    for p in (new.actions, new.kind, new.absent, new.embedding.weight):
        assert 0.01 < p.std() < 0.03
    assert not any(p.is_meta for p in model.parameters())
    clip = inputs()
    cfg = replace(model.cfg, latent_chw=CHW, subjects=SubjectConfig(slots=SLOTS))
    again = party.from_base(tmp_path, cfg)
    assert (clip(again)[1] == 0).all()  # the output starts at zero
    same = party.from_base(tmp_path, cfg)
    assert torch.equal(same.subjects.actions, again.subjects.actions)


def test_a_base_that_does_not_fit_is_refused(tmp_path):
    native_folder(tmp_path)
    tensors = checkpoint.load_tensors(tmp_path / "diffusion_pytorch_model.safetensors")[0]
    save_file(tensors | {"extra": torch.zeros(1)},
              tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="1 extra tensor"):
        party.from_base(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no configuration"):
        party.from_base(tmp_path)


def test_configurations_read_back_and_refuse():
    cfg = tiny_party(mca="frame").cfg
    assert PartyConfig.from_json(json.loads(json.dumps(cfg.to_json()))) == cfg
    with pytest.raises(ConfigError, match="cannot be read"):
        PartyConfig.from_json({"wan": {}})
    for wrong in (dict(mca="all"), dict(slots=-1), dict(actions=0)):
        with pytest.raises(ConfigError):
            SubjectConfig(**wrong)
    with pytest.raises(ConfigError, match="latents and network"):
        replace(cfg, latent_chw=(5, 8, 8))
    with pytest.raises(ConfigError, match="cross-attention"):
        replace(cfg, wan=WanConfig(dim=64, num_heads=4, in_dim=4, out_dim=4, text_len=0))


def test_without_a_mask_everything_sees_everything():
    q, k, v = (torch.randn(1, 6, 2, 8, generator=torch.Generator().manual_seed(i))
               for i in range(3))
    within = torch.ones(1, 3, 3, dtype=torch.bool)
    attend = masked(torch.ones(2, 2, dtype=torch.bool), 3, within)
    close(attend(0, q, k, v), attention(q, k, v), 1e-6)
