"""The small networks: torch's own modules as the truth, in chunks as in one piece."""

import pytest
import torch
from torch import nn

from lightning_lopt.rules import StepContext, make, networks


def test_mlp_equals_torchs_layers():
    sizes = [5, 7, 6, 3]
    layers = networks.init_mlp(sizes, std=0.5)
    modules = []
    for layer, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.normal_(layers[f"b{layer}"])
        linear.weight, linear.bias = nn.Parameter(layers[f"w{layer}"].mT), layers[f"b{layer}"]
        modules += [linear, nn.ReLU()]
    channels = torch.randn(5, 11)
    torch.testing.assert_close(networks.mlp(layers, channels), nn.Sequential(*modules[:-1])(channels.mT).mT)


def test_gru_equals_torchs_cell():
    cell, weights = nn.GRUCell(4, 3), networks.init_gru(4, 3)
    cell.weight_ih, cell.bias_ih = nn.Parameter(weights["w_input"].mT), weights["b_input"]
    cell.weight_hh, cell.bias_hh = nn.Parameter(weights["w_hidden"].mT), weights["b_hidden"]
    hidden = expected = torch.zeros(3, 6)
    for _ in range(5):
        channels = torch.randn(4, 6)
        hidden, expected = networks.gru(weights, channels, hidden), cell(channels.mT, expected.mT).mT
        torch.testing.assert_close(hidden, expected)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (8,), (5, 3), (2, 3, 3, 3)])
def test_chunks_make_no_difference(shape, monkeypatch):
    layers = networks.init_mlp([4, 6, 2], std=1.0)
    first, second = torch.randn(3, *shape), torch.randn(1, *shape)

    def network(x, y):
        assert x.shape[1] == y.shape[1] <= networks.CHUNK
        return networks.mlp(layers, torch.cat([x, y]))

    whole = networks.coordinatewise(network, first, second)
    assert whole.shape == (2, *shape)
    monkeypatch.setattr(networks, "CHUNK", 4)
    torch.testing.assert_close(networks.coordinatewise(network, first, second), whole)


@pytest.mark.parametrize("kind", ["k_timesteps", "k_momentums", "multiscale_adam"])
def test_a_tensor_of_many_chunks_moves_as_its_parts(kind):
    rule, size = make(kind), 2 * networks.CHUNK + 5
    meta_params = {name: value.detach() for name, value in rule.meta_params().items()}
    param, context = torch.randn(size), StepContext(torch.tensor(0.0))

    def moved(part):
        return rule.update(meta_params, param[part] + 1, rule.init_state(param[part]), param[part], context)[0]

    whole = moved(slice(None))
    parts = [moved(slice(begin, begin + 1000)) for begin in range(0, size, 1000)]
    torch.testing.assert_close(whole, torch.cat(parts))
