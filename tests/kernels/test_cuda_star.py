"""The Triton STAR kernels against the rule itself; in Triton's interpreter, or compiled where there is a GPU."""

import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from triton_cases import DEVICE, triton

import lightning_lopt as lopt
from lightning_lopt.kernels import WorkItem
from lightning_lopt.kernels.cuda import star as triton_star
from lightning_lopt.kernels.cuda import star_step as device_code
from lightning_lopt.kernels.cuda.star import Control
from lightning_lopt.kernels.cuda.tiling import Sizes
from lightning_lopt.rules import StepContext

# The interpreter is NumPy, which warns of what a GPU passes over: overflow, and arithmetic with NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

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
# The interpreter takes a quarter of a second for one tensor's step, hence few; and as many as one has time for:
# LIGHTNING_LOPT_TRITON_STEPS=50 python -m pytest tests/kernels/test_cuda_star.py -k "rule or many"
STEPS = int(os.environ.get("LIGHTNING_LOPT_TRITON_STEPS", 50 if DEVICE.type == "cuda" else 2))
MANY = 300 if STEPS >= 50 else 24
FIELDS = ("exp_avg", "exp_avg_sq", "row", "col", "diag")


def make_rule(kind="star", **config):
    rule = lopt.rules.make(kind, **config).to(DEVICE)
    for name, value in rule.named_parameters():
        value.data.normal_(0, 0.1 if name.endswith("decays") else 0.3)
        if name == "centering":
            value.data.copy_(torch.tensor([0.9, 0.5]))
        if name == "caution":  # otherwise it may be 0
            value.data.copy_(torch.tensor([0.9, 0.3]))
    return rule


class Run:
    """One list of tensors, moved by the kernel, and its copy, moved by the rule."""

    def __init__(self, rule, shapes, dtype=torch.float32, state_dtype=torch.float32, safeguard=False, make=torch.randn):
        self.rule, self.kernel, self.safeguard = rule, triton_star.make(rule, state_dtype=state_dtype), safeguard
        self.meta_params = {name: value.detach() for name, value in rule.meta_params().items()}
        self.params = [make(shape).to(DEVICE, dtype) for shape in shapes]
        self.copies = [param.clone() for param in self.params]
        self.states = [self.new_state(param) for param in self.params]
        self.copied = [self.new_state(param) for param in self.params]
        self.grads = []

    def new_state(self, param):
        counters = {name: torch.zeros((), dtype=torch.int64) for name in ("skipped", "skipped_in_row")}
        state = {"step": torch.zeros(()), **self.rule.init_state(param.float().cpu())._asdict(), **counters}
        return {name: value.to(DEVICE) for name, value in state.items()}

    def draw(self, size=0.1):
        self.grads = [(size * torch.randn(param.shape)).to(param) for param in self.params]
        return self.grads

    def step(self, scale=0.5, decay=0.01, maximize=False, num_steps=None, measure=False, control=None):
        parts = [
            WorkItem(param, grad, state, scale, decay, maximize)
            for param, grad, state in zip(self.params, self.grads, self.states, strict=True)
        ]
        options = {"safeguard": self.safeguard, "measure": measure, "control": control or Control()}
        return self.kernel.step(parts, self.meta_params, num_steps, 5, **options)

    def reference_step(self, scale=0.5, decay=0.01, factor=1.0, num_steps=None):
        for param, grad, state in zip(self.copies, self.grads, self.copied, strict=True):
            if not param.numel():
                continue
            old = type(self.rule.init_state(param))(*(state[name] for name in (*FIELDS, "factored_dims")))
            value = param.float()
            context = StepContext(state["step"], None, num_steps, num_tensors=5)
            delta, new = self.rule.update(self.meta_params, factor * grad.float(), old, value, context)
            param.copy_(value + scale * delta - decay * value)
            state.update(new._asdict(), step=state["step"] + 1)

    def snapshot(self):
        return [
            tensor.clone() for p, state in zip(self.params, self.states, strict=True) for tensor in (p, *state.values())
        ]

    def check(self, tolerance=2e-5):
        for param, state, copy, other in zip(self.params, self.states, self.copies, self.copied, strict=True):
            # Absolute, relative to the tensor: heads that all but cancel have no digits of their own.
            atol = tolerance * max([1.0, *copy.float().abs().flatten().tolist()])
            torch.testing.assert_close(param, copy, rtol=tolerance, atol=atol)
            for name in (*FIELDS, "step"):
                torch.testing.assert_close(state[name].float(), other[name], rtol=tolerance, atol=1e-7, msg=name)


