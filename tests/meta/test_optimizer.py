"""The meta-optimizer against the authors' (optax.adamw), with both kinds of clipping, on recorded gradients."""

import numpy as np
import pytest
import torch
from goldens import FIXTURES
from torch import nn

from lightning_lopt.meta.arguments import adamw, check_patterns, cosine, make_labels, matches
from lightning_lopt.tasks import make

RECORDED = np.load(FIXTURES / "meta_adamw_f64.npz")
# torch divides by the norm + 1e-6, optax by the norm; Adam undoes most of that.
CLIPS = {
    "none": (lambda params: None, 1e-12),
    "elementwise": (lambda params: nn.utils.clip_grad_value_(params, 1.0), 1e-12),
    "global_norm": (lambda params: nn.utils.clip_grad_norm_(params, 1.0), 1e-7),
}


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1, 0.5])
def test_adamw_is_the_references(clip, weight_decay):
    params = {name: nn.Parameter(torch.tensor(RECORDED[f"p0/{name}"])) for name in "ab"}
    optimizer = adamw(params, float(RECORDED["lr"]), weight_decay, {})
    apply, tolerance = CLIPS[clip]
    for step in range(12):
        for name, param in params.items():
            param.grad = torch.tensor(RECORDED[f"grads/{name}"][step])
        apply(list(params.values()))
        optimizer.step()
        for name, param in params.items():
            expected = torch.tensor(RECORDED[f"wd{weight_decay}/{clip}/{name}"][step])
            torch.testing.assert_close(param.detach(), expected, rtol=tolerance, atol=tolerance)


def test_the_first_pattern_that_matches_sets_the_rate():
    params = {name: nn.Parameter(torch.zeros(1)) for name in ("w0", "w1", "rms_decays")}
    optimizer = adamw(params, 0.5, 0.0, {"w1": 3.0, "w*": 2.0, "*": 0.5})
    assert [(g["lr"], len(g["params"])) for g in optimizer.param_groups] == [(1.0, 1), (1.5, 1), (0.25, 1)]


def test_cosine():
    optimizer = adamw({"a": nn.Parameter(torch.zeros(1))}, 2.0, 0.0, {})
    scheduler, rates = cosine(optimizer, 4), []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5, 0.0, 0.0])


def test_patterns():
    assert matches("momentum_decays", ["w*", "*_decays"])
    assert not matches("W0", ["w*"])
    assert not matches("w0", [])
    check_patterns("trainable", ["w?", "b0"], ["w0", "b0"])
    with pytest.raises(ValueError, match=r"trainable: 'c' matches no meta-parameter. The rule has \['w0', 'b0'\]"):
        check_patterns("trainable", ["w?", "c"], ["w0", "b0"])


def test_labels():
    assert make_labels([make(name) for name in ("quadratic", "rosenbrock", "quadratic", "quadratic")]) == [
        "quadratic",
        "rosenbrock",
        "quadratic-2",
        "quadratic-3",
    ]
