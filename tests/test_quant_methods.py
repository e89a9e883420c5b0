"""The arithmetic of the methods, on random layers whose inputs are correlated as real ones are."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from lowmem.errors import BadInput, Cancelled
from lowmem.events import CancelToken
from lowmem.fields import build
from lowmem.kernels.grid import fit, fit_closely, nearest, refit, squared_error
from lowmem.kernels.quantized import Quantized
from lowmem.quant import METHODS, get, usable
from lowmem.quant import hessian as hessian_module
from lowmem.quant.base import BITS
from lowmem.quant.hessian import Hessian
from lowmem.quant.methods import gptq_solver
from lowmem.quant.scaling import channel_scales

GRID = [name for name in METHODS if name not in ("int8_dynamic", "bnb")]
COLUMNS = 128


def inputs(tokens: int = 512, seed: int = 0) -> torch.Tensor:
    """Correlated channels of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(99))
    sizes = torch.logspace(-1, 1, COLUMNS)[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(98))]
    return torch.randn(tokens, COLUMNS, generator=generator) @ (mixing / 8 + torch.eye(COLUMNS)) * sizes


def hessian() -> Hessian:
    found = Hessian(COLUMNS)
    found.add(inputs())
    found.finish()
    return found


def test_a_reordered_hessian_is_that_of_reordered_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian_module, "_STRIP", 48)
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(5))
    found, expected = hessian(), Hessian(COLUMNS)
    found.reorder(order)
    expected.add(inputs()[:, order])
    expected.finish()
    torch.testing.assert_close(found.matrix, expected.matrix)
    torch.testing.assert_close(found.magnitude, expected.magnitude)


def test_the_reported_loss_is_without_dampening() -> None:
    result = solve("gptq", dampening=1.0)[0]
    assert result.loss == pytest.approx(loss(result, weight()), rel=1e-3)


