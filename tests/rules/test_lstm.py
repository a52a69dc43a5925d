"""The LSTM rule against torch's LSTMCell, its preprocessing and stabilizers against their formulas."""

import json
import math

import numpy as np
import pytest
import torch
from lightning_cases import Module, fit
from optimizer_cases import assert_equal, parameters, set_gradients, snapshot
from torch import Tensor, nn

import lightning_lopt as lopt
from lightning_lopt import RuleOptimizer
from lightning_lopt.meta.unroll import Unroll
from lightning_lopt.rules import LSTMConfig, StepContext, UpdateRule, dmd, make
from lightning_lopt.rules.lstm import SCHEDULE, preprocess
from lightning_lopt.tasks import make as make_task

F64 = torch.float64


def double(kind: str, **config) -> UpdateRule:
    return make(kind, **config).double()


def context(step: int = 0, **more) -> StepContext:
    return StepContext(torch.tensor(float(step)), **more)


def run(rule: UpdateRule, grads: Tensor, start: Tensor | None = None) -> tuple[list[Tensor], list[Tensor], object]:
    """(deltas, parameters before each step, last state) for gradients (steps, *shape)."""
    param = torch.zeros_like(grads[0]) if start is None else start
    meta_params, state, deltas, params = rule.meta_params(), rule.init_state(param), [], []
    for step, grad in enumerate(grads):
        params.append(param)
        delta, state = rule.update(meta_params, grad, state, param, context(step))
        param = param + delta.detach()
        deltas.append(delta)
    return deltas, params, state


class TorchLSTM:
    """Cells of torch and a readout, with a rule's weights; a row for each coordinate."""

    def __init__(self, rule: UpdateRule) -> None:
        self.config, units = rule.config, rule.config.hidden_size
        self.weights = {name: value.detach() for name, value in rule.named_parameters()}
        self.cells, self.state = [], None
        for layer in range(self.config.num_layers):
            weight = self.weights[f"w_input{layer}"]
            cell = nn.LSTMCell(len(weight), units).double()
            with torch.no_grad():
                cell.weight_ih.copy_(weight.T)
                cell.weight_hh.copy_(self.weights[f"w_hidden{layer}"].T)
                # Only the sum of the two counts.
                cell.bias_ih.copy_(0.25 * self.weights[f"b{layer}"])
                cell.bias_hh.copy_(0.75 * self.weights[f"b{layer}"])
            self.cells.append(cell)

    @torch.no_grad()
    def __call__(self, features: np.ndarray) -> tuple[Tensor, Tensor]:
        """Features (n, inputs) -> (readout, top hidden units) of each coordinate."""
        units = torch.tensor(features)
        self.state = self.state or [None] * len(self.cells)
        for layer, cell in enumerate(self.cells):
            self.state[layer] = cell(units, self.state[layer])
            units = self.state[layer][0]
        return units.sum(1) if self.config.readout == "sum" else units @ self.weights["readout"], units


def features(grad: np.ndarray, form: str, p: float) -> np.ndarray:
    """(n, features): equation 5.2 of the thesis, and the two of Andrychowicz et al., App. A, number by number."""
    rows = []
    for value in grad.ravel().tolist():
        large = abs(value) >= math.exp(-p)
        log, sign = math.log(abs(value)) / p if large else -1.0, math.copysign(1, value)
        both = (log, sign) if large else (-1.0, math.exp(p) * value)
        one = log * sign if large else -math.exp(p) * value
        rows.append({"none": (value,), "logsign": both, "logsign1": (one,)}[form])
    return np.array(rows)


def gradients(steps: int, *shape: int, seed: int = 0) -> Tensor:
    """Of all magnitudes, from 1e-8 to 10."""
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.normal(size=(steps, *shape)) * 10.0 ** rng.uniform(-8, 1, size=(steps, *shape)))


