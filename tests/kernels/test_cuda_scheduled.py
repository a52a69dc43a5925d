"""The Triton kernel of `scheduled` against the rule; in Triton's interpreter, or compiled where there is a GPU."""

import pytest
import torch
from star_trajectory import LENGTHS, gradient, parameters, recorded
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import DEVICE, QUIET, STEPS, Run, channels_last, check_safeguard, make_rule, transposed, triton

import lightning_lopt as lopt
from lightning_lopt.kernels import WorkItem
from lightning_lopt.kernels.cuda import scheduled
from lightning_lopt.kernels.cuda.scheduled_step import PROVEN, UNKNOWN

pytestmark = QUIET
# Scalars, vectors beyond a strip, matrices with odd sizes, ones, rows beyond a strip, several tiles; convolutions.
SHAPES = [(), (1030,), (1, 1), (6, 8), (9, 1), (3, 5000), (130, 70), (4, 4, 3, 3), (3, 1, 3, 3), (1, 2, 3, 1, 3)]
FEW = [(7,), (5, 3)]


def verdicts(run):
    return run.kernel._last[1].arguments["verdicts"].tolist()


def test_steps_are_those_of_the_rule():
    run = Run(make_rule("scheduled"), SHAPES)
    for _ in range(STEPS):
        run.both(num_steps=10)
    run.check()


@pytest.mark.parametrize(("length", "steps", "tensors"), [("known", 10, [1, 2]), ("unknown", 1, range(6))])
def test_the_recorded_trajectory(length, steps, tensors):
    run = Run(lopt.load_rule("star").to(DEVICE), [], safeguard=True)
    start, expected = parameters(torch.float32), recorded(length, torch.float32)
    for index in tensors:
        run.add(start[index].detach().to(DEVICE))
    for step in range(steps):
        grads = [gradient(param.cpu(), index, step) for index, param in zip(tensors, run.params, strict=True)]
        work_items = [
            WorkItem(param, grad.to(DEVICE), state, 1.0, 0.0, False)
            for param, grad, state in zip(run.params, grads, run.states, strict=True)
        ]
        run.kernel.step(work_items, run.meta_params, LENGTHS[length], len(start), safeguard=True, measure=False)
    for index, param in zip(tensors, run.params, strict=True):
        torch.testing.assert_close(param, expected[steps][index].to(DEVICE), rtol=2e-5, atol=2e-7)


def test_a_long_run_of_unknown_length_in_which_a_matrix_grows_from_noise_alone():
    rule = make_rule("scheduled", eps=1e-12)
    run = Run(rule, [(4, 9), (5,)])
    for _ in range(2):
        for state in (*run.states, *run.copied):  # as of step 3,000 of white noise
            state["step"].fill_(3000)
            for momentum, decay in zip(state["exp_avg"], rule.decays(run.meta_params).momentum, strict=True):
                momentum.fill_(0.1 * float((1 - decay) / (1 + decay)) ** 0.5)
            state["exp_avg_sq"].fill_(0.01)
        run.both()
        run.check()


