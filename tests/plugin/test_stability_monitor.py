"""StabilityMonitor: the radius against closed forms, in runs that settle and in runs that diverge."""

import warnings

import lightning as L
import pytest
import torch
from lightning_cases import KNOWN_WARNINGS

from lightning_lopt import StabilityMonitor
from lightning_lopt.plugin.stability_monitor import radius

pytestmark = KNOWN_WARNINGS
HESSIAN = torch.tensor([4.0, 1.0, 0.25])


class Quadratic(L.LightningModule):
    """1/2 sum_i h_i x_i^2 in two tensors, by gradient descent: x_i shrinks by 1 - lr h_i a step."""

    def __init__(self, lr, momentum=0.0):
        super().__init__()
        self.lr, self.momentum = lr, momentum
        self.first, self.rest = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(2))
        self.frozen = torch.nn.Parameter(torch.full((5,), torch.nan), requires_grad=False)
        self.logged = []

    def training_step(self, batch, batch_idx):
        self.logged.append(self.trainer.callback_metrics.get("lopt/spectral_radius"))
        return 0.5 * (HESSIAN * torch.cat([self.first, self.rest]) ** 2).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


def fit(module, monitor, steps=40, **options):
    options = {"max_steps": steps, "logger": False, "enable_checkpointing": False, "accelerator": "cpu", **options}
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    trainer = L.Trainer(callbacks=[monitor], **options, **silent)
    trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(100, 1)))
    return trainer


@pytest.mark.parametrize(
    ("lr", "momentum", "expected"),
    [
        (0.1, 0.0, 1 - 0.1 * 0.25),  # the slowest direction
        (0.4, 0.0, 0.9),  # 1 - 0.4 * 0.25 at last; the sharpest shrinks by 0.6
        (0.55, 0.0, 1.2),  # the sharpest grows: |1 - 0.55 * 4|
        (0.1, 0.9, 0.9**0.5),  # complex pairs, all of size sqrt(beta)
    ],
)
def test_radius_is_that_of_gradient_descent_on_a_quadratic(lr, momentum, expected):
    monitor = StabilityMonitor(rank=6 if momentum else 3, window=12)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lopt/spectral_radius has been")
        trainer = fit(Quadratic(lr, momentum), monitor, steps=25)
    assert monitor.spectral_radius == pytest.approx(expected, abs=2e-3)
    assert float(trainer.callback_metrics["lopt/spectral_radius"]) == pytest.approx(monitor.spectral_radius)


def test_warns_while_there_is_time_and_only_once():
    module, monitor = Quadratic(lr=0.55), StabilityMonitor(rank=3, window=12)
    with pytest.warns(UserWarning, match="steps double every 4 steps, and training is about to diverge") as caught:
        fit(module, monitor, steps=30)
    assert len([w for w in caught if "spectral_radius" in str(w.message)]) == 1
    assert module.first.isfinite().all()
    assert StabilityMonitor().threshold > 1


def test_settling_runs_are_not_warned_of():
    fit(Quadratic(lr=0.3), StabilityMonitor())  # warnings are errors


def test_counts_optimizer_steps_under_accumulation():
    module, monitor = Quadratic(lr=0.1), StabilityMonitor(rank=3, window=12)
    fit(module, monitor, steps=20, accumulate_grad_batches=3)
    assert monitor.spectral_radius == pytest.approx(0.975, abs=2e-3)
    first = next(index for index, value in enumerate(module.logged) if value is not None)
    assert first == 3 * 12  # twelve steps after the start


def test_a_fresh_fit_begins_afresh():
    monitor = StabilityMonitor(rank=3, window=12)
    fit(Quadratic(lr=0.1), monitor, steps=20)
    fit(Quadratic(lr=0.2), monitor, steps=20)
    assert monitor.spectral_radius == pytest.approx(0.95, abs=2e-3)


def test_radius_of_what_stands_still_or_is_not_finite():
    snapshots = torch.ones(4, 10, dtype=torch.float64)
    assert radius(snapshots, 2) == 0
    snapshots[0, -1] = torch.inf
    assert torch.isnan(torch.tensor(radius(snapshots, 2)))


def test_sketches_keep_the_radius_of_a_large_model():
    """10,000 coordinates, of which 256 signed sums are kept."""
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Linear(100, 100, bias=False)
    directions, monitor = torch.randn(2, 100, 100, generator=generator), StabilityMonitor()
    for step in range(21):
        with torch.no_grad():
            module.weight.copy_(0.97**step * directions[0] + 0.7**step * directions[1])
        monitor._snapshots.append(monitor._sketch(list(module.parameters())))
    assert radius(torch.stack(monitor._snapshots, 1), 2) == pytest.approx(0.97, abs=1e-3)


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"window": 3}, {"sketch_size": 8}, {"threshold": 0.9}, {"patience": 0}, {"rank": 1.5}]
)
def test_errors_say_what_is_allowed(options):
    with pytest.raises(ValueError, match="is not allowed: it must be"):
        StabilityMonitor(**options)
