"""The GRU rule against its equations coordinate by coordinate, and torch's cell where the two agree."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_cases import KNOWN_WARNINGS
from torch import nn

import lightning_lopt as lopt
from lightning_lopt import cli
from lightning_lopt.claims import gru as claims_gru
from lightning_lopt.claims.claim import Measurement
from lightning_lopt.claims.experiment import Experiment
from lightning_lopt.claims.gru import (
    BEST_MOMENTUM,
    TASKS,
    Budget,
    Round,
    SearchSpace,
    draw,
    mean_ratios,
    search,
)
from lightning_lopt.evaluation.baselines import SGDM, Adam
from lightning_lopt.evaluation.compare import fingerprint
from lightning_lopt.meta.estimators import FullUnroll
from lightning_lopt.meta.unroll import Unroll
from lightning_lopt.rules import GRUConfig, StepContext, make
from lightning_lopt.tasks import datasets
from lightning_lopt.tasks import make as make_task

pytestmark = KNOWN_WARNINGS
F64 = torch.float64
CONTEXT = StepContext(torch.tensor(0.0))
RECIPES = Path(__file__).parents[2] / "examples/configs/gru"


def random_rule(**config):
    """A rule whose every meta-parameter is random, in float64."""
    rule = make("gru", **{"hidden_size": 6, **config}).double()
    with torch.no_grad():
        for value in rule.parameters():
            value.normal_(std=0.5)
    return rule


def run(rule, grads):
    """(updates, states' `hidden` plus `initial`) for gradients (steps, *shape)."""
    meta_params, param = rule.meta_params(), torch.zeros_like(grads[0])
    state, deltas, states = rule.init_state(param), [], []
    for grad in grads:
        delta, state = rule.update(meta_params, grad, state, param, CONTEXT)
        deltas.append(delta)
        states.append(state.hidden + rule.initial.reshape(-1, *[1] * param.dim()))
    return torch.stack(deltas), torch.stack(states)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(rule, grads):
    """Updates of one coordinate, in NumPy, with the gates of Cho et al. written out."""
    w = {name: value.detach().numpy() for name, value in rule.named_parameters()}
    units, h, updates = rule.config.hidden_size, w["initial"], []
    for g in grads * rule.config.input_scale:
        x = {"raw": [g], "asinh": [np.arcsinh(g)], "log1p": [np.log1p(abs(g)), np.sign(g)]}[rule.config.input_scaling]
        gates = sigmoid(np.concatenate([x, h]) @ w["w_gates"] + w["b_gates"])
        reset, update = gates[:units], gates[units:]
        candidate = np.tanh(np.concatenate([x, reset * h]) @ w["w_candidate"] + w["b_candidate"])
        h = update * h + (1 - update) * candidate
        updates.append(rule.config.out_scale * (w["readout"] @ h + w["readout_bias"][0]))
    return np.array(updates)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"input_scaling": "log1p"},
        {"input_scaling": "asinh"},
        {"input_scale": 3.0, "out_scale": 0.1, "hidden_size": 1},
    ],
    ids=str,
)
def test_equals_its_equations_coordinate_by_coordinate(config):
    rule, rng = random_rule(**config), np.random.default_rng(0)
    grads = rng.normal(size=(30, 2, 3)) * 10.0 ** rng.uniform(-4, 1, size=(30, 2, 3))
    deltas, _ = run(rule, torch.tensor(grads))
    for row in range(2):
        for column in range(3):
            expected = by_hand(rule, grads[:, row, column])
            np.testing.assert_allclose(deltas[:, row, column].detach().numpy(), expected, rtol=0, atol=1e-12)


def test_equals_torchs_cell_where_the_reset_gate_is_open():
    """With the reset gate at 1 both forms are one; half open they are two different functions."""
    rule, cell = random_rule(), nn.GRUCell(1, 6).double()
    w = {name: value.detach() for name, value in rule.named_parameters()}
    with torch.no_grad():
        rows = torch.cat([w["w_gates"], w["w_candidate"]], 1).T  # reset, update, candidate, as torch has them
        cell.weight_ih.copy_(rows[:, :1])
        cell.weight_hh.copy_(rows[:, 1:])
        cell.bias_ih.copy_(torch.cat([w["b_gates"], w["b_candidate"]]))
        cell.bias_hh.zero_()
    grads = torch.randn(20, 1, dtype=F64)
    for bias, same in ((1e3, True), (0.0, False)):
        with torch.no_grad():
            rule.b_gates[:6] = bias
            cell.bias_ih[:6] = bias
        _, states = run(rule, grads)
        hidden = rule.initial.unsqueeze(0)
        for grad in grads:
            hidden = cell(grad.unsqueeze(0), hidden)
        assert torch.allclose(states[-1, :, 0], hidden[0], rtol=0, atol=1e-9) == same


def test_untrained_it_leaves_parameters_where_they_are():
    rule = make("gru")
    deltas, _ = run(rule, torch.randn(5, 4))
    assert not deltas.any()


