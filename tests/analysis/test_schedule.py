"""What `lopt show` says of a scheduled rule: every number in words, and the schedule that the rule really has."""

import dataclasses

import pytest
import torch

import lightning_lopt as lopt
from lightning_lopt import cli
from lightning_lopt.analysis import schedule
from lightning_lopt.rules import ScheduledConfig, StepContext, make


def test_every_readable_number_is_in_the_table_with_its_meaning():
    numbers = {name: 0.01 + 0.01 * i for i, name in enumerate(ScheduledConfig.meanings())}
    lines = schedule.describe(make("scheduled", **numbers)).splitlines()
    for name, meaning in ScheduledConfig.meanings().items():
        assert any(line.split() == [name, f"{numbers[name]:.4g}", *meaning.split()] for line in lines), name


def test_the_step_sizes_drawn_are_those_of_the_rules_steps():
    """On a vector that no other number changes: delta = -step size * u, u = 1 for a first gradient at any step."""
    rule = make("scheduled", nominal_stepsize=0.1, peak=0.5, start=-1.0, warmup=0.3, anneal=0.7, unknown_late=-0.4)
    param = torch.zeros(3)
    for num_steps in (200, None):
        steps, sizes = schedule.step_sizes(rule, num_steps, 5)
        for step, size in zip(steps, sizes, strict=True):
            context = StepContext(torch.tensor(step), None, num_steps)
            delta, state = rule.update(rule.meta_params(), torch.ones(3), rule.init_state(param), param, context)
            direction = state.exp_avg.mean(0) * torch.rsqrt(state.exp_avg_sq + rule.config.eps)
            torch.testing.assert_close(delta, -size * direction)


def test_a_rule_that_was_meta_trained_on_says_so():
    rule = make("scheduled", peak=0.5)
    assert "trained on" not in schedule.describe(rule)
    rule.schedule_fraction.data += 0.1
    assert "trained on" in schedule.describe(rule)


def test_the_command_prints_and_draws(tmp_path, capsys):
    assert cli.main(["show", "star", "--plot", str(tmp_path / "star.png")]) == 0
    said = capsys.readouterr().out
    assert "warmup   0.1972   fraction of the run until the peak" in said
    assert (tmp_path / "star.png").stat().st_size > 10_000


def test_other_kinds_cannot_be_drawn(tmp_path, capsys):
    assert cli.main(["show", "hyperparam", "--plot", str(tmp_path / "no.png")]) == 2
    assert "--plot draws rules of kind 'scheduled'" in capsys.readouterr().err


def test_the_numbers_of_star_are_in_its_file(tmp_path):
    star = lopt.load_rule("star")
    assert dataclasses.asdict(star.config)["warmup"] == pytest.approx(0.1972141998509566)
