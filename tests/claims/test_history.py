"""Claims about normalized histories and Multiscale Adam: arithmetic, checks, and the bundled weights."""

import pytest
import torch

import lightning_lopt as lopt
from lightning_lopt.claims import (
    Experiment,
    Measurement,
    find,
    history,
    loss_curves,
    multiscale,
    shahid_trained,
    verdict,
)
from lightning_lopt.claims.learning_rate import WithLearningRate, at_rate
from lightning_lopt.evaluation.baselines import Adam
from lightning_lopt.rules import StepContext, make
from lightning_lopt.rules.multiscale_adam import linear_weights
from lightning_lopt.tasks import make as make_task


def experiment(seeds: int = 2) -> Experiment:
    return Experiment(seeds=seeds, quick=True, cache_dir=None)


def test_losses_are_those_of_a_plain_loop():
    rule = make("mng", eta_min=0.1)
    (found,) = history.curves(experiment(1), {"MNG": rule}, "sum-of-squares", 30)["MNG"]
    x = 20 * torch.rand(1, 1000, generator=torch.Generator().manual_seed(0))[0] - 10
    param = torch.nn.Parameter(x)
    optimizer, losses = lopt.RuleOptimizer([param], rule, backend="reference"), []
    for _ in range(30):
        losses.append(float(param.detach().square().sum()))
        param.grad = 2 * param.detach()
        optimizer.step()
    torch.testing.assert_close(found, torch.tensor(losses, dtype=torch.float64), rtol=1e-4, atol=1e-6)


def test_candidates_with_one_rule_run_side_by_side_as_they_run_alone():
    both = history.adams({"a": {"lr": 0.1}, "b": {"lr": 0.01}})
    together = history.curves(experiment(), both, "sum-of-squares", 20)
    alone = history.curves(experiment(), {"b": both["b"]}, "sum-of-squares", 20)
    for first, second in zip(together["b"], alone["b"], strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=0)
    assert not torch.allclose(together["a"][0], together["b"][0])


def test_cached_losses_are_kept_apart_by_learning_rate(tmp_path):
    rule = WithLearningRate(make("multiscale_adam", mixer="la_b", eta=1.0), "constant")
    cached = Experiment(seeds=1, quick=True, cache_dir=tmp_path)
    rows = []
    for rate in (0.1, 0.01, 0.1):
        rows += history.curves(cached, {"a": (rule, at_rate(rule, rate))}, "sum-of-squares", 5)["a"]
    assert torch.equal(rows[0], rows[2])
    assert not torch.allclose(rows[0], rows[1])


def test_mng_is_below_adam_on_the_sum_of_squares():
    """From step 50 to 200, and in the summed loss over 1,000 steps, for three seeds."""
    rules = history.adams({f"{rate:g}": {"lr": rate} for rate in history.RATES})
    found = history.curves(experiment(3), {**rules, "MNG": make("mng", eta_min=1e-3)}, "sum-of-squares", 1000)
    for rate in history.RATES:
        for ours, theirs in zip(found["MNG"], found[f"{rate:g}"], strict=True):
            assert (ours[50:201] < theirs[50:201]).all()
            assert ours.sum() < theirs.sum()


def test_the_bundled_linear_mixer_has_the_two_extremes():
    rule = lopt.load_rule("multiscale-adam-linear")
    assert (rule.kind, rule.config.mixer, rule.config.k) == ("multiscale_adam", "la_b", 6)
    weights = linear_weights("la_b", rule.weights.detach())
    assert weights[0] + weights[-1] >= 0.95
    assert weights.argmax() == 0
    assert weights[1:-1].max() < weights[-1] < weights[0]


def test_the_bundled_timesteps_vote():
    rule = lopt.load_rule("k-timesteps")
    assert (rule.kind, rule.config.k) == ("k_timesteps", 5)
    votes = rule.step_map(torch.tensor([row for row, _ in history.TABLE[:6]]))
    assert (votes.diff() < 0).all()  # from five positive gradients to five negative ones
    assert votes[0] > 0.9
    assert votes[-1] < -0.9


def test_the_bundled_mixer_uses_one_adam_for_large_features_and_the_extremes_for_small_ones():
    rule = lopt.load_rule("multiscale-adam")
    assert (rule.kind, rule.config.mixer, rule.config.k) == ("multiscale_adam", "rnn2", 6)
    far, near = rule.mixing_weights(torch.tensor([[-1.0] * 6, [0.0] * 6]).mT).unbind(1)
    assert far[1] > 0.9
    assert near[0] + near[-1] > 0.5
    assert near.max() < 0.6


@pytest.mark.parametrize(("schedule", "floor"), [("constant", 0.0), ("cosine", 0.0), ("cosine", 0.1)])
def test_a_rule_with_a_learning_rate_matches_torchs_scheduler(schedule, floor):
    rule, steps = make("multiscale_adam", mixer="la_b", eta=1.0), 20
    annealed = WithLearningRate(rule, schedule, floor)
    meta_params = {**{k: v.detach() for k, v in annealed.meta_params().items()}, "lr": torch.tensor(0.1).double()}
    param, state, grads = torch.ones(3), rule.init_state(torch.ones(3)), torch.randn(steps, 3)
    theirs = torch.nn.Parameter(torch.ones(3))
    optimizer = lopt.RuleOptimizer([theirs], rule, lr=0.1, backend="reference")
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    if schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0.1 * floor)
    for step, grad in enumerate(grads):
        delta, state = annealed.update(
            meta_params, grad, state, param, StepContext(torch.tensor(float(step)), None, steps)
        )
        param, theirs.grad = param + delta, grad
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(param, theirs.detach(), rtol=1e-5, atol=1e-6)


