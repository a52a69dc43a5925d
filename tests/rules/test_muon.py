"""Muon: torch.optim.Muon for hidden matrices, and torch.optim.AdamW for all other tensors."""

import pytest
import torch
from torch import Tensor, nn

from lightning_lopt import RuleOptimizer
from lightning_lopt.rules import StepContext, make

STEPS = 25
SHAPES = [(8, 8), (24, 8), (8, 24), (5, 3), (7, 13)]
needs_torchs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon before 2.9")


def gradients(shape, dtype=torch.float64, steps=STEPS, seed=0) -> list[Tensor]:
    """A mean gradient and noise, with singular values over two decades."""
    generator = torch.Generator().manual_seed(seed)
    mean, scales = torch.randn(shape, generator=generator), torch.logspace(0, -2, shape[-1] if shape else 1)
    return [((mean + torch.randn(shape, generator=generator)) * scales).reshape(shape).to(dtype) for _ in range(steps)]


def run(rule, param: Tensor, grads, role="hidden") -> Tensor:
    """The parameter after the gradients."""
    state = rule.init_state(param)
    for step, grad in enumerate(grads):
        context = StepContext(torch.tensor(float(step), dtype=param.dtype), role=role)
        delta, state = rule.update({}, grad, state, param, context)
        param = param + delta
    return param


def run_torchs(make_optimizer, param: Tensor, grads) -> Tensor:
    param = nn.Parameter(param.clone())
    optimizer = make_optimizer([param])
    for grad in grads:
        param.grad = grad
        optimizer.step()
    return param.detach()


# --- torch's Muon, which iterates in bfloat16 whatever the dtype of the parameters


@pytest.fixture
def in_full_precision(monkeypatch):
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)


@needs_torchs_muon
@pytest.mark.usefixtures("in_full_precision")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_equals_torchs_muon(shape, nesterov, adjust, dtype, tolerance):
    grads, start = gradients(shape, dtype), torch.zeros(shape, dtype=dtype)
    config = {"momentum": 0.9, "nesterov": nesterov, "adjust_lr_fn": adjust}
    found = run(make("muon", lr=0.1, **config), start, grads)
    expected = run_torchs(lambda p: torch.optim.Muon(p, lr=0.1, weight_decay=0.0, **config), start, grads)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@needs_torchs_muon
@pytest.mark.usefixtures("in_full_precision")
@pytest.mark.parametrize("role", ["hidden", "output"])
def test_decay_is_torchs(role):
    grads, start = gradients((6, 4)), torch.ones(6, 4, dtype=torch.float64)
    found = run(make("muon", lr=0.1, adam_lr=0.1, adam_eps=1e-8, weight_decay=0.3), start, grads, role)

    def theirs(params):
        if role == "hidden":
            return torch.optim.Muon(params, lr=0.1, weight_decay=0.3)
        return torch.optim.AdamW(params, lr=0.1, betas=(0.9, 0.95), weight_decay=0.3)

    torch.testing.assert_close(found, run_torchs(theirs, start, grads), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["muon", "soap", "star", "celo2", "velo"])
def test_without_decay_the_configuration_has_none(kind):
    small = {"lstm_hidden_size": 4, "param_inits": 2} if kind == "velo" else {}
    rule = make(kind, weight_decay=0.3, **small)
    assert rule.without_decay().config == type(rule.config).from_dict({**rule.config.to_dict(), "weight_decay": 0.0})
    assert rule.config.weight_decay == 0.3


