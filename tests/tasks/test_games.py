"""Tasks with gradients of their own: against plain autograd, the equations of motion, and by learning."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

from lightning_lopt import tasks
from lightning_lopt.tasks.games import Adversarial, Episodes, PolicyGradient, Samples, cart_pole
from lightning_lopt.tasks.networks import MLP
from lightning_lopt.tasks.sources import shuffled


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ring(num: int = 2000) -> torch.Tensor:
    """Points around a ring beside the origin."""
    angle = torch.randint(8, (num,), generator=generator()) * math.pi / 4
    around = torch.stack([angle.cos() + 2.0, angle.sin() + 1.0], 1)
    return around + 0.05 * torch.randn(num, 2, generator=generator(1))


@pytest.fixture
def gan() -> Adversarial:
    x = ring()
    networks = {
        "generator": MLP(inputs=4, hidden=(32, 32), outputs=2),
        "discriminator": MLP(inputs=2, hidden=(32, 32), outputs=1),
    }
    return Adversarial(name="ring", source=shuffled("ring", x, torch.zeros(len(x))), batch_size=64, **networks)


def test_the_players_get_the_gradients_of_their_own_losses(gan):
    params = {name: value.requires_grad_() for name, value in gan.init(generator()).params.items()}
    batch = gan.batch(generator(1), {})

    def part(name):
        return {key.removeprefix(f"{name}."): value for key, value in params.items() if key.startswith(name)}

    fake = gan.generator.apply(part("generator"), batch.z)
    real_logits, fake_logits = (gan.discriminator.apply(part("discriminator"), x) for x in (batch.x, fake))
    real, wrong = torch.ones(64, 1), torch.zeros(64, 1)
    against = F.binary_cross_entropy_with_logits
    losses = {
        "discriminator": against(real_logits, real) + against(fake_logits, wrong),
        "generator": against(fake_logits, real),
    }
    grads, _ = gan.grad_and_value({name: value.detach() for name, value in params.items()}, batch)
    for name, param in params.items():
        (expected,) = torch.autograd.grad(losses[name.split(".")[0]], param, retain_graph=True)
        torch.testing.assert_close(grads[name], expected, rtol=1e-4, atol=1e-7)


def test_the_loss_is_the_energy_distance(gan):
    params = gan.init(generator()).params
    batch = gan.batch(generator(1), {})
    fake = gan.generator.apply({k[10:]: v for k, v in params.items() if k.startswith("generator.")}, batch.z)
    pairs = [torch.cdist(a, b).mean() for a, b in ((batch.x, fake), (batch.x, batch.x), (fake, fake))]
    expected = 2 * pairs[0] - pairs[1] - pairs[2]
    torch.testing.assert_close(gan.loss(params, batch), expected, rtol=1e-4, atol=1e-4)
    assert gan.grad_and_value(params, batch)[1] == gan.loss(params, batch)


def test_a_collapsed_generator_is_further_away_than_the_data_themselves(gan):
    held_out = gan.eval_batch("test", {})
    other = gan.eval_batch("train", {}).x[: len(held_out.x)]
    perfect = MLP(inputs=2, outputs=2)
    copy = Adversarial(name="copy", source=gan.source, generator=perfect, discriminator=gan.discriminator)
    params = {"generator.layers.0.weight": torch.eye(2), "generator.layers.0.bias": torch.zeros(2)}
    good = copy.loss(params, Samples(held_out.x, other))
    collapsed = copy.loss(params, Samples(held_out.x, other[:1].expand_as(other)))
    assert good < 0.01
    assert collapsed > 50 * good


def test_a_gan_moves_its_samples_to_the_data(gan):
    params = gan.init(generator()).params
    optimizer = torch.optim.Adam(list(params.values()), lr=2e-3, betas=(0.5, 0.999))
    random, valid = generator(2), gan.eval_batch("valid", {})
    first = gan.eval_loss(params, valid)
    for _ in range(150):
        grads, _ = gan.grad_and_value(params, gan.batch(random, {}))
        for name, grad in grads.items():
            params[name].grad = grad
        optimizer.step()
    assert gan.eval_loss(params, valid) < 0.3 * first


# --- The cart-pole and its policy gradient ---


def test_the_cart_pole_obeys_its_equations_of_motion():
    state = torch.randn(50, 4, dtype=torch.float64) * 0.3
    right = (torch.rand(50) < 0.5).double()
    following = cart_pole(state, right)
    torch.testing.assert_close(following[:, [0, 2]], state[:, [0, 2]] + 0.02 * state[:, [1, 3]])
    push, twist = ((following - state)[:, [1, 3]] / 0.02).unbind(1)
    angle, turning = state[:, 2], state[:, 3]
    # Lagrange's equations of a cart of 1 kg and a uniform rod of 0.1 kg and half length 0.5 m.
    force = 1.1 * push + 0.05 * (twist * angle.cos() - turning.square() * angle.sin())
    torch.testing.assert_close(force, 20 * right - 10)
    torch.testing.assert_close(4 / 3 * 0.5 * twist + push * angle.cos(), 9.8 * angle.sin())


def test_the_loss_is_the_horizon_over_the_mean_length():
    task = tasks.make("real-policy-gradient", horizon=50, episodes=3, hidden=(8,))
    params, batch = task.init(generator()).params, task.batch(generator(1), {})
    lengths = []
    for episode in range(3):
        state, length = batch.start[episode : episode + 1], 0
        for unit in batch.unit[:, episode]:
            length += 1
            policy = {name[7:]: value for name, value in params.items() if name.startswith("policy.")}
            chance = torch.sigmoid(task.networks["policy"].apply(policy, state)[0, 0])
            state = cart_pole(state, (unit < chance).float().reshape(1))
            if abs(state[0, 0]) >= 2.4 or abs(state[0, 2]) >= math.radians(12):
                break
        lengths.append(length)
    assert task.loss(params, batch) == pytest.approx(50 / (sum(lengths) / 3), rel=1e-5)
    assert task.grad_and_value(params, batch)[1] == pytest.approx(float(task.loss(params, batch)))
    assert task.metrics(params, batch)["standing"] == pytest.approx(sum(lengths) / 150, rel=1e-5)


def test_the_policy_gradient_is_that_of_its_formula():
    task = PolicyGradient(name="short", horizon=30, episodes=5, hidden=(8,))
    params = {name: value.double().requires_grad_() for name, value in task.init(generator()).params.items()}
    batch = Episodes(*(leaf.double() for leaf in task.batch(generator(1), {})))
    fixed = {name: value.detach() for name, value in params.items()}
    played = task.rollout(fixed, batch)
    nets = {part: {k[len(part) + 1 :]: v for k, v in params.items() if k.startswith(part)} for part in task.networks}
    returns = torch.zeros_like(played.alive)
    after = torch.zeros(5, dtype=torch.float64)
    for t in reversed(range(30)):
        after = played.alive[t] + 0.99 * after
        returns[t] = after / 50
    alive = played.alive.bool()
    states, right, wanted = played.states[alive], played.right[alive], returns[alive]
    logits = task.networks["policy"].apply(nets["policy"], states).squeeze(1)
    values = task.networks["value"].apply(nets["value"], states).squeeze(1)
    advantages = (wanted - values).detach()
    advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-6)
    policy = torch.distributions.Bernoulli(logits=logits)
    surrogate = -(advantages * policy.log_prob(right)) - 0.01 * policy.entropy() + 0.5 * (values - wanted).square()
    expected = torch.autograd.grad(surrogate.mean(), list(params.values()))
    grads, _ = task.grad_and_value(fixed, batch)
    for name, value in zip(params, expected, strict=True):
        torch.testing.assert_close(grads[name], value, rtol=1e-8, atol=1e-12)


def test_a_policy_learns_to_keep_the_pole_up():
    task = PolicyGradient(name="short", horizon=100, episodes=8, hidden=(16,))
    params = task.init(generator()).params
    optimizer = torch.optim.Adam(list(params.values()), lr=2e-2)
    random, valid = generator(2), task.eval_batch("valid", {}, size=16)
    first = task.eval_loss(params, valid)
    for _ in range(30):
        grads, _ = task.grad_and_value(params, task.batch(random, {}))
        for name, grad in grads.items():
            params[name].grad = grad
        optimizer.step()
    assert task.eval_loss(params, valid) < 0.6 * first


def test_evaluation_batches_differ_between_splits_and_not_between_calls():
    task = PolicyGradient(name="short", horizon=10)
    valid, test = (task.eval_batch(split, {}) for split in ("valid", "test"))
    assert torch.equal(valid.unit, task.eval_batch("valid", {}).unit)
    assert not torch.equal(valid.unit, test.unit)
    assert vmap(task.loss)(task.init(generator(), 2).params, task.eval_batch("test", {}, 2)).shape == (2,)