def weight(rows: int = 64, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.05


def solve(method: str, weights: list[torch.Tensor] | None = None, **options: Any) -> list[Quantized]:
    chosen = get(method)
    made = build(chosen.Options, {"group_size": 32} | options)
    made.check()
    return chosen.quantize(weights or [weight()], hessian() if chosen.calibrated else None, made, CancelToken())


def loss(result: Quantized, original: torch.Tensor) -> float:
    """The error of the outputs, computed from the inputs themselves."""
    x = inputs()
    return float((x @ (result.dequantize() - original).t()).square().sum() / (x @ original.t()).square().sum())


def test_a_hessian_is_that_of_its_inputs() -> None:
    x, found = inputs(), Hessian(COLUMNS)
    for part in x.view(4, -1, COLUMNS):
        found.add(part)
    found.finish()
    torch.testing.assert_close(found.matrix, x.t() @ x / len(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.magnitude, x.abs().mean(0))
    change = weight()
    torch.testing.assert_close(
        found.output_error(change), float((x @ change.t()).square().sum() / len(x)), rtol=1e-4, atol=0
    )
    factors = torch.rand(COLUMNS) + 0.5
    found.divide(factors)
    torch.testing.assert_close(found.matrix, (x / factors).t() @ (x / factors) / len(x), rtol=1e-4, atol=1e-4)


def test_a_wide_hessian_is_accumulated_in_strips_and_stays_symmetric() -> None:
    x, found = torch.randn(40, 1200, generator=torch.Generator().manual_seed(0)), Hessian(1200)
    found.add(x)
    found.finish()
    torch.testing.assert_close(found.matrix, x.t() @ x / 40, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.matrix, found.matrix.t())


@pytest.mark.parametrize("method", GRID)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_every_method_keeps_to_the_stored_form(method: str, bits: int, symmetric: bool, group_size: int) -> None:
    if method == "awq" and bits != 4:
        with pytest.raises(BadInput, match="4 bits"):
            solve(method, bits=bits)
        return
    first, second = solve(
        method, [weight(), weight(40, 2).half()], bits=bits, symmetric=symmetric, group_size=group_size
    )
    assert first.codes.shape == (64, COLUMNS)
    assert second.codes.shape == (40, COLUMNS)
    groups = 1 if group_size == -1 else COLUMNS // group_size
    assert first.scales.shape == first.zeros.shape == (64, groups)
    assert int(first.codes.max()) < 2**bits
    assert int(first.zeros.max()) < 2**bits
    assert bool(first.scales.isfinite().all())
    assert bool((first.scales > 0).all())
    if symmetric:
        assert bool((first.zeros == 2 ** (bits - 1)).all())
    # Calibrated methods trade the weights' own error for that of the outputs.
    assert first.loss < {2: 0.6, 3: 0.15, 4: 0.04, 8: 2e-4}[bits]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_calibrated_methods_lose_less_than_rounding(bits: int) -> None:
    rounded = loss(solve("rtn", bits=bits)[0], weight())
    plain = loss(solve("gptq", bits=bits, search=False, sweeps=0, dampening=0.01)[0], weight())
    full = loss(solve("gptq", bits=bits)[0], weight())
    assert full < min(0.5 * rounded, 0.6 * plain)
    if bits == 4:
        assert plain < 0.7 * rounded
        assert loss(solve("awq", scale_channels=False)[0], weight()) < 0.9 * rounded


def test_hqq_loses_less_than_rounding() -> None:
    skewed = [weight() + 0.02, weight(64, 3).pow(3) * 100]
    for original in skewed:
        rounded, solved = solve("rtn", [original])[0], solve("hqq", [original])[0]
        assert solved.loss < 0.97 * rounded.loss
        torch.testing.assert_close(
            solved.loss,
            float((solved.dequantize() - original).square().sum() / original.square().sum()),
            rtol=1e-4,
            atol=0,
        )


def test_reported_loss_is_that_of_the_outputs() -> None:
    for method in ("gptq", "awq"):
        result = solve(method)[0]
        torch.testing.assert_close(result.loss, loss(result, weight()), rtol=0.02, atol=0)


def test_group_grids_see_the_corrections_inside_a_block() -> None:
    """The grid of a group fits weights that carry the errors of the group before it in the same block of columns."""
    found, original = hessian(), weight()
    arguments: dict[str, Any] = {
        "bits": 3,
        "group_size": 32,
        "symmetric": False,
        "order": "none",
        "dampening": 0.01,
        "search": False,
        "sweeps": 0,
        "cancel": CancelToken(),
    }
    result = gptq_solver.solve([original], found, **arguments)[0]
    _, factor = gptq_solver._factorize(hessian().matrix, 0.01, CancelToken())
    corrected = original.clone()
    for column in range(COLUMNS):
        if column % 32 == 0:
            scale, zero = fit(corrected[:, column : column + 32], 3, False)
            torch.testing.assert_close(result.scales[:, column // 32].float(), scale.squeeze(1), rtol=2e-3, atol=0)
        here = corrected[:, column : column + 1]
        error = here - (nearest(here, scale, zero, 3) - zero) * scale
        corrected[:, column:] -= error / factor[column, column] * factor[column, column:]
    stale = fit(original[:, 32:64], 3, False)[0].squeeze(1)
    assert not torch.allclose(result.scales[:, 1].float(), stale, rtol=0.02)


def test_groups_longer_than_a_block_see_all_corrections(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = solve("gptq", group_size=128)[0]
    monkeypatch.setattr(gptq_solver, "BLOCK", 32)
    torch.testing.assert_close(solve("gptq", group_size=128)[0].loss, whole.loss, rtol=0.05, atol=0)


def test_rows_are_independent_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = solve("gptq")[0]
    monkeypatch.setattr(gptq_solver, "ROWS_BYTES", 4 * COLUMNS * 10)
    parts = solve("gptq")[0]
    assert (whole.codes == parts.codes).float().mean() > 0.999
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-2, atol=0)


@pytest.mark.parametrize("order", ["groups", "activation", "none"])
def test_orders_of_columns_and_the_groups_they_leave(order: str) -> None:
    result = solve("gptq", order=order)[0]
    consecutive = torch.arange(COLUMNS, dtype=torch.int32) // 32
    assert torch.equal(result.groups, consecutive) == (order != "activation")
    assert torch.equal(result.groups.sort().values, consecutive)
    assert loss(result, weight()) < 0.5 * loss(solve("rtn")[0], weight())


def test_sweeps_never_raise_the_loss() -> None:
    losses = [solve("gptq", bits=3, sweeps=sweeps, dampening=0.001)[0].loss for sweeps in (0, 1, 3)]
    assert losses[0] > losses[1] >= losses[2] * 0.999


def test_singular_and_empty_hessians_are_dampened_until_they_work() -> None:
    few = Hessian(COLUMNS)
    few.add(inputs(3))  # rank 3
    few.finish()
    none = Hessian(COLUMNS)
    none.finish()
    for found in (few, none):
        options = build(get("gptq").Options, {"group_size": 32, "dampening": 0.001})
        result = get("gptq").quantize([weight()], found, options, CancelToken())[0]
        assert (result.dequantize() - weight()).square().mean() < 0.1 * weight().square().mean()


def test_channel_scales_help_rounding_and_leave_no_channel_behind() -> None:
    found, options = hessian(), build(get("awq").Options, {"group_size": 32})
    factors = channel_scales([weight()], found, options, CancelToken())
    assert bool((factors > 0).all())
    rounded = solve("rtn", [weight() * factors])[0].dequantize() / factors
    assert found.output_error(rounded - weight()) < 0.8 * found.output_error(solve("rtn")[0].dequantize() - weight())


def test_search_and_refit_lower_the_error() -> None:
    groups, importance = weight().view(-1, 32), torch.rand(32) + 0.1
    plain, searched = fit(groups, 3, False, importance), fit(groups, 3, False, importance, search=True)
    costs = [squared_error(groups, *grid, 3, importance) for grid in (plain, searched)]
    assert bool((costs[1] <= costs[0]).all())
    assert costs[1].sum() < 0.9 * costs[0].sum()
    scale, zero = plain
    steps = nearest(groups, scale, zero, 3) - zero
    fitted = refit(groups, steps, scale)
    assert (groups - steps * fitted).square().sum() < (groups - steps * scale).square().sum()
    assert torch.equal(fitted, fitted.half().float())


def test_the_closest_grid_is_closer_than_a_searched_one() -> None:
    dense = torch.randn(1000, 32, generator=torch.Generator().manual_seed(0))
    low = dense.amin(1, keepdim=True)
    step = (dense.amax(1, keepdim=True) - low) / 15
    once_rounded = ((dense - low) / step).round() * step + low  # on grids with real zero points, as GGUF's
    for groups, share in ((dense, 1), (once_rounded, 0.98)):
        plain, searched, closest = fit(groups, 4, False), fit(groups, 4, False, search=True), fit_closely(groups, 4)
        costs = [squared_error(groups, *grid, 4) for grid in (plain, searched, closest)]
        assert bool((costs[2] <= costs[0]).all())
        assert costs[2].sum() < share * costs[1].sum()
    assert torch.equal(closest[0], closest[0].half().float())
    assert torch.equal(closest[1], closest[1].round())


@pytest.mark.parametrize("method", GRID)
def test_flat_groups_are_exact_or_close(method: str) -> None:
    """Weights that are all zero, or all the same, have no range to divide."""
    flat = torch.zeros(32, COLUMNS)
    flat[1], flat[2], flat[3] = 0.5, -0.25, 1e-9
    result = solve(method, [flat])[0].dequantize()
    assert bool(result.isfinite().all())
    torch.testing.assert_close(result[:3], flat[:3], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_stop_is_heard_within_a_second(method: str) -> None:
    chosen, cancel, wide = get(method), CancelToken(), 1024
    found = Hessian(wide)
    found.add(torch.randn(64, wide))
    found.finish()
    big = torch.randn(6000, wide)
    options = build(chosen.Options, {"group_size": 64} if method in GRID else {})

    def forever() -> None:
        while True:
            chosen.quantize([big], found if chosen.calibrated else None, options, cancel)

    chosen.quantize([big[:64]], found if chosen.calibrated else None, options, cancel)  # its libraries are imported
    pressed = threading.Timer(0.3, cancel.set)
    pressed.start()
    started = time.monotonic()
    with pytest.raises(Cancelled):
        forever()
    assert time.monotonic() - started < 1.3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 5}, "in 5 bits"),
        ({"bits": 16}, "Bits is 16"),
        ({"group_size": 7}, "groups of 7"),
        ({"group_size": 0}, "groups of 0"),
    ],
)
def test_options_that_cannot_be_stored_are_refused(options: dict[str, int], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        solve("rtn", **options)


def test_methods_are_found_by_name(made_up: Any) -> None:
    assert all(get(name).name == name for name in METHODS)
    assert list(usable(made_up())) == list(METHODS)
    with pytest.raises(BadInput, match="no quantization method 'magic'"):
        get("magic")
