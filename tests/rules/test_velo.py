"""VeLO against its authors' code, in float64, and what is around its network."""

import math

import numpy as np
import pytest
import torch
from contract_table import mix_a_momentum_through
from optimizer_cases import assert_close, assert_equal, set_gradients
from torch import Tensor, nn
from velo_goldens import GOLDENS, INPUTS, TREES, leaves, length, replay, tensor

import lightning_lopt as lopt
from lightning_lopt import RuleOptimizer
from lightning_lopt.rules import StepContext, velo_lstm

RECORDED = (0, 1, 3, 10, 24)  # steps whose intermediate values are there
PARAMS_AT = (0, 10, 24)  # steps whose parameters are there


def small(seed=0, **config):
    """VeLO with random meta-parameters, all of which act."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rule = lopt.rules.make("velo", **{"lstm_hidden_size": 8, "param_inits": 4, "step_mult": 1e-1, **config})
        for value in rule.parameters():
            nn.init.normal_(value, std=0.3)
    return rule


# --- the authors' numbers


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", GOLDENS)
def test_follows_the_authors_code(name, tree):
    """Every number that is recorded, to 1e-9, and the parameters to 1e-9 of how far they have moved."""
    golden = GOLDENS[name]
    rule = golden.rule()
    compared = 0
    for number, step in enumerate(replay(rule, golden, tree, length(tree))):
        if number in PARAMS_AT:
            for leaf, param in step.params.items():
                expected = golden.recorded(f"{tree}/params/{leaf}")[PARAMS_AT.index(number)]
                moved = (expected - tensor(INPUTS[f"{tree}/params0/{leaf}"])).abs().max()
                rounding = 1e-15 * expected.abs().max()
                assert (param - expected).abs().max() <= 1e-9 * moved + rounding, leaf
                compared += 1
        if f"{tree}/{number}/lstm_in" in golden.data:
            recorded = {key: golden.recorded(f"{tree}/{number}/{key}") for key in ("lstm_in", "controls", "lr_mult")}
            controls, factors = map(torch.stack, zip(*step.heads, strict=True))
            for found, expected in zip((step.inputs, controls, factors), recorded.values(), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
            loss_features = golden.recorded(f"{tree}/{number}/loss_features")
            torch.testing.assert_close(step.inputs[0, 9:18], loss_features, rtol=1e-9, atol=1e-9)
            compared += 1
    assert compared >= 2 * len(leaves(tree)) + (2 if name == "velo_f64" else 1)
    if tree == "mixed":
        last = [step.states[leaf] for leaf in leaves(tree)]
        hidden = torch.stack([state.hidden for state in last]) + rule.initial_hidden
        cell = torch.stack([state.cell for state in last]) + rule.initial_cell
        torch.testing.assert_close(hidden, golden.recorded("mixed/lstm_h"), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(cell, golden.recorded("mixed/lstm_c"), rtol=1e-9, atol=1e-9)
        assert int(step.run.seen) == golden.data["mixed/loss_buffer/iteration"]
        for field, key in (("means", "means"), ("lows", "running_min")):
            torch.testing.assert_close(
                getattr(step.run, field), golden.recorded(f"mixed/loss_buffer/{key}"), rtol=1e-9, atol=1e-9
            )


@pytest.mark.parametrize("bugged", [False, True])
def test_decays_of_the_loss(bugged):
    golden = GOLDENS["velo_bugged_f64" if bugged else "velo_f64"]
    length = torch.tensor(10.0 if bugged else 30.0, dtype=torch.float64)
    recorded = golden.recorded("mixed/loss_buffer/decays")
    torch.testing.assert_close(velo_lstm.loss_decays(length), recorded, rtol=1e-14, atol=0)


def to_torch(leaf: Tensor) -> Tensor:
    """From (*kernel, in, out) to (out, in, *kernel)."""
    return leaf if leaf.dim() < 2 else leaf.permute(-1, -2, *range(leaf.dim() - 2))


@pytest.mark.parametrize("tree", TREES)
def test_the_optimizer_takes_the_authors_steps_on_torchs_layout(tree):
    """Square matrices and convolutions included, whose largest dims are equal."""
    golden = GOLDENS["velo_f64"]
    names = leaves(tree)
    params = [nn.Parameter(to_torch(tensor(INPUTS[f"{tree}/params0/{leaf}"])).contiguous()) for leaf in names]
    optimizer = RuleOptimizer(params, golden.rule(layout="torch"), num_steps=golden.num_steps)
    for number in range(11):
        for leaf, param in zip(names, params, strict=True):
            param.grad = to_torch(tensor(INPUTS[f"{tree}/grads/{leaf}"][number])).contiguous()
        optimizer.step(loss=tensor(INPUTS["losses"][number]))
    for leaf, param in zip(names, params, strict=True):
        expected = to_torch(golden.recorded(f"{tree}/params/{leaf}")[1])
        torch.testing.assert_close(param.detach(), expected, rtol=0, atol=1e-14)


def test_without_the_layout_square_tensors_take_other_steps():
    """So that the test before it is one: only ties depend on the layout."""
    golden = GOLDENS["velo_f64"]
    rules = [golden.rule(layout=layout) for layout in ("torch", "jax")]
    for shape, differs in (((6, 6), True), ((8, 8, 3, 3), True), ((8, 4, 3, 3), False), ((5, 3), False), ((4,), False)):
        param, grad = torch.rand(shape).double() + 1, torch.randn(shape).double()
        meta_params = rules[0].meta_params()
        deltas = [
            rule.update(meta_params, grad, rule.init_state(param), param, StepContext(tensor(0)))[0] for rule in rules
        ]
        assert torch.allclose(*deltas, rtol=1e-12, atol=0) != differs, shape


# --- what is around the network


def quadratic(params):
    return sum(((param - 1) ** 2).sum() for param in params)


def train(rule, params, steps, num_steps, loss_scale=1.0, **options):
    optimizer = RuleOptimizer(params, rule, num_steps=num_steps, **options)
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step(loss=loss_scale / (1 + step))
    return optimizer


SHAPES = [(4, 3), (3,), (), (2, 3, 2, 2, 2)]  # the last is Conv3d's


def some(seed=0, dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype) + 0.5) for shape in shapes]


def test_l2_is_in_the_gradient_and_in_the_loss():
    """As the authors wrap it: the same as adding it to the objective by hand."""
    decay = 0.1
    params, by_hand = some(), some()
    wrapped = RuleOptimizer(params, small(weight_decay=decay), num_steps=9)
    plain = RuleOptimizer(by_hand, small(), num_steps=9)
    for step in range(6):
        for each in (params, by_hand):
            set_gradients(each, step)
        loss = torch.tensor(1.0 / (1 + step), dtype=torch.float64)
        with torch.no_grad():
            penalty = decay * sum(param.square().sum() for param in by_hand)
            for param in by_hand:
                param.grad += decay * param
        wrapped.step(loss=loss)
        plain.step(loss=loss + penalty)
    assert_close([p.detach() for p in params], [p.detach() for p in by_hand], 1e-12)
    assert wrapped.state[params[0]]["run_means"].dtype == torch.float64


def test_decoupled_decay_is_subtracted_and_nothing_else():
    params, plain = some(), some()
    optimizer = RuleOptimizer(params, small(weight_decay=0.1, decoupled_weight_decay=True), num_steps=9)
    other = RuleOptimizer(plain, small(), num_steps=9)
    before = [param.detach().clone() for param in params]
    for each in (params, plain):
        set_gradients(each, 0)
    for each in (optimizer, other):
        each.step(loss=1.0)
    assert_close([p + 0.1 * old for p, old in zip(params, before, strict=True)], plain, 1e-12)
    assert_equal(*(each.state[p[0]].values() for each, p in ((optimizer, params), (other, plain))))


@pytest.mark.parametrize("limit", [5, 4])
def test_a_long_run_is_a_short_one_on_averages(limit):
    """Seven steps, of which two or three make an update, against the same rule on averaged gradients and losses."""
    every = math.ceil(10 / limit)
    params, averaged = some(), some()
    long = RuleOptimizer(params, small(max_training_steps=limit), num_steps=10)
    short = RuleOptimizer(averaged, small(max_training_steps=0), num_steps=10 // every)
    sums, total = [torch.zeros_like(param) for param in params], 0.0
    for step in range(7):
        before = [param.detach().clone() for param in params]
        set_gradients(params, step)
        loss = 1.0 / (1 + step)
        sums, total = [s + p.grad for s, p in zip(sums, params, strict=True)], total + loss
        long.step(loss=torch.tensor(loss, dtype=torch.float64))
        if (step + 1) % every:
            assert_equal(before, [param.detach() for param in params])
            continue
        for param, grad in zip(averaged, sums, strict=True):
            param.grad = grad / every
        short.step(loss=torch.tensor(total / every, dtype=torch.float64))
        sums, total = [torch.zeros_like(param) for param in params], 0.0
        assert_close([p.detach() for p in params], [p.detach() for p in averaged], 1e-12)
    for ours, theirs in zip(params, averaged, strict=True):
        for name, value in short.state[theirs].items():
            if name not in ("step", "grad_sum", "run_steps", "run_loss_sum", "run_loss_count"):
                torch.testing.assert_close(long.state[ours][name], value, rtol=1e-12, atol=1e-12)


def test_the_authors_limit_is_150_000_steps():
    for num_steps, every in ((150_000, 1), (150_001, 2), (300_000, 2), (300_001, 3)):
        params = some()
        optimizer = RuleOptimizer(params, small(), num_steps=num_steps)
        for step in range(1, 4):
            before = params[0].detach().clone()
            set_gradients(params, step)
            optimizer.step(loss=1.0)
            assert torch.equal(before, params[0]) == bool(step % every), num_steps


def test_lengths_as_tensors_are_lengths_as_numbers():
    """In meta-training each run has its own."""
    for num_steps in (3, 10):
        rule = small(max_training_steps=5)
        ends = []
        for known in (num_steps, torch.tensor(float(num_steps))):
            param = torch.full((3, 2), 0.5)
            state, run = rule.init_state(param), rule.init_run_state(param)
            for step in range(4):
                context = StepContext(torch.tensor(float(step)), torch.tensor(1.0), known)
                run = rule.update_run_state(rule.meta_params(), run, {"": param}, context)
                context = context._replace(run=run)
                grads = {"": torch.full((3, 2), 1.0 + step)}
                _, states = rule.shared_context(rule.meta_params(), grads, {"": state}, {"": param}, context)
                delta, state = rule.update(rule.meta_params(), grads[""], states[""], param, context)
                param = param + delta
            ends.append([param, *state, *run])
        assert_close(*ends, 1e-6)


def test_the_length_of_the_run_and_the_loss_must_be_known():
    params = some()
    optimizer = RuleOptimizer(params, small())
    set_gradients(params, 0)
    with pytest.raises(RuntimeError, match="Rule 'velo' must know the length of the run. Pass num_steps="):
        optimizer.step(loss=1.0)
    optimizer.num_steps = 10
    with pytest.raises(RuntimeError, match="Rule 'velo' reads the training loss"):
        optimizer.step()
    optimizer.step(loss=1.0)
    rule, param = small(), torch.ones(2)
    run = rule.init_run_state(param)
    with pytest.raises(ValueError, match="must know the length of the run"):
        rule.update_run_state({}, run, {}, StepContext(torch.tensor(0.0), torch.tensor(1.0)))
    with pytest.raises(ValueError, match="reads the training loss"):
        rule.update_run_state({}, run, {}, StepContext(torch.tensor(0.0), None, 5))


def test_a_loss_that_is_not_finite_is_left_out():
    """The buffer goes on as if it had not been there; the step is taken."""
    with_nan, without = (RuleOptimizer(some(), small(), num_steps=20, safeguard=True) for _ in range(2))
    for optimizer in (with_nan, without):
        params = optimizer.param_groups[0]["params"]
        for step, loss in enumerate([2.0, 1.0, math.nan, math.inf, 0.5]):
            if optimizer is without and not math.isfinite(loss):
                continue
            set_gradients(params, step)
            optimizer.step(loss=loss)
    of_both = [optimizer.state[optimizer.param_groups[0]["params"][0]] for optimizer in (with_nan, without)]
    assert [int(state["run_seen"]) for state in of_both] == [3, 3]
    assert [int(state["run_steps"]) for state in of_both] == [5, 3]
    assert_equal(*([state[name] for name in ("run_means", "run_lows")] for state in of_both))
    assert with_nan.num_skipped() == 0
    assert all(param.isfinite().all() for param in with_nan.param_groups[0]["params"])


def test_each_step_is_bounded_by_the_tensors_scale():
    rules = [small(clip_param_scale_amount=amount) for amount in (None, 1e-3)]
    param, grad = torch.full((3, 2), 2.0), torch.randn(3, 2)
    deltas = [
        rule.update(rule.meta_params(), grad, rule.init_state(param), param, StepContext(torch.tensor(0.0)))[0]
        for rule in rules
    ]
    torch.testing.assert_close(deltas[1], deltas[0] / 2 * 1e-3 * math.sqrt(6), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lstm_hidden_size": 0}, "lstm_hidden_size=0 is not allowed"),
        ({"param_inits": 2.0}, "param_inits=2.0 is not allowed"),
        ({"step_mult": -1.0}, "step_mult=-1.0"),
        ({"bugged_loss_features": 1}, "bugged_loss_features=1"),
        ({"max_training_steps": -1}, "max_training_steps=-1"),
        ({"layout": "tf"}, r"layout='tf' is not allowed: it must be one of \['torch', 'jax'\]"),
        ({"num_steps": 3}, "Unknown config key 'num_steps'"),
    ],
)
def test_wrong_configurations(config, message):
    with pytest.raises(ValueError, match=message):
        lopt.rules.make("velo", **config)


def test_the_published_size():
    assert lopt.rules.make("velo").num_meta_params() == 2_304_513  # 2,320,385 with the unused layer


# --- freezing, and the run's state


def test_steps_do_not_change_because_another_tensor_freezes():
    """Its last state still takes part in the LSTM's maximum, and its last value in the L2 of the loss."""
    params, same = some(), some()
    rule = small(weight_decay=0.1)
    optimizers = RuleOptimizer(params, rule, num_steps=20), RuleOptimizer(same, rule, num_steps=20)
    for step in range(6):
        for each, optimizer in zip((params, same), optimizers, strict=True):
            set_gradients(each, step)
            if each is params and step == 5:
                each[1].requires_grad_(False)
                each[1].grad = None
            optimizer.step(loss=1.0 / (1 + step))
    assert_equal([params[i].detach() for i in (0, 2, 3)], [same[i].detach() for i in (0, 2, 3)])
    assert not torch.equal(params[1], same[1])