# --- the network


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"preprocessing": "none", "out_scale": 1.0},
        {"preprocessing": "logsign1", "readout": "sum", "out_scale": 0.01},
        {"num_layers": 1, "hidden_size": 7, "p": 5.0},
        {"num_layers": 3, "hidden_size": 4, "readout": "sum"},
    ],
    ids=str,
)
def test_equals_torchs_cells_coordinate_by_coordinate(config):
    rule = double("lstm", **config)
    grads, c = gradients(50, 3, 4), rule.config
    deltas, _, state = run(rule, grads)
    reference = TorchLSTM(rule)
    for grad, delta in zip(grads, deltas, strict=True):
        readout, _ = reference(features(grad.numpy(), c.preprocessing, c.p))
        torch.testing.assert_close(delta, c.out_scale * readout.reshape(3, 4), rtol=0, atol=1e-10)
    for layer in range(c.num_layers):
        for ours, theirs in zip((state.hidden, state.cell), reference.state[layer], strict=True):
            torch.testing.assert_close(ours[layer].reshape(c.hidden_size, 12).T, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rank": 3, "snapshots": "increments", "eigenvalue_scale": 5.0},
        {"rank": 2, "method": "svd", "preprocessing": "none"},
    ],
    ids=str,
)
def test_eigenvalues_are_further_inputs(config):
    """Of the parameter's own trajectory, which the test keeps; zero until t > m, which is the step of index m."""
    rule = double("lstm_dmd", scope="tensor", num_snapshots=6, **config)
    c = rule.config
    grads = gradients(25, 3, 4)
    deltas, params, _ = run(rule, grads, torch.randn(3, 4, dtype=F64))
    reference = TorchLSTM(rule)
    for step, (grad, delta) in enumerate(zip(grads, deltas, strict=True)):
        inputs = np.zeros(c.rank if c.rank == 1 else 2 * c.rank)
        if step >= 6:
            window = torch.stack(params[step - 6 : step + 1], -1).reshape(12, 7)
            window = window.diff(dim=1) if c.snapshots == "increments" else window
            inputs = dmd.features(dmd.eigenvalues(window, c.rank, method="svd"), c.eigenvalue_scale).numpy()
        of_grad = features(grad.numpy(), c.preprocessing, c.p)
        readout, _ = reference(np.concatenate([of_grad, np.tile(inputs, (12, 1))], axis=1))
        torch.testing.assert_close(delta, c.out_scale * readout.reshape(3, 4), rtol=0, atol=1e-8)


def test_many_coordinates_are_as_few():
    """They are taken in chunks."""
    rule = double("lstm", hidden_size=2)
    grads = gradients(2, 20_001)
    deltas, _, _ = run(rule, grads)
    for at in (0, 8191, 8192, 16_384, 20_000):
        alone, _, _ = run(rule, grads[:, at : at + 1])
        for many, one in zip(deltas, alone, strict=True):
            torch.testing.assert_close(many[at], one[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("kind", "config", "count"),
    [
        ("lstm", {}, 2 * 80 + 20 * 80 + 80 + 40 * 80 + 80 + 20),
        ("lstm", {"preprocessing": "none"}, 5060),
        ("lstm", {"preprocessing": "logsign1", "readout": "sum"}, 5040),
        ("lstm", {"nominal_stepsize": 1e-3, "normalize_blackbox": True}, 5140),
        ("lstm", {"nominal_stepsize": 1e-3, "nominal_controller": True}, 5160),
        ("lstm", {"ndim_splits": (2, 3)}, 3 * 5140),
        ("lstm_dmd", {}, 5220),
        ("lstm_dmd", {"rank": 3}, 5140 + 6 * 80),
    ],
)
def test_number_of_meta_parameters(kind, config, count):
    assert make(kind, **config).num_meta_params() == count


def test_fresh_weights_are_as_torchs_and_the_controller_starts_at_one():
    for name, value in make("lstm", hidden_size=64, nominal_controller=True).named_parameters():
        if name == "controller":
            assert not value.any()
        else:
            assert 0.9 / 8 < value.abs().max() <= 1 / 8


def test_tensors_of_other_dims_may_have_a_network_of_their_own():
    rule = double("lstm", ndim_splits=(2, 4))
    plain = double("lstm")
    for shape, network in (((), 0), ((5,), 0), ((5, 2), 1), ((2, 2, 2), 1), ((2, 2, 1, 1), 2)):
        plain.load_state_dict({name: value[network] for name, value in rule.state_dict().items()})
        grads = gradients(3, *shape)
        for ours, theirs in zip(run(rule, grads)[0], run(plain, grads)[0], strict=True):
            assert torch.equal(ours, theirs)


def test_tensors_of_other_names_may_have_a_network_of_their_own(tmp_path):
    """In an optimizer with names, in one that is told them, and in meta-training; the first pattern counts."""
    rule = double("lstm", name_splits=("*.bias", "1.*"))
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).double()
    networks = {"0.weight": 2, "0.bias": 0, "1.weight": 1, "1.bias": 0}
    expected, alone = {}, double("lstm")
    for name, param in model.named_parameters():
        param.grad = torch.randn_like(param)
        alone.load_state_dict({key: value[networks[name]] for key, value in rule.state_dict().items()})
        expected[name] = param.detach() + run(alone, param.grad.unsqueeze(0))[0][0].detach()
    optimizer = RuleOptimizer(model.parameters(), rule)
    with pytest.raises(RuntimeError, match="looks at names.*set_names"):
        optimizer.step()
    optimizer.set_names(model.named_parameters())
    optimizer.step()
    for name, param in model.named_parameters():
        assert torch.equal(param, expected[name])
    optimizer = RuleOptimizer(model.named_parameters(), rule)
    optimizer.step()
    assert lopt.load_rule(str(lopt.save_rule(rule, tmp_path / "rule"))).config == rule.config
    with pytest.raises(ValueError, match="only without ndim_splits"):
        make("lstm", name_splits=("*.bias",), ndim_splits=(2,))


