"""The hand-designed baselines match torch.optim, and the search for their settings never ends at an edge."""

import math

import pytest
import torch

from lightning_lopt.evaluation.baselines import SGDM, Adam, BaselineConfig, NAdamW, RMSProp
from lightning_lopt.evaluation.runs import Runs
from lightning_lopt.evaluation.tuning import BASELINES, Grid, RandomSearch
from lightning_lopt.rules import StepContext

STEPS = 60


def nadam(params, lr, **options):
    return torch.optim.NAdam(params, lr=lr, decoupled_weight_decay=True, **options)


BASELINES_UNDER_TEST = {
    "adam": (Adam, {"lr": 1e-2}, torch.optim.Adam, {}),
    "adam-betas": (Adam, {"lr": 1e-2, "beta1": 0.7, "beta2": 0.95}, torch.optim.Adam, {"betas": (0.7, 0.95)}),
    "adam-eps": (Adam, {"lr": 1e-2, "eps": 1e-3}, torch.optim.Adam, {"eps": 1e-3}),
    "adamw": (Adam, {"lr": 1e-2, "weight_decay": 0.1}, torch.optim.AdamW, {"weight_decay": 0.1}),
    "sgd": (SGDM, {"lr": 1e-1, "momentum": 0.0}, torch.optim.SGD, {}),
    "sgdm": (SGDM, {"lr": 1e-1}, torch.optim.SGD, {"momentum": 0.9}),
    "rmsprop": (RMSProp, {"lr": 1e-3}, torch.optim.RMSprop, {}),
    "rmsprop-alpha": (RMSProp, {"lr": 1e-3, "alpha": 0.9}, torch.optim.RMSprop, {"alpha": 0.9}),
    "nadam": (NAdamW, {"lr": 1e-2}, nadam, {}),
    "nadamw": (
        NAdamW,
        {"lr": 3e-2, "beta1": 0.8, "beta2": 0.99, "weight_decay": 0.03, "momentum_decay": 1e-2},
        nadam,
        {"betas": (0.8, 0.99), "weight_decay": 0.03, "momentum_decay": 1e-2},
    ),
}


def gradient(param, step):
    """The gradient of a badly scaled, noisy problem; the noise depends on the step alone."""
    noise = torch.randn(param.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return (torch.tensor([1.0, 0.1, 10.0, 1e-3]) * param + 0.3 * noise).to(param.dtype)


def ours(rule, start, num_steps):
    """Parameters after each step."""
    meta_params = {name: value.detach() for name, value in rule.meta_params().items()}
    param, state, rows = start.clone(), rule.init_state(start), []
    for step in range(STEPS):
        context = StepContext(torch.tensor(float(step)), None, num_steps)
        delta, state = rule.update(meta_params, gradient(param, step), state, param, context)
        param = param + delta
        rows.append(param)
    return torch.stack(rows)


def theirs(optimizer, start, *, schedule=None, **options):
    param, rows = torch.nn.Parameter(start.clone()), []
    opt = optimizer([param], **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, schedule) if schedule else None
    for step in range(STEPS):
        param.grad = gradient(param.detach(), step)
        opt.step()
        if scheduler:
            scheduler.step()
        rows.append(param.detach().clone())
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", BASELINES_UNDER_TEST)
def test_a_baseline_matches_torch(name, dtype):
    rule, hyperparameters, optimizer, options = BASELINES_UNDER_TEST[name]
    start = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.1, 0.0, -1.0, 2.0]], dtype=dtype)
    expected = theirs(optimizer, start, lr=hyperparameters["lr"], **options)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5  # rounding adds up over the steps
    torch.testing.assert_close(ours(rule(**hyperparameters), start, None), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("rule", [Adam, SGDM, NAdamW])
@pytest.mark.parametrize("warmup", [0.0, 0.2])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_schedules_match_torch(rule, warmup, schedule):
    torchs = {Adam: torch.optim.AdamW, SGDM: torch.optim.SGD, NAdamW: nadam}[rule]
    options = {"momentum": 0.9} if rule is SGDM else {"weight_decay": 0.02}
    ramp = int(warmup * STEPS)

    def factor(step):
        rise = min(1.0, (step + 1) / ramp) if ramp else 1.0
        fall = 0.5 * (1 + math.cos(math.pi * max(step - ramp, 0) / (STEPS - ramp)))
        return rise * (fall if schedule == "cosine" else 1.0)

    start = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    made = rule(BaselineConfig(schedule), lr=3e-2, warmup=warmup, **({} if rule is SGDM else options))
    expected = theirs(torchs, start, schedule=factor, lr=3e-2, **options)
    torch.testing.assert_close(ours(made, start, STEPS), expected, atol=1e-9, rtol=1e-9)


def test_cosine_matches_torchs_cosine_annealing():
    start, lr = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64), 3e-2
    param = torch.nn.Parameter(start.clone())
    opt = torch.optim.Adam([param], lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=STEPS)
    for step in range(STEPS):
        param.grad = gradient(param.detach(), step)
        opt.step()
        scheduler.step()
    last = ours(Adam(BaselineConfig("cosine"), lr=lr), start, STEPS)[-1]
    torch.testing.assert_close(last, param.detach(), atol=1e-9, rtol=1e-9)


