"""Claims about the LSTM rules: arithmetic, checks, recipes, and the bundled weights."""

import math
import statistics
from pathlib import Path

import pytest
import torch
from lightning_cases import KNOWN_WARNINGS

import lightning_lopt as lopt
from lightning_lopt.claims import Experiment, find, lstm, lstm_quadratic, verdict
from lightning_lopt.claims import lstm_eigenvalue as eigenvalue
from lightning_lopt.claims.loss_curves import losses as losses_of
from lightning_lopt.claims.multi_seed import meta_train_seeds, normalize_by_seed
from lightning_lopt.cli import main
from lightning_lopt.meta.estimators import TruncatedBackprop
from lightning_lopt.meta.schedules import Horizon
from lightning_lopt.meta.unroll import Unroll
from lightning_lopt.rules import StepContext, make
from lightning_lopt.tasks import make as make_task

pytestmark = KNOWN_WARNINGS
FOLDER = Path(__file__).parents[2] / "examples" / "configs" / "lstm"
RULES = {"lstm": "lstm", "lstm_dmd": "lstm_dmd"}


def experiment(path=None, seeds=2):
    return Experiment(seeds=seeds, quick=True, cache_dir=path)


@pytest.fixture
def tiny(monkeypatch):
    """Small fresh rules instead of the bundled ones, and one small task."""

    def load(name):
        torch.manual_seed(len(name))
        config = {} if name == "lstm" else {"num_snapshots": 2, "snapshots": "increments", "nominal_stepsize": 1e-2}
        config |= {"scheduler": True} if name == lstm.ROBUST else {}
        return make("lstm" if name == "lstm" else "lstm_dmd", hidden_size=2, out_scale=1e-3, **config)

    monkeypatch.setattr(lstm, "load_rule", load)
    monkeypatch.setattr(lstm, "TASKS", {"A": "breast-cancer-logreg"})


# --- Arithmetic ---


def as_published(ours=0.2):
    """Table 1 as published, with our rule at `ours` on each task and tuned Adam at 0.25."""
    numbers = {}
    for label, (plain, dmd, adam) in lstm.PUBLISHED.items():
        row = {"lstm": plain, "lstm-dmd": dmd, "Adam 0.01": adam, "lstm-dmd-robust": ours, "tuned Adam": 0.25}
        row[lstm.ALONE] = 0.25
        numbers |= {f"{label}: {name}": [value] * 3 for name, value in row.items()}
    return numbers


def test_table_1_passes_as_published_and_fails_otherwise():
    everything = find(["dmd-table1"])[0].checks
    checks = [check for check in everything if check.kind == "paper"]
    assert (len(checks), len(everything)) == (10, 18)  # our own rule's checks do not count
    assert verdict([check(as_published()) for check in checks]) == "reproduced"
    for name, value in (("MNIST-1L: lstm-dmd", 0.56), ("CIFAR10-1L: lstm-dmd", 2.03), ("MNIST-2L: lstm", 0.1)):
        assert verdict([check({**as_published(), name: [value] * 3}) for check in checks]) == "partly", name


@pytest.mark.parametrize(("wins", "holds"), [(2, False), (3, True), (6, True)])
def test_wins_are_counted(wins, holds):
    numbers = as_published(0.3)
    for number, label in enumerate(lstm.TASKS):
        numbers[f"{label}: lstm-dmd-robust"] = (
            [0.2, 0.2, 0.21] if number < wins else [0.2, 0.2, 0.3]
        )  # within the noise
    assert lstm._wins("lstm-dmd-robust", "tuned Adam", 0.5)(numbers) is holds


def test_the_nominal_term_alone_keeps_the_scheduler_and_the_length(tiny, monkeypatch):
    """It steps like the full rule with the network switched off, and depends on the length of the run."""
    robust = lstm.load_rule(lstm.ROBUST)
    with torch.no_grad():
        robust.schedule_fraction += torch.linspace(0, -1, 11)
    silent = make("lstm_dmd", **{**robust.config.to_dict(), "out_scale": 0.0})
    silent.load_state_dict(robust.state_dict())
    monkeypatch.setattr(lstm, "load_rule", lambda name: robust)
    task, ends = make_task("breast-cancer-logreg"), []
    for rule, length in ((silent, 30), (lstm.nominal_alone(), 30), (silent, None)):
        ((_, make_optimizer),) = lstm.with_rule(rule, length).items()
        ends.append(float(lstm.train(task, 30, 0, make_optimizer)[-1]))
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)
    assert abs(ends[2] / ends[0] - 1) > 1e-3


