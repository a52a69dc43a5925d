"""Runs of `lopt evaluate` and of the claims go through the rule's kernel where there is one."""

import pytest
import torch

from lightning_lopt import hub, kernels, tasks
from lightning_lopt.evaluation.runs import CHUNK, run
from lightning_lopt.meta import unroll
from lightning_lopt.meta.unroll import Unroll


@pytest.mark.parametrize("tell_length", [True, False])
@pytest.mark.parametrize("name", ["star", "star-paper", "blackbox"])
def test_the_kernels_runs_are_those_of_the_reference(name, tell_length, monkeypatch):
    """Over more than one chunk of steps, for several settings and seeds side by side."""
    rule, task = hub.load_rule(name), tasks.make("digits-mlp")
    if isinstance(kernels.find(rule, "cpu"), str):
        pytest.skip("no compiler")
    settings = [
        {key: value.detach().clone() for key, value in rule.meta_params().items()},
        {key: 1.02 * value.detach() for key, value in rule.meta_params().items()},
    ]
    reports = []
    options = {"steps": CHUNK + 20, "seeds": 2, "tell_length": tell_length}
    used, fused = [], unroll.fused
    monkeypatch.setattr(unroll, "fused", lambda *a, **k: used.append(fused(*a, **k)) or used[-1])
    by_kernel = run(rule, settings, task, on_step=reports.append, **options)
    assert used
    assert all(found is not None for found in used)
    assert reports == [CHUNK, CHUNK + 20]
    monkeypatch.setattr(unroll, "fused", lambda *a, **k: None)
    by_reference = run(rule, settings, task, **options)
    for ours, theirs in zip(by_kernel, by_reference, strict=True):
        for field in ("initial", "final", "mean", "test_loss"):
            assert getattr(ours, field) == pytest.approx(getattr(theirs, field), rel=1e-4), field
    assert by_kernel[0].final != by_kernel[1].final


def test_a_rule_without_a_kernel_takes_its_own_steps_and_is_not_compiled(monkeypatch):
    rule, task = hub.load_rule("lstm"), tasks.make("digits-mlp")
    monkeypatch.setattr(unroll, "_compile", lambda step: pytest.fail("it must not be compiled"))
    (found,) = run(rule, [rule.meta_params()], task, steps=3, seeds=1)
    assert torch.isfinite(torch.tensor(found.final)).all()


def test_an_unknown_way_to_compile_is_refused():
    with pytest.raises(ValueError, match="compiled='kernels' is not allowed: use False, True or 'kernel'"):
        Unroll(hub.load_rule("lstm"), tasks.make("digits-mlp"), compiled="kernels")
