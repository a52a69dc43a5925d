"""The table of rules that every contract test runs over. A new rule adds one line to `RULES_UNDER_TEST`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lightning_lopt.rules import UpdateRule, make


def pass_gradient_through(rule: UpdateRule) -> None:
    """Meta-parameters that make the MLP's direction the normalized gradient: relu(x) - relu(-x)."""
    with torch.no_grad():
        for value in rule.parameters():
            value.zero_()
        for unit, sign in ((0, 1.0), (1, -1.0)):
            rule.w0[0, unit] = sign
            rule.w1[unit, unit] = 1.0
            rule.w2[unit, 0] = sign


def step_against_the_mean(rule: UpdateRule) -> None:
    """Meta-parameters that make a step of the sign and about the size of the normalized gradients' mean."""
    with torch.no_grad():
        for value in rule.parameters():
            value.zero_()
        for unit, sign in ((0, 1.0), (1, -1.0)):
            rule.w0[:, unit] = sign * 2 / rule.config.k
            rule.w1[unit, :10] = 5 * torch.linspace(0, 1, 10)  # the magnitudes
            rule.w1[unit, 10:] = torch.tensor([-sign, sign])  # the signs


def mix_a_momentum_through(rule: UpdateRule) -> None:
    """Meta-parameters that make each network's direction the normalized fastest momentum, of any net at any time."""
    with torch.no_grad():
        for name, value in rule.named_parameters():
            if not name.startswith(("mix", "input", "gates")):  # the LSTM runs on, and its outputs are ignored
                value.zero_()
        rule.controls_b.fill_(1.0)
        rule.step_b.fill_(1.0)
        for unit, sign in ((0, 1.0), (1, -1.0)):
            rule.w0[:, 3, unit] = sign / rule.config.ff_mult
            rule.w1[:, unit, unit] = 1.0 / rule.config.ff_mult
            rule.w2[:, unit, 0] = sign / rule.config.ff_mult


class RuleCase(NamedTuple):
    """A rule, and with what it descends."""

    kind: str
    config: dict[str, Any]
    prepare: Callable[[UpdateRule], None] = lambda rule: None  # for rules that do not descend untrained

    def make(self) -> UpdateRule:
        rule = make(self.kind, **self.config)
        self.prepare(rule)
        return rule


RULES_UNDER_TEST = [
    RuleCase("star", {"nominal_stepsize": 1e-2, "step_mult": 1e-6}),
    RuleCase("scheduled", {"nominal_stepsize": 1e-2, "centering_start": 0.5, "caution_end": 0.5}),
    RuleCase(
        "scheduled",
        {
            "nominal_stepsize": 1e-2,
            "orthogonal_start": 0.9,
            "hidden": 0.3,
            "cap": -1.0,
            "first_scale": 0.7,
            "decay": 0.1,
        },
    ),
    RuleCase("hyperparam", {"nominal_stepsize": 1e-2}),
    RuleCase("blackbox", {"step_mult": 1e-2}, pass_gradient_through),
    RuleCase("celo2", {"lr": 1e-2}, pass_gradient_through),
    RuleCase("celo2_base", {"lr": 1e-2}, pass_gradient_through),
    RuleCase("lstm", {"nominal_stepsize": 1e-2, "nominal_controller": True, "out_scale": 1e-6}),
    RuleCase(
        "lstm_dmd", {"nominal_stepsize": 1e-2, "out_scale": 1e-6, "rank": 2, "num_snapshots": 2, "scope": "tensor"}
    ),
    RuleCase("lstm_dmd", {"nominal_stepsize": 1e-2, "out_scale": 1e-6, "num_snapshots": 3, "scheduler": True}),
    RuleCase("gru", {"nominal_stepsize": 1e-2, "nominal_controller": True, "out_scale": 1e-6, "hidden_size": 8}),
    RuleCase("mng", {}),
    RuleCase("k_timesteps", {}, step_against_the_mean),
    RuleCase("k_momentums", {}, step_against_the_mean),
    RuleCase("multiscale_adam", {"mixer": "la_b"}),
    RuleCase("multiscale_adam", {"mixer": "rnn2"}),
    RuleCase("multiscale_adam", {"mixer": "gru"}),
    RuleCase("muon", {"adam_lr": 1e-2}),
    RuleCase("soap", {"lr": 1e-2, "betas": (0.9, 0.99)}),
    RuleCase("velo", {"lstm_hidden_size": 8, "param_inits": 4, "step_mult": 2e-2}, mix_a_momentum_through),
]