def test_cosine_adams_match_torch_at_each_rate():
    rows = lstm.cosine_adams(20)
    assert len(rows) == 9
    for rate, make_optimizer in zip(lstm.RATES, rows.values(), strict=True):
        param = torch.nn.Parameter(torch.ones(3))
        adam = torch.optim.Adam([param], lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 20)
        mine = torch.nn.Parameter(torch.ones(3))
        other = make_optimizer([mine])
        for step in range(20):
            param.grad = mine.grad = torch.tensor([1.0, -2.0, 0.1]) * (step + 1)
            adam.step()
            schedule.step()
            other.step()
        torch.testing.assert_close(mine, param)


def test_the_papers_window_is_never_learned_from(monkeypatch):
    """With the paper's m = 100 and runs of 100 steps, the eigenvalue's weights do not change; with m = 20 they do."""
    monkeypatch.setattr(eigenvalue, "make_task", lambda name, **options: make_task("breast-cancer-logreg"))
    numbers = eigenvalue._literal(experiment(seeds=2)).numbers
    assert max(numbers[f"{eigenvalue.BY_EIGENVALUE}, m = 100"]) < 1e-5  # weights are kept to six digits
    for name in (f"{eigenvalue.BY_EIGENVALUE}, m = 20", f"{eigenvalue.BY_GRADIENT}, m = 100"):
        assert min(numbers[name]) > 1e-4
    assert [numbers[f"{eigenvalue.FIRST}, m = {m}"] for m in (100, 20)] == [[101], [21]]
    (claim,) = find(["dmd-literal"])
    assert [(check.kind, check(numbers)) for check in claim.checks] == [
        *[("paper", False)] * 2,
        *[("control", True)] * 3,
    ]


def test_nag_is_torchs():
    rule, param = lstm_quadratic.NAG(lr=0.1), torch.tensor([1.0, -2.0, 3.0])
    theirs = torch.nn.Parameter(param.clone())
    optimizer, state = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, nesterov=True), rule.init_state(param)
    for step in range(6):
        theirs.grad = theirs.detach() ** 3
        delta, state = rule.update(rule.meta_params(), param**3, state, param, StepContext(torch.tensor(float(step))))
        param = param + delta
        optimizer.step()
        torch.testing.assert_close(param, theirs.detach())


# --- What is measured ---


def test_the_table_is_measured_with_adam_at_its_best(tiny, tmp_path):
    measured = lstm._table(experiment(tmp_path))
    names = {*lstm.LEARNED, lstm.ALONE, lstm.UNTOLD, lstm.COSINE, "Adam 0.01", "tuned Adam", "lr of tuned Adam"}
    assert set(measured.numbers) == {f"A: {name}" for name in names}
    assert all(len(row) == 2 for name, row in measured.numbers.items() if "lr of" not in name)
    adam, at_one_rate = measured.numbers["A: tuned Adam"], measured.numbers["A: Adam 0.01"]
    assert statistics.fmean(adam) <= statistics.fmean(at_one_rate)
    (rate,) = measured.numbers["A: lr of tuned Adam"]
    task = make_task("breast-cancer-logreg")
    for seed, value in enumerate(adam):
        losses = lstm.train(task, 30, seed, lambda params: torch.optim.Adam(params, lr=rate))
        assert value == pytest.approx(float(losses[-10:].mean()), rel=1e-5)
    again = Experiment(seeds=2, quick=True, cache_dir=tmp_path)
    assert lstm._table(again).numbers == measured.numbers


def test_a_run_is_a_plain_loop_and_divergence_is_bounded():
    task = make_task("quadratic", dim=3)
    losses = lstm.train(task, 5, 3, lambda params: torch.optim.SGD(params, lr=0.01))
    generator = torch.Generator().manual_seed(3)
    start = task.init(generator)
    x, matrix, target = start.params["x"], start.constants["matrix"], start.constants["target"]
    for loss in losses:
        residual = matrix @ x - target
        torch.testing.assert_close(loss.float(), residual.square().sum())
        x = x - 0.01 * 2 * matrix.T @ residual
    wild = lstm.train(task, 200, 3, lambda params: torch.optim.SGD(params, lr=1e9))
    assert wild[-1] == 2 * wild[0]


