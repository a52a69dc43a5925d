"""The inner loop: populations equal loops over members, resets take a slot, both sides see the same data."""

import dataclasses
import gc
import math
import pickle
import unittest.mock
import weakref
from collections import Counter

import pytest
import torch
from lightning_cases import KNOWN_WARNINGS
from meta_cases import (
    CURVATURES,
    Descent,
    Parabola,
    Spy,
    descent,
    fit,
    generator,
    losses_by_hand,
    meta,
    meta_params,
    star,
)
from torch.utils._pytree import tree_leaves, tree_map

import lightning_lopt as lopt
from lightning_lopt import kernels, tasks
from lightning_lopt.meta import fused as fused_module
from lightning_lopt.meta import unroll as unroll_module
from lightning_lopt.meta.unroll import OBJECTIVES, Unroll
from lightning_lopt.meta.validation import meta_validate

EXACT = {"rtol": 1e-12, "atol": 1e-12}
pytestmark = KNOWN_WARNINGS


def lengths(*values):
    return torch.tensor(values)


def expand(theta, population, std=0.05):
    """Different meta-parameters for each member."""
    random = generator(9)
    return {k: p + std * torch.randn((population, *p.shape), generator=random, dtype=p.dtype) for k, p in theta.items()}


def assert_same(first, second, **tolerances):
    for a, b in zip(tree_leaves(first), tree_leaves(second), strict=True):
        torch.testing.assert_close(a, b, **(tolerances or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("task", ["quadratic", "linear-regression", "rosenbrock"])
def test_a_population_is_a_loop_over_its_members(task):
    unroll = Unroll(star(), tasks.make(task), objective="raw")
    meta = expand(meta_params(unroll.rule), 3)
    start = unroll.start(generator(), lengths(20, 30, 40))
    whole, record = unroll.run(meta, start, 6, generator(), None, batched=True)
    for member in range(3):
        one = slice(member, member + 1)
        alone = tree_map(lambda tensor, one=one: tensor[one], start)
        own = {name: p[member] for name, p in meta.items()}
        after, losses = unroll.run(own, alone, 6, generator(), None)
        torch.testing.assert_close(losses.losses, record.losses[:, one], rtol=1e-4, atol=1e-5)
        assert_same(after.params, tree_map(lambda tensor, one=one: tensor[one], whole.params), rtol=1e-4, atol=1e-5)


def test_losses_are_those_before_each_update():
    unroll, theta = descent()
    inner, record = unroll.run(theta, unroll.start(generator(), lengths(99)), 8, generator(), None)
    torch.testing.assert_close(record.losses[:, 0], losses_by_hand(theta, 8)[:8], **EXACT)
    torch.testing.assert_close(
        unroll.loss(inner, unroll.task.batch(generator(), {}, 1))[0], losses_by_hand(theta, 8)[8]
    )


def test_a_reset_takes_a_slot_and_counts_no_loss():
    unroll, theta = descent()
    inner, random = unroll.start(generator(), lengths(3, 5)), generator()
    inner, record = unroll.run(theta, inner, 9, random, lambda number: torch.full((number,), 4))
    # Episodes of 3 and 4 steps, each with its reset: three steps, reset, four steps, reset; five steps, reset, three.
    assert record.mask.T.int().tolist() == [[1, 1, 1, 0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 1, 1, 1]]
    assert record.done.T.int().tolist() == [[0, 0, 1, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0, 0, 0, 0]]
    losses = losses_by_hand(theta, 5)
    expected = torch.stack([*losses[:3], losses.new_zeros(()), *losses[:4], losses.new_zeros(())])
    torch.testing.assert_close(record.losses[:, 0], expected, **EXACT)
    assert inner.clock.tolist() == [0, 3]
    assert inner.step.tolist() == [0, 3]
    assert inner.horizon.tolist() == [4, 4]
    assert inner.done.tolist() == [False, False]
    assert (inner.params["x"][0] == 1).all()
    assert (inner.states["x"].velocity[0] == 0).all()


def test_a_reset_is_a_fresh_start_of_task_and_parameters():
    unroll = Unroll(Descent(dtype=torch.float32), tasks.make("quadratic-thesis"), objective="ratio")
    theta = meta_params(unroll.rule)
    before = unroll.start(generator(), lengths(2, 9))
    after, _ = unroll.run(theta, before, 3, generator(1), lambda number: torch.full((number,), 7))
    changed = [
        not torch.equal(a, b) for a, b in zip(before.constants["matrix"], after.constants["matrix"], strict=True)
    ]
    assert changed == [True, False]
    assert after.horizon.tolist() == [7, 9]
    assert (after.first_loss[0], after.step[0]) == (1, 0)
    _, record = unroll.run(theta, after, 1, generator(2), None)
    assert record.losses[0, 0] == 1  # the new run's loss relative to its own first


def test_without_resets_a_run_that_has_ended_waits():
    unroll, theta = descent(idle=True)
    inner, record = unroll.run(theta, unroll.start(generator(), lengths(3, 9)), 5, generator(), None)
    assert record.mask.T.int().tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert record.done.int().sum() == 1
    ended, _ = unroll.run(theta, unroll.start(generator(), lengths(3)), 3, generator(), None)
    assert torch.equal(inner.params["x"][0], ended.params["x"][0])
    assert inner.done.tolist() == [True, False]


@pytest.mark.parametrize("name", ["digits-dropout-mlp", "noisy-quadratic", "quadratic-thesis"])
def test_both_sides_of_a_pair_see_the_same_data_starts_and_resets(name):
    unroll = Unroll(star(), tasks.make(name), objective="log")
    start = unroll.start(generator(), lengths(2, 4), sides=2)
    meta = {k: p.expand(4, *p.shape) for k, p in meta_params(unroll.rule).items()}
    draw = lambda number: torch.full((number,), 3)  # noqa: E731
    inner, record = unroll.run(meta, start, 6, generator(), draw, sides=2, batched=True)
    plus, minus = (tree_map(lambda tensor, i=i: tensor.chunk(2)[i], inner) for i in (0, 1))
    assert_same(plus, minus)
    assert torch.equal(*record.losses.chunk(2, dim=1))
    assert not torch.equal(record.losses[:, 0], record.losses[:, 1])


@pytest.mark.parametrize(("field", "expected"), [("step", 2.0), ("num_steps", 9.0), ("loss", None)])
def test_what_a_rule_is_told(field, expected):
    unroll = Unroll(Spy(field), Parabola(), objective="raw")
    inner, record = unroll.run(meta_params(unroll.rule), unroll.start(generator(), lengths(9)), 3, generator(), None)
    assert inner.params["x"][0, 0].item() == (record.losses[-1, 0].item() if expected is None else expected)


def test_what_a_rule_makes_of_all_tensors_together():
    class Sharing(Spy):
        """Sums all gradients, and counts steps."""

        needs_shared_context = True

        def shared_context(self, meta_params, grads, states, params, context, *, in_place=False):
            total = sum(grad.sum() for grad in grads.values()) * meta_params["where"]
            return total, states

    unroll = Unroll(Sharing("shared"), Parabola(), objective="raw")
    inner, _ = unroll.run(meta_params(unroll.rule), unroll.start(generator(), lengths(9)), 1, generator(), None)
    assert inner.params["x"].tolist() == [pytest.approx([sum(CURVATURES)] * 3)]


def test_the_horizon_can_be_kept_from_the_rule():
    unroll = Unroll(Spy("num_steps"), Parabola(), objective="raw", tell_horizon=False)
    inner, _ = unroll.run(meta_params(unroll.rule), unroll.start(generator(), lengths(9)), 1, generator(), None)
    assert (inner.params["x"] == -1).all()


def test_objectives():
    task = tasks.make("digits-mlp")
    cap = 1.5 * math.log(10)
    loss, first = torch.tensor([1.0, 0.0, 1e9, math.nan, math.inf, -1.0]), torch.full((6,), 2.0)
    found = {name: objective(task, loss, first).tolist() for name, objective in OBJECTIVES.items()}
    assert found["raw"][:3] == [1.0, 0.0, 1e9]
    assert found["clipped"] == pytest.approx([1.0, 0.0, cap, cap, cap, 0.0])
    assert found["ratio"] == pytest.approx([0.5, 0.0, 2.0, 2.0, 2.0, 0.0])
    assert found["log"] == pytest.approx([math.log(x + 0.01) for x in found["ratio"]])


def test_an_unknown_objective():
    with pytest.raises(ValueError, match="objective='mean' is not allowed: use one of"):
        descent(objective="mean")


def test_relative_objectives_are_relative_to_the_runs_first_loss():
    unroll, theta = descent(Parabola(start=3.0), objective="ratio")
    _, record = unroll.run(theta, unroll.start(generator(), lengths(99)), 4, generator(), None)
    losses = losses_by_hand(theta, 3)
    torch.testing.assert_close(record.losses[:, 0], losses / losses[0], **EXACT)
    staggered = unroll.start(generator(), lengths(99))._replace(clock=torch.tensor([7]))
    _, record = unroll.run(theta, staggered, 4, generator(), None)
    torch.testing.assert_close(record.losses[:, 0], losses / losses[0], **EXACT)


def test_frozen_meta_parameters_are_merged():
    unroll, theta = descent(Parabola(noise=0.3))
    start = unroll.start(generator(), lengths(9, 9))
    whole, _ = unroll.run(theta, start, 5, generator(), None)
    frozen = dataclasses.replace(unroll, frozen={"log_lr": theta["log_lr"]})
    assert_same(frozen.run({"momentum": theta["momentum"]}, start, 5, generator(), None)[0], whole)
    batched = {"momentum": theta["momentum"].expand(2)}
    assert_same(frozen.run(batched, start, 5, generator(), None, batched=True)[0], whole)


def test_gradients_are_of_first_order_where_asked_for():
    for second_order in (True, False):
        unroll, theta = descent(second_order=second_order)
        theta["log_lr"].requires_grad_()
        inner, _ = unroll.run(theta, unroll.start(generator(), lengths(9)), 2, generator(), None)
        (grad,) = torch.autograd.grad(inner.params["x"][0, 0], theta["log_lr"])
        a, h, m = theta["log_lr"].exp().item(), CURVATURES[0], theta["momentum"].item()
        # x2 = x1 - a (m h + h x1), x1 = 1 - a h
        slope = -a * h - a * (m * h + h * (1 - a * h)) + (a * a * h * h if second_order else 0)
        assert grad.item() == pytest.approx(slope, rel=1e-12)


def test_the_step_count_is_exact_whatever_the_default_dtype_is():
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does for precision="bf16-true"
    try:
        inner = descent()[0].start(generator(), lengths(9))
    finally:
        torch.set_default_dtype(torch.float32)
    assert inner.step.dtype == inner.first_loss.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compiled_steps_equal_eager_ones():
    rule, task = star(), tasks.make("digits-logreg", batch_size=8)
    theta = meta_params(rule)
    fixed = {name: theta.pop(name) for name in ("w0", "b0")}
    eager = Unroll(rule, task, objective="log", frozen=fixed)
    start = eager.start(generator(), lengths(4, 9), sides=2)
    meta = expand(theta, 4, 0.01)

    def run(unroll):
        arguments = (meta, start, 8, generator(1), lambda number: torch.full((number,), 5))
        with torch.no_grad():
            return unroll.run(*arguments, sides=2, batched=True)

    with unittest.mock.patch.object(kernels, "find", return_value="none, for once"):
        assert_same(run(dataclasses.replace(eager, compiled=True)), run(eager), rtol=1e-5, atol=1e-5)


def test_compiled_code_is_freed_with_the_unrolls_that_use_it(monkeypatch):
    monkeypatch.setattr(unroll_module, "_compile", lambda function: function)
    unroll, theta = descent(compiled=True)
    relative = dataclasses.replace(unroll, objective="ratio")
    with torch.no_grad():
        for each in (unroll, unroll, relative):
            each.run(theta, each.start(generator(), lengths(9)), 2, generator(), None)
    assert unroll.compile_cache is relative.compile_cache
    assert list(unroll.compile_cache) == [(unroll, False), (relative, False)]
    rule = weakref.ref(unroll.rule)
    del unroll, relative, each
    gc.collect()
    assert rule() is None


def test_compiled_code_is_kept_from_step_to_step_and_not_pickled(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(unroll_module, "_compile", lambda function: made.append(function) or function)
    task = Parabola(noise=0.1)
    module = meta(tasks=[task, Parabola(name="other")], validation_tasks=[task], compiled=True)
    fit(tmp_path, module)
    # Two training tasks with meta-parameters per run, and a validation task without.
    assert len(made) == len(module._compile_cache) == 3
    assert pickle.loads(pickle.dumps(module))._compile_cache == {}
    fit(tmp_path, module)
    assert len(made) == 3


def test_a_truncation_copies_its_runs_once_and_looks_for_the_kernel_once(monkeypatch):
    rule, task = lopt.rules.make("star"), tasks.make("digits-mlp", batch_size=8, hidden=(6,))
    if isinstance(kernels.find(rule, "cpu"), str):
        pytest.skip("no kernel on this machine")
    clone, find = fused_module._clone, kernels.find
    counts = Counter()
    monkeypatch.setattr(fused_module, "_clone", lambda tensor: counts.update(copies=1) or clone(tensor))
    monkeypatch.setattr(kernels, "find", lambda *arguments: counts.update(searches=1) or find(*arguments))
    unroll = Unroll(rule, task, compiled=True)
    start = unroll.start(generator(), lengths(9, 9), sides=2)
    theta = expand(meta_params(rule), 4)
    with torch.no_grad():
        unroll.run(theta, start, 5, generator(), None, sides=2, batched=True)
    assert counts == {"copies": len(tree_leaves([start.params, start.states])), "searches": 1}


FUSED = {
    "scheduled": ("scheduled", {"centering_start": 0.5, "caution_end": 0.5}),
    "star": ("star", {"step_mult": 1e-2}),
    "blackbox": ("blackbox", {}),
}


@pytest.mark.parametrize("batched", [True, False], ids=["a rule for each run", "one rule"])
@pytest.mark.parametrize(("kind", "config"), FUSED.values(), ids=FUSED)
def test_the_kernel_moves_a_population_as_the_rule_does(kind, config, batched):
    """Including resets and runs in progress, and without writing to the tensors of the start."""
    torch.manual_seed(0)
    rule, task = lopt.rules.make(kind, **config), tasks.make("digits-mlp", batch_size=8, hidden=(6,))
    if isinstance(kernels.find(rule, "cpu"), str):
        pytest.skip("no kernel on this machine")
    theta = {name: value.detach() for name, value in rule.meta_params().items()}
    fixed = {name: theta.pop(name) for name in list(theta)[:1]} if len(theta) > 1 else {}
    eager = Unroll(rule, task, objective="log", frozen=fixed)
    meta = expand(theta, 4, 0.01) if batched else theta
    horizons = lambda number: torch.full((number,), 5)  # noqa: E731
    with torch.no_grad():
        start, _ = eager.run(meta, eager.start(generator(), lengths(4, 9), sides=2), 2, generator(3), horizons,
                             sides=2, batched=batched)  # fmt: skip
        before = tree_map(torch.clone, start)
        results = [unroll.run(meta, start, 9, generator(1), horizons, sides=2, batched=batched)
                   for unroll in (eager, dataclasses.replace(eager, compiled=True))]  # fmt: skip
    assert_same(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert_same(start, before, rtol=0, atol=0)


def test_validation_losses_are_the_log_objective_and_the_loss_at_the_end():
    unroll, theta = descent()
    result = meta_validate(unroll, theta, horizon=20, num_runs=3, generator=generator())
    losses = losses_by_hand(theta, 19)
    torch.testing.assert_close(result.meta_loss, (losses / losses[0] + 1e-2).log().mean(), **EXACT)
    torch.testing.assert_close(result.final, losses[-2:].mean(), **EXACT)
