"""Triton for the tests of its kernels: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

import lightning_lopt as lopt
from lightning_lopt import kernels
from lightning_lopt.rules import StepContext

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
reason = "the Triton kernels' tests need triton >= 3.6: pip install triton"
triton = pytest.importorskip("triton", minversion="3.6", reason=reason)
# The interpreter takes a quarter of a second to step one tensor, hence few steps. To take as many as there is time for:
# LIGHTNING_LOPT_TRITON_STEPS=50 python -m pytest tests/kernels/test_cuda_scheduled.py
STEPS = int(os.environ.get("LIGHTNING_LOPT_TRITON_STEPS", 50 if DEVICE.type == "cuda" else 2))
# The interpreter is NumPy, which warns of what a GPU passes over: overflow, and arithmetic with NaN.
QUIET = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

if DEVICE.type == "cpu":
    from triton.runtime import interpreter

    # The interpreter puts itself into triton.language again at each call of a function by a function, which takes most
    # of its time. Once for each module that a function may see is enough.
    LANGUAGES = (interpreter.tl, interpreter.tl.core)
    _enter, _entered = interpreter._patch_lang, set()

    def _enter_once(function):
        seen = {lang for lang in LANGUAGES if any(value is lang for value in function.__globals__.values())}
        if not seen <= _entered:
            _entered.update(seen)
            _enter(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = _enter_once


class Run:
    """Tensors that the kernel of a rule moves, and their copies, which the rule itself moves."""

    def __init__(self, rule, shapes, dtype=torch.float32, safeguard=False, make=torch.randn, roles=None):
        self.rule, self.kernel, self.safeguard = rule, kernels.find(rule, "cuda"), safeguard
        self.kernel.product_dtype = torch.float32  # as in the rule
        self.roles = [None] * len(shapes) if roles is None else list(roles)
        self.meta_params = {name: value.detach() for name, value in rule.meta_params().items()}
        self.params = [make(shape).to(DEVICE, dtype) for shape in shapes]
        self.copies = [param.clone() for param in self.params]
        self.states = [self.new_state(param) for param in self.params]
        self.copied = [self.new_state(param) for param in self.params]
        self.grads = []

    def new_state(self, param):
        counters = {name: torch.zeros((), dtype=torch.int64) for name in ("skipped", "skipped_in_row")}
        state = {
            "step": torch.zeros((), dtype=torch.int64),
            **self.rule.init_state(param.float().cpu())._asdict(),
            **counters,
        }
        return {name: value.to(DEVICE) for name, value in state.items()}

    def add(self, param, role=None):
        self.params.append(param)
        self.roles.append(role)
        self.copies.append(param.clone())
        self.states.append(self.new_state(param))
        self.copied.append(self.new_state(param))

    def draw(self, size=0.1):
        # Some are 0, as of pixels that are always black.
        self.grads = [(size * torch.randn(p.shape) * (torch.rand(p.shape) < 0.9)).to(p) for p in self.params]

    def step(self, scale=0.5, decay=0.01, maximize=False, num_steps=None, measure=False):
        work_items = [
            kernels.WorkItem(param, grad, state, scale, decay, maximize, role)
            for param, grad, state, role in zip(self.params, self.grads, self.states, self.roles, strict=False)
        ]
        return self.kernel.step(work_items, self.meta_params, num_steps, 5, safeguard=self.safeguard, measure=measure)

    def reference_step(self, scale=0.5, decay=0.01, num_steps=None):
        """The same by the rule. Returns the sums of squares of the change and of the rule's delta."""
        change, nominal = 0.0, 0.0
        for param, grad, state, role in zip(self.copies, self.grads, self.copied, self.roles, strict=False):
            if not param.numel():
                continue
            fields = type(self.rule.init_state(param))
            old, value = fields(*(state[name] for name in fields._fields)), param.float().clone()
            context = StepContext(state["step"].float(), None, num_steps, num_tensors=5, role=role)
            delta, new = self.rule.update(self.meta_params, grad.float(), old, value, context)
            param.copy_(value + scale * delta - decay * value)
            state.update(new._asdict(), step=state["step"] + 1)
            change += float((param.float() - value).square().sum())
            nominal += float(delta.square().sum())
        return change, nominal

    def both(self, **options):
        """One step of each, with new gradients; what the kernel measured."""
        self.draw()
        squares = self.step(**options)
        expected = self.reference_step(**{name: value for name, value in options.items() if name != "measure"})
        if squares is not None:
            found = [float(squares.change), *map(float, squares.terms.values())]
            assert found == pytest.approx(expected, rel=1e-3)
        return squares

    def snapshot(self):
        return [
            tensor.clone() for p, state in zip(self.params, self.states, strict=True) for tensor in (p, *state.values())
        ]

    def check(self, tolerance=2e-5):
        for param, state, copy, other in zip(self.params, self.states, self.copies, self.copied, strict=True):
            # Absolute, relative to the tensor: heads that all but cancel have no digits of their own.
            atol = tolerance * max([1.0, *copy.float().abs().flatten().tolist()])
            torch.testing.assert_close(param, copy, rtol=tolerance, atol=atol)
            for name in state.keys() - {"skipped", "skipped_in_row"}:
                torch.testing.assert_close(state[name].float(), other[name].float(), rtol=2e-5, atol=1e-7, msg=name)


def make_rule(kind, **config):
    """A rule with meta-parameters that are far from trivial."""
    rule = lopt.rules.make(kind, **config).to(DEVICE)
    for name, value in rule.named_parameters():
        value.data.normal_(0, 0.1 if name.endswith("decays") else 0.3)
        if name in ("centering", "caution", "orthogonal"):  # fractions, which might be clamped to 0
            value.data.copy_(torch.tensor([0.9, 0.4]))
    return rule


def channels_last(shape):
    return torch.randn(shape).to(memory_format=torch.channels_last)


def transposed(shape):
    return torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))


def check_safeguard(rule, large, role=None):
    """Skip the tensors that would break, count that, and leave them and their state as they are.

    Args:
        rule: the rule.
        large: a gradient with which the state would not be finite.
        role: of all tensors.
    """
    run = Run(rule, [(3,), (5, 3), (5, 3), (5, 3), (4, 3), (2,)], safeguard=True, roles=[role] * 6)
    run.draw()
    run.grads[1][2, 1] = torch.nan
    run.grads[2][0, 0] = large
    run.params[3].fill_(3.4e38)  # its new value will not be finite
    run.grads[5][1] = torch.inf
    before = [[tensor.clone() for tensor in (p, *s.values())] for p, s in zip(run.params, run.states, strict=True)]
    run.step(decay=-0.5)
    for number, (param, state) in enumerate(zip(run.params, run.states, strict=True)):
        skipped = number in (1, 2, 3, 5)
        assert (int(state["skipped"]), int(state["skipped_in_row"])) == (int(skipped),) * 2, number
        same = [torch.equal(a, b) for a, b in zip(before[number][:-2], (param, *state.values()), strict=False)]
        assert all(same) if skipped else not same[0], number
        assert float(state["step"]) == (0 if skipped else 1)
    run.params, run.states, run.grads = run.params[3:4], run.states[3:4], run.grads[3:4]
    run.params[0].fill_(1.0)
    run.step()
    assert (int(run.states[0]["skipped"]), int(run.states[0]["skipped_in_row"])) == (1, 0)
