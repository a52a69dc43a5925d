"""The Triton kernel of `scheduled` against the rule; in Triton's interpreter, or compiled where there is a GPU."""

import pytest
import torch
from star_trajectory import LENGTHS, NUMBERS, gradient, parameters, recorded
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import DEVICE, QUIET, STEPS, Run, channels_last, check_safeguard, make_rule, transposed, triton

import lightning_lopt as lopt
from lightning_lopt.kernels import WorkItem
from lightning_lopt.kernels.cuda import products, scheduled
from lightning_lopt.kernels.cuda.columns import BOUND, PROVEN, SKIP, UNKNOWN
from lightning_lopt.rules import matrix

pytestmark = QUIET
# Scalars, vectors beyond a strip, matrices with odd sizes, ones, rows beyond a strip, several tiles; convolutions.
SHAPES = [(), (1030,), (1, 1), (6, 8), (9, 1), (3, 5000), (130, 70), (4, 4, 3, 3), (3, 1, 3, 3), (1, 2, 3, 1, 3)]
FEW = [(7,), (5, 3)]
# Two alike; tall, square and wide ones, beyond a tile, a convolution; some that are no matrices; experts whose numbers
# come in fours and do not.
ROLES = [
    *[((6, 8), "hidden")] * 2,
    *[((20, 3), "hidden"), ((4, 12), "hidden"), ((130, 70), "hidden"), ((4, 3, 2, 2), "hidden")],
    *[((1, 6), "hidden"), ((3,), "hidden"), ((3, 4, 6), "experts"), ((2, 5, 3), "experts")],
    *[((7, 4), "embedding"), ((5, 4), "output"), ((4, 4), "other"), ((4, 4), None)],
]


def tables_of(run):
    (seen,) = run.kernel._seen.values()
    return seen.plan.arguments


def verdicts(run):
    return tables_of(run)["verdicts"].tolist()


def roled(rule, cases, **options):
    shapes, roles = zip(*cases, strict=True)
    return Run(rule, shapes, roles=roles, **options)


def test_steps_are_those_of_the_rule():
    run = Run(make_rule("scheduled"), SHAPES)
    for _ in range(STEPS):
        run.both(num_steps=10)
    run.check()


@pytest.mark.parametrize(("num_steps", "safeguard"), [(40, True), (None, False)])
def test_every_role_moves_as_in_the_rule_and_is_measured(num_steps, safeguard):
    run = roled(make_rule("scheduled"), ROLES, safeguard=safeguard)
    for step in range(STEPS):
        run.both(num_steps=num_steps, measure=step % 2 == 0)
    run.check(2e-5 * max(1, STEPS / 10))
    if safeguard:
        assert verdicts(run) == [PROVEN.value] * len(ROLES)


@pytest.mark.parametrize("cap", [-6.0, 10.0])
def test_matrices_that_begin_small_or_at_zero(cap):
    """With a cap that is far below the factors, and with one that is far above them."""
    rule = make_rule("scheduled")
    rule.first_scale.data.fill_(0.5)
    rule.cap.data.fill_(cap)
    cases = [((6, 8), "hidden"), ((6, 8), "output"), ((8, 4), "embedding"), ((4, 4), None), ((4,), None)]
    run = roled(rule, cases, make=lambda shape: 0.01 * torch.randn(shape))
    for number in (0, 2):
        run.params[number].zero_(), run.copies[number].zero_()
    for _ in range(3):
        before = [param.clone() for param in run.params]
        run.both(num_steps=20, scale=1.0, decay=0.0)
    run.check()
    moved = [float((a - b).square().mean().sqrt()) for a, b in zip(run.params, before, strict=True)]
    assert max(moved[:-1]) < 1e-3 < moved[-1] or cap > 0  # vectors have no cap
    assert [float(state["first_square"]) == 0 for state in run.states] == [True, False, True, False, False]


