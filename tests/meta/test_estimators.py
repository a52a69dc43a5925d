"""Every estimator against independent gradients: closed forms, a plain loop, finite differences."""

import dataclasses
import math

import pytest
import torch
from meta_cases import Descent, Jump, Parabola, descent, generator, gradient, losses_by_hand, meta_params

from lightning_lopt.meta.estimators import PES, ESSingle, FullES, FullUnroll, OneStep, OneStepState, TruncatedBackprop
from lightning_lopt.meta.schedules import Horizon, Weights
from lightning_lopt.meta.unroll import Unroll
from lightning_lopt.rules import make
from lightning_lopt.tasks import make as make_task

ENDLESS = Horizon(10**6)
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def estimates(estimator, unroll, theta, number, seed=0):
    """A sequence of estimates."""
    random = generator(seed)
    state, found = estimator.init(unroll, theta, random), []
    for _ in range(number):
        found.append(estimator.estimate(unroll, theta, state, random))
        state = found[-1].state
    return found


def assert_gradient(found, expected, **tolerances):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **(tolerances or EXACT))


# --- Backpropagation: exact ---


def test_full_unroll_is_the_gradient_of_the_mean_loss_after_each_update():
    unroll, theta = descent()
    (found,) = estimates(FullUnroll(num_runs=2, horizon=12), unroll, theta, 1)
    assert_gradient(found.meta_grad, gradient(lambda t: losses_by_hand(t, 12)[1:].mean(), theta))
    torch.testing.assert_close(found.meta_loss, losses_by_hand(theta, 12)[1:].mean(), **EXACT)


