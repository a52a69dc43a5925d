"""Faults injected into training: parameters stay finite, the run recovers, what happened is counted and logged."""

import csv
import math
from pathlib import Path

import pytest
import torch
from contract_table import RULES_UNDER_TEST
from lightning.pytorch.loggers import CSVLogger
from lightning_cases import KNOWN_WARNINGS, Module, fit
from optimizer_cases import assert_equal, hidden, parameters, run, snapshot, star

import lightning_lopt as lopt
from lightning_lopt import RuleOptimizer
from lightning_lopt.optimizer.trust_band import PATIENCE, TrustBand

pytestmark = KNOWN_WARNINGS

FAULT_AT, STEPS = 8, 40


class Run:
    """A rule on a small regression; tests corrupt `optimizer` and `param` between steps."""

    def __init__(self, case, safeguard=True):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(16, 3, generator=generator)
        self.targets = self.inputs @ torch.randn(3, 2, generator=generator)
        self.param = torch.nn.Parameter(torch.zeros(3, 2))
        self.optimizer = RuleOptimizer(hidden([self.param]), case.make(), num_steps=STEPS, safeguard=safeguard)
        self.losses = []

    def loss(self, targets=None):
        return (self.inputs @ self.param - (self.targets if targets is None else targets)).square().mean()

    def step(self, spoil_gradient=None, targets=None):
        self.optimizer.zero_grad()
        loss = self.loss(targets)
        loss.backward()
        if spoil_gradient is not None:
            self.param.grad[0, 0] = spoil_gradient
        self.optimizer.step(loss=loss)
        self.losses.append(self.loss().item())
        assert self.param.isfinite().all()
        assert all(t.isfinite().all() for t in self.optimizer.state[self.param].values())


def flip_a_bit(run):
    """Flip the highest exponent bit of a number in the first accumulator."""
    state = run.optimizer.state[run.param]
    names = ("exp_avg_sq", "exp_avg", "cell", "hidden", "grads")
    tensor = next(state[name] for name in names if name in state and state[name].numel())
    tensor.view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 30)


def explode_the_schedule(run, step):
    run.optimizer.param_groups[0]["lr"] = 10.0 ** (40 * (step - FAULT_AT)) if 0 <= step - FAULT_AT < 3 else 1.0


# fault -> (first step that must be skipped, how many); None: finite, or not, as the rule takes it
FAULTS = {
    "NaN": (FAULT_AT, 1),
    "inf": (FAULT_AT, 1),
    "1e30": None,  # to those who square it infinite; others follow it
    "bit flip": None,
    "schedule": (FAULT_AT + 1, 2),
    "batch": (FAULT_AT, 0),
}


def faulty_step(run, fault, step):
    at_fault = step == FAULT_AT
    if fault == "bit flip" and at_fault:
        flip_a_bit(run)
    if fault == "schedule":
        explode_the_schedule(run, step)
    gradient = {"NaN": math.nan, "inf": math.inf, "1e30": 1e30}.get(fault) if at_fault else None
    run.step(gradient, 1e3 * run.targets if fault == "batch" and at_fault else None)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("case", RULES_UNDER_TEST, ids=lambda case: f"{case.kind} {case.config}"[:40])
def test_parameters_stay_finite_and_what_is_not_is_counted(case, fault):
    faulty, sound = Run(case), Run(case)
    for step in range(STEPS):
        faulty_step(faulty, fault, step)
        sound.step()
    counted = faulty.optimizer.num_skipped()
    if FAULTS[fault] is not None:
        first, number = FAULTS[fault]
        assert counted == number
        if number:  # the steps are gone, and nothing else: the run is so many steps behind
            assert set(faulty.losses[first : first + number]) == {faulty.losses[first - 1]}
            assert faulty.losses[first + number :] == pytest.approx(sound.losses[first:-number], rel=1e-5)
    elif counted:
        assert faulty.losses[-1] <= faulty.losses[FAULT_AT - 1] + 0.1 * faulty.losses[0]


# --- The trust band ---


def play(losses):
    trust, history = TrustBand.new(), []
    for loss in losses:
        trust = trust.observe(torch.tensor(loss))
        history.append(int(trust.fallback))
    return trust, history


def noise(size, count, seed=0):
    return (size * torch.randn(count, generator=torch.Generator().manual_seed(seed))).tolist()


FALLING = [2.3 * math.exp(-i / 200) + e for i, e in enumerate(noise(0.2, 600))]


@pytest.mark.parametrize(
    "losses",
    [FALLING, [1 + e for e in noise(0.3, 2000)], [1.0] * 500, [1 + abs(e) ** 3 for e in noise(1.0, 2000)], [0.0] * 50],
    ids=["falling", "noise alone", "constant", "heavy tails", "zero"],
)
def test_sound_losses_keep_the_trust(losses):
    trust, history = play(losses)
    assert sum(history) == 0
    assert trust.handovers == 0


def test_the_rule_is_left_after_patience_and_taken_up_again_after_as_much():
    trust, history = play([*FALLING[:300], *[50.0] * 40, *FALLING[300:400]])
    assert history.index(1) == 300 + PATIENCE - 1
    assert [history.count(1), trust.handovers] == [40, 1]
    assert history[340 + PATIENCE - 1 :] == [0] * (100 - PATIENCE + 1)


@pytest.mark.parametrize("scale", [1e-6, 1.0, -1.0, 1e6])
@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_the_band_knows_no_scale(scale, shift):
    spiked = [*FALLING[:100], *[6.0] * 30, *FALLING[100:150]]
    if scale < 0:  # a negative loss that falls
        spiked, scale = [loss - 10.0 for loss in spiked], 1.0
    assert play([scale * (loss + shift) for loss in spiked])[1] == play(spiked)[1]