def test_a_frozen_tensor_keeps_its_part():
    """Without it the others would step otherwise: what waits is not ignored."""
    rule, ends = small(), []
    for waits in (True, False):
        params = some()
        optimizer = train(rule, params, 3, 20)
        set_gradients(params, 3)
        params[0].grad = None
        if not waits:
            del optimizer.state[params[0]]
        optimizer.step(loss=0.2)
        ends.append(params[1].detach())
    assert not torch.equal(*ends)


def test_the_run_goes_on_while_tensors_take_turns():
    """The loss buffer and the count belong to the run: as if all had trained."""
    params, all_train = some(shapes=[(4, 3), (3,)]), some(shapes=[(4, 3), (3,)])
    turns = RuleOptimizer(params, small(), num_steps=20)
    other = RuleOptimizer(all_train, small(), num_steps=20)
    for step in range(8):
        for each in (params, all_train):
            set_gradients(each, step)
        params[int(step < 4)].grad = None
        for optimizer in (turns, other):
            optimizer.step(loss=1.0 / (1 + step))
    for name in ("run_seen", "run_means", "run_lows", "run_steps"):
        assert torch.equal(turns.state[params[1]][name], other.state[all_train[0]][name])
        assert turns.state[params[0]][name] is turns.state[params[1]][name]
    assert [int(turns.state[param]["step"]) for param in params] == [4, 4]


