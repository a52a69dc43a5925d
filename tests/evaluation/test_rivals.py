"""Runs seed by seed and rivals match torch's optimizers; the small search; what is looked at during a run."""

import dataclasses
import importlib.util
import math

import pytest
import torch

import lightning_lopt as lopt
from lightning_lopt import tasks
from lightning_lopt.evaluation import Case, Options, compare, evaluate, one_by_one, runs
from lightning_lopt.evaluation.one_by_one import RuleStepper
from lightning_lopt.evaluation.results import DEFAULT_ADAM
from lightning_lopt.evaluation.rivals import DEFAULT_ADAM_RIVAL, RIVALS, SmallGrid
from lightning_lopt.evaluation.runs import Judge, Runs, look_steps
from lightning_lopt.evaluation.tuning import BASELINES

STEPS = 40
PACKAGES = {"schedule-free": "schedulefree", "soap": "pytorch_optimizer", "prodigy": "prodigyopt"}


def needs(rival: str) -> None:
    package = PACKAGES.get(rival)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'lightning_lopt[rivals]'")
    if rival == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon needs torch 2.9")


def gradient(params, step):
    """The gradient of a badly scaled, noisy problem."""
    random = torch.Generator().manual_seed(step)
    return {
        name: (0.3 + i) * p.detach() + torch.randn(p.shape, generator=random)
        for i, (name, p) in enumerate(params.items())
    }


def start(task):
    params = task.init(torch.Generator().manual_seed(0)).params
    return {name: torch.nn.Parameter(value.clone()) for name, value in params.items()}


def trained(rival, task, steps=STEPS, **setting):
    """Parameters after `steps` steps of a rival."""
    params = start(task)
    stepper = RIVALS[rival].make(params, task, steps, setting)
    for step in range(steps):
        stepper.step(gradient(params, step), torch.tensor(1.0))
    stepper.evaluate(True)
    return params


def by_hand(task, optimizers, warmup, steps=STEPS):
    """The same with torch's own schedulers: linear warm-up, then cosine annealing to zero."""
    params = start(task)
    made, ramp = optimizers(params), round(warmup * steps)
    for step in range(steps):
        rise = min(1.0, (step + 1) / ramp) if ramp else 1.0
        factor = rise * 0.5 * (1 + math.cos(math.pi * max(step - ramp, 0) / (steps - ramp)))
        grads = gradient(params, step)
        for name, param in params.items():
            param.grad = grads[name]
        for optimizer in made:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("own_lr", group["lr"]) * factor
            optimizer.step()
    return params


def equal(actual, expected):
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-6, atol=1e-7)


@pytest.fixture
def conv():
    return tasks.make("digits-conv")


# --- Rivals ---


def test_the_recipe_is_adamw_with_warm_up_and_cosine(conv):
    expected = by_hand(conv, lambda p: [torch.optim.AdamW(p.values(), lr=1e-3, weight_decay=0.01)], 0.05)
    equal(trained("adamw-recipe", conv), expected)
    other = by_hand(conv, lambda p: [torch.optim.AdamW(p.values(), lr=3e-3, weight_decay=0.1)], 0.05)
    equal(trained("adamw-tuned", conv, lr=3e-3, weight_decay=0.1), other)


def test_nadamw_is_at_algoperfs_point(conv):
    point = {"lr": 1.749e-3, "betas": (0.9327, 0.9955), "weight_decay": 0.0812, "decoupled_weight_decay": True}
    # 2 % of 50 steps are one whole step.
    expected = by_hand(conv, lambda p: [torch.optim.NAdam(p.values(), **point)], 0.02, steps=50)
    equal(trained("nadamw-algoperf", conv, steps=50), expected)


def test_muon_moves_the_hidden_matrices_and_adamw_the_rest(conv):
    needs("muon")
    rest = [name for name in start(conv) if name not in conv.hidden_matrices]
    adamw = by_hand(conv, lambda p: [torch.optim.AdamW([p[n] for n in rest], lr=1e-3, weight_decay=0.01)], 0.05)
    found = trained("muon", conv)
    equal({name: found[name] for name in rest}, {name: adamw[name] for name in rest})
    # One step at a time from zero momentum: a matrix with orthonormal rows or columns, up to the accuracy of
    # Newton-Schulz, which leaves singular values between 0.7 and 1.2.
    params = start(conv)
    stepper = RIVALS["muon"].make(params, conv, 20, {})  # the warm-up is one step long
    before = params["convs.1.weight"].detach().clone()
    stepper.step(gradient(params, 0), torch.tensor(1.0))
    moved = (params["convs.1.weight"].detach() - (1 - 0.02 * 0.01) * before).flatten(1)
    scale = 0.02 * max(1, moved.shape[0] / moved.shape[1]) ** 0.5
    values = torch.linalg.svdvals(moved / scale)
    assert ((values > 0.6) & (values < 1.3)).all()