def test_steps_are_those_of_the_rule():
    run = Run(make_rule(step_mult=1e-4), SHAPES)
    for _ in range(STEPS):
        run.draw()
        run.step()
        run.reference_step()
    run.check()


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("hyperparam", {"nominal_grad_estimator": "SGD"}),
        ("hyperparam", {"nominal_controller": False, "nominal_grad_estimator": "AggMo"}),
        ("blackbox", {}),
        ("star", {"nominal_grad_estimator": "Adam", "weight_decay": 0.02}),
        ("star", {"nominal_grad_estimator": "SGDM", "weight_decay": 0.02, "regularization_controller": True}),
        ("star", {"scheduler": True, "exp_mult": (1e-2, 1e-1, 1e-1)}),
        ("star", {"eps": 1e-10}),
    ],
)
def test_kinds_and_options(kind, config):
    run = Run(make_rule(kind, **config), FEW)
    for _ in range(2):
        run.draw()
        squares = run.step(num_steps=10, measure=True)
        before = [copy.clone() for copy in run.copies]
        run.reference_step(num_steps=10)
    run.check()
    change = sum(float((a - b).square().sum()) for a, b in zip(run.copies, before, strict=True))
    assert float(squares.change) == pytest.approx(change, rel=1e-3)
    expected = {"hyperparam": {"nominal"}, "blackbox": {"blackbox"}, "star": {"blackbox", "nominal"}}[kind]
    assert set(squares.terms) == expected | ({"decay"} if config.get("weight_decay") else set())


def test_a_scheduled_step_after_the_first_makes_no_tensor_on_the_host(monkeypatch):
    run = Run(make_rule("hyperparam", scheduler=True), [(5, 3)])
    run.draw()
    run.step(num_steps=10)

    def refuse(*_, **__):
        raise AssertionError("a CUDA graph cannot capture a copy from the host")

    monkeypatch.setattr(torch, "tensor", refuse)
    run.step(num_steps=10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_and_mixed_dtypes(dtype):
    run = Run(make_rule(step_mult=1e-5), [(7,), (5, 8)], dtype)
    run.params.append(torch.randn(4, 3).to(DEVICE))
    run.copies.append(run.params[-1].clone())
    run.states.append(run.new_state(run.params[-1]))
    run.copied.append(run.new_state(run.params[-1]))
    for _ in range(2):
        run.draw()
        run.step()
        run.reference_step()
    run.check(2e-2 if dtype == torch.bfloat16 else 2e-3)
    torch.testing.assert_close(run.params[-1], run.copies[-1], rtol=2e-5, atol=2e-5)
    for state, other in zip(run.states, run.copied, strict=True):  # the float32 state knows no rounding but its own
        torch.testing.assert_close(state["exp_avg"], other["exp_avg"], rtol=1e-5, atol=1e-7)


def channels_last(shape):
    return torch.randn(shape).to(memory_format=torch.channels_last)


def transposed(shape):
    return torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))


@pytest.mark.parametrize(("make", "scheduler"), [(channels_last, False), (channels_last, True), (transposed, True)])
def test_other_memory_orders_and_grads_laid_out_otherwise(make, scheduler):
    run = Run(make_rule(step_mult=1e-4, scheduler=scheduler), [(2, 3, 2, 2)], make=make)
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
    for shapes, safeguard, control, expected in (
        ([(3, 2)], False, Control(), 6),
        ([(2,), (2, 2)] * 2, True, Control(max_norm=torch.ones(1, device=DEVICE)), 8),
    ):
        run = Run(make_rule(), shapes, safeguard=safeguard)
        run.draw()
        counted.clear()
        run.step(control=control)
        assert len(counted) == expected


