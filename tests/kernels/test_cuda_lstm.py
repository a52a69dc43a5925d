"""The Triton LSTM kernel against the rule itself; in Triton's interpreter, or compiled where there is a GPU."""

import pytest
import torch
from triton_cases import DEVICE

import lightning_lopt as lopt
from lightning_lopt.kernels import WorkItem
from lightning_lopt.kernels.cuda import lstm as triton_lstm
from lightning_lopt.rules import StepContext

# The interpreter is NumPy, which warns of what a GPU passes over: overflow, and arithmetic with NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

SHAPES = [(), (1,), (70,), (3, 5), (2, 2, 3, 1)]
CONFIGS = {
    "default": {},
    "one layer, one feature": {"num_layers": 1, "preprocessing": "logsign1", "p": 5.0, "hidden_size": 5},
    "sum of linear": {"preprocessing": "none", "readout": "sum", "hidden_size": 17},
    "networks by dims": {"ndim_splits": (2, 3), "hidden_size": 4},
    "stabilised": {
        "nominal_stepsize": 1e-3,
        "nominal_controller": True,
        "exp_mult": 0.1,
        "normalize_blackbox": True,
        "hidden_size": 4,
        "out_scale": 1e-4,
    },
}


class Run:
    """A rule's tensors, moved by the kernel, and their copies, moved by the rule."""

    def __init__(self, config, shapes=SHAPES, kind="lstm", dtype=torch.float32, **options):
        self.rule = lopt.rules.make(kind, **config).to(DEVICE)
        for value in self.rule.parameters():
            value.data.normal_(0, 0.5)
        self.meta_params = {name: value.detach() for name, value in self.rule.meta_params().items()}
        self.kernel = triton_lstm.make(self.rule, precision="ieee", **options)
        self.params = [torch.randn(shape).to(DEVICE, dtype) for shape in shapes]
        self.copies = [param.clone() for param in self.params]
        self.expected = [self.rule.init_state(param.float()) for param in self.params]
        self.states = []
        for param in self.params:
            counters = {
                name: torch.zeros((), dtype=torch.int64, device=DEVICE) for name in ("skipped", "skipped_in_row")
            }
            state = {"step": torch.zeros((), device=DEVICE), **counters}
            self.states.append(state | self.rule.init_state(param.float())._asdict())

    def draw(self):
        # From far below e^-p to above 1.
        self.grads = [(torch.randn(p.shape) * 10 ** (6 * torch.rand(p.shape) - 5)).to(p) for p in self.params]

    def step(self, *, safeguard=False, measure=False, **options):
        parts = [
            WorkItem(p, g, s, 0.5, 0.01, False) for p, g, s in zip(self.params, self.grads, self.states, strict=True)
        ]
        return self.kernel.step(parts, self.meta_params, None, safeguard=safeguard, measure=measure, **options)

    def reference_step(self, shared=None):
        for number, (copy, grad) in enumerate(zip(self.copies, self.grads, strict=True)):
            value = copy.float()
            context = StepContext(torch.tensor(0.0, device=DEVICE), shared=shared)
            arguments = self.meta_params, grad.float(), self.expected[number], value, context
            delta, self.expected[number] = self.rule.update(*arguments)
            copy.copy_(value + 0.5 * delta - 0.01 * value)

    def check(self, tolerance=1e-5):
        for param, copy, state, expected in zip(self.params, self.copies, self.states, self.expected, strict=True):
            torch.testing.assert_close(param, copy, rtol=tolerance, atol=tolerance)
            for name in ("hidden", "cell", "exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(state[name].float(), getattr(expected, name), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_are_those_of_the_rule(name):
    run = Run(CONFIGS[name])
    for _ in range(50 if name == "networks by dims" else 3):
        run.draw()
        before = [copy.clone() for copy in run.copies]
        squares = run.step(measure=True)
        run.reference_step()
    run.check()
    assert all(float(state["step"]) > 2 for state in run.states)
    change = sum(float((a - b).square().sum()) for a, b in zip(run.copies, before, strict=True))
    assert float(squares.change) == pytest.approx(change, rel=1e-3)
    assert set(squares.terms) == ({"blackbox", "nominal"} if name == "stabilised" else {"blackbox"})


def test_eigenvalues_are_read():
    run = Run({"rank": 2, "hidden_size": 4}, kind="lstm_dmd")
    for _ in range(2):
        run.draw()
        shared = torch.randn(4, device=DEVICE)
        run.step(shared=shared)
        run.reference_step(shared)
    run.check()


def test_lower_precision_parameters():
    run = Run({"hidden_size": 4}, dtype=torch.bfloat16)
    for _ in range(2):
        run.draw()
        run.step()
        run.reference_step()
    run.check(1e-2)


def test_bfloat16_state_is_right_on_average_and_the_same_in_each_run():
    ends = []
    for _ in range(2):
        torch.manual_seed(0)
        run = Run({"hidden_size": 4}, [(2000,)], state_dtype=torch.bfloat16)
        run.grads = [torch.full((2000,), 0.1, device=DEVICE)]
        run.step()
        run.reference_step()
        ends.append(run.states[0])
    for name in ("hidden", "cell"):
        kept, exact = ends[0][name], getattr(run.expected[0], name)
        assert kept.dtype == torch.bfloat16
        assert torch.equal(kept, ends[1][name])
        error = (kept.float() - exact) / exact.abs()
        assert error.abs().max() < 2**-7
        assert error.mean(-1).abs().max() < 5 * 2**-8 / 2000**0.5  # rounding to nearest: up to 2^-9 for all alike


def test_the_safeguard_skips_the_tensors_that_would_break_and_counts_them():
    run = Run({"hidden_size": 4}, [(3,), (5, 3), (3,)])
    run.draw()
    run.grads[1][2, 1] = torch.nan
    run.states[2]["cell"][0, 0, 1] = torch.inf
    before = [
        [tensor.clone() for tensor in (p, s["hidden"], s["step"])] for p, s in zip(run.params, run.states, strict=True)
    ]
    run.step(safeguard=True)
    for number, (param, state) in enumerate(zip(run.params, run.states, strict=True)):
        skipped = number > 0
        assert (int(state["skipped"]), int(state["skipped_in_row"])) == (int(skipped),) * 2
        same = [torch.equal(a, b) for a, b in zip(before[number], (param, state["hidden"], state["step"]), strict=True)]
        assert same == [skipped] * 3


def test_what_has_no_kernel_says_why():
    assert triton_lstm.supports(lopt.rules.make("lstm")) is None
    assert "hidden_size=65" in triton_lstm.supports(lopt.rules.make("lstm", hidden_size=65))
    assert "scope='tensor'" in triton_lstm.supports(lopt.rules.make("lstm_dmd", scope="tensor"))
    assert "scheduler" in triton_lstm.supports(lopt.rules.make("lstm", nominal_stepsize=1e-2, scheduler=True))
    assert "eps" in triton_lstm.supports(lopt.rules.make("lstm", nominal_stepsize=1e-2, eps=1e-8))
    assert "STAR" in triton_lstm.supports(lopt.rules.make("star"))
    with pytest.raises(ValueError, match="precision='fp8'"):
        triton_lstm.make(lopt.rules.make("lstm"), precision="fp8")