def test_schedule_free_shows_its_average_only_for_evaluation(conv):
    needs("schedule-free")
    import schedulefree

    params, twin = start(conv), start(conv)
    stepper = RIVALS["schedule-free"].make(params, conv, 100, {})
    point = {"lr": 2.5e-3, "betas": (0.9, 0.9955), "weight_decay": 0.0812, "warmup_steps": 2}
    expected = schedulefree.AdamWScheduleFree(twin.values(), **point)
    expected.train()
    for step in range(10):
        stepper.step(gradient(params, step), torch.tensor(1.0))
        grads = gradient(twin, step)
        for name, param in twin.items():
            param.grad = grads[name]
        expected.step()
    equal(params, twin)
    training = {name: value.detach().clone() for name, value in params.items()}
    stepper.evaluate(True)
    expected.eval()
    equal(params, twin)
    assert not torch.equal(params["head.weight"], training["head.weight"])
    stepper.evaluate(False)
    equal(params, training)


@pytest.mark.parametrize("rival", RIVALS)
def test_every_rival_learns(rival):
    needs(rival)
    task = tasks.make("synthetic-mlp")
    make = lambda params, own, steps: RIVALS[rival].make(params, own, steps, {})  # noqa: E731
    found = one_by_one.run(make, task, steps=150, seeds=2, validations=3)
    assert max(found.valid_loss) < 0.9 * found.scale
    assert one_by_one.step_seconds(make, task, num=1) > 0


@pytest.mark.parametrize("rival", PACKAGES)
def test_a_missing_package_is_named_before_anything_runs(rival, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {PACKAGES[rival]}.*pip install 'lightning_lopt\[rivals\]'"):
        RIVALS[rival].check()


def test_an_old_torch_without_muon_is_named(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ModuleNotFoundError, match="from torch 2.9 on"):
        RIVALS["muon"].check()


# --- Runs seed by seed ---


def test_a_run_seed_by_seed_is_a_run_side_by_side():
    task, adam = tasks.make("synthetic-mlp"), BASELINES["adam"].make(lr=1e-3)
    options = {"steps": 15, "seeds": 3, "validations": 4}
    (side_by_side,) = runs.run(adam, [adam.meta_params()], task, **options)
    make = lambda params, own, steps: DEFAULT_ADAM_RIVAL.make(params, own, steps, {})  # noqa: E731
    apart = one_by_one.run(make, task, **options)
    for field in dataclasses.fields(Runs):
        if field.name in ("steps", "metrics"):
            continue
        a, b = (torch.tensor(getattr(each, field.name)) for each in (side_by_side, apart))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-3 if field.name == "accuracy" else 1e-5)


def test_a_learned_rule_runs_as_the_optimizer_that_users_have():
    task, rule = tasks.make("synthetic-mlp"), lopt.load_rule("star")
    (reference,) = runs.run(rule, [rule.meta_params()], task, steps=10, seeds=2)
    for told, length in ((True, 10), (False, None)):
        found = one_by_one.run(lambda p, t, n, k=length: RuleStepper(p, rule, k), task, steps=10, seeds=2)
        assert (found.final == pytest.approx(reference.final, rel=1e-3)) is told


def test_looks_at_validation_data():
    assert look_steps(100, 4) == [25, 50, 75, 100]
    task, adam = tasks.make("digits-mlp"), BASELINES["adam"].make(lr=1e-2)
    (found,) = runs.run(adam, [adam.meta_params()], task, steps=30, seeds=2, validations=3)
    assert found.valid_steps == [10, 20, 30]
    shorter = [runs.run(adam, [adam.meta_params()], task, steps=n, seeds=2, validations=1)[0] for n in (10, 20, 30)]
    for seed in range(2):
        assert found.valid_curve[seed] == pytest.approx([each.valid_loss[seed] for each in shorter], rel=1e-4)
        assert found.best_valid[seed] == min(found.valid_curve[seed])
        best = found.valid_curve[seed].index(found.best_valid[seed])
        assert found.best_test[seed] == pytest.approx(shorter[best].test_loss[seed], rel=1e-4)
    assert found.metrics["accuracy"] == found.accuracy


def test_the_best_look_is_kept_and_tested():
    """Three looks at parameters that are good, best, and bad."""
    task = tasks.make("digits-logreg")
    judge = Judge(task, steps=3, looks=3)
    generator = torch.Generator().manual_seed(0)
    x = {name: torch.randn(value.shape, generator=generator) for name, value in task.init(generator).params.items()}
    for scale in (0.1, 0.0, 5.0):
        judge.look([{name: scale * value for name, value in x.items()}], [{}])
    verdict = judge.verdicts([{name: 5.0 * value for name, value in x.items()}], [{}])[0]
    assert verdict.valid_curve[1] == pytest.approx(math.log(10), rel=1e-5)
    assert verdict.best_test == pytest.approx(math.log(10), rel=1e-5)
    assert verdict.test_loss > verdict.best_test
    assert len(judge.steps) == 3