@needs_torchs_muon
@pytest.mark.usefixtures("in_full_precision")
def test_iterations_and_coefficients_reach_the_step():
    grads, start, coefficients = gradients((6, 6)), torch.zeros(6, 6, dtype=torch.float64), (2.0, -1.5, 0.5)
    found = run(make("muon", lr=0.1, iterations=3, coefficients=coefficients), start, grads)
    expected = run_torchs(
        lambda p: torch.optim.Muon(p, lr=0.1, weight_decay=0.0, ns_steps=3, ns_coefficients=coefficients), start, grads
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@needs_torchs_muon
@pytest.mark.parametrize("shape", SHAPES)
def test_in_bfloat16_it_is_as_near_to_torchs_as_bfloat16_allows(shape):
    grads, start = gradients(shape, torch.float32), torch.zeros(shape)
    expected = run_torchs(lambda p: torch.optim.Muon(p, lr=0.1, weight_decay=0.0), start, grads)
    distance = [(run(make("muon", lr=0.1, bfloat16=b), start, grads) - expected).norm() for b in (True, False)]
    assert max(distance) < 0.02 * expected.norm()


def test_the_scale_of_gradients_makes_no_difference():
    rule, start, grads = make("muon"), torch.zeros(5, 3), gradients((5, 3), torch.float32)
    expected = run(rule, start, grads)
    for scale in (1e-25, 1e-10, 1e10, 1e30):
        torch.testing.assert_close(run(rule, start, [scale * grad for grad in grads]), expected, rtol=1e-4, atol=1e-6)
    assert not run(rule, start, [torch.zeros(5, 3)]).any()


# --- which tensors


@pytest.mark.parametrize(
    ("shape", "role"),
    [
        ((6, 4), "embedding"),
        ((6, 4), "output"),
        ((6, 4), "other"),
        ((6, 4), None),
        ((6,), "hidden"),
        ((), None),
        ((6, 1), "hidden"),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_all_else_takes_adamws_step(shape, role, dtype, tolerance):
    grads, start = gradients(shape, dtype), torch.ones(shape, dtype=dtype)
    found = run(make("muon", adam_lr=0.01, adam_betas=(0.8, 0.99), adam_eps=1e-8), start, grads, role)
    expected = run_torchs(lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.99), weight_decay=0.0), start, grads)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_a_convolution_is_one_matrix():
    grads, start = gradients((6, 12)), torch.zeros(6, 3, 2, 2, dtype=torch.float64)
    found = run(make("muon"), start, [grad.reshape(start.shape) for grad in grads])
    torch.testing.assert_close(found.reshape(6, 12), run(make("muon"), start.reshape(6, 12), grads))


def test_experts_are_made_orthogonal_one_by_one():
    start, members = torch.zeros(3, 8, 4, dtype=torch.float64), [gradients((8, 4), seed=seed) for seed in range(3)]
    found = run(make("muon"), start, [torch.stack(grads) for grads in zip(*members, strict=True)], "experts")
    torch.testing.assert_close(found, torch.stack([run(make("muon"), start[0], grads) for grads in members]))


@needs_torchs_muon
@pytest.mark.usefixtures("in_full_precision")
def test_one_optimizer_is_torchs_muon_and_adamw_with_their_decay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 12), nn.Linear(12, 9))
    model.double()
    twin = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 12), nn.Linear(12, 9))
    twin.double().load_state_dict(model.state_dict())
    rule = make("muon", lr=0.01, adjust_lr_fn="match_rms_adamw", adam_lr=0.01, adam_eps=1e-8)
    optimizer = RuleOptimizer(model.named_parameters(), rule, weight_decay=0.01 * 0.1)
    optimizer.set_roles(model)
    hidden = [twin[1].weight, twin[3].weight]
    others = [param for param in twin.parameters() if not any(param is matrix for matrix in hidden)]
    theirs = [
        torch.optim.Muon(hidden, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1),
    ]
    for _ in range(STEPS):
        batch = torch.randint(9, (32,))
        for net, optimizers in ((model, [optimizer]), (twin, theirs)):
            net.zero_grad()
            nn.functional.cross_entropy(net(batch), batch).backward()
            for each in optimizers:
                each.step()
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"lr": -1.0}, "lr"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"momentum": 1.0}, "momentum"),
        ({"iterations": 0}, "iterations"),
        ({"coefficients": (1.0, 2.0)}, "coefficients"),
        ({"adjust_lr_fn": None}, "adjust_lr_fn"),
        ({"adam_betas": (0.9, 1.0)}, "adam_betas"),
        ({"adam_eps": 0.0}, "adam_eps"),
        ({"bfloat16": 1}, "bfloat16"),
    ],
)
def test_configurations_that_are_refused(config, name):
    with pytest.raises(ValueError, match=name):
        make("muon", **config)