def test_long_runs_are_judged_by_their_worst_stretch(tiny):
    numbers = lstm._long(experiment(seeds=1)).numbers
    assert set(numbers) == {f"A: {lstm.WORST}", "A: last loss"}
    assert all(math.isfinite(row[0]) for row in numbers.values())


def test_the_eigenvalue_is_replaced_and_nothing_else():
    rule = make("lstm_dmd", hidden_size=3, num_snapshots=3, snapshots="increments")
    task, shown = make_task("rosenbrock"), {}
    for feature in eigenvalue.FEATURES:
        altered = eigenvalue.ReplacedEigenvalue(rule, feature)
        states = {"x": rule.init_state(torch.zeros(2))}
        for step in range(6):
            param = {"x": torch.tensor([1.0, 2.0]) * 0.5**step}
            context = StepContext(torch.tensor(float(step)))
            shared, states = altered.shared_context(altered.meta_params(), {}, states, param, context)
        shown[feature] = float(shared)
        assert int(states["x"].seen) == 6
    assert shown == pytest.approx({"eigenvalue": 0.5, "zero": 0.0, "one": 1.0, "step counter": 0.05})
    unroll, generator = (
        Unroll(eigenvalue.ReplacedEigenvalue(rule, "eigenvalue"), task, "raw"),
        torch.Generator().manual_seed(0),
    )
    plain = Unroll(rule, task, "raw")
    runs = [u.start(generator.manual_seed(0), torch.full((2,), 20)) for u in (unroll, plain)]
    with torch.no_grad():
        ends = [
            u.run(rule.meta_params(), r, 8, generator.manual_seed(1), lambda n: None)[0].params["x"]
            for u, r in zip((unroll, plain), runs, strict=True)
        ]
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_the_papers_window_has_no_eigenvalue_during_meta_training():
    """With (R, m) = (1, 100) the first nonzero eigenvalue comes at step 101, after the end of runs of 100 steps."""
    rule = make("lstm_dmd")
    states, shown = {"x": rule.init_state(torch.zeros(3))}, []
    for step in range(101):
        param = {"x": torch.tensor([1.0, 2.0, 3.0]) * 0.9**step}
        shared, states = rule.shared_context(
            rule.meta_params(), {}, states, param, StepContext(torch.tensor(float(step)))
        )
        shown.append(float(shared))
    assert (rule.config.rank, rule.config.num_snapshots) == (1, 100)
    assert shown[:100] == [0.0] * 100
    assert shown[100] == pytest.approx(0.9)


def test_the_quick_quadratic_measures_all(monkeypatch):
    numbers = lstm_quadratic._quadratic(experiment(seeds=1)).numbers
    summed = lstm_quadratic.SUMMED
    assert {f"{summed} {name}" for name in ("the LSTM", *lstm_quadratic.HAND_DESIGNED)} < set(numbers)
    assert numbers[f"{summed} NAG"][0] < 300  # 100 steps from a first loss of 10 on average
    assert all(rate[0] in lstm_quadratic.GRID for name, rate in numbers.items() if name.startswith("lr of"))


def test_problems_side_by_side_are_runs_of_their_own():
    """For a coordinatewise rule, one run on the sum is many runs. Uses the norm, whose gradients mix coordinates."""
    rule = make("lstm", preprocessing="none", hidden_size=4)
    many = lstm_quadratic.StackedLeastSquares(problems=3, dim=4, init_std=1.0, squared=False)
    one = make_task("quadratic", dim=4, init_std=1.0, squared=False)
    start = many.init(torch.Generator().manual_seed(0))
    states = [rule.init_state(start.params["x"]), *(rule.init_state(x) for x in start.params["x"])]
    params = [start.params["x"], *start.params["x"]]
    batches = [start.constants, *({k: v[i] for k, v in start.constants.items()} for i in range(3))]
    for step in range(3):
        context, found = StepContext(torch.tensor(float(step))), []
        for number, task in enumerate([many, one, one, one]):
            grads, loss = task.grad_and_value({"x": params[number]}, batches[number])
            delta, states[number] = rule.update(rule.meta_params(), grads["x"], states[number], params[number], context)
            params[number] = (params[number] + delta).detach()
            found.append(float(loss))
        assert found[0] == pytest.approx(sum(found[1:]), rel=1e-6)
    torch.testing.assert_close(params[0], torch.stack(params[1:]))


