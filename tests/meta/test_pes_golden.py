"""PES against a run of the authors' code: losses, gradients, accumulators and parameters of each truncation."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_lopt.meta import estimators
from lightning_lopt.meta.estimators import PES
from lightning_lopt.meta.schedules import Horizon
from lightning_lopt.meta.unroll import Unroll
from lightning_lopt.rules import STAR
from lightning_lopt.tasks import Start, Task

FIXTURE = Path(__file__).parents[1] / "fixtures" / "pes_star_nqm_f64.npz"
META_NAMES = ("w0", "b0", "w1", "b1", "w2", "b2", "momentum_decays", "rms_decays", "adafactor_decays")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RecordedQuadratic(Task):
    """0.5 (w - xi)' H (w - xi) + 0.1 (b - 1)^2, with the noise xi that was recorded."""

    golden: dict
    xi: list = dataclasses.field(default_factory=list)

    def init(self, generator, population=None):
        start = {"b": torch.tensor(self.golden["b0"]), "w": torch.tensor(self.golden["phi0"])}
        return Start({k: v.repeat(population, *[1] * v.dim()) for k, v in start.items()}, {})

    def batch(self, generator, constants, population=None):
        return {"xi": self.xi.pop(0), "H": torch.tensor(self.golden["H"]).repeat(population, 1, 1)}

    def loss(self, params, batch):
        offset = params["w"] - batch["xi"]
        return 0.5 * offset @ batch["H"] @ offset + 0.1 * (params["b"] - 1) ** 2

    def eval_batch(self, split, constants, population=None, *, size=None, generator=None):
        raise NotImplementedError


@pytest.fixture(scope="module")
def golden():
    with np.load(FIXTURE) as file:
        return {name: file[name] for name in file.files}


def part(golden, prefix):
    return {name: torch.tensor(golden[f"{prefix}/{name}"]) for name in META_NAMES}


def test_replays_the_reference(golden, monkeypatch):
    config = {
        "exp_mult": (0.5, 0.4, 0.3),
        "nominal_stepsize": 0.1,
        "nominal_controller": True,
        "normalize_blackbox": True,
    }
    rule = STAR.from_jax(part(golden, "theta"), **config)
    task = RecordedQuadratic(name="recorded", golden=golden)
    unroll = Unroll(rule, task, objective="raw", tell_horizon=False)
    length, episode, pairs = (int(golden[k]) for k in ("trunc_length", "episode_length", "num_tasks"))
    pes = PES(num_pairs=pairs, truncation=length, std=float(golden["std"]), horizon=Horizon(episode), stagger=False)
    generator = torch.Generator()
    meta_params = {name: p.detach() for name, p in rule.meta_params().items()}
    state = pes.init(unroll, meta_params, generator)
    clock = torch.tensor(golden["inner_step0"]).long().repeat(2)
    state = state._replace(inner=state.inner._replace(clock=clock))

    truncations = sum(name.endswith("/mean_loss") for name in golden)
    assert truncations >= 5
    for i in range(truncations):
        task.xi.extend(torch.tensor(golden[f"trunc{i}/xi"]))
        monkeypatch.setattr(estimators, "draw_perturbations", lambda *_, i=i: part(golden, f"trunc{i}/perturb"))
        estimate = pes.estimate(unroll, meta_params, state, generator)
        state = estimate.state
        close = {"rtol": 0, "atol": 1e-9}
        torch.testing.assert_close(estimate.meta_loss, torch.tensor(golden[f"trunc{i}/mean_loss"]), **close)
        for name in META_NAMES:
            scale = 1e-9 * max(1.0, float(np.abs(golden[f"trunc{i}/grad/{name}"]).max()))
            torch.testing.assert_close(
                estimate.meta_grad[name], torch.tensor(golden[f"trunc{i}/grad/{name}"]), rtol=0, atol=scale
            )
            torch.testing.assert_close(
                state.perturbation[name], torch.tensor(golden[f"trunc{i}/acc_out/{name}"]), **close
            )
        for name in ("b", "w"):
            sides = torch.cat([torch.tensor(golden[f"trunc{i}/{side}_params/{name}"]) for side in "pn"])
            torch.testing.assert_close(state.inner.params[name], sides, **close)
