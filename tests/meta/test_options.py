"""Options of meta-training from the LSTM papers, against plain loops, and imitation against its definition."""

import dataclasses
import math

import lightning as L
import pytest
import torch
from meta_cases import Descent, Parabola, descent, generator, gradient, losses_by_hand, meta, meta_params

import lightning_lopt as lopt
from lightning_lopt import tasks
from lightning_lopt.meta.estimators import FullUnroll, TruncatedBackprop
from lightning_lopt.meta.imitation import Imitation, sign_distance
from lightning_lopt.meta.schedules import Horizon, Weights
from lightning_lopt.meta.unroll import Unroll

ENDLESS = Horizon(10**6)
EXACT = {"rtol": 1e-10, "atol": 1e-12}
SGD = {"kind": "lstm", "hidden_size": 1, "out_scale": 0.0, "nominal_stepsize": 1e-2, "nominal_grad_estimator": "SGD"}


# --- Weights of the losses ---


@pytest.mark.parametrize(
    ("weights", "expected"),
    [(Weights(), [1, 1, 1]), (Weights(1.0), [2, 3, 4]), (Weights(0.0, 1.5), [1.5, 2.25, 3.375])],
)
def test_weights_are_the_thesiss(weights, expected):
    assert weights(3).tolist() == expected


@pytest.mark.parametrize("arguments", [(-1.0, 1.0), (math.inf, 1.0), (math.nan, 1.0), (0.0, 0.0), (0.0, 11.0)])
def test_invalid_weights(arguments):
    with pytest.raises(ValueError, match="is not allowed"):
        Weights(*arguments)


@pytest.mark.parametrize("weights", [Weights(slope=1.0), Weights(base=1.3), Weights(0.5, 0.9)])
@pytest.mark.parametrize("whole", [True, False])
def test_losses_are_weighted(weights, whole):
    unroll, theta = descent()
    estimator = TruncatedBackprop(2, 8, ENDLESS, stagger=False, weights=weights)
    estimator = FullUnroll(2, 8, weights) if whole else estimator
    state = estimator.init(unroll, theta, generator())
    found = estimator.estimate(unroll, theta, state, generator())
    w = torch.tensor([(1 + weights.slope * t) * weights.base**t for t in range(1, 9)], dtype=torch.float64)
    expected = gradient(lambda t: (w * losses_by_hand(t, 8)[1:]).sum() / w.sum(), theta)
    for name, value in expected.items():
        torch.testing.assert_close(found.meta_grad[name], value, **EXACT)


# --- Sliding windows ---


def test_windows_overlap():
    """Each estimate covers a whole window, and the next one begins `stride` steps later, as in a plain loop."""
    unroll, theta = descent()
    estimator = TruncatedBackprop(2, 5, ENDLESS, stagger=False, stride=2)
    state, random = estimator.init(unroll, theta, generator()), generator()
    for number in range(4):
        found = estimator.estimate(unroll, theta, state, random)
        first = 2 * number

        def window(t, first=first):
            losses = losses_by_hand({k: p.detach() for k, p in t.items()}, 0)
            h, x, velocity = torch.tensor((1.0, 0.3, 0.05), dtype=torch.float64), torch.ones(3, dtype=torch.float64), 0
            for step in range(first + 5):
                p = {k: v.detach() for k, v in t.items()} if step < first else t
                velocity = p["momentum"] * velocity + h * x
                x = x - p["log_lr"].exp() * velocity
                losses = torch.cat([losses, (0.5 * h * x * x).sum().reshape(1)])
            return losses[first + 1 :].mean()

        torch.testing.assert_close(found.meta_loss, window(theta), **EXACT)
        for name, value in gradient(window, theta).items():
            torch.testing.assert_close(found.meta_grad[name], value, **EXACT)
        state = found.state
    assert state.clock.tolist() == [8, 8]


@pytest.mark.parametrize("stride", [0, 6, -1])
def test_invalid_strides(stride):
    with pytest.raises(ValueError, match=f"stride={stride} is not allowed"):
        TruncatedBackprop(truncation=5, stride=stride)


def test_one_update_per_super_epoch_is_gradient_accumulation(tmp_path):
    """Four truncations of a run share one step of the meta-optimizer, which sees the mean of their gradients."""
    estimator = TruncatedBackprop(1, 5, ENDLESS, stagger=False)
    module = meta(Descent(), tasks=[Parabola()], estimator=estimator, schedule="constant", objective="raw")
    theta, seen = meta_params(module.rule), {}

    class Look(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.update({name: p.grad.clone() for name, p in pl_module.rule.named_parameters()})

    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(accelerator="cpu", max_steps=1, accumulate_grad_batches=4, callbacks=[Look()], **off)
    trainer.fit(module)
    expected = gradient(lambda t: losses_by_hand(t, 20, cut=5)[1:].mean(), theta)
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value, **EXACT)