def test_meta_seeds_that_train_side_by_side_are_independent(tmp_path):
    """What a meta-seed learns does not depend on the other one, and is found in the cache."""
    rule, task = make("lstm", hidden_size=3, preprocessing="none"), make_task("quadratic", dim=3)
    estimator = TruncatedBackprop(2, 4, Horizon(9), stagger=False)
    options = {"num_steps": 5, "lr": 1e-2, "num_checkpoints": 2, "schedule": "cosine"}

    def with_seeds(*seeds):
        found = experiment(tmp_path)
        found.seeds = seeds
        return found

    for normalize in (False, True, "tensor", "clip"):
        found = [
            meta_train_seeds(with_seeds(*seeds), "", rule, task, estimator, normalize=normalize, **options)
            for seeds in ((3, 5), (3, 9), (3, 5))
        ]
        assert [len(checkpoints) for checkpoints in found] == [2, 2, 2]
        for (mine, my_other), (theirs, their_other), (again, _) in zip(*found, strict=True):
            for name, value in mine.items():
                assert torch.equal(again[name], value)
                torch.testing.assert_close(theirs[name], value)
                assert not torch.equal(their_other[name], my_other[name])
        moved = found[0][1][0]["w_hidden0"] - found[0][0][0]["w_hidden0"]
        assert 0 < moved.abs().max() < 5e-2


def test_gradients_are_normalized_by_meta_seed():
    grads = {"a": torch.tensor([[3.0, 0.0], [0.3, 0.0]]), "b": torch.tensor([[4.0], [0.4]])}
    double = {name: grad / 2 for name, grad in grads.items()}  # means over all runs, of two seeds
    expected = {
        False: ([3.0, 0.3], [4.0, 0.4]),
        True: ([0.6, 0.6], [0.8, 0.8]),
        "tensor": ([1.0, 1.0], [1.0, 1.0]),
        "clip": ([0.6, 0.3], [0.8, 0.4]),
    }
    for how, (of_a, of_b) in expected.items():
        found = normalize_by_seed(double, how, 2)
        assert found["a"][:, 0].tolist() == pytest.approx(of_a)
        assert found["b"][:, 0].tolist() == pytest.approx(of_b)


def test_the_quick_findings_and_windows_measure_all(monkeypatch):
    quick = experiment(seeds=2)
    monkeypatch.setattr(lstm_quadratic, "RECIPES", {k: lstm_quadratic.RECIPES[k] for k in ("default", "3200 steps")})
    numbers = lstm_quadratic._findings(quick).numbers
    assert len(numbers) == 8
    assert len(numbers[f"{lstm_quadratic.FINAL}3200 steps"]) == 2
    monkeypatch.setattr(eigenvalue, "make_task", lambda name, **options: make_task("breast-cancer-logreg"))
    monkeypatch.setattr(eigenvalue, "WINDOWS", [(1, 3), (2, 4)])
    numbers = eigenvalue._windows(quick).numbers
    assert set(numbers) == {f"R = {r}, m = {m}{where}" for r, m in eigenvalue.WINDOWS for where in ("", ", batch 16")}
    assert all(len(row) == 2 and all(map(math.isfinite, row)) for row in numbers.values())


# --- Recipes and weights ---


def test_there_is_a_rule_for_every_recipe():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_the_recipes_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--model.tasks=[breast-cancer-logreg]", "--model.validation_tasks=[breast-cancer-logreg]"]
    small += ["--model.validation_horizon=2", "--model.validation_seeds=1", "--model.steps_per_epoch=1"]
    small += ["--model.estimator.init_args.truncation=2", "--model.tasks_per_step=1", "--trainer.max_steps=1"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    assert main(["meta-train", "fit", "--config", str(FOLDER / f"{name}.yaml"), *small, *quiet]) == 0
    folder = name.replace("_", "-")
    assert lopt.load_rule(tmp_path / "runs" / folder / "rule").kind == RULES[name]


@pytest.mark.parametrize("name", lstm.LEARNED)
def test_the_bundled_rules_train(name):
    """All three lower the loss of a small net in 80 steps; windows are short enough for eigenvalues to appear."""
    rule = lopt.load_rule(name)
    assert rule.kind == ("lstm" if name == "lstm" else "lstm_dmd")
    (losses,) = losses_of(rule, [rule.meta_params()], "digits-sigmoid-mlp", 80, 2, seed=0)
    assert float(losses[:, -10:].mean() / losses[:, 0].mean()) < 0.7
    assert rule.config.rank == 0 or rule.config.num_snapshots < 100