def test_cosine_needs_the_length():
    with pytest.raises(ValueError, match="needs the run's length"):
        ours(Adam(BaselineConfig("cosine")), torch.ones(4), None)


# --- The search ---


def runs_of(tail, mean, num_seeds=2):
    """Runs with these losses; NaN: they diverged."""
    ones = [1.0] * num_seeds
    same = {"steps": 100, "initial": ones, "accuracy": ones, "test_loss": ones, "curve": [[1.0]] * num_seeds}
    return Runs(**same, final=[tail] * num_seeds, tail=[tail] * num_seeds, mean=[mean] * num_seeds)


def bowl(best_lr, best_decay=None, best_lr_for_mean=None, limit=math.inf):
    """Runs of a setting, with the lowest losses at the given values; they diverge above `limit`."""

    def response(setting):
        if setting["lr"] > limit:
            return runs_of(math.nan, math.nan)
        decay = 0.0
        if best_decay is not None:
            decay = 0.1 * abs(math.log10(setting["weight_decay"] + 1e-6) - math.log10(best_decay + 1e-6))
        off = [abs(math.log10(setting["lr"] / lr)) for lr in (best_lr, best_lr_for_mean or best_lr)]
        return runs_of(*(0.01 * (1 + distance + decay) for distance in off))

    return response


def search(grid, response):
    """The result of a search, and all settings that it tried."""
    tried = []

    def measure(settings):
        tried.extend(settings)
        return [response(setting) for setting in settings]

    return grid.search(measure), tried


@pytest.mark.parametrize("grid", [BASELINES[name].search for name in ("adam", "sgdm", "adamw")])
@pytest.mark.parametrize("best_lr", [1e-7, 3e-5, 1e-3, 0.3, 1.0, 3.0, 30.0, 1e4])
def test_the_best_rate_lies_inside_what_was_tried(grid, best_lr):
    tuned, tried = search(grid, bowl(best_lr, best_lr_for_mean=10 * best_lr))
    rates = [setting["lr"] for setting in tried]
    for measure, best in (("final", best_lr), ("mean", 10 * best_lr)):
        lr = tuned.best[measure].hyperparameters["lr"]
        assert lr == pytest.approx(best)
        assert min(rates) < lr < max(rates)
    assert tuned.num_trials == len(tried) == len({str(setting) for setting in tried})  # nothing is tried twice


@pytest.mark.parametrize("best_decay", [0.0, 1e-4, 1e-2, 1e-1, 10.0])
def test_the_best_decay_lies_inside_what_was_tried(best_decay):
    tuned, tried = search(Grid(decays=4), bowl(1e-3, best_decay))
    chosen = tuned.best["final"].hyperparameters
    assert chosen == {"lr": pytest.approx(1e-3), "weight_decay": pytest.approx(best_decay)}
    assert max(setting["weight_decay"] for setting in tried) > best_decay


def test_a_stable_rate_is_found_when_the_whole_grid_diverges():
    tuned, _ = search(Grid(), bowl(1.0, limit=2e-6))
    assert tuned.best["final"].hyperparameters["lr"] == 1e-6


def test_a_search_without_an_end_says_so():
    with pytest.raises(RuntimeError, match="improve to the edge"):
        search(Grid(), bowl(1e30))


def test_a_setting_with_one_diverged_seed_never_wins():
    good, bad = runs_of(0.5, 0.5), runs_of(0.1, 0.1)
    bad.final[0] = math.nan
    tuned, _ = search(Grid(), lambda setting: good if setting["lr"] == 0.01 else bad)
    assert tuned.best["final"].hyperparameters == {"lr": 0.01}


def test_random_search_is_reproducible_and_inside_its_box():
    box = BASELINES["nadamw"].search.box
    settings = RandomSearch(box, 40).settings()
    assert settings[:10] == RandomSearch(box, 10).settings()
    for setting in settings:
        for name, (low, high) in box.items():
            value = 1 - setting[name] if name.startswith("beta") else setting[name]
            assert low * 0.999 <= value <= high * 1.001
    response = bowl(1e-2)
    tuned, tried = search(RandomSearch(box, 40), response)
    assert tried == settings
    assert tuned.best["mean"].hyperparameters == min(tried, key=lambda setting: response(setting).mean[0])


def test_every_baseline_has_the_hyperparameters_that_its_search_sets():
    for baseline in BASELINES.values():
        settings = baseline.search.settings() if isinstance(baseline.search, RandomSearch) else [{"lr": 0.1}]
        assert set(settings[0]) <= set(baseline.make(**settings[0]).meta_params())