def test_rows_that_a_batch_does_not_read_stay_but_for_decay():
    rule = make_rule("scheduled")
    run = roled(rule, [((6, 5), "embedding"), ((3, 2, 4), "embedding")])
    for _ in range(3):
        run.draw()
        for grad in run.grads:
            grad[1:] = 0
        before = run.params[0].clone()
        run.step(num_steps=20, decay=0.0)
        run.reference_step(num_steps=20, decay=0.0)
    run.check()
    assert not run.states[0]["exp_avg_sq"][1:].any()
    lost = 1 - run.params[0][1:] / before[1:]
    torch.testing.assert_close(lost, torch.full_like(lost, float(lost.mean())), rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_shares_at_their_ends(share):
    rule = make_rule("scheduled")
    rule.orthogonal.data.fill_(share)
    run = roled(rule, ROLES[:3], safeguard=True)
    for _ in range(2):
        run.both(measure=True)
    run.check()


def test_matrices_without_a_gradient_and_with_a_tiny_one():
    run = roled(make_rule("scheduled", eps=1e-20), [((6, 8), "hidden"), ((6, 8), "hidden")])
    for size in (0.0, 1e-18):
        run.draw(size)
        run.grads[0].zero_()
        run.step()
        run.reference_step()
        run.check()
    assert all(param.isfinite().all() for param in run.params)


def test_products_in_half_precision_take_nearly_the_same_step():
    steps, cases = [], [((48, 64), "hidden"), ((24, 96), "hidden"), ((3, 16, 24), "experts"), ((5,), None)]
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        run = roled(make_rule("scheduled"), cases)
        run.kernel.product_dtype = dtype
        before = [param.clone() for param in run.params]
        run.draw()
        squares = run.step(measure=True, decay=0.0)
        steps.append([new - old for new, old in zip(run.params, before, strict=True)])
        assert float(squares.change) == pytest.approx(sum(float(step.square().sum()) for step in steps[-1]), rel=1e-3)
    for a, b in zip(*steps, strict=True):
        assert (a - b).norm() <= 0.02 * a.norm()
    assert torch.equal(steps[0][-1], steps[1][-1])


def test_a_step_inside_of_autocast_is_the_same():
    ends = []
    for enabled in (False, True):
        torch.manual_seed(0)
        run = roled(make_rule("scheduled"), ROLES[:4])
        run.draw()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
            run.step()
        ends.append(run.snapshot())
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize(("length", "steps", "tensors"), [("known", 10, [1, 2]), ("unknown", 1, range(6))])
def test_the_recorded_trajectory(length, steps, tensors):
    run = Run(lopt.rules.make("scheduled", **NUMBERS).to(DEVICE), [], safeguard=True)
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
        squares = run.both(measure=True, scale=0.5)
    change = sum(float((a - b).square().sum()) for a, b in zip(run.copies, before, strict=True))
    assert float(squares.change) == pytest.approx(change, rel=1e-3)
    assert set(squares.terms) == {"nominal"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_and_mixed_dtypes(dtype):
    run = roled(make_rule("scheduled"), [((7,), None), ((5, 8), None), ((5, 8), "hidden")], dtype=dtype)
    run.add(torch.randn(5, 8).to(DEVICE), "hidden")
    run.add(torch.randn(4, 3).to(DEVICE))
    for _ in range(2):
        run.both(measure=True)
    run.check(2e-2 if dtype == torch.bfloat16 else 2e-3)
    torch.testing.assert_close(run.params[-1], run.copies[-1], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("make", "shape", "role"),
    [
        (channels_last, (2, 3, 2, 2), "hidden"),
        (channels_last, (8, 3, 2, 2), None),
        (transposed, (2, 3, 4), None),
        (transposed, (90, 100), "hidden"),
        (transposed, (5, 12, 3), "hidden"),
        (transposed, (4, 6), "experts"),
        (lambda shape: torch.randn(3, 6, 4).mT, (3, 4, 6), "experts"),
        # Matrices whose numbers lie scattered
        (lambda shape: torch.randn(3, 4, 5).transpose(0, 1), (4, 3, 5), "hidden"),
        (lambda shape: torch.randn(4, 3, 5).transpose(0, 1), (3, 4, 5), "experts"),
    ],
)
def test_other_memory_orders_and_grads_laid_out_otherwise(make, shape, role):
    run = Run(make_rule("scheduled"), [shape], make=make, roles=[role])
    strides = run.params[0].stride()
    for _ in range(2):
        run.draw()
        run.grads = [grad.contiguous() for grad in run.grads]
        run.step()
        run.reference_step()
    run.check()
    assert run.params[0].shape == shape
    assert run.params[0].stride() == strides
    scattered = matrix.is_matrix(shape, role) and products.sides_in_memory(run.params[0], role) is None
    assert run.states[0]["exp_avg"][0].is_contiguous() if scattered else run.states[0]["exp_avg"][0].stride() == strides


PRODUCTS = {"bmm", "baddbmm"}
NO_WORK = {"empty", "view", "slice", "transpose", "_unsafe_view", "expand"}  # on the device


def work_of(operations):
    """How many matrix products there were, and which other operations for the device."""
    names = [operation.removeprefix("aten.").partition(".")[0] for operation in operations]
    return sum(name in PRODUCTS for name in names), [name for name in names if name not in PRODUCTS | NO_WORK]


class Recorded(TorchDispatchMode):
    """Operations of PyTorch, which launches of Triton are not."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(str(function))
        return function(*arguments, **(options or {}))


def recorded_step(run, monkeypatch, **options):
    """Launches of a step that follows another, and its operations. Nothing is launched: the interpreter would do so by
    operations on the host.
    """
    launches = []
    run.draw()
    with monkeypatch.context() as patch:
        stub = lambda kernel, grid: lambda **_: launches.append(kernel)  # noqa: E731
        patch.setattr(triton.runtime.jit.KernelInterface, "__getitem__", stub)
        run.step(num_steps=10, **options)
        launches.clear()
        with Recorded() as operations:
            run.step(num_steps=10, **options)
    return launches, operations.names


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("safeguard", [True, False])
def test_a_step_is_a_few_launches_and_nothing_else(monkeypatch, centered, safeguard):
    rule = make_rule("scheduled")
    rule.centering.data.mul_(centered)
    for number in (1, 4):  # of tensors
        run = Run(rule, [(3, 2), (2,)] * number, safeguard=safeguard)
        launches, operations = recorded_step(run, monkeypatch)
        assert len(launches) == 3 + centered + safeguard
        assert operations == []


def test_hidden_matrices_take_three_launches_more_and_products_alone(monkeypatch):
    rule = make_rule("scheduled")
    for number in (1, 4):  # of tensors
        cases = [((5, 6), "hidden"), ((6, 5), "hidden"), ((2, 5, 6), "experts"), ((5,), None)] * number
        launches, operations = recorded_step(roled(rule, cases, safeguard=True), monkeypatch)
        assert len(launches) == 8
        assert work_of(operations) == (12, [])  # six for each of two shapes
    # Matrices twice as wide as high: three products more, but of rows alone, and one sum.
    wide = roled(rule, [((3, 8), "hidden")] * 2, safeguard=True)
    launches, operations = recorded_step(wide, monkeypatch)
    assert work_of(operations) == (7, ["add_"])
    rule.orthogonal.data.zero_()
    launches, operations = recorded_step(roled(rule, cases, safeguard=True), monkeypatch)
    assert (len(launches), operations) == (5, [])


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


@pytest.mark.parametrize("role", [None, "hidden", "embedding"])
def test_the_safeguard_skips_the_tensors_that_would_break_and_counts_them(role):
    check_safeguard(make_rule("scheduled"), large=1e25, role=role)


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


def test_an_orthogonal_step_may_be_as_large_as_the_norm_of_its_direction():
    rule = make_rule("scheduled")
    cases = [((64, 64), None), ((64, 64), "hidden"), ((64, 64), "hidden")]
    run = roled(rule, cases, dtype=torch.float16, safeguard=True)
    run.draw()
    run.params[2].fill_(65504)
    run.step(scale=1e-3, decay=0.0)
    assert verdicts(run) == [PROVEN.value, PROVEN.value, UNKNOWN.value]
    change = float(tables_of(run)["multipliers"][0, BOUND.value])
    before = run.params[1].clone()
    run.step(scale=10 / change, decay=0.0)  # the change of plain coordinates is at most some 1e4, of a matrix 6.4e5
    assert verdicts(run)[:2] == [PROVEN.value, SKIP.value]
    assert torch.equal(run.params[1], before)


@pytest.mark.parametrize("role", [None, "hidden"])
def test_without_the_safeguard_nan_passes_into_its_tensor_alone(role):
    run = Run(make_rule("scheduled"), [(5, 3), (5, 3)], roles=[role, role])
    run.draw()
    run.grads[0][0, 0] = torch.nan
    run.step()
    assert run.params[0].isnan().all()
    assert run.params[1].isfinite().all()


@pytest.mark.parametrize("role", [None, "hidden"])
def test_a_gradient_whose_square_overflows_leaves_value_and_rule_equal(role):
    run = Run(make_rule("scheduled"), [(5, 3)], roles=[role])
    run.draw()
    run.grads[0][0, 0] = 1e20
    run.step()
    run.reference_step()
    run.check()
    assert run.params[0].isfinite().all()


def test_what_has_no_kernel_says_why():
    assert scheduled.supports(lopt.rules.make("scheduled")) is None
    assert "STAR is not the class" in scheduled.supports(lopt.rules.make("star"))
    kernel = scheduled.make(lopt.rules.make("scheduled"))
    assert kernel.refuses(torch.ones(())) is None
    assert "gaps" in kernel.refuses(torch.ones(4, 4)[:, ::2])
    assert "rows of 2^30" in kernel.refuses(torch.empty(2, 2**30, device="meta"))