@pytest.mark.parametrize("objective", ["raw", "ratio", "log"])
def test_full_unroll_equals_finite_differences(objective):
    unroll, theta = descent(Parabola(noise=0.1, random_start=True), objective=objective)
    estimator = FullUnroll(num_runs=3, horizon=10)

    def meta_loss(**changes):
        return estimator.estimate(unroll, {**theta, **changes}, None, generator()).meta_loss

    found = estimator.estimate(unroll, theta, None, generator()).meta_grad
    for name, p in theta.items():
        h = 1e-5
        difference = (meta_loss(**{name: p + h}) - meta_loss(**{name: p - h})) / (2 * h)
        torch.testing.assert_close(found[name], difference, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("segment", [1, 5, 12, 22])
@pytest.mark.parametrize("objective", ["raw", "ratio"])
def test_segments_that_are_run_again_have_the_same_gradient(segment, objective):
    """And the same random draws: the noise of the batches, and the final state of the generator."""
    unroll, theta = descent(Parabola(noise=0.1, random_start=True), objective=objective)
    whole, again = (FullUnroll(3, 23, Weights(slope=0.1), segment=length) for length in (None, segment))
    left, right = generator(), generator()
    expected, found = whole.estimate(unroll, theta, None, left), again.estimate(unroll, theta, None, right)
    assert_gradient(found.meta_grad, expected.meta_grad)
    torch.testing.assert_close(found.meta_loss, expected.meta_loss, **EXACT)
    assert torch.equal(left.get_state(), right.get_state())


def test_segments_carry_a_networks_state_and_second_derivatives():
    torch.manual_seed(0)
    rule = make("gru", hidden_size=4, initial_lr=1e-3, initial_reach=10.0).double()
    unroll, theta = Unroll(rule, make_task("rosenbrock"), "ratio"), meta_params(rule)
    torch.set_default_dtype(torch.float64)
    try:
        expected, found = (FullUnroll(2, 13, segment=s).estimate(unroll, theta, None, generator()) for s in (None, 4))
    finally:
        torch.set_default_dtype(torch.float32)
    assert_gradient(found.meta_grad, expected.meta_grad)
    assert all(grad.abs().max() > 1e-9 for name, grad in found.meta_grad.items() if name != "initial")


def test_what_runs_carry_back_can_be_shortened():
    """Clipping to 0 at the start of a segment is truncation; a large norm has no effect."""
    unroll, theta = descent()
    exact, loose = (
        FullUnroll(2, 12, segment=3, carry=c).estimate(unroll, theta, None, generator()) for c in (None, 1e9)
    )
    assert_gradient(loose.meta_grad, exact.meta_grad)
    (nothing,) = estimates(FullUnroll(2, 12, segment=3, carry=1e-30), unroll, theta, 1)
    assert_gradient(nothing.meta_grad, gradient(lambda t: losses_by_hand(t, 12, cut=3)[1:].mean(), theta))
    torch.testing.assert_close(nothing.meta_loss, exact.meta_loss, **EXACT)
    with pytest.raises(ValueError, match="needs a segment"):
        FullUnroll(carry=1.0)
    with pytest.raises(ValueError, match="segment=0 is not allowed"):
        FullUnroll(segment=0)


@pytest.mark.parametrize("objective", ["raw", "ratio", "log"])
def test_one_truncation_as_long_as_the_run_is_the_full_unroll(objective):
    unroll, theta = descent(objective=objective)
    (whole,) = estimates(FullUnroll(num_runs=2, horizon=10), unroll, theta, 1)
    truncated = TruncatedBackprop(num_runs=2, truncation=10, horizon=Horizon(10), stagger=False)
    (found,) = estimates(truncated, unroll, theta, 1)
    assert_gradient(found.meta_grad, whole.meta_grad)
    torch.testing.assert_close(found.meta_loss, whole.meta_loss, **EXACT)


def test_truncated_backprop_forgets_what_was_before_the_truncation():
    unroll, theta = descent()
    truncated = TruncatedBackprop(num_runs=2, truncation=5, horizon=ENDLESS, stagger=False)
    found = estimates(truncated, unroll, theta, 2)
    for i, estimate in enumerate(found):
        cut = gradient(lambda t, i=i: losses_by_hand(t, 10, cut=5)[5 * i + 1 : 5 * i + 6].mean(), theta)
        assert_gradient(estimate.meta_grad, cut)
    whole = gradient(lambda t: losses_by_hand(t, 10)[6:].mean(), theta)
    assert abs(found[1].meta_grad["log_lr"] / whole["log_lr"]) < 0.8


def test_truncated_backprop_leaves_out_the_start_of_an_episode_after_a_reset():
    # Episodes of 3 steps and a reset, truncations of 4: the last slot is the reset, and what follows is a fresh start.
    unroll, theta = descent(objective="ratio")
    truncated = TruncatedBackprop(num_runs=2, truncation=4, horizon=Horizon(3), stagger=False)
    for estimate in estimates(truncated, unroll, theta, 2):
        losses = losses_by_hand(theta, 2)
        torch.testing.assert_close(estimate.meta_loss, (losses / losses[0])[1:].mean(), **EXACT)


def test_one_step_is_the_log_ratio_over_one_update():
    # f(x') = f(x) summed over curvatures h with x' = (1 - a h) x; without momentum, for v = 0 at the start.
    unroll, theta = descent()
    first, second = estimates(OneStep(num_runs=2, horizon=ENDLESS, stagger=False), unroll, theta, 2)
    a = theta["log_lr"].exp().item()
    before = sum(h for h in (1.0, 0.3, 0.05))
    after = sum(h * (1 - a * h) ** 2 for h in (1.0, 0.3, 0.05))
    slope = sum(-2 * a * h * h * (1 - a * h) for h in (1.0, 0.3, 0.05)) / after
    assert first.meta_loss.item() == pytest.approx(math.log(after / before), rel=1e-12)
    assert first.meta_grad["log_lr"].item() == pytest.approx(slope, rel=1e-12)
    assert first.meta_grad["momentum"].item() == 0
    by_hand = gradient(lambda t: losses_by_hand(t, 2, cut=1)[2].log(), theta)
    assert_gradient(second.meta_grad, by_hand)


def test_one_step_is_judged_on_a_batch_that_the_step_has_not_seen():
    # The step goes by xi, and both losses are those of the next draw, zeta: h (x - zeta)^2 with x = 1 - a h (1 - xi).
    unroll, theta = descent(Parabola(noise=100.0))
    task, random = unroll.task, generator(1)
    inner = unroll.start(generator(), torch.tensor([9]))
    estimator = OneStep(num_runs=1, horizon=ENDLESS)
    estimate = estimator.estimate(unroll, theta, OneStepState(inner, torch.tensor(0)), generator(1))
    xi, zeta = (task.batch(random, inner.constants, 1)["xi"][0] for _ in range(2))
    assert (xi - zeta).abs().min() > 1
    h, a = torch.tensor((1.0, 0.3, 0.05), dtype=torch.float64), theta["log_lr"].exp()
    x = 1 - a * h * (1 - xi)
    after, before = ((h * (where - zeta) ** 2).sum() for where in (x, torch.ones(3, dtype=torch.float64)))
    torch.testing.assert_close(estimate.meta_loss, (after / before).log(), **EXACT)
    slope = (2 * h * (x - zeta) * -a * h * (1 - xi)).sum() / after
    torch.testing.assert_close(estimate.meta_grad["log_lr"], slope, **EXACT)


def test_one_step_fits_no_noise():
    """With pure-noise gradients a step reduces the loss as often as it increases it, but always on its own batch."""
    unroll, theta = descent(Parabola(noise=10.0))
    samples = [e.meta_grad["log_lr"] for e in estimates(OneStep(num_runs=256, horizon=Horizon(1)), unroll, theta, 60)]
    mean, error = mean_and_error(samples)
    assert mean > 4 * error  # smaller steps are better: the noise, 10, hides the way of length 1


def test_one_step_episodes_lengthen():
    unroll, theta = descent()
    estimator = OneStep(num_runs=4, horizon=Horizon(50), early=Horizon(2, 3), num_early=5, stagger=False)
    found = estimates(estimator, unroll, theta, 20)
    lengths = [int(estimate.state.inner.horizon.min()) for estimate in found]
    assert max(lengths[:5]) <= 3
    assert lengths[-1] == 50
    assert [int(estimate.state.num_estimates) for estimate in found] == list(range(1, 21))


def test_first_order_takes_the_tasks_gradients_for_constants():
    unroll, theta = descent(second_order=False)
    estimator = FullUnroll(num_runs=1, horizon=6)
    (first_order,) = estimates(estimator, unroll, theta, 1)
    (second_order,) = estimates(estimator, dataclasses.replace(unroll, second_order=True), theta, 1)
    assert_gradient(first_order.meta_grad, gradient(lambda t: losses_by_hand(t, 6, first_order=True)[1:].mean(), theta))
    for name in theta:
        ratio = (first_order.meta_grad[name] / second_order.meta_grad[name]).item()
        assert ratio > 1.05  # without the Hessian, past updates are not seen to shrink later gradients


# --- Evolution strategies: unbiased, within what their noise allows ---


def mean_and_error(samples):
    """Mean and standard error over the first axis."""
    stacked = torch.stack(samples)
    return stacked.mean(0), stacked.std(0) / len(samples) ** 0.5


def repeat(estimator, unroll, theta, truncations, times=12):
    """Per meta-parameter, mean and standard error over repetitions of the mean estimate over an episode."""
    runs = [estimates(estimator, unroll, theta, truncations, seed) for seed in range(times)]
    means = {n: [torch.stack([e.meta_grad[n] for e in run]).mean(0) for run in runs] for n in theta}
    return {name: mean_and_error(samples) for name, samples in means.items()}


def es_cases(pairs=400, std=1e-3):
    return {
        "FullES": (FullES(num_pairs=pairs, horizon=12, std=std), 1),
        "PES": (PES(num_pairs=pairs, truncation=3, std=std, horizon=ENDLESS, stagger=False), 4),
        "ESSingle": (ESSingle(num_pairs=pairs, truncation=3, std=std, horizon=Horizon(12), stagger=False), 4),
    }


@pytest.mark.parametrize("name", es_cases())
def test_es_is_unbiased(name):
    estimator, truncations = es_cases()[name]
    unroll, theta = descent()
    expected = gradient(lambda t: losses_by_hand(t, 12)[:12].mean(), theta)
    for key, (mean, error) in repeat(estimator, unroll, theta, truncations).items():
        assert error < 0.1 * abs(expected[key])  # else the next line says little
        assert abs(mean - expected[key]) < 4 * error


@pytest.mark.parametrize("name", es_cases())
def test_es_is_unbiased_on_noisy_tasks(name):
    estimator, truncations = es_cases()[name]
    unroll, theta = descent(Parabola(noise=0.3, random_start=True))
    # The first loss depends on nothing, so that the mean of 12 losses has 11 / 12 of the gradient of that of the rest.
    exact = [FullUnroll(num_runs=2000, horizon=11).estimate(unroll, theta, None, generator(s)) for s in range(4)]
    for key, (mean, error) in repeat(estimator, unroll, theta, truncations).items():
        expected, exact_error = mean_and_error([11 / 12 * estimate.meta_grad[key] for estimate in exact])
        assert error < 0.2 * abs(expected)
        assert abs(mean - expected) < 4 * (error + exact_error)


def test_es_single_weighs_the_steps_of_an_episode_alike_where_truncations_do_not_divide_it():
    # Episodes of 10 in three truncations of 4, the last of which waits for two slots.
    unroll, theta = descent()
    estimator = ESSingle(num_pairs=400, truncation=4, std=1e-3, horizon=Horizon(10), stagger=False)
    expected = gradient(lambda t: losses_by_hand(t, 10)[:10].mean(), theta)["log_lr"]
    mean, error = (12 / 10 * value for value in repeat(estimator, unroll, theta, 3)["log_lr"])
    assert error < 0.1 * abs(expected)
    assert abs(mean - expected) < 4 * error


def test_truncated_es_is_biased_where_pes_is_not():
    class TruncatedES(PES):
        """PES that ignores earlier perturbations."""

        def estimate(self, unroll, meta_params, state, generator):
            forgotten = {name: torch.zeros_like(p) for name, p in state.perturbation.items()}
            return super().estimate(unroll, meta_params, state._replace(perturbation=forgotten), generator)

    unroll, theta = descent()
    expected = gradient(lambda t: losses_by_hand(t, 12)[:12].mean(), theta)["log_lr"]
    pes, truncations = es_cases()["PES"]
    mean, error = repeat(TruncatedES(**vars(pes)), unroll, theta, truncations)["log_lr"]
    assert abs(mean - expected) > 8 * error
    assert abs(mean) < 0.7 * abs(expected)


def test_the_variance_of_pes_grows_with_the_truncations_and_that_of_es_single_does_not():
    # The loss is the meta-parameter itself, so that a difference of losses is the current perturbation.
    unroll = Unroll(Jump(), Parabola(linear=True), objective="raw")
    theta, variances = meta_params(unroll.rule), {}
    for estimator in (
        PES(num_pairs=10, truncation=2, horizon=ENDLESS, stagger=False),
        ESSingle(num_pairs=10, truncation=2, horizon=ENDLESS, stagger=False),
    ):
        runs = [estimates(estimator, unroll, theta, 9, seed) for seed in range(40)]
        grads = torch.stack([torch.stack([e.meta_grad["where"] for e in run]) for run in runs])
        variances[type(estimator)] = grads.var(0)
        assert abs(grads[:, 1:].mean() - 1.35) < 0.2  # sum of the curvatures
    assert variances[PES][8] > 2.5 * variances[PES][1]
    assert 0.5 < variances[ESSingle][8] / variances[ESSingle][1] < 2


def test_es_of_a_linear_loss_is_exact_in_the_direction_of_the_perturbation():
    # One pair: (L+ - L-) / (2 std^2) * eps = sum(h) eps^2 / std^2, on the 3 of 4 losses that come after an update.
    unroll = Unroll(Jump(), Parabola(linear=True), objective="raw")
    theta = meta_params(unroll.rule)
    estimate = FullES(num_pairs=1, horizon=4, std=0.1).estimate(unroll, theta, None, generator(3))
    eps = 0.1 * torch.randn(1, generator=generator(3), dtype=torch.float64).item()
    assert estimate.meta_grad["where"].item() == pytest.approx(0.75 * 1.35 * eps**2 / 0.01, rel=1e-12)


# --- Episodes ---


def test_es_single_waits_for_the_truncation_to_end_and_then_draws_anew():
    unroll, theta = descent()
    estimator = ESSingle(num_pairs=4, truncation=3, horizon=Horizon(5), stagger=False)
    first, second, third = (e.state for e in estimates(estimator, unroll, theta, 3))
    assert torch.equal(first.perturbation["log_lr"], second.perturbation["log_lr"])
    assert second.inner.clock.tolist() == [5] * 8  # of six slots one was spent waiting
    assert second.inner.done.all()
    assert not (third.perturbation["log_lr"] == second.perturbation["log_lr"]).any()
    assert third.inner.clock.tolist() == [3] * 8


def test_pes_forgets_the_perturbations_of_an_episode_that_has_ended():
    unroll, theta = descent()
    estimator = PES(num_pairs=4, truncation=3, horizon=Horizon(5), stagger=False)
    state = estimator.init(unroll, theta, generator())
    for number in range(3):
        random, twin = generator(number), generator(number)
        fresh = torch.randn(4, generator=twin, dtype=torch.float64) * estimator.std
        before, state = state, estimator.estimate(unroll, theta, state, random).state
        total = before.perturbation["log_lr"] + fresh
        assert torch.equal(state.perturbation["log_lr"], fresh if number == 1 else total)


@pytest.mark.parametrize("kind", [PES, ESSingle, TruncatedBackprop, OneStep])
def test_staggering_sets_the_clocks_alone_ahead(kind):
    unroll, theta = descent()
    size = {"num_pairs": 50} if kind in (PES, ESSingle) else {"num_runs": 50}
    state = kind(**size, horizon=Horizon(20, 40)).init(unroll, theta, generator())
    inner = getattr(state, "inner", state)
    assert (inner.clock < inner.horizon).all()
    assert len(inner.clock.unique()) > 10
    assert (inner.step == 0).all()
    assert (inner.params["x"] == 1).all()
    if kind in (PES, ESSingle):
        assert torch.equal(*inner.clock.chunk(2))
        assert torch.equal(*inner.horizon.chunk(2))
    level = kind(**size, horizon=Horizon(20, 40), stagger=False).init(unroll, theta, generator())
    assert (getattr(level, "inner", level).clock == 0).all()


# --- All of them ---

ALL = {
    "FullUnroll": FullUnroll(num_runs=3, horizon=6),
    "FullUnroll in segments": FullUnroll(num_runs=3, horizon=6, segment=4),
    "TruncatedBackprop": TruncatedBackprop(num_runs=3, truncation=4, horizon=Horizon(3, 9)),
    "OneStep": OneStep(num_runs=3, horizon=Horizon(2, 4)),
    "FullES": FullES(num_pairs=3, horizon=6),
    "PES": PES(num_pairs=3, truncation=4, horizon=Horizon(3, 9)),
    "ESSingle": ESSingle(num_pairs=3, truncation=4, horizon=Horizon(3, 9)),
}


@pytest.mark.parametrize("name", ALL)
def test_everything_follows_from_the_generator(name):
    unroll, theta = descent(Parabola(noise=0.5, random_start=True))
    torch.manual_seed(1)
    first = estimates(ALL[name], unroll, theta, 5)
    torch.manual_seed(2)
    again, other = estimates(ALL[name], unroll, theta, 5), estimates(ALL[name], unroll, theta, 5, seed=1)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.meta_loss, b.meta_loss)
        assert torch.equal(a.meta_grad["log_lr"], b.meta_grad["log_lr"])
    assert [e.meta_loss for e in first] != [e.meta_loss for e in other]
    assert torch.initial_seed() == 2