def test_tasks_without_validation_data_have_no_such_losses():
    task, adam = tasks.make("two-moons", train_fraction=1.0), BASELINES["adam"].make()
    (found,) = runs.run(adam, [adam.meta_params()], task, steps=5, seeds=2, validations=3)
    assert found.best_valid == found.valid_curve == found.best_test == found.valid_steps == []
    assert math.isnan(found.average("best_valid"))
    assert all(math.isnan(loss) for loss in found.clamped("best_valid"))
    assert found.tuning_loss("best_valid") == found.tuning_loss("tail")
    results = evaluate("star", [Case("two-moons", 5)], ["adam"], options=Options(seeds=2, cache_dir=None))
    assert not results.validated
    assert math.isnan(results.summary()[0].ratios["valid", "adam"].value)
    assert results.measures == ["final", "mean", "test"]


# --- The small search ---


def fake(valid, tail=1.0):
    ones = [1.0]
    losses = {"final": [tail], "tail": [tail], "mean": [tail], "valid_loss": [valid], "best_valid": [valid]}
    return Runs(100, initial=ones, **losses, test_loss=ones, accuracy=ones, curve=[ones], valid_curve=[[valid]])


@pytest.mark.parametrize("best", [1e-4, 3e-4, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("decay", [0.01, 0.1, 1.0])
def test_the_small_search_ends_inside_and_judges_by_validation(best, decay):
    tried = []

    def run(setting):
        tried.append((setting["lr"], setting["weight_decay"]))
        off = abs(math.log10(setting["lr"] / best)) + 0.1 * abs(math.log10(setting["weight_decay"] / decay))
        return fake(valid=0.1 + 0.1 * off, tail=1.0 / (1 + off))  # the training loss says the opposite

    found = SmallGrid().search(run)
    assert found.best["valid"].hyperparameters == {"lr": pytest.approx(best), "weight_decay": decay}
    rates = [lr for lr, _ in tried]
    assert min(rates) < best < max(rates)
    assert len(set(tried)) == len(tried) == found.num_trials
    assert found.best["final"].hyperparameters != found.best["valid"].hyperparameters


# --- In an evaluation ---


def test_rivals_and_rules_seed_by_seed_in_an_evaluation(tmp_path):
    options = Options(seeds=2, nominal=False, cache_dir=tmp_path)
    case, names = Case("synthetic-mlp", 12, one_by_one=True), ["adamw-recipe", "adamw-tuned"]
    results = evaluate("star", [case], names, options=options)
    assert results.optimizers == [*names, DEFAULT_ADAM, "star"]
    assert results.main_reference == "adamw-tuned"
    assert results.entry(case, "adamw-tuned").num_settings > 4
    assert results.entry(case, "adamw-recipe").best["valid"].runs.best_valid
    assert results.step_time(case, "star") > 0
    assert results.ratio(case, "adamw-recipe", "adamw-recipe", "valid").value == 1.0
    summary = {row.optimizer: row for row in results.summary()}
    assert summary["adamw-tuned"].as_good["valid", "adamw-recipe"] == 1
    assert evaluate("star", [case], names, options=options) == results  # from the cache
    # Side by side, the rule sees the same batches; a baseline may run seed by seed too.
    beside = evaluate("star", [Case("synthetic-mlp", 12)], [], options=options)
    assert beside.entry(Case("synthetic-mlp", 12), "star").loss("final") == pytest.approx(
        results.entry(case, "star").loss("final"), rel=1e-3
    )
    assert math.isnan(evaluate([], [Case("synthetic-mlp", 12)], names[:1], options=options).entries[0].step_seconds)


def test_a_baseline_seed_by_seed_has_the_hyperparameters_of_each_setting(tmp_path):
    options = Options(seeds=1, nominal=False, cache_dir=tmp_path)
    apart, beside = (
        evaluate([], [Case("synthetic-mlp", 8, flag)], ["adam"], options=options).entries[0] for flag in (True, False)
    )
    assert apart.best["final"].hyperparameters == beside.best["final"].hyperparameters
    assert apart.loss("valid") == pytest.approx(beside.loss("valid"), rel=1e-3)


def test_keys_of_cached_results_are_the_same_in_every_process():
    """Options may be functions, whose repr has an address."""
    for name in tasks.list_tasks():
        assert " at 0x" not in str(compare._describe(name)), name