def test_what_is_measured():
    run = Run(make_rule("scheduled"), FEW)
    for _ in range(2):
        before = [copy.clone() for copy in run.copies]
        squares = run.both(measure=True, decay=0.0)
    change = sum(float((a - b).square().sum()) for a, b in zip(run.copies, before, strict=True))
    assert float(squares.change) == pytest.approx(change, rel=1e-3)
    assert float(squares.terms["nominal"]) == pytest.approx(4 * change, rel=1e-3)  # steps are scaled by 0.5
    assert set(squares.terms) == {"nominal"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_and_mixed_dtypes(dtype):
    run = Run(make_rule("scheduled"), [(7,), (5, 8)], dtype)
    run.add(torch.randn(4, 3).to(DEVICE))
    for _ in range(2):
        run.both()
    run.check(2e-2 if dtype == torch.bfloat16 else 2e-3)
    torch.testing.assert_close(run.params[-1], run.copies[-1], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("make", "shape"), [(channels_last, (2, 3, 2, 2)), (transposed, (2, 3, 4)), (transposed, (90, 100))]
)
def test_other_memory_orders_and_grads_laid_out_otherwise(make, shape):
    run = Run(make_rule("scheduled"), [shape], make=make)
    for _ in range(2):
        run.draw()
        run.grads = [grad.contiguous() for grad in run.grads]
        run.step()
        run.reference_step()
    run.check()
    assert run.states[0]["exp_avg"][0].stride() == run.params[0].stride()


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("safeguard", [True, False])
def test_a_step_is_a_few_launches_and_nothing_else(monkeypatch, centered, safeguard):
    launches, operations = [], []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            operations.append(str(function))
            return function(*arguments, **(options or {}))

    rule = make_rule("scheduled")
    rule.centering.data.mul_(centered)
    for number in (1, 4):  # of tensors
        run = Run(rule, [(3, 2), (2,)] * number, safeguard=safeguard)
        run.draw()
        run.step(num_steps=10)
        with monkeypatch.context() as patch, Recorded():
            # Nothing is launched: the interpreter would do so by operations on the host.
            stub = lambda kernel, grid: lambda **_: launches.append(kernel)  # noqa: E731
            patch.setattr(triton.runtime.jit.KernelInterface, "__getitem__", stub)
            run.step(num_steps=10)
        assert len(launches) == 3 + centered + safeguard
        assert operations == []
        launches.clear()


def test_two_runs_are_equal_to_the_bit_and_tensors_do_not_meet():
    ends = []
    for extra in (False, False, True):
        torch.manual_seed(0)
        run = Run(make_rule("scheduled"), FEW)
        if extra:
            run.add(torch.ones(3, 3, device=DEVICE))
        run.draw()
        run.step()
        ends.append([*run.params[:2], run.states[1]["exp_avg_sq"]])
    for a, b, c in zip(*ends, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_maximize_negates_the_gradient():
    run = Run(make_rule("scheduled"), FEW)
    run.draw()
    given, run.grads = run.grads, [-grad for grad in run.grads]
    run.step(maximize=True)
    run.grads = given
    run.reference_step()
    run.check()


def test_the_safeguard_skips_the_tensors_that_would_break_and_counts_them():
    check_safeguard(make_rule("scheduled"), large=1e25)


def test_the_safeguard_looks_only_where_sums_prove_nothing():
    run = Run(make_rule("scheduled"), [(5, 3), (4,), (5, 3)], safeguard=True)
    run.params[2][0, 0] = run.copies[2][0, 0] = 3e19  # its square is not finite, but the new value is
    run.both()
    assert verdicts(run) == [PROVEN.value, PROVEN.value, UNKNOWN.value]
    assert [float(state["step"]) for state in run.states] == [1, 1, 1]
    run.check()


def test_float16_values_near_the_limit_are_looked_at():
    run = Run(make_rule("scheduled"), [(6,), (6,)], torch.float16, safeguard=True)
    for values in (run.params, run.copies):
        values[0].fill_(6e4)
        values[1].fill_(65504)
    run.draw()
    run.step(scale=0.0, decay=-0.01)
    assert [int(state["skipped"]) for state in run.states] == [0, 1]
    assert run.params[1].tolist() == [65504] * 6


def test_without_the_safeguard_nan_passes_into_its_tensor_alone():
    run = Run(make_rule("scheduled"), [(5, 3), (5, 3)])
    run.draw()
    run.grads[0][0, 0] = torch.nan
    run.step()
    assert run.params[0].isnan().all()
    assert run.params[1].isfinite().all()


def test_a_gradient_whose_square_overflows_leaves_value_and_rule_equal():
    run = Run(make_rule("scheduled"), [(5, 3)])
    run.draw()
    run.grads[0][0, 0] = 1e20
    run.step()
    run.reference_step()
    run.check()
    assert run.params[0].isfinite().all()


def test_what_has_no_kernel_says_why():
    assert scheduled.supports(lopt.rules.make("scheduled")) is None
    assert scheduled.supports(lopt.rules.make("star")) == "STAR is not Scheduled"
    kernel = scheduled.make(lopt.rules.make("scheduled"))
    assert kernel.refuses(torch.ones(())) is None
    assert "gaps" in kernel.refuses(torch.ones(4, 4)[:, ::2])
    assert "rows of 2^30" in kernel.refuses(torch.empty(2, 2**30, device="meta"))