@pytest.mark.parametrize("name", ALL)
def test_a_gradient_is_like_the_meta_parameters_and_no_graph_is_kept(name):
    unroll, theta = descent(Parabola(dtype=torch.float32))
    theta = {key: p.float() for key, p in theta.items()}
    for estimate in estimates(ALL[name], unroll, theta, 3):
        assert {k: (g.shape, g.dtype) for k, g in estimate.meta_grad.items()} == {
            k: (p.shape, p.dtype) for k, p in theta.items()
        }
        assert bool(estimate.finite)
        tensors = torch.utils._pytree.tree_leaves(estimate)
        assert not any(tensor.requires_grad for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("objective", ["raw", "log"])
def test_divergence_gives_finite_gradients(name, objective):
    unroll = Unroll(Descent(log_lr=80.0, dtype=torch.float32), Parabola(dtype=torch.float32), objective=objective)
    found = estimates(ALL[name], unroll, meta_params(unroll.rule), 4)
    assert all(grad.isfinite().all() for estimate in found for grad in estimate.meta_grad.values())
    if objective == "raw":
        assert not all(bool(estimate.finite) for estimate in found)


@pytest.mark.parametrize("name", ALL)
def test_frozen_meta_parameters_act_and_have_no_gradient(name):
    unroll, theta = descent(Parabola(noise=0.5))
    frozen = dataclasses.replace(unroll, frozen={"momentum": theta["momentum"]})
    (found,) = estimates(ALL[name], frozen, {"log_lr": theta["log_lr"]}, 1)
    assert found.meta_grad.keys() == {"log_lr"}
    if isinstance(ALL[name], (FullUnroll, TruncatedBackprop, OneStep)):
        (whole,) = estimates(ALL[name], unroll, theta, 1)
        assert torch.equal(found.meta_grad["log_lr"], whole.meta_grad["log_lr"])


@pytest.mark.parametrize(("low", "high"), [(0, None), (5, 4), (-1, 3)])
def test_invalid_horizons(low, high):
    with pytest.raises(ValueError, match=r"Horizon\(.*is not allowed: it needs 1 <= low <= high"):
        Horizon(low, high)


def test_horizons_are_log_uniform():
    lengths = Horizon(10, 1000).draw(4000, generator())
    assert (lengths.min(), lengths.max()) >= (10, 900)
    assert lengths.max() <= 1000
    assert abs(lengths.log().median() - math.log(100)) < 0.15
