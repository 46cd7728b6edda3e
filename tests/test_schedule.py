"""Schedules against the published tables and solvers, and against their own mathematics."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from worldgym.errors import ConfigError, NotFiniteError, ShapeError
from worldgym.schedule import FewStep, FlowTable, UniPC, add_noise, x0_from_flow

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "wan_causal"
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"{GOLDEN} is absent")


@golden
def test_table_reproduces_golden():
    want = load_file(GOLDEN / "scheduler.safetensors")
    table = FlowTable(5.0)
    assert torch.equal(table.sigmas_R, want["sigmas"])
    assert torch.equal(table.timesteps_R, want["timesteps"])
    torch.testing.assert_close(table.weights_R, want["training_weight"], atol=1e-5, rtol=0)


@golden
@pytest.mark.parametrize("slots", [1, 2])
def test_unipc_reproduces_golden(slots):
    want = load_file(GOLDEN / "unipc.safetensors")
    solver = UniPC(8, shift=5.0)
    assert list(solver.timesteps) == want["timesteps"].tolist()
    assert list(solver.sigmas) == want["sigmas"].tolist()
    run = solver.begin(want["x0_sample"][:slots])
    for flow, sample in zip(want["model_outputs"], want["samples"], strict=True):
        got = run.step(flow[:slots])
        torch.testing.assert_close(got, sample[:slots], atol=1e-5, rtol=1e-5)
    assert run.done


@pytest.mark.parametrize("shift", [0.5, 1.0, 5.0, 8.0])
def test_row_is_the_argmin(shift):
    table = FlowTable(shift)
    rows = table.timesteps_R.double()
    t = torch.cat([torch.arange(0, 1001, 0.37), torch.tensor([-5.0, 0.0, 1000.0, 1200.0])]).double()
    t = torch.cat([t, rows, (rows[1:] + rows[:-1]) / 2])
    assert torch.equal(table.row(t), (rows[None] - t[:, None]).abs().argmin(1))
    assert table.row(t.reshape(1, -1)).shape == (1, len(t))


def test_sigma_of_a_batch_and_weights():
    table = FlowTable(5.0)
    sigma_BF = table.sigma(torch.tensor([[1000.0, 625.0], [0.0, 937.5]]))
    assert sigma_BF.tolist()[0] == [1.0, 0.625] and sigma_BF[1, 1] == 0.9375
    assert sigma_BF[1, 0] == table.sigmas_R[-1]  # nearest entry, not exactly 0
    assert table.weights_R.mean() == pytest.approx(1, abs=1e-4)
    assert table.weight(500.0) == table.weights_R.max()


def test_warping_and_few_step():
    schedule = FewStep.of([1000, 750, 500, 250], shift=5.0)
    assert schedule.timesteps == pytest.approx((1000, 937.5, 833.3333, 625), abs=1e-3)
    assert schedule.sigmas == pytest.approx((1, 0.9375, 0.83333, 0.625), abs=1e-5)
    assert FewStep.even(4, shift=5.0) == schedule
    assert FewStep.of([1000, 750, 500, 250, 0], shift=5.0) == schedule
    flat = FewStep.of([1000, 750], shift=5.0, warp=False)
    assert flat.timesteps == (1000.0, 750.0) and flat.sigmas[1] == pytest.approx(0.75, abs=1e-3)
    assert FlowTable(5.0).warp([0]) == [0.0]


def test_noise_and_back():
    noise = torch.Generator().manual_seed(1)
    x0, eps = torch.randn(2, 3, 4, 5, generator=noise), torch.randn(2, 3, 4, 5, generator=noise)
    for sigma in (0.3, torch.tensor([0.2, 0.9]), torch.rand(2, 3, generator=noise)):
        x = add_noise(x0, eps, sigma)
        torch.testing.assert_close(x0_from_flow(x, eps - x0, sigma), x0)
    assert torch.equal(add_noise(x0, eps, 0.0), x0)
    assert torch.equal(add_noise(x0, eps, torch.tensor([1.0, 0.0]))[0], eps[0])
    assert add_noise(x0.bfloat16(), eps, 0.5).dtype == torch.bfloat16
    with pytest.raises(ShapeError, match="Fix: pass sigma as"):
        add_noise(x0, eps, torch.rand(5))


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
def test_unipc_follows_a_straight_flow_exactly(steps):
    """With the true flow of one data point every solver must land on that point."""
    noise = torch.Generator().manual_seed(2)
    x0, eps = torch.randn(3, 4, generator=noise), torch.randn(3, 4, generator=noise)
    solver = UniPC(steps, shift=3.0)
    x = add_noise(x0, eps, solver.sigmas[0])
    run = solver.begin(x)
    for sigma in solver.sigmas[:-1]:
        x = run.step((x - x0) / sigma)
    torch.testing.assert_close(x, x0, atol=1e-4, rtol=1e-4)


def test_unipc_slots_do_not_mix():
    noise = torch.Generator().manual_seed(3)
    x, flows = torch.randn(4, 6, generator=noise), torch.randn(5, 4, 6, generator=noise)
    whole, part = UniPC(5).begin(x), UniPC(5).begin(x[1:2])
    for flow in flows:
        together, alone = whole.step(flow), part.step(flow[1:2])
        assert torch.equal(together[1:2], alone)


def _over():
    run = UniPC(1).begin(torch.zeros(2))
    run.step(torch.zeros(2))
    run.step(torch.zeros(2))


REFUSED = [
    (lambda: FlowTable(0.0), ConfigError, "shift"),
    (lambda: FlowTable(float("nan")), ConfigError, "shift"),
    (lambda: FlowTable(5.0).warp([1001]), ConfigError, "1001"),
    (lambda: FlowTable(5.0).warp([12.5]), ConfigError, "12.5"),
    (lambda: FlowTable(5.0).sigma(float("nan")), NotFiniteError, "timestep"),
    (lambda: FewStep.of([]), ConfigError, "denoising steps"),
    (lambda: FewStep.of([500, 750]), ConfigError, "falling"),
    (lambda: FewStep.even(0), ConfigError, "denoising step"),
    (lambda: UniPC(0), ConfigError, "sampling step"),
    (lambda: UniPC(3, shift=-1), ConfigError, "shift"),
    (lambda: UniPC(3).begin(torch.zeros(2, 3)).step(torch.zeros(3)), ShapeError, "(2, 3)"),
    (_over, ConfigError, "over"),
]


@pytest.mark.parametrize(("call", "error", "word"), REFUSED)
def test_refusals(call, error, word):
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert word in text and "expected" in text and "Fix:" in text
