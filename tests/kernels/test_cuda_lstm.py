"""The Triton LSTM kernel against the rule; in Triton's interpreter, or compiled where there is a GPU."""

import pytest
import torch
from triton_cases import QUIET, Run, make_rule

import lightning_lopt as lopt
from lightning_lopt.kernels.cuda import lstm as triton_lstm

pytestmark = QUIET

SHAPES = [(), (1,), (70,), (3, 5), (2, 2, 3, 1)]
CONFIGS = {
    "default": {},
    "one layer, one feature": {"num_layers": 1, "preprocessing": "logsign1", "p": 5.0, "hidden_size": 5},
    "sum of linear": {"preprocessing": "none", "readout": "sum", "hidden_size": 17},
    "networks by dims": {"ndim_splits": (2, 3), "hidden_size": 4},
    "stabilized": {
        "nominal_stepsize": 1e-3,
        "nominal_controller": True,
        "exp_mult": 0.1,
        "normalize_blackbox": True,
        "hidden_size": 4,
        "out_scale": 1e-4,
    },
}


class LSTMRun(Run):
    """Gradients from far below e^-p to above 1."""

    def __init__(self, config, shapes=SHAPES, **options):
        super().__init__(make_rule("lstm", **config), shapes, **options)

    def draw(self, size=0.1):
        self.grads = [(torch.randn(p.shape) * 10 ** (6 * torch.rand(p.shape) - 5)).to(p) for p in self.params]


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_are_those_of_the_rule(name):
    many = name == "one layer, one feature"
    run = LSTMRun(CONFIGS[name], [(3, 5)] if many else SHAPES)
    for _ in range(50 if many else 3):
        before = [copy.clone() for copy in run.copies]
        squares = run.both(measure=True)
    run.check()
    change = sum(float((a - b).square().sum()) for a, b in zip(run.copies, before, strict=True))
    assert float(squares.change) == pytest.approx(change, rel=1e-3)
    assert set(squares.terms) == ({"blackbox", "nominal"} if name == "stabilized" else {"blackbox"})


def test_lower_precision_parameters():
    run = LSTMRun({"hidden_size": 4}, dtype=torch.bfloat16)
    for _ in range(2):
        run.both()
    run.check(1e-2)


def test_the_safeguard_skips_the_tensors_that_would_break_and_counts_them():
    run = LSTMRun({"hidden_size": 4}, [(3,), (5, 3), (3,)], safeguard=True)
    run.draw()
    run.grads[1][2, 1] = torch.nan
    run.states[2]["cell"][0, 0, 1] = torch.inf
    before = [
        [tensor.clone() for tensor in (p, s["hidden"], s["step"])] for p, s in zip(run.params, run.states, strict=True)
    ]
    run.step()
    for number, (param, state) in enumerate(zip(run.params, run.states, strict=True)):
        skipped = number > 0
        assert (int(state["skipped"]), int(state["skipped_in_row"])) == (int(skipped),) * 2
        same = [torch.equal(a, b) for a, b in zip(before[number], (param, state["hidden"], state["step"]), strict=True)]
        assert same == [skipped] * 3


def test_what_has_no_kernel_says_why():
    assert triton_lstm.supports(lopt.rules.make("lstm")) is None
    assert "hidden_size=65" in triton_lstm.supports(lopt.rules.make("lstm", hidden_size=65))
    assert "no eigenvalues" in triton_lstm.supports(lopt.rules.make("lstm_dmd"))
    assert "scheduler=True" in triton_lstm.supports(lopt.rules.make("lstm", nominal_stepsize=1e-2, scheduler=True))
    assert "eps=1e-08" in triton_lstm.supports(lopt.rules.make("lstm", nominal_stepsize=1e-2, eps=1e-8))
    assert triton_lstm.supports(lopt.rules.make("star")) == "STAR is not LSTMRule"