def test_fewer_bad_losses_than_patience_are_forgiven():
    assert sum(play([*FALLING[:100], *([9.0] * (PATIENCE - 1) + FALLING[100:103]) * 5])[1]) == 0


def test_a_slow_climb_is_seen_and_so_are_losses_that_are_not_finite():
    slow = [*FALLING, *(0.15 + 0.01 * i for i in range(400))]
    assert play(slow)[1].index(1) < 600 + 150
    assert play([1.0] * 20 + [math.nan] * PATIENCE)[1][-1] == 1
    assert play([math.inf] * PATIENCE + [1.0] * PATIENCE)[1][-2:] == [1, 0]


# --- Handing over ---


class Jumps(Module):
    """For forty steps the loss is a hundred higher, with an unchanged gradient."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 100.0 * (40 <= self.global_step < 80)


@pytest.mark.filterwarnings("ignore:The loss left its trust band 1 times")
def test_a_handover_is_counted_and_logged(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("lightning_lopt.plugin.callback.rank_zero_info", said.append)
    logger = CSVLogger(tmp_path)
    callback = lopt.LearnedOptimizer(star(), safeguard="fallback")
    arguments = {"max_epochs": 15, "logger": logger, "log_every_n_steps": 1}
    with pytest.warns(UserWarning, match="The loss left its trust band 1 times"):
        runner = fit(tmp_path, callback, module=Jumps(), **arguments)
    assert runner.global_step == 120
    assert runner.optimizers[0].num_handovers() == 1
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = [row["lopt/fallback"] for row in csv.DictReader(file) if row.get("lopt/fallback")]
    assert [float(row) for row in rows] == [0.0] * 49 + [1.0] * 40 + [0.0] * 31
    told = [text for text in said if "trust band" in text]
    assert ["only the rule's nominal term" in text for text in told] == [True, False]
    assert "the whole rule is applied again" in told[1]


def test_fallen_back_a_step_is_the_nominal_term_to_the_bit_and_inside_the_band_the_whole_rule():
    watched = RuleOptimizer(parameters(), star(), safeguard="fallback")
    whole = RuleOptimizer(parameters(), star(), safeguard=True, backend="reference")
    alone = RuleOptimizer(parameters(), star(step_mult=0.0, seed=0), safeguard=True, backend="reference")
    for optimizer in (watched, whole):
        run(optimizer, 5, loss=1.0)
    plain = [t for t in snapshot(watched) if t.shape != (9,)]
    assert_equal(plain, snapshot(whole))
    run(watched, 15, start=5, loss=1.0)
    run(watched, PATIENCE - 1, start=20, loss=9.0)
    before = [p.detach().clone() for p in watched.param_groups[0]["params"]]
    alone.rule.load_state_dict(watched.rule.state_dict())
    for mine, theirs in zip(alone.param_groups[0]["params"], watched.param_groups[0]["params"], strict=True):
        mine.data.copy_(theirs.data)
        state = watched.state[theirs]
        alone.state[mine] = {name: t.clone() for name, t in state.items() if name != "trust"}
    run(watched, 1, start=40, loss=9.0)
    run(alone, 1, start=40)
    assert watched.num_handovers() == 1
    moved = [p.detach() for p in watched.param_groups[0]["params"]]
    assert_equal(moved, [p.detach() for p in alone.param_groups[0]["params"]])
    assert any(not torch.equal(a, b) for a, b in zip(before, moved, strict=True))


def test_the_trust_is_saved_and_a_resumed_run_is_equal_to_the_bit():
    losses = [*FALLING[:30], *[9.0] * 30]
    whole = RuleOptimizer(parameters(), star(), safeguard="fallback")
    for step, loss in enumerate(losses[:35]):
        run(whole, 1, start=step, loss=loss)
    resumed = RuleOptimizer(parameters(), star(), safeguard="fallback")
    resumed.load_state_dict(whole.state_dict())
    for mine, theirs in zip(resumed.param_groups[0]["params"], whole.param_groups[0]["params"], strict=True):
        mine.data.copy_(theirs.data)
    for optimizer in (whole, resumed):
        for step, loss in enumerate(losses[35:], start=35):
            run(optimizer, 1, start=step, loss=loss)
        assert optimizer.num_handovers() == 1
    assert_equal(snapshot(whole), snapshot(resumed))


def test_what_is_refused():
    with pytest.raises(ValueError, match="kind 'lstm': it has no nominal term.*nominal_stepsize > 0"):
        RuleOptimizer(parameters(), lopt.rules.make("lstm"), safeguard="fallback")
    with pytest.raises(ValueError, match="safeguard='maybe' is not allowed: use True, False or 'fallback'"):
        RuleOptimizer(parameters(), star(), safeguard="maybe")
    with pytest.raises(ValueError, match="no fused kernel"):
        RuleOptimizer(parameters(), star(), safeguard="fallback", backend="fused")
    with pytest.raises(ValueError, match="no nominal term"):
        lopt.LearnedOptimizer(lopt.rules.make("mng"), safeguard="fallback")
    with pytest.raises(RuntimeError, match="reads the training loss"):
        run(RuleOptimizer(parameters(), star(), safeguard="fallback"), 1)
    RuleOptimizer(parameters(), lopt.rules.make("lstm", nominal_stepsize=1e-2), safeguard="fallback")
