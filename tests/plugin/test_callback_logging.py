"""What LearnedOptimizer announces and logs, and its safeguard in a Trainer."""

import logging
import math
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning_cases import (
    KNOWN_WARNINGS,
    ManualModule,
    Module,
    csv_logger,
    data,
    fit,
    learned,
    metrics,
    trainer,
    weights,
)
from optimizer_cases import LossRule, assert_equal, star

import lightning_lopt as lopt

pytestmark = KNOWN_WARNINGS


def announcements(caplog):
    return [record.message for record in caplog.records if record.message.startswith("LearnedOptimizer")]


@pytest.fixture
def said(caplog):
    """Lightning's messages, which do not reach the root logger."""
    names = ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero")
    caplog.set_level(logging.INFO)
    for name in names:
        logging.getLogger(name).addHandler(caplog.handler)
    yield lambda: list(dict.fromkeys(announcements(caplog)))
    for name in names:
        logging.getLogger(name).removeHandler(caplog.handler)


def test_the_fit_starts_with_which_rule_runs_its_size_and_its_state(tmp_path, said):
    backend = fit(tmp_path).optimizers[0].backend  # depends on whether this machine has a compiler
    # 24 + 25 parameters: 4 floats each, 3 more for rows, columns and vectors.
    assert said() == [
        f"LearnedOptimizer: (star, 207 meta-parameters) trains 49 parameters in place of AdamW, {backend} backend, "
        "24.0 bytes of state per parameter. Run length: 16 steps (from the Trainer). The module's own lr is logged, "
        "not used; its weight decay (0.01) is not used."
    ]


def test_a_loaded_rule_is_announced_by_name_and_revision(tmp_path, said):
    rule = star()
    rule.source = SimpleNamespace(name="me/fast", revision="0123456789abcdef")
    fit(tmp_path, lopt.LearnedOptimizer(rule, lr="scale"))
    (message,) = said()
    assert message.startswith("LearnedOptimizer: 'me/fast' (star, 207 meta-parameters at 0123456789ab) trains 49")
    assert message.endswith("The module's own lr multiplies its update; its weight decay (0.01) is not used.")


def test_bytes_of_state_are_what_the_optimizer_keeps(tmp_path, said):
    runner = fit(tmp_path)
    state = [
        tensor
        for tensors in runner.optimizers[0].state.values()
        for name, tensor in tensors.items()
        if name not in ("step", "skipped", "skipped_in_row")
    ]
    count = sum(p.numel() for p in runner.lightning_module.parameters())
    in_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state) / count
    assert f"{in_bytes:.1f} bytes of state per parameter" in said()[0]


@pytest.mark.parametrize(
    ("every", "accumulate", "steps"),
    [(1, 1, list(range(16))), (3, 1, [2, 5, 8, 11, 14]), (2, 2, [1, 3, 5, 7])],
)
def test_scalars_are_logged_every_so_many_steps(tmp_path, every, accumulate, steps):
    logger = csv_logger(tmp_path)
    fit(tmp_path, logger=logger, log_every_n_steps=every, accumulate_grad_batches=accumulate)
    rows = [row for row in metrics(tmp_path) if "lopt/update_rms" in row]
    assert [row["step"] for row in rows] == steps
    for row in rows:
        assert row["lopt/update_rms"] > 0
        assert 0 < row["lopt/nominal_share"] < 1
        assert row["lopt/skipped"] == 0