@pytest.mark.filterwarnings("ignore:.*")
def test_the_callback_tells_names(tmp_path):
    """Networks whose weights are 0 move nothing."""
    rule = make("lstm", name_splits=("net.0.*", "*.bias"))
    with torch.no_grad():
        for param in rule.parameters():
            param[1:] = 0
    module = Module()
    before = {name: param.detach().clone() for name, param in module.named_parameters()}
    fit(tmp_path, lopt.LearnedOptimizer(rule), module=module, max_steps=2)
    moved = {name for name, param in module.named_parameters() if not torch.equal(param, before[name])}
    assert moved == {"net.0.weight", "net.0.bias"}


def test_meta_training_tells_names():
    """A task's one tensor is `x`: by that name it gets the first network, and alone that has a meta-gradient."""
    rule = make("lstm", hidden_size=3, name_splits=("x",), preprocessing="none", out_scale=1.0)
    unroll, leaves = Unroll(rule, make_task("quadratic"), "raw"), rule.meta_params()
    generator = torch.Generator().manual_seed(0)
    inner = unroll.start(generator, torch.full((2,), 10))
    _, record = unroll.run(leaves, inner, 4, generator, lambda n: torch.full((n,), 10))
    record.losses.sum().backward()
    for param in leaves.values():
        assert param.grad[0].any()
        assert not param.grad[1].any()