def test_initial_weights_have_variance_one_over_inputs():
    rule = make("gru", hidden_size=256)
    for weight in (rule.w_gates, rule.w_candidate):
        assert float(weight.detach().std()) == pytest.approx(257**-0.5, rel=0.02)
    assert not any(getattr(rule, name).any() for name in ("b_gates", "b_candidate", "initial", "readout"))


@pytest.mark.parametrize("name", ["initial", "readout", "readout_bias", "w_gates", "w_candidate", "controller"])
def test_meta_gradients_are_those_of_finite_differences(name):
    rule = random_rule(hidden_size=3, nominal_stepsize=0.1, nominal_controller=True, exp_mult=0.5)
    grads, fixed = torch.randn(4, 2, dtype=F64), rule.meta_params()

    def last(value):
        param = torch.zeros(2, dtype=F64)
        state = rule.init_state(param)
        for grad in grads:
            delta, state = rule.update({**fixed, name: value}, grad + param, state, param, CONTEXT)
            param = param + delta
        return param

    assert torch.autograd.gradcheck(last, (fixed[name].detach().requires_grad_(),))


def test_stabilizers_are_those_of_the_lstm():
    """Both rules with a readout of 0 are the nominal term alone."""
    options = {"nominal_stepsize": 0.1, "nominal_controller": True, "normalize_blackbox": True}
    gru, lstm = make("gru", **options).double(), make("lstm", **options).double()
    with torch.no_grad():
        lstm.readout.zero_()
    grads = torch.randn(5, 3, dtype=F64)
    state, param, deltas = lstm.init_state(grads[0]), torch.zeros(3, dtype=F64), []
    for grad in grads:
        delta, state = lstm.update(lstm.meta_params(), grad, state, param, CONTEXT)
        deltas.append(delta)
    torch.testing.assert_close(run(gru, grads)[0], torch.stack(deltas))


def test_meta_training_on_quadratics_lowers_the_mean_loss():
    """A few exact meta-gradients of short runs; an untrained rule has 1."""
    rule = make("gru", hidden_size=8)
    unroll, generator = Unroll(rule, make_task("linear-regression"), objective="ratio"), torch.Generator()
    adam, losses = torch.optim.Adam(rule.parameters(), lr=2e-2), []
    for _ in range(12):
        meta_params = {name: value.detach() for name, value in rule.named_parameters()}
        estimate = FullUnroll(8, 10).estimate(unroll, meta_params, None, generator.manual_seed(0))
        losses.append(float(estimate.meta_loss))
        for name, value in rule.named_parameters():
            value.grad = estimate.meta_grad[name]
        torch.nn.utils.clip_grad_norm_(rule.parameters(), 0.5)
        adam.step()
    assert losses[0] == pytest.approx(1.0)
    assert losses[-1] < 0.9


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0 is not allowed"),
        ({"input_scaling": "log"}, "one of \\['raw', 'asinh', 'log1p'\\]"),
        ({"nominal_controller": True}, "nothing to scale"),
        ({"nominal_grad_estimator": "adam"}, "SGD"),
    ],
)
def test_errors_say_what_is_allowed(config, message):
    with pytest.raises(ValueError, match=message):
        GRUConfig.from_dict(config)


def test_begins_as_momentum_where_asked_to():
    """Small gradients: torch's SGD with momentum."""
    rule = make("gru", hidden_size=32, initial_lr=0.5, initial_beta=0.8).double()
    param = torch.zeros(3, dtype=F64, requires_grad=True)
    sgd, grads = torch.optim.SGD([param], lr=0.5, momentum=0.8), 0.1 * torch.randn(20, 3, dtype=F64)
    deltas, _ = run(rule, grads)
    for grad, delta in zip(grads, deltas, strict=True):
        before, param.grad = param.detach().clone(), grad
        sgd.step()
        torch.testing.assert_close(delta.detach(), param.detach() - before, rtol=0.1, atol=5e-3)


@pytest.mark.parametrize("path", sorted(set(RECIPES.glob("*.yaml")) - set(RECIPES.glob("*-second.yaml"))), ids=str)
def test_recipes_run(path, tmp_path, monkeypatch):
    if path.stem == "mnist" and not datasets.is_available("mnist"):
        pytest.skip(f"MNIST is not here: set {datasets.FOLDER_VARIABLE}")
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.max_steps=2", "--model.steps_per_epoch=1", "--trainer.enable_progress_bar=false"]
    short += ["--model.estimator.init_args.num_runs=2", "--model.estimator.init_args.horizon=3"]
    stages = [path, *RECIPES.glob(f"{path.stem}-second.yaml")]
    for stage in stages:
        assert cli.main(["meta-train", "fit", "--config", str(stage), *short]) == 0
    runs = list((tmp_path / "runs").iterdir())
    assert len(runs) == len(stages)
    for run in runs:
        assert lopt.load_rule(run / "rule").kind == "gru"
        assert len(list((run / "history").glob("*step=*.ckpt"))) == 2  # for the history of the modes