def test_many_small_tensors():
    shapes = [(number % 5 + 1,) if number % 3 else (2, number % 4 + 1) for number in range(MANY)]
    run = Run(make_rule(step_mult=1e-4), shapes)
    run.draw()
    run.step()
    run.reference_step()
    run.check()


def test_two_runs_are_equal_to_the_bit_and_tensors_do_not_meet():
    ends = []
    for extra in (False, False, True):
        torch.manual_seed(0)
        run = Run(make_rule(), FEW)
        run.draw()
        if extra:
            run.params.insert(1, torch.ones(3, 3, device=DEVICE))
            run.states.insert(1, run.new_state(run.params[1]))
            run.grads.insert(1, torch.ones(3, 3, device=DEVICE))
        run.step()
        ends.append([run.params[0], run.params[-1], run.states[-1]["exp_avg_sq"], run.states[-1]["row"]])
    for a, b, c in zip(*ends, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_clipping_scaling_and_maximizing_act_on_the_gradient():
    run = Run(make_rule(step_mult=1e-4), [*FEW, (2, 70)])
    one = torch.ones(1, device=DEVICE)
    for max_norm in (0.3, 1e9):
        run.draw()
        norm = torch.linalg.vector_norm(torch.stack([grad.norm() for grad in run.grads]))
        factor = min(1.0, max_norm / (float(norm) + 1e-6))
        given, run.grads = run.grads, [-1024 * grad for grad in run.grads]
        run.step(maximize=True, control=Control(grad_scale=1024 * one, max_norm=max_norm * one))
        torch.testing.assert_close(run.kernel.norm, norm)
        run.grads = given
        run.reference_step(factor=factor)
    run.check()


def test_nothing_changes_where_the_gradient_overflowed():
    run = Run(make_rule(), FEW, safeguard=True)
    run.draw()
    run.grads[1].fill_(torch.inf)
    before = run.snapshot()
    run.step(control=Control(found_inf=torch.ones(1, device=DEVICE)))
    assert all(torch.equal(a, b) for a, b in zip(before, run.snapshot(), strict=True))


def test_the_safeguard_skips_the_tensors_that_would_break_and_counts_them():
    run = Run(make_rule(), [(3,), (5, 3), (5, 3), (5, 3), (4, 3), (2,)], safeguard=True)
    run.draw()
    run.grads[1][2, 1] = torch.nan
    run.grads[2][0, 0] = 3e19  # its square is not finite
    run.params[3].fill_(3.4e38)  # its new value will not be finite
    run.grads[5][1] = torch.inf
    before = [[tensor.clone() for tensor in (p, *s.values())] for p, s in zip(run.params, run.states, strict=True)]
    run.step(scale=0.5, decay=-0.5)
    for number, (param, state) in enumerate(zip(run.params, run.states, strict=True)):
        skipped = number in (1, 2, 3, 5)
        assert (int(state["skipped"]), int(state["skipped_in_row"])) == (int(skipped),) * 2, number
        same = [torch.equal(a, b) for a, b in zip(before[number][:-2], (param, *state.values()), strict=False)]
        assert all(same) if skipped else not same[0]
        assert float(state["step"]) == (0 if skipped else 1)
    run.params, run.states, run.grads = run.params[3:4], run.states[3:4], run.grads[3:4]
    run.params[0].fill_(1.0)
    run.step()
    assert (int(run.states[0]["skipped"]), int(run.states[0]["skipped_in_row"])) == (1, 0)


def test_without_the_safeguard_nan_passes_into_its_tensor_alone():
    run = Run(make_rule(), [(5, 3), (5, 3)])
    run.draw()
    run.grads[0][0, 0] = torch.nan
    run.step()
    assert run.params[0].isnan().all()
    assert run.params[1].isfinite().all()


def test_bfloat16_state_is_right_on_average_and_the_same_in_each_run():
    number, ends = 4000, []
    for _ in range(2):
        torch.manual_seed(0)
        run = Run(make_rule(), [(number,)], state_dtype=torch.bfloat16)
        run.grads = [torch.full((number,), 0.1, device=DEVICE)]
        for _ in range(3):
            run.step()
        ends.append(run.states[0])
    run.copies[0].copy_(run.params[0])
    for _ in range(3):
        run.reference_step()
    for name in ("exp_avg", "exp_avg_sq"):
        kept, exact = ends[0][name], run.copied[0][name]
        assert kept.dtype == torch.bfloat16
        assert torch.equal(kept, ends[1][name])
        assert (kept[..., 1:] != kept[..., :-1]).any()  # each number has its own random bits
        error = (kept.float() - exact) / exact
        assert error.abs().max() < 3 * 2**-7  # three roundings
        # Rounding to nearest would move all numbers alike, by up to 2^-9 a step.
        assert error.mean(-1).abs().max() < 4 * 2**-8 / number**0.5


def test_what_has_no_kernel_says_why():
    assert triton_star.supports(lopt.rules.make("star")) is None
    assert "hidden_size=8" in triton_star.supports(lopt.rules.make("star", hidden_size=8))
    assert "aggregate_magnitude" in triton_star.supports(lopt.rules.make("star", aggregate_magnitude=True))
    assert "LSTMRule" in triton_star.supports(lopt.rules.make("lstm"))
    kernel = triton_star.make(lopt.rules.make("star"))
    assert kernel.refuses(torch.ones(3, 3).t()) is None
    assert "float64" in kernel.refuses(torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="state_dtype=torch.float16"):
        triton_star.make(lopt.rules.make("star"), state_dtype=torch.float16)


def test_tensors_without_numbers_are_passed_over():
    run = Run(make_rule(), [(0, 3), (2,)])
    run.draw()
    run.step()
    run.reference_step()
    run.check()
    run.params, run.grads = run.params[:1], run.grads[:1]
    run.states = run.states[:1]
    assert float(run.step(measure=True).change) == 0


def test_ways_of_reading_a_tile_are_all_taken():
    """Else the tests above would not test them."""
    shapes = [(3,), (6, 8), (4, 4, 3, 3), (9, 1)]
    assert set(shapes[1:]) <= set(SHAPES)
    run = Run(make_rule(), shapes)
    run.draw()
    run.step()
    plan = next(iter(run.kernel._plans.known.values()))
    aligned = plan.addresses.table.tensor[:, -1].bool().cpu()
    flat, inner, width = (plan.tiling.sizes[:, Sizes._fields.index(n)].cpu() for n in ("flat", "inner", "width"))
    flat, aligned = flat.bool(), aligned & (width % 4 == 0)
    ways = {device_code.FLAT.value} if flat.any() else set()
    ways |= {device_code.MATRIX.value} if (aligned & ~flat & (inner == 1)).any() else set()
    ways |= {device_code.SIDE_BY_SIDE.value} if (aligned & ~flat & (inner > 1)).any() else set()
    ways |= {device_code.UNALIGNED.value} if (~aligned & ~flat).any() else set()
    assert ways == {0, 1, 2, 3}


@pytest.mark.skipif(DEVICE.type == "cuda", reason="it would measure, which takes minutes")
def test_the_benchmark_gives_no_figures_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    script = Path(__file__).parents[2] / "examples" / "benchmarks" / "gpu.py"
    runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out
    assert "nothing was timed" in said
    assert not any(character.isdigit() for character in said)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="CUDA graphs need a GPU")
def test_a_captured_step_is_the_step():
    ends = []
    for captured in (False, True):
        torch.manual_seed(0)
        run = Run(make_rule(), FEW)
        run.draw()
        run.step()  # tables are sent, kernels compiled
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run.step()
        for _ in range(3):
            graph.replay() if captured else run.step()
        ends.append(run.snapshot())
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="only a GPU can be waited for")
def test_a_step_does_not_wait_for_the_device():
    run = Run(make_rule(), FEW, safeguard=True)
    run.draw()
    run.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
