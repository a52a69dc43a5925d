"""The Triton STAR kernels against the rule; in Triton's interpreter, or compiled where there is a GPU."""

import pytest
import torch
from triton_cases import DEVICE, QUIET, STEPS, Run, channels_last, check_safeguard, make_rule, transposed, triton

import lightning_lopt as lopt
from lightning_lopt.kernels.cuda import star as triton_star
from lightning_lopt.kernels.cuda import star_step as device_code
from lightning_lopt.kernels.cuda.tiling import Sizes

pytestmark = QUIET

# Scalars, vectors beyond a tile's strip, matrices with odd sizes, ties, ones; convolutions; three to five dims.
SHAPES = [
    (),
    (1030,),
    (1, 1),
    (70, 66),
    (6, 8),
    (9, 1),
    (4, 4, 3, 3),
    (3, 3, 2, 2),
    (3, 1, 3, 3),
    (2, 5, 4),
    (1, 2, 3, 1, 3),
]
FEW = [(7,), (5, 3)]
MANY = 300 if STEPS >= 50 else 24


def test_steps_are_those_of_the_rule():
    run = Run(make_rule("star", step_mult=1e-4), SHAPES)
    for _ in range(STEPS):
        run.both()
    run.check()


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("hyperparam", {"nominal_grad_estimator": "SGD"}),
        ("hyperparam", {"nominal_controller": False, "nominal_grad_estimator": "AggMo"}),
        ("blackbox", {}),
        ("star", {"nominal_grad_estimator": "Adam", "weight_decay": 0.02}),
        ("star", {"nominal_grad_estimator": "SGDM", "weight_decay": 0.02, "regularization_controller": True}),
        ("star", {"eps": 1e-10}),
    ],
)
def test_kinds_and_options(kind, config):
    run = Run(make_rule(kind, **config), FEW)
    for _ in range(2):
        before = [copy.clone() for copy in run.copies]
        squares = run.both(measure=True)
    run.check()
    change = sum(float((a - b).square().sum()) for a, b in zip(run.copies, before, strict=True))
    assert float(squares.change) == pytest.approx(change, rel=1e-3)
    expected = {"hyperparam": {"nominal"}, "blackbox": {"blackbox"}, "star": {"blackbox", "nominal"}}[kind]
    assert set(squares.terms) == expected | ({"decay"} if config.get("weight_decay") else set())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_and_mixed_dtypes(dtype):
    run = Run(make_rule("star", step_mult=1e-5), [(7,), (5, 8)], dtype)
    run.add(torch.randn(4, 3).to(DEVICE))
    for _ in range(2):
        run.both()
    run.check(2e-2 if dtype == torch.bfloat16 else 2e-3)
    torch.testing.assert_close(run.params[-1], run.copies[-1], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("make", [channels_last, transposed])
def test_other_memory_orders_and_grads_laid_out_otherwise(make):
    run = Run(make_rule("star", step_mult=1e-4), [(2, 3, 2, 2)], make=make)
    for _ in range(2):
        run.draw()
        run.grads = [grad.contiguous() for grad in run.grads]
        run.step()
        run.reference_step()
    run.check()
    assert run.states[0]["exp_avg"][0].stride() == run.params[0].stride()
    assert "gaps" in run.kernel.refuses(torch.ones(4, 4)[:, ::2])


def test_launches_do_not_depend_on_the_number_of_tensors(monkeypatch):
    counted = []
    get = triton.runtime.jit.KernelInterface.__getitem__
    monkeypatch.setattr(
        triton.runtime.jit.KernelInterface, "__getitem__", lambda self, grid: counted.append(self) or get(self, grid)
    )
    no_network = {"step_mult": 0.0, "nominal_controller": False}
    for shapes, safeguard, config, expected in (
        ([(3, 2)], False, {}, 6),
        ([(2,), (2, 2)] * 2, True, {}, 7),
        ([(3, 2)], False, no_network, 3),
        ([(2,)], True, no_network, 5),  # there are no rows and columns
    ):
        run = Run(make_rule("star", **config), shapes, safeguard=safeguard)
        run.draw()
        counted.clear()
        run.step()
        assert len(counted) == expected


def test_many_small_tensors():
    shapes = [(number % 5 + 1,) if number % 3 else (2, number % 4 + 1) for number in range(MANY)]
    run = Run(make_rule("star", step_mult=1e-4), shapes)
    run.both()
    run.check()


def test_two_runs_are_equal_to_the_bit_and_tensors_do_not_meet():
    ends = []
    for extra in (False, False, True):
        torch.manual_seed(0)
        run = Run(make_rule("star"), FEW)
        if extra:
            run.add(torch.ones(3, 3, device=DEVICE))
        run.draw()
        run.step()
        ends.append([*run.params[:2], run.states[1]["exp_avg_sq"], run.states[1]["row"]])
    for a, b, c in zip(*ends, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_maximize_negates_the_gradient():
    run = Run(make_rule("star", step_mult=1e-4), FEW)
    run.draw()
    given, run.grads = run.grads, [-grad for grad in run.grads]
    run.step(maximize=True)
    run.grads = given
    run.reference_step()
    run.check()


def test_the_safeguard_skips_the_tensors_that_would_break_and_counts_them():
    check_safeguard(make_rule("star"), large=3e19)


def test_without_the_safeguard_nan_passes_into_its_tensor_alone():
    run = Run(make_rule("star"), [(5, 3), (5, 3)])
    run.draw()
    run.grads[0][0, 0] = torch.nan
    run.step()
    assert run.params[0].isnan().all()
    assert run.params[1].isfinite().all()


def test_what_has_no_kernel_says_why():
    assert triton_star.supports(lopt.rules.make("star")) is None
    assert "hidden_size=8" in triton_star.supports(lopt.rules.make("star", hidden_size=8))
    assert "aggregate_magnitude" in triton_star.supports(lopt.rules.make("star", aggregate_magnitude=True))
    assert "LSTMRule" in triton_star.supports(lopt.rules.make("lstm"))
    kernel = triton_star.make(lopt.rules.make("star"))
    assert kernel.refuses(torch.ones(3, 3).t()) is None
    assert "float64" in kernel.refuses(torch.ones(3, dtype=torch.float64))


def test_tensors_without_numbers_are_passed_over():
    run = Run(make_rule("star"), [(0, 3), (2,)])
    run.both()
    run.check()
    run.params, run.grads, run.states = run.params[:1], run.grads[:1], run.states[:1]
    assert float(run.step(measure=True).change) == 0


def test_ways_of_reading_a_tile_are_all_taken():
    """Else the tests above would not test them."""
    shapes = [(3,), (6, 8), (4, 4, 3, 3), (9, 1)]
    assert set(shapes[1:]) <= set(SHAPES)
    run = Run(make_rule("star"), shapes)
    run.draw()
    run.step()
    _, plan = run.kernel._last
    aligned = (plan._addresses.tensor[:, :4] % 16 == 0).all(1).cpu()
    flat, inner, width = (plan.arguments["sizes"][:, Sizes._fields.index(n)].cpu() for n in ("flat", "inner", "width"))
    flat, aligned = flat.bool(), aligned & (width % 4 == 0)
    ways = {device_code.FLAT.value} if flat.any() else set()
    ways |= {device_code.MATRIX.value} if (aligned & ~flat & (inner == 1)).any() else set()
    ways |= {device_code.SIDE_BY_SIDE.value} if (aligned & ~flat & (inner > 1)).any() else set()
    ways |= {device_code.UNALIGNED.value} if (~aligned & ~flat).any() else set()
    assert ways == {0, 1, 2, 3}