def test_eigenvalues_that_nobody_computed_count_as_zero():
    rule, grads = double("lstm_dmd"), gradients(3, 4)
    plain = double("lstm")
    weights = {name: value[:2] if name == "w_input0" else value for name, value in rule.state_dict().items()}
    plain.load_state_dict(weights)
    for ours, theirs in zip(run(rule, grads)[0], run(plain, grads)[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)


# --- preprocessing


@pytest.mark.parametrize("p", [0.5, 5.0, 10.0, 30.0])
@pytest.mark.parametrize("form", ["none", "logsign", "logsign1"])
def test_preprocessing_is_the_papers(form, p):
    grads = np.array([*gradients(1, 60)[0], *(s * math.exp(-p) * x for s in (1, -1) for x in (0.9, 1.1)), 0.0, 1e4])
    ours = preprocess(torch.tensor(grads).unsqueeze(0), form, p)
    np.testing.assert_allclose(ours.numpy().T, features(grads, form, p), rtol=1e-12, atol=1e-14)


def test_preprocessing_by_hand():
    grads = torch.tensor([[math.e, -math.e, math.exp(-10), -1.0, math.exp(-11), 0.0]], dtype=F64)
    expected = [[0.1, 0.1, -1, 0, -1, -1], [1, -1, 1, -1, math.exp(-1), 0]]
    torch.testing.assert_close(preprocess(grads, "logsign", 10.0), torch.tensor(expected, dtype=F64))
    expected = [[0.1, -0.1, -1, 0, -math.exp(-1), 0]]
    torch.testing.assert_close(preprocess(grads, "logsign1", 10.0), torch.tensor(expected, dtype=F64))


@pytest.mark.parametrize("form", ["logsign", "logsign1"])
@pytest.mark.parametrize("p", [1e-2, 10.0, 80.0])
def test_preprocessing_and_its_derivative_are_finite(form, p):
    values = [0.0, 1e-45, 1e-38, 1e-20, math.exp(-p), 1.0, 1e30, 3e38]
    grads = torch.tensor([values + [-value for value in values]], requires_grad=True)
    outputs = preprocess(grads, form, p)
    (slope,) = torch.autograd.grad(outputs.sum(), grads)
    assert outputs.isfinite().all()
    assert slope.isfinite().all()
    assert outputs.abs().max() < 100 / p


# --- STAR's stabilizers


@pytest.mark.parametrize("estimator", ["SGD", "SGDM", "AggMo", "Adam", "AdamAggMo"])
def test_the_nominal_term_is_stars(estimator):
    options = {"nominal_stepsize": 0.03, "nominal_grad_estimator": estimator}
    rule = double("lstm", out_scale=0.0, **options)
    star = double("hyperparam", nominal_controller=False, exp_mult=(0.0, 0.0, 0.0), **options)
    grads = gradients(30, 3, 4)
    for ours, theirs in zip(run(rule, grads)[0], run(star, grads)[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("num_steps", [None, 25])
@pytest.mark.parametrize("eps", [1e-6, 1e-10])
def test_the_scheduler_is_that_of_the_rule_scheduled(num_steps, eps):
    """The factor, the mix of momenta and the learned decays, from the same numbers; no step is alike without them."""
    options = {"nominal_stepsize": 0.03, "eps": eps}
    rule = double("lstm", out_scale=0.0, hidden_size=2, scheduler=True, **options)
    scheduled = double("scheduled", **options)
    plain = double("lstm", out_scale=0.0, hidden_size=2, nominal_stepsize=0.03, eps=eps)
    for name in SCHEDULE:
        with torch.no_grad():
            getattr(scheduled, name).add_(0.03 * torch.randn(SCHEDULE[name], dtype=F64))
            getattr(rule, name).copy_(getattr(scheduled, name))
    param, grads = torch.randn(3, 4, dtype=F64), gradients(25, 3, 4)
    states = [each.init_state(param) for each in (rule, scheduled, plain)]
    for step, grad in enumerate(grads):
        told, deltas = context(step, num_steps=num_steps, num_tensors=3), []
        for number, each in enumerate((rule, scheduled, plain)):
            delta, states[number] = each.update(each.meta_params(), grad, states[number], param, told)
            deltas.append(delta)
        torch.testing.assert_close(deltas[0], deltas[1], rtol=1e-12, atol=1e-15)
        assert not torch.allclose(deltas[0], deltas[2], rtol=1e-3)
        param = param + deltas[0]


def test_the_scheduler_multiplies_both_terms():
    options = {"nominal_stepsize": 0.1, "scheduler": True}
    rule, grad = double("lstm", **options), torch.ones(3, dtype=F64)
    before = rule.terms(rule.meta_params(), grad, rule.init_state(grad), grad, context())
    with torch.no_grad():
        rule.schedule_step += math.log(2)
    after = rule.terms(rule.meta_params(), grad, rule.init_state(grad), grad, context())
    for name in ("blackbox", "nominal"):
        torch.testing.assert_close(after[name], 2 * before[name])
    with pytest.raises(ValueError, match="scheduler=True is not allowed: it must be false without a stabilizer"):
        make("lstm", scheduler=True)


@pytest.mark.parametrize("kind", ["lstm", "lstm_dmd"])
@pytest.mark.parametrize("controller", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_composition_equals_its_parts_put_together_by_hand(kind, controller, normalize):
    """Momenta and second moment as they are defined, the network from torch's cells."""
    options = {"scope": "tensor", "num_snapshots": 50} if kind == "lstm_dmd" else {}
    stabilizers = {"nominal_stepsize": 0.05, "nominal_controller": controller, "normalize_blackbox": normalize}
    rule = double(kind, exp_mult=0.5, **stabilizers, **options)
    if controller:
        nn.init.normal_(rule.controller)
    reference = TorchLSTM(rule)
    grads = gradients(20, 5)
    momenta, square = torch.zeros(3, 5, dtype=F64), torch.zeros(5, dtype=F64)
    for grad, delta in zip(grads, run(rule, grads)[0], strict=True):
        inputs = features(grad.numpy(), "logsign", 10.0)
        readout, units = reference(np.pad(inputs, ((0, 0), (0, 1))) if options else inputs)
        decays = torch.tensor([[0.9], [0.99], [0.999]], dtype=F64)
        momenta, square = decays * momenta + (1 - decays) * grad, 0.999 * square + 0.001 * grad**2
        root = (square + 1e-6).sqrt()
        step = 0.1 * readout / (root if normalize else 1)
        factor = torch.exp(0.5 * units @ reference.weights["controller"]) if controller else 1
        torch.testing.assert_close(delta, step - 0.05 * factor * momenta.mean(0) / root, rtol=0, atol=1e-10)


def test_terms_are_named_as_stars():
    grad = torch.ones(3)
    for config, names in (({}, ["blackbox"]), ({"nominal_stepsize": 0.1}, ["blackbox", "nominal"])):
        rule = make("lstm", **config)
        terms = rule.terms(rule.meta_params(), grad, rule.init_state(grad), grad, context())
        assert list(terms) == names


def test_off_they_cost_nothing():
    state = make("lstm").init_state(torch.zeros(3, 4))
    assert state._fields == ("hidden", "cell", "exp_avg", "exp_avg_sq")
    assert sum(tensor.numel() for tensor in state) == 2 * 2 * 20 * 12
    on = make("lstm", normalize_blackbox=True).init_state(torch.zeros(3, 4))
    assert sum(tensor.numel() for tensor in on) == (80 + 4) * 12


# --- gradients


@pytest.mark.parametrize(
    "config",
    [
        {"preprocessing": "logsign", "nominal_stepsize": 0.1, "nominal_controller": True, "normalize_blackbox": True},
        {"preprocessing": "none", "readout": "sum", "rank": 1, "num_snapshots": 1, "scope": "tensor"},
    ],
    ids=str,
)
def test_gradients_are_those_of_finite_differences(config):
    rule = double("lstm", hidden_size=2, exp_mult=0.3, **config)
    names = list(rule.meta_params())
    values = [torch.randn_like(value) * 0.5 for value in rule.parameters()]
    grads = gradients(3, 2) + 0.1

    def last(grad, *values):
        meta_params, param = dict(zip(names, values, strict=True)), torch.ones(2, dtype=F64)
        state = rule.init_state(param)
        for step, each in enumerate((*grads[:2], grad)):
            delta, state = rule.update(meta_params, each, state, param, context(step))
            param = param + delta
        return param

    inputs = [grads[2].requires_grad_(), *(value.requires_grad_() for value in values)]
    assert torch.autograd.gradcheck(last, inputs, eps=1e-6, atol=1e-6)


def test_eigenvalues_pass_no_gradient():
    """The meta-gradient is as if their values had come from outside, as L2O-DMD's code base detaches its inputs."""
    config = {"rank": 2, "num_snapshots": 3}
    inside, outside = double("lstm", **config, scope="tensor"), double("lstm", **config, scope="global")
    names, grads = list(inside.meta_params()), gradients(6, 4)
    values = {name: value.detach() for name, value in inside.meta_params().items()}
    seen = []

    def final(rule, start, given):
        param, state = start, rule.init_state(start)
        for step, grad in enumerate(grads):
            shared = torch.tensor(given[step], dtype=F64) if given else None
            delta, state = rule.update(values, grad + param, state, param, context(step, shared=shared))
            param = param + delta
            if not given and isinstance(state, tuple):
                window = dmd.Window(*(tensor.detach() for tensor in state[4:]))
                seen.append(dmd.features(inside.online.eigenvalues([window])))
        return param.sum()

    start = torch.randn(4, dtype=F64, requires_grad=True)
    loss = final(inside, start, [])
    shared = [each.tolist() for each in seen]
    assert any(shared[-1])
    other = final(outside, start, shared)
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(torch.autograd.grad(loss, start), torch.autograd.grad(other, start))
    assert names[0] == "w_input0"


# --- configuration


NOT_A_SIZE = (-1.0, math.nan, math.inf, "1", None, True)
BAD_VALUES = {
    "hidden_size": (0, 1025, 2.0, None),
    "num_layers": (0, 17, "2"),
    "preprocessing": ("log", None),
    "p": (0.0, -1.0, 100.0, math.nan, "10"),
    "out_scale": NOT_A_SIZE,
    "readout": ("mean", None),
    "ndim_splits": ((0,), (3, 2), (2, 2), 3, None, ("2",), (2.0,)),
    "name_splits": ("*.bias", None, (1,), ("",)),
    "nominal_stepsize": NOT_A_SIZE,
    "nominal_grad_estimator": ("adam", None),
    "nominal_controller": (1, "true", None),
    "exp_mult": (math.nan, "1", None, True),
    "normalize_blackbox": (0, None),
    "eps": (0.0, 2.0, "1"),
    "scheduler": (1, None, True),
    "rank": (-1, 101, 1.0, None),
    "num_snapshots": (0, 10_001, 5.0, None),
    "snapshots": ("increment", None),
    "method": ("eig", None),
    "scope": ("all", None),
    "sketch_size": (0, 2**25, 64.0),
    "loss_scale": NOT_A_SIZE,
    "eigenvalue_scale": NOT_A_SIZE,
    "memory_limit": (-1, 1e9, None),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_VALUES.items() for value in values])
def test_config_refuses(name, value):
    with pytest.raises(ValueError, match="is not allowed: it must be") as caught:
        LSTMConfig.from_dict({name: value})
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_config_field_has_bad_values_in_the_table():
    assert set(BAD_VALUES) == set(LSTMConfig().to_dict())


def test_config_refuses_more_eigenvalues_than_snapshots():
    make("lstm_dmd", rank=5, num_snapshots=5)
    with pytest.raises(ValueError, match=r"rank=5 is not allowed: it must be an integer in \[0, 4\]"):
        make("lstm_dmd", rank=5, num_snapshots=5, snapshots="increments")


def test_config_survives_json():
    config = LSTMConfig(ndim_splits=(2, 3), rank=2, snapshots="shifted", nominal_stepsize=1e-3)
    assert LSTMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_kinds_defaults_are_the_papers():
    assert make("lstm").config.rank == 0
    config = make("lstm_dmd").config
    assert (config.rank, config.num_snapshots, config.snapshots, config.method) == (1, 100, "raw", "gram")
    assert (config.hidden_size, config.num_layers, config.p, config.scope) == (20, 2, 10.0, "global")


@pytest.mark.parametrize(
    ("config", "loss", "share"),
    [
        ({}, False, True),
        ({"scope": "tensor"}, False, False),
        ({"loss_scale": 1.0}, True, True),
        ({"rank": 0, "loss_scale": 1.0}, False, False),
    ],
)
def test_what_a_rule_needs(config, loss, share):
    rule = make("lstm_dmd", **config)
    assert (rule.needs_loss, rule.needs_shared_context) == (loss, share)


def test_too_many_copies_are_refused_with_the_way_out():
    params = parameters([(100, 100), (10,)])
    rule = make("lstm_dmd", memory_limit=101 * 10_010 * 4)
    RuleOptimizer(params, rule)
    with pytest.raises(
        ValueError, match="num_snapshots=100 of 10,011 parameters take 4,044,444 bytes, above "
    ) as caught:
        RuleOptimizer([*params, nn.Parameter(torch.ones(1))], rule)
    assert "method='sketch' (428,140 bytes)" in str(caught.value)
    assert "\n" not in str(caught.value)
    optimizer = RuleOptimizer(params, rule)
    with pytest.raises(ValueError, match="memory_limit=4,044,040"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="memory_limit"):
        rule.init_state(torch.zeros(10_011))
    RuleOptimizer([*params, nn.Parameter(torch.ones(1))], make("lstm_dmd", memory_limit=500_000, method="sketch"))
    with pytest.raises(ValueError, match="Use fewer snapshots, a smaller sketch_size, or a higher limit"):
        RuleOptimizer(params, make("lstm_dmd", memory_limit=100_000, method="sketch"))
    RuleOptimizer([*params, nn.Parameter(torch.ones(1))], make("lstm_dmd", memory_limit=0, rank=0))
    frozen = nn.Parameter(torch.ones(10**6), requires_grad=False)
    RuleOptimizer([*params, frozen, nn.UninitializedParameter()], rule)


# --- behind RuleOptimizer


@pytest.mark.parametrize("kind", ["lstm", "lstm_dmd"])
def test_bfloat16_parameters_have_float32_state_and_arithmetic(kind):
    rule = make(kind, nominal_stepsize=1e-3, **({"num_snapshots": 2} if kind == "lstm_dmd" else {}))
    params, others = parameters(dtype=torch.bfloat16), [p.float() for p in parameters(dtype=torch.bfloat16)]
    others = [nn.Parameter(p.detach()) for p in others]
    optimizer, other = RuleOptimizer(params, rule), RuleOptimizer(others, rule)
    for step in range(4):
        set_gradients(params, step)
        for param, twin in zip(params, others, strict=True):
            twin.grad, twin.data = param.grad.float(), param.detach().float()
        optimizer.step()
        other.step()
        for param, twin in zip(params, others, strict=True):
            assert torch.equal(param, twin.to(torch.bfloat16))
            for name, tensor in optimizer.state[param].items():
                assert tensor.dtype == other.state[twin][name].dtype
                assert torch.equal(tensor, other.state[twin][name])


@pytest.mark.parametrize(
    "config", [{}, {"num_layers": 1, "nominal_stepsize": 1e-2, "nominal_controller": True, "scheduler": True}], ids=str
)
@pytest.mark.parametrize("kind", ["lstm", "lstm_dmd"])
def test_state_is_overwritten_only_where_nobody_needs_the_old_one(kind, config):
    """With the safeguard, or a measured step, the update is the pure function; the bits are the same."""
    rule = make(kind, **config, **({"num_snapshots": 2} if kind == "lstm_dmd" else {}))
    shapes = [(3, 4), (4500,), ()]
    optimizers = [RuleOptimizer(parameters(shapes), rule, safeguard=guarded) for guarded in (False, True, False)]
    for step in range(5):
        for number, optimizer in enumerate(optimizers):
            set_gradients(params := optimizer.param_groups[0]["params"], step)
            places = [optimizer.state[p]["cell"].data_ptr() for p in params if p in optimizer.state]
            if number == 2:
                optimizer.measure_next_step()
            optimizer.step()
            same = [optimizer.state[p]["cell"].data_ptr() for p in params] == places
            assert same is (number == 0 and step > 0)
    for other in optimizers[1:]:
        for mine, theirs in zip(*(o.param_groups[0]["params"] for o in (optimizers[0], other)), strict=True):
            assert torch.equal(mine, theirs)
            for name, tensor in optimizers[0].state[mine].items():
                assert torch.equal(tensor, other.state[theirs][name]), name


def test_an_update_is_pure_unless_it_is_told_otherwise():
    rule = make("lstm")
    param, grad = torch.ones(6), torch.linspace(-1.0, 1.0, 6)
    with torch.no_grad():
        _, state = rule.update(rule.meta_params(), grad, rule.init_state(param), param, context())
        kept = [tensor.clone() for tensor in state]
        delta, pure = rule.update(rule.meta_params(), grad, state, param, context(1))
        assert all(map(torch.equal, state, kept))
        told, overwritten = rule.update(rule.meta_params(), grad, state, param, context(1, in_place=True))
    assert torch.equal(delta, told)
    assert all(map(torch.equal, overwritten, pure))
    assert overwritten.hidden.data_ptr() == state.hidden.data_ptr()


def test_a_saved_rule_is_the_same_rule(tmp_path):
    options = {"nominal_stepsize": 1e-2, "nominal_controller": True, "scheduler": True}
    rule = make("lstm_dmd", rank=2, num_snapshots=4, ndim_splits=(2,), **options)
    loaded = lopt.load_rule(str(lopt.save_rule(rule, tmp_path / "rule")))
    assert loaded.config == rule.config
    optimizers = [RuleOptimizer(parameters(), each) for each in (rule, loaded)]
    for optimizer in optimizers:
        for step in range(8):
            set_gradients(optimizer.param_groups[0]["params"], step)
            optimizer.step()
    assert_equal(*(snapshot(optimizer) for optimizer in optimizers))
