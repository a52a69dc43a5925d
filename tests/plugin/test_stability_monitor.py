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


@pytest.mark.parametrize(("every", "steps", "estimates"), [(1, 20, 9), (5, 20, 2), (30, 65, 2), (100, 99, 0)])
def test_only_steps_that_an_estimate_looks_at_cost_anything(monkeypatch, every, steps, estimates):
    looked, copies, cpu = [], [], torch.Tensor.cpu

    class Counts(StabilityMonitor):
        def _sketch(self, params):
            looked.append(self._steps)
            before = len(copies)
            monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: (copies.append(1), cpu(tensor))[1])
            sketch = super()._sketch(params)
            monkeypatch.setattr(torch.Tensor, "cpu", cpu)
            assert len(copies) == before + 1  # one for all parameters
            return sketch

    module, monitor = Quadratic(lr=0.1), Counts(rank=3, window=12, every_n_steps=every)
    fit(module, monitor, steps=steps)
    at = [step for step in range(12, steps + 1) if step % every == 0]
    assert len(at) == estimates
    upcoming = {step for step in range(steps + 1) if -step % every <= 12}
    assert set(looked) == upcoming
    assert len(looked) == len(upcoming)
    expected = 0.975 if estimates else float("nan")
    assert monitor.spectral_radius == pytest.approx(expected, abs=2e-3, nan_ok=True)


def test_two_bytes_per_parameter_are_enough():
    monitor, params = StabilityMonitor(), [torch.nn.Parameter(torch.ones(shape)) for shape in (1000, (30, 50), ())]
    monitor._sketch(params)
    kept = [t for t in torch.utils._pytree.tree_leaves(vars(monitor)) if isinstance(t, torch.Tensor)]
    assert sum(t.numel() * t.element_size() for t in kept) <= 2 * sum(p.numel() for p in params)


def test_blocks_and_tensors_are_one_sketch(monkeypatch):
    """However the coordinates are cut, the sketch is linear, and keeps inner products."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 50_000, generator=generator)
    monitor = StabilityMonitor(sketch_size=1024)
    whole = monitor._sketch([first]), monitor._sketch([second])
    assert float(whole[0] @ whole[1]) == pytest.approx(float(first @ second), abs=4 * 50_000 / 32)
    assert float(whole[0] @ whole[0]) == pytest.approx(float(first @ first), rel=0.2)
    torch.testing.assert_close(monitor._sketch([first + 2 * second]), whole[0] + 2 * whole[1], rtol=1e-4, atol=1e-3)
    monkeypatch.setattr("lightning_lopt.plugin.stability_monitor._BLOCK", 5000)
    torch.testing.assert_close(monitor._sketch([first]), whole[0])


def test_two_optimizers_that_step_on_every_batch_count_as_one_step():
    class Two(Quadratic):
        def __init__(self):
            super().__init__(0.1)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.logged.append(self.trainer.callback_metrics.get("lopt/spectral_radius"))
            optimizers = self.optimizers()
            self.manual_backward(0.5 * (HESSIAN * torch.cat([self.first, self.rest]) ** 2).sum())
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            return [torch.optim.SGD([param], lr=self.lr) for param in (self.first, self.rest)]

    module, monitor = Two(), StabilityMonitor(rank=3, window=12, every_n_steps=15)
    fit(module, monitor, steps=40)
    assert monitor.spectral_radius == pytest.approx(0.975, abs=2e-3)


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"window": 3}, {"sketch_size": 8}, {"threshold": 0.9}, {"patience": 0}, {"rank": 1.5}]
)
def test_errors_say_what_is_allowed(options):
    with pytest.raises(ValueError, match="is not allowed: it must be"):
        StabilityMonitor(**options)
