"""MetaTrainer with its tasks divided between two processes: assignment, logs, and bit-exact resuming."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning_cases import KNOWN_WARNINGS
from meta_cases import TWO, Parabola, assert_reports_equal, meta, run

from lightning_lopt import MetaTrainer

pytestmark = [*KNOWN_WARNINGS, pytest.mark.filterwarnings("ignore:.*save_top_k=-1.*")]


class Recording(MetaTrainer):
    """Records the tasks that it advances, with their meta-losses."""

    def _estimate(self, index, number):
        estimate = super()._estimate(index, number)
        self.best[f"turn {number}"] = self.best.get(f"turn {number}", []) + [(index, float(estimate.meta_loss))]
        return estimate


class Logged(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        epoch = trainer.current_epoch
        pl_module.best[f"logged {epoch}"] = {k: float(v) for k, v in trainer.callback_metrics.items()}


def spread():
    tasks = [Parabola(name=name, noise=0.2, start=start) for name, start in (("a", 1.0), ("b", 10.0), ("c", 100.0))]
    return meta(kind=Recording, tasks=tasks, tasks_per_step=1, steps_per_epoch=2)


def test_tasks_are_spread_over_processes(tmp_path):
    ranks, _ = run(tmp_path, "two", spread(), callbacks=[Logged()], ranks=2, **TWO)
    turns = [[rank["best"][f"turn {step}"] for step in range(8)] for rank in ranks]
    assert [[index for ((index, _),) in rank] for rank in turns] == [[0, 2, 1, 0, 2, 1, 0, 2], [1, 0, 2, 1, 0, 2, 1, 0]]
    for epoch in range(4):
        seen: dict[int, list[float]] = {}
        for rank in turns:
            for ((index, loss),) in rank[2 * epoch : 2 * epoch + 2]:
                seen.setdefault(index, []).append(loss)
        logged = ranks[0]["best"][f"logged {epoch}"]
        assert logged == ranks[1]["best"][f"logged {epoch}"]
        for index, name in enumerate("abc"):  # four turns in an epoch: each task had one
            assert logged[f"meta_loss/{name}"] == pytest.approx(sum(seen[index]) / len(seen[index]), rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(*(rank["weights"].values() for rank in ranks), strict=True))


def test_a_run_that_shares_its_tasks_resumes_equal_to_the_bit(tmp_path):
    whole, _ = run(tmp_path, "whole", spread(), ranks=2, **TWO)
    resumed, _ = run(tmp_path, "resumed", spread(), ranks=2, ckpt_path=tmp_path / "step=4.ckpt", **TWO)
    for report in (*whole, *resumed):
        report["best"] = {name: value for name, value in report["best"].items() if not name.startswith("turn")}
    assert_reports_equal(whole, resumed)
