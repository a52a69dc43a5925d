"""The fused steps of normalized histories and Multiscale Adam against the rules themselves."""

import copy
import shutil

import pytest
import torch
from torch import nn

from lightning_lopt import RuleOptimizer, kernels
from lightning_lopt.rules import make

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler to build the kernel with"
)
RULES = {
    "mng": ("mng", {}),
    "signs": ("mng", {"k": 3, "sign_only": True, "eta_min_schedule": "cosine"}),
    "k_timesteps": ("k_timesteps", {"hidden_size": 7}),
    "k_momentums": ("k_momentums", {}),
    "tanh": ("k_momentums", {"step": "tanh", "hidden_size": 10, "reference": "mid-range"}),
    "la_b": ("multiscale_adam", {"mixer": "la_b"}),
    "rnn2": ("multiscale_adam", {"mixer": "rnn2"}),
    "one Adam": ("multiscale_adam", {"mixer": "mlp", "betas": ((0.9, 0.99),)}),
}
SHAPES = ((), (1,), (17,), (5, 33), (4, 3, 3, 3))


def rule_of(name: str, std: float = 0.5):
    kind, options = RULES[name]
    rule, generator = make(kind, **options), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in rule.parameters():
            value.copy_(std * torch.randn(value.shape, generator=generator))
    return rule


def optimizers(name: str, **options):
    """The same parameters with the kernel and with the rule."""
    made = []
    for backend in ("fused", "reference"):
        generator = torch.Generator().manual_seed(1)
        params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
        made.append((RuleOptimizer(params, rule_of(name), num_steps=50, backend=backend, **options), params))
    return made


def set_gradients(params, step: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = size * torch.randn(param.shape, generator=generator)
        if step % 7 == 3:
            param.grad.zero_()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("options", [{}, {"safeguard": True, "weight_decay": 0.01, "lr": 0.5, "maximize": True}])
def test_the_kernel_is_the_rule(name, options):
    """50 steps with zeros and ties; a rule is not chaotic here, so that rounding does not grow."""
    (fast, ours), (plain, theirs) = optimizers(name, **options)
    assert fast.backend == "fused"
    for step in range(50):
        set_gradients(ours, step), set_gradients(theirs, step)
        fast.step(), plain.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5, msg=lambda text, step=step: f"step {step}: {text}")
    for a, b in zip(ours, theirs, strict=True):
        assert fast.state[a].keys() == plain.state[b].keys()
        for key, value in plain.state[b].items():
            torch.testing.assert_close(fast.state[a][key], value, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", ["k_momentums", "la_b", "k_timesteps"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_the_safeguard_leaves_all_as_it_was(name, bad):
    ((fast, params), _) = optimizers(name, safeguard=True)
    for step in range(3):
        set_gradients(params, step)
        fast.step()
    before = copy.deepcopy([(p.detach(), fast.state[p]) for p in params])
    set_gradients(params, 4)
    params[3].grad[2, 5] = bad
    fast.step()
    for index, (param, (value, state)) in enumerate(zip(params, before, strict=True)):
        skipped = index == 3
        assert fast.state[param]["skipped"] == int(skipped)
        assert torch.equal(param, value) == skipped
        kept = {key: torch.equal(fast.state[param][key], state[key]) for key in state if not key.startswith("skipped")}
        assert all(kept.values()) == skipped
    set_gradients(params, 5)
    fast.step()
    assert fast.state[params[3]]["skipped_in_row"] == 0


def test_threads_do_not_change_the_result():
    values = []
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        param = nn.Parameter(torch.linspace(-1, 1, 2**18 + 5))
        optimizer = RuleOptimizer([param], rule_of("la_b"), backend="fused")
        for step in range(3):
            set_gradients([param], step)
            optimizer.step()
        values.append(param.detach().clone())
    torch.set_num_threads(threads)
    assert torch.equal(*values)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("multiscale_adam", {"mixer": "gru"}, "recurrent"),
        ("k_momentums", {"normalization": "adam"}, "Adam-like"),
        ("k_timesteps", {"parameter_inputs": True}, "parameter inputs"),
    ],
)
def test_what_the_kernel_does_not_have(kind, options, reason):
    assert reason in kernels.find(make(kind, **options), "cpu")
    param = nn.Parameter(torch.ones(3, dtype=torch.float64))
    assert "float32" in kernels.find(make("mng"), "cpu").refuses(param)