def heat_map(best: int) -> dict[str, list[float]]:
    """A table in which RNN-2 has the lowest loss in the first `best` schedules and the third lowest in the others."""
    table = {}
    for column, schedule in enumerate(multiscale.SCHEDULES):
        table[f"RNN-2 at {schedule}"] = [0.1 if column < best else 0.35] * 2
        table |= {
            f"Adam {beta:g} at {schedule}": [0.2 + 0.1 * row] * 2 for row, (beta, _) in enumerate(multiscale.BETAS[6])
        }
    return table


@pytest.mark.parametrize(("best", "holds"), [(10, True), (8, True), (7, False), (0, False)])
def test_ranks_of_the_heat_map(best, holds):
    numbers = heat_map(best)
    names = {name.partition(" at ")[0] for name in numbers}
    table = {name: {s: numbers[f"{name} at {s}"] for s in multiscale.SCHEDULES} for name in names}
    found = multiscale._ranks("RNN-2", table)
    assert found == {
        "schedules where RNN-2 is best": [float(best)],
        "schedules where RNN-2 is best or second": [float(best)],
    }
    (claim,) = find(["multiscale-heat"])
    assert claim.checks[0](found) == holds


def test_a_schedule_within_the_noise_is_not_won():
    table = {"RNN-2": [0.1, 0.2], "Adam": [0.21, 0.11], "slow": [0.5, 0.6]}
    columns = {name: dict.fromkeys(multiscale.SCHEDULES, row) for name, row in table.items()}
    assert multiscale._ranks("RNN-2", columns) == {
        "schedules where RNN-2 is best": [0.0],
        "schedules where RNN-2 is best or second": [float(len(multiscale.SCHEDULES))],
    }


def test_the_heat_map_is_drawn_with_the_best_of_a_column_darkest():
    numbers = heat_map(10) | {f"LA at {schedule}": [0.3] for schedule in multiscale.SCHEDULES}
    rows = ["LA", "RNN-2", *(f"Adam {beta:g}" for beta, _ in multiscale.BETAS[6])]
    figure = multiscale.draw_heat_map(
        Measurement(numbers, {"optimizers": rows, "schedules": list(multiscale.SCHEDULES)})
    )
    shades = figure.axes[0].images[0].get_array()
    assert shades.shape == (8, 10)
    assert (shades.argmin(0) == 1).all()
    assert shades.max() == 1


def test_table_3_1_passes_for_the_thesis_and_fails_for_a_rule_that_does_nothing():
    (claim,) = find(["history-step-map"])

    def held(steps):
        return verdict([check(history.table_numbers(steps)) for check in claim.checks])

    assert held([step for _, step in history.TABLE]) == "reproduced"
    assert held([0.0] * 12) == "partly"
    assert held([1.0] * 12) != "reproduced"


def test_adams_of_the_heat_map_are_those_of_the_rule():
    names = multiscale._single_adams(5e-4)
    betas = [tuple(m[name].item() for name in ("beta1", "beta2")) for _, m in names.values()]
    assert betas == list(multiscale.BETAS[6])
    assert all(isinstance(rule, Adam) for rule, _ in names.values())


def test_one_weight_of_the_linear_mixer_is_one_adam():
    for number, (name, (adam, settings)) in enumerate(multiscale._single_adams(1e-2).items()):
        rule = WithLearningRate(multiscale.single_adam(number), "constant")
        ours = loss_curves.losses(rule, [at_rate(rule, 1e-2)], "synthetic-mlp", 20, 1, seed=0)
        theirs = loss_curves.losses(adam, [settings], "synthetic-mlp", 20, 1, seed=0)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0, msg=name)


CURVES = {"history-ranges": 4, "history-cifar": 3, "multiscale-cifar": 10, "multiscale-floor": 8}


@pytest.mark.parametrize("name", [*CURVES, "multiscale-heat-rnn1"])
def test_claims_run_on_a_small_task_in_place_of_their_own(name, monkeypatch):
    tiny = make_task("synthetic-mlp", hidden=(4,))
    for module in (loss_curves, shahid_trained):
        monkeypatch.setattr(module, "make_task", lambda *_, **__: tiny)
    (claim,) = find([name])
    measured = claim.measure(experiment(1))
    assert verdict([check(measured.numbers) for check in claim.checks])
    assert all(0 <= value < 10 for values in measured.numbers.values() for value in values)
    panel = claim.plot(measured).axes[0]
    if name in CURVES:
        assert len(panel.get_lines()) == CURVES[name]
    else:
        assert measured.data["optimizers"] == ["RNN-1", *(f"Adam {beta:g}" for beta, _ in multiscale.BETAS[6])]
        assert panel.images[0].get_array().shape == (7, 10)


def test_k_timesteps_of_several_lengths(monkeypatch):
    """history-sizes keeps, for each k, the run at eta_min 1e-4 and the best run, which may be the same."""
    tiny = make_task("synthetic-mlp", hidden=(4,))
    for module in (loss_curves, shahid_trained):
        monkeypatch.setattr(module, "make_task", lambda *_, **__: tiny)
    (claim,) = find(["history-sizes"])
    measured = claim.measure(experiment(1))
    for k in shahid_trained.TIMESTEPS:
        tried = [measured.numbers[f"last loss of k={k}, eta_min {eta:g}"][0] for eta in shahid_trained.ETAS]
        assert measured.numbers[f"best last loss of k={k}"] == [min(tried)]
        best = shahid_trained.ETAS[tried.index(min(tried))]
        assert {f"k={k}, eta_min 0.0001", f"k={k}, eta_min {best:g}"} <= set(measured.data["curves"])