def test_the_logged_rms_is_that_of_the_step(tmp_path):
    class Watches(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.last, self.changes = self.flat(pl_module), []

        def on_train_batch_end(self, trainer, pl_module, *args):
            now = self.flat(pl_module)
            self.changes.append((now - self.last).square().mean().sqrt().item())
            self.last = now

        def flat(self, module):
            return torch.cat([p.detach().flatten() for p in module.parameters()])

    watches = Watches()
    fit(tmp_path, learned(), watches, logger=csv_logger(tmp_path))
    logged = [row["lopt/update_rms"] for row in metrics(tmp_path) if "lopt/update_rms" in row]
    assert logged == pytest.approx(watches.changes, rel=1e-4)


def test_several_optimizers_are_told_apart(tmp_path):
    fit(tmp_path, module=ManualModule(), logger=csv_logger(tmp_path), log_every_n_steps=2)
    row = next(row for row in metrics(tmp_path) if "lopt/update_rms" in row)
    assert {"lopt/update_rms", "lopt/update_rms-1", "lopt/nominal_share-1", "lopt/skipped-1"} <= set(row)
    assert row["lopt/update_rms"] != row["lopt/update_rms-1"]


def test_a_rule_of_one_term_logs_no_share(tmp_path):
    fit(tmp_path, lopt.LearnedOptimizer(LossRule()), logger=csv_logger(tmp_path))
    rows = metrics(tmp_path)
    assert any("lopt/update_rms" in row for row in rows)
    assert not any("lopt/nominal_share" in row for row in rows)


def test_logging_changes_nothing(tmp_path):
    often, never = (fit(tmp_path, log_every_n_steps=n, logger=bool(n) and csv_logger(tmp_path)) for n in (1, 0))
    assert_equal(weights(often), weights(never))


class Spoiled(Module):
    """Some batches have a non-finite loss; with `partly` it only reaches the last bias."""

    def __init__(self, bad, partly=False):
        super().__init__()
        self.bad, self.partly = bad, partly

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if not self.bad(self.global_step):
            return loss
        return loss + math.nan * (self.net[2].bias.sum() if self.partly else loss)


def test_bad_batches_are_passed_over_counted_and_logged(tmp_path):
    with pytest.warns(UserWarning, match="The safeguard skipped 8 tensor updates that were not finite"):
        runner = fit(tmp_path, module=Spoiled(lambda step: step in (3, 5)), logger=csv_logger(tmp_path))
    assert all(torch.isfinite(p).all() for p in weights(runner))
    assert {s["step"].item() for s in runner.optimizers[0].state.values()} == {14}
    rows = [row for row in metrics(tmp_path) if "lopt/skipped" in row]
    assert [row["lopt/skipped"] for row in rows] == [0, 0, 0, 4, 4] + [8] * 11
    assert all(math.isfinite(value) for row in rows for name, value in row.items() if name.startswith("lopt/update"))


def test_only_the_tensors_that_a_bad_batch_reaches_are_passed_over(tmp_path):
    with pytest.warns(UserWarning, match="skipped 1 tensor updates"):
        runner = fit(tmp_path, module=Spoiled(lambda step: step == 3, partly=True))
    steps = {
        name: runner.optimizers[0].state[p]["step"].item() for name, p in runner.lightning_module.named_parameters()
    }
    assert steps == {"net.0.weight": 16, "net.0.bias": 16, "net.2.weight": 16, "net.2.bias": 15}


def test_a_run_of_bad_batches_stops_training(tmp_path):
    module = Spoiled(lambda step: step >= 4)
    runner = trainer(tmp_path, learned(), max_epochs=10)
    with pytest.raises(RuntimeError, match=r"was not finite in \d+ steps in a row") as caught:
        runner.fit(module, data())
    assert "\n" not in str(caught.value)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert 4 + 20 <= runner.global_step + 1 <= 4 + 20 + 10


def test_without_the_safeguard_training_goes_on(tmp_path):
    runner = fit(tmp_path, learned(safeguard=False), module=Spoiled(lambda step: step == 3))
    assert all(torch.isnan(p).all() for p in weights(runner))


def test_the_safeguard_costs_no_bit_of_the_result(tmp_path):
    guarded, unguarded = (fit(tmp_path, learned(safeguard=safeguard)) for safeguard in (True, False))
    assert_equal(weights(guarded), weights(unguarded))