def test_the_objective_is_the_mean_ratio_over_the_start_and_every_step():
    """Momentum on a random quadratic, in NumPy."""
    task, random = make_task("linear-regression"), torch.Generator().manual_seed(5)
    start = task.init(random, population=3)
    expected = []
    drawn = start.params["x"], start.constants["hessian"], start.constants["minimum"]
    for x, hessian, minimum in zip(*(tensor.double().numpy() for tensor in drawn), strict=True):
        velocity, losses = np.zeros(5), []
        for _ in range(31):
            grad = hessian @ (x - minimum)
            losses.append(0.5 * (x - minimum) @ grad)
            velocity = 0.9 * velocity + grad
            x = x - 0.5 * velocity
        expected.append(np.mean(losses) / losses[0])
    rule = SGDM(None, lr=0.5, momentum=0.9)
    (found,) = mean_ratios(rule, [rule.meta_params()], task, problems=3, seed=5, steps=30)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("rounds", [[Round(120, 12, 60)], [Round(120, 1, 20), Round(30, 8, 60), Round(5, 32, 60)]])
def test_a_search_finds_the_best_of_a_grid_and_says_whether_it_is_at_its_edge(rounds):
    task, told = make_task("linear-regression"), []
    rates, momenta = [10 ** (i / 4) for i in range(-7, 5)], [0.0, 0.9, 0.999]
    every = [SGDM(None, lr=lr, momentum=momentum) for lr in rates for momentum in momenta]
    means = mean_ratios(every[0], [rule.meta_params() for rule in every], task, problems=64, seed=1, steps=60).mean(1)
    best = every[int(means.argmin())]
    options = {"seed": 7, "members": 320, "report": lambda text, *counts: told.append(counts)}
    found = search(SearchSpace(SGDM, {"lr": rates, "momentum": momenta}), task, rounds, **options)
    assert fingerprint(found.best) == fingerprint(best)
    assert found.inside
    assert told[-1] == (sum(settings for settings, _, _ in rounds),) * 2
    edge = search(SearchSpace(SGDM, {"lr": rates[:6], "momentum": momenta}), task, rounds, **options)
    assert float(edge.best.lr.detach()) == pytest.approx(rates[5])
    assert not edge.inside


@pytest.mark.parametrize(
    ("name", "rival"),
    [
        ("gru-quadratic", SGDM(None, **BEST_MOMENTUM)),
        ("gru-rosenbrock", Adam(None, lr=0.0794, beta1=0.816, beta2=0.879)),  # as `lopt reproduce` tunes it
    ],
)
def test_bundled_rules_beat_the_best_of_their_rivals(name, rival):
    task, objectives = make_task(TASKS[name]), []
    for rule in (lopt.load_rule(name), rival):
        objectives.append(float(mean_ratios(rule, [rule.meta_params()], task, problems=128, seed=9).mean()))
    assert objectives[0] < 0.85 * objectives[1]


def test_the_bundled_rule_for_two_moons_beats_tuned_adam():
    task, objectives = make_task("two-moons"), []
    for rule in (lopt.load_rule("gru-two-moons"), Adam(None, lr=0.0199526, beta1=0.90897, beta2=0.895189)):
        objectives.append(mean_ratios(rule, [rule.meta_params()], task, problems=2, seed=77).mean())
    assert objectives[0] < 0.95 * objectives[1]


def test_the_bundled_rule_for_mnist_is_ahead_of_tuned_adam_from_the_start():
    """The paper's network itself, which meta-training has not seen."""
    if not datasets.is_available("mnist"):
        pytest.skip(f"MNIST is not here: set {datasets.FOLDER_VARIABLE}")
    task, objectives = make_task("mnist-conv"), []
    for rule in (lopt.load_rule("gru-mnist"), Adam(None, lr=0.00794328, beta1=0.627241, beta2=0.879321)):
        objectives.append(mean_ratios(rule, [rule.meta_params()], task, problems=1, seed=9, steps=40).mean())
    assert objectives[0] < 0.95 * objectives[1]


def test_figure_17_of_a_dear_task_takes_its_fresh_problems_in_groups(monkeypatch):
    monkeypatch.setitem(claims_gru.BUDGETS, "linear-regression", Budget(rounds=(Round(2, 2, 2),), fresh=32))
    (claim,) = (claim for claim in claims_gru.CLAIMS if claim.id == "gru-quadratic-figure-17")
    found = claim.measure(Experiment(seeds=1, cache_dir=None)).numbers["objective of momentum in closed form"]
    rule, task = SGDM(None, **BEST_MOMENTUM), make_task("linear-regression")
    groups = [mean_ratios(rule, [rule.meta_params()], task, problems=32, seed=seed)[0] for seed in (2_000, 3_000)]
    assert found == pytest.approx(torch.cat(groups).tolist(), rel=1e-5)


def test_figure_17_has_the_mean_of_every_optimizer():
    values = {"objective of ours": [0.01, 0.03], "objective of theirs": [0.1, 0.3], "settings at a grid's edge": [0.0]}
    (panel,) = draw(Measurement(values)).axes
    (means,) = panel.lines
    assert means.get_ydata() == pytest.approx(np.log10([0.02, 0.2]))
    assert [text.get_text() for text in panel.get_xticklabels()] == ["ours\n0.0200", "theirs\n0.2000"]