def test_trains_a_network_behind_the_optimizer():
    """With a network in the bank that steps along the momentum; against a loss from outside, torch's own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    rule = lopt.rules.make("velo", lstm_hidden_size=8, param_inits=4, step_mult=3e-2)
    mix_a_momentum_through(rule)
    optimizer = RuleOptimizer(model.parameters(), rule, num_steps=200, safeguard=True)
    x = torch.randn(64, 4)
    y = torch.sin(x[:, :1]) + 0.5 * x[:, 1:2]
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step(loss=loss)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]
    assert optimizer.num_skipped() == 0


def test_numbers_are_the_same_in_float32():
    """To single precision, relative to the movement, as far as is known of PyLO's port (3e-6 to 1e-4)."""
    golden = GOLDENS["velo_f64"]
    params = [nn.Parameter(tensor(INPUTS[f"mixed/params0/{leaf}"]).float()) for leaf in leaves("mixed")]
    rule = golden.rule().float()
    optimizer = RuleOptimizer(params, rule, num_steps=30)
    for number in range(25):
        for leaf, param in zip(leaves("mixed"), params, strict=True):
            param.grad = torch.tensor(INPUTS[f"mixed/grads/{leaf}"][number]).float()
        optimizer.step(loss=torch.tensor(np.float32(INPUTS["losses"][number])))
    for leaf, param in zip(leaves("mixed"), params, strict=True):
        expected = golden.recorded(f"mixed/params/{leaf}")[2]
        moved = (expected - tensor(INPUTS[f"mixed/params0/{leaf}"])).abs().max()
        assert (param.double() - expected).abs().max() < 1e-3 * moved, leaf