def test_each_tensors_gradient_can_be_normalized():
    grads = [
        {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor(1e-9)},
        {"a": torch.tensor([0.0, -2.0]), "b": torch.tensor(5.0)},
    ]
    found = meta(normalize="tensor")._average(grads)
    torch.testing.assert_close(found["a"], torch.tensor([0.3, -0.1]))
    torch.testing.assert_close(found["b"], torch.tensor(1.0))
    with pytest.raises(ValueError, match="normalize='layer' is not allowed"):
        meta(normalize="layer")


# --- Imitation ---


def test_the_sign_distance_is_equation_5_11():
    step, target = torch.tensor([0.5, -0.5, 0.0]), torch.tensor([0.2, 0.2, 0.2])
    expected = torch.tensor([0.3 * math.exp(-2), 0.7 * math.exp(2), 0.2])
    torch.testing.assert_close(sign_distance(step, target), expected)


@pytest.mark.parametrize("distance", ["squared", "sign"])
def test_imitation_is_the_mean_distance_on_the_teachers_runs(distance):
    """Against a loop over the runs of the teacher, which is gradient descent with momentum."""
    teacher, student = Descent(-1.0, 0.3), Descent(-2.0, 0.5)
    theta, known = meta_params(student), meta_params(teacher)
    unroll, estimator = Unroll(student, Parabola(), "raw"), Imitation(teacher, distance, 2, 4, ENDLESS)
    random = generator()
    state = estimator.init(unroll, theta, random)
    found = [estimator.estimate(unroll, theta, state, random)]
    found.append(estimator.estimate(unroll, theta, found[0].state, random))

    def by_hand(t, begin, end):
        h, x = torch.tensor((1.0, 0.3, 0.05), dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        velocity, own, total = 0.0, torch.zeros(3, dtype=torch.float64), 0.0
        for step in range(end):
            velocity = known["momentum"] * velocity + h * x
            own = t["momentum"] * (own.detach() if step == begin else own) + h * x
            target, answer = -known["log_lr"].exp() * velocity, -t["log_lr"].exp() * own
            apart = 0.5 * (answer - target) ** 2 if distance == "squared" else sign_distance(answer, target)
            total = total + (apart.mean() / (end - begin) if step >= begin else 0.0)
            x = x + target
        return total

    for number, estimate in enumerate(found):
        span = 4 * number, 4 * number + 4
        torch.testing.assert_close(estimate.meta_loss, by_hand(theta, *span), **EXACT)
        for name, value in gradient(lambda t, span=span: by_hand(t, *span), theta).items():
            torch.testing.assert_close(estimate.meta_grad[name], value, **EXACT)


def test_who_imitates_itself_has_nothing_to_learn():
    rule = lopt.rules.make("lstm_dmd", hidden_size=3, num_snapshots=2, snapshots="increments")
    teacher = lopt.rules.make("lstm", hidden_size=3)
    with torch.no_grad():
        rule.w_input0[2:] = 0.0  # what the eigenvalue goes by
        values = {name: p.clone() for name, p in rule.named_parameters()}
        values["w_input0"] = values["w_input0"][:2]
        teacher.load_state_dict(values)
    unroll, estimator = Unroll(rule, tasks.make("rosenbrock")), Imitation(teacher, num_runs=2, truncation=6)
    theta = meta_params(rule)
    found = estimator.estimate(unroll, theta, estimator.init(unroll, theta, generator()), generator())
    assert float(found.meta_loss) < 1e-12  # steps of 0.01
    assert bool(found.finite)


def test_sign_pre_training_teaches_an_lstm_which_way_is_down():
    """Section 5.4.4 of the thesis: gradients from N(0, 1e-3), target -0.01 g. At first half of the signs are right."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rule = lopt.rules.make("lstm", hidden_size=8, out_scale=1e-4)
    task = tasks.make("random-slopes")
    estimator = Imitation(SGD, "sign", num_runs=1, truncation=4, horizon=Horizon(12))
    options = {"estimator": estimator, "tasks": [task], "lr": 1e-2, "steps_per_epoch": 10, "second_order": False}
    module = meta(rule, **options)
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)

    def right():
        grad = 1e-3 * torch.randn(1000, generator=generator(3))
        param = torch.zeros(1000)
        delta, _ = rule.update(
            rule.meta_params(), grad, rule.init_state(param), param, lopt.rules.StepContext(torch.tensor(0.0))
        )
        return float((delta.sign() == -grad.sign()).float().mean())

    before = right()
    L.Trainer(accelerator="cpu", max_steps=100, **off).fit(module)
    assert before < 0.7
    assert right() > 0.95


def test_imitation_refuses():
    with pytest.raises(ValueError, match="distance='cosine' is not allowed"):
        Imitation(SGD, "cosine")
    with pytest.raises(ValueError, match="all tensors share"):
        Imitation({"kind": "lstm_dmd"})
    assert dataclasses.replace(Imitation(SGD), distance="sign").distance == "sign"
